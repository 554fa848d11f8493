"""Reads CLIP's state dict from the files it is published in, without torch and without running what they hold.

A torch file is a zip around a pickle, and a pickle is a program. It is interpreted here, opcode by opcode, by code
that knows how to build tensors, dicts and inert objects and nothing else: there is no call it could be talked into.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from edge.errors import ModelError

Array: TypeAlias = npt.NDArray[np.generic]
State: TypeAlias = dict[str, Array]

_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a bare pickle behind a magic number
_PICKLE_LIMIT = 4 << 20  # bytes; a ViT's is about 0.1 MB; 4 million opcodes take 4 s
_MODULE_LIMIT = 50_000  # values met while flattening modules: a small pickle may name one child many times over
_NAME_LIMIT = 500  # characters in a tensor's dotted name; a module that holds itself would make one without end
_STORAGES: dict[str, np.dtype[np.generic]] = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_CALLS = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",  # dict(model.named_parameters())
    "torch.jit._pickle.build_intlist",  # a scripted Conv2d's padding
    "collections.OrderedDict",
}


def read_checkpoint(path: Path) -> State:
    """Reads a state dict: dotted names to arrays, in the dtypes of the file (weights float16 or float32).

    The format is told by content, never by name: safetensors, a TorchScript archive (as ViT-B-32.pt; its modules
    flattened to dotted names) or a zip file of torch.save (a dict of tensors, or one under 'state_dict'). Values that
    are no tensors are left out. Arrays may be read-only views of one buffer. Raises ModelError, and nothing else, for
    a file that is missing, damaged, of another format, or asks for more than tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(32)
            size = file.seek(0, 2)
        if head[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                return _state_from_archive(_Archive(archive, size))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
            return _state_from_safetensors(path)
    except ModelError as e:  # raised below, where the file's name is not known
        raise ModelError(f"{path}: {e.what}", expected=e.expected, got=e.got, remedy=e.remedy) from e
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OverflowError, struct.error) as error:
        # zipfile's own error, and what its parsing of foreign bytes lets escape
        raise ModelError(f"{path}: the archive is damaged: {error}") from error
    legacy = head.startswith(_LEGACY)
    raise ModelError(
        f"{path}: not a checkpoint that can be read",
        expected="safetensors, a TorchScript archive or a zip file of torch.save",
        got="a pickle of torch < 1.6" if legacy else f"{size} bytes beginning {head!r}" if head else "an empty file",
        remedy="load it with torch and torch.save it again" if legacy else None,
    )


def _state_from_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        state = cast(State, load_file(path))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:  # the last four: no numpy dtype
        raise ModelError(f"the safetensors file is damaged or of an unknown dtype: {error!r}") from error
    for name, value in state.items():
        if value.dtype.isbuiltin != 1:  # bfloat16 and the like, which numpy knows once onnx has been imported
            raise ModelError(f"tensor {name!r} is of an unknown dtype", expected="one of numpy's", got=value.dtype)
    return state


# --- torch's zip files ------------------------------------------------------------------------------------------------


class _Archive:
    """One torch zip file: `<root>/data.pkl` and the storages `<root>/data/<key>`, each stored uncompressed."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._room = archive, size
        self._storages: dict[str, bytes] = {}
        roots = [name[: -len("data.pkl")] for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise ModelError("not a torch archive", expected="one <root>/data.pkl", got=f"{len(roots)} of them")
        self._root = roots[0]
        order = self._root + "byteorder"  # written by torch >= 2.1
        if order in archive.namelist() and (got := self._read(order)) != b"little":
            raise ModelError("the archive's byte order", expected="little", got=got[:16])

    def _read(self, name: str) -> bytes:
        """One entry's bytes, CRC checked. All that is read may not exceed the file's size: no bomb fits into that."""
        try:
            entry = self._archive.getinfo(name)
        except KeyError:
            raise ModelError(f"the archive has no entry {name[:100]!r}") from None
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ModelError(f"entry {name!r} is compressed", expected="stored bytes, as torch writes them")
        self._room -= entry.file_size
        if self._room < 0:
            raise ModelError(f"entry {name!r} claims more bytes than the file has", got=entry.file_size)
        return self._archive.read(entry)

    def pickle(self) -> bytes:
        size = self._archive.getinfo(self._root + "data.pkl").file_size
        if size > _PICKLE_LIMIT:
            raise ModelError("data.pkl is too large", expected=f"at most {_PICKLE_LIMIT} bytes", got=size)
        return self._read(self._root + "data.pkl")

    def storage(self, dtype: np.dtype[np.generic], key: str, count: int) -> _Storage:
        if key not in self._storages:
            self._storages[key] = self._read(f"{self._root}data/{key}")
        data = self._storages[key]
        if len(data) != count * dtype.itemsize:
            raise ModelError(f"storage {key[:100]!r}", expected=f"{count * dtype.itemsize} bytes", got=len(data))
        return _Storage(np.frombuffer(data, dtype))


def _state_from_archive(archive: _Archive) -> State:
    try:
        root = _unpickled(archive.pickle(), archive.storage)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # genops' refusals, an empty stack
        raise ModelError(f"data.pkl is damaged: {error!r}") from error
    if isinstance(root, _Module):
        state = _flattened(root)
    else:
        nested = root.get("state_dict", root) if isinstance(root, dict) else None
        state = {k: v for k, v in nested.items() if _is_tensor(k, v)} if isinstance(nested, dict) else {}
    if not state:
        found = [str(key)[:100] for key in root][:5] if isinstance(root, dict) else type(root).__name__
        raise ModelError("holds no tensors", expected="tensors by name, or such a dict under 'state_dict'", got=found)
    return state


def _is_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray)


def _flattened(root: _Module) -> State:
    """The tensors of a tree of modules, named as torch's state_dict names them: 'visual.conv1.weight'."""
    state: State = {}
    waiting = [("", root)]
    met = 0
    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            met += 1
            full = f"{prefix}{name}"
            if met > _MODULE_LIMIT or len(full) > _NAME_LIMIT:
                limits = f"at most {_MODULE_LIMIT} values with names of {_NAME_LIMIT} characters"
                raise ModelError("the module tree is too large", expected=limits)
            if isinstance(value, _Module):
                waiting.append((f"{full}.", value))
            elif isinstance(value, np.ndarray):
                state[full] = value
    return state


# --- the pickle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name the pickle asked for and may have; it stays a name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A whole storage, contiguous. A type of its own: a tensor given as a storage would defeat the bounds check."""

    values: Array  # (count,)


@dataclass
class _Module:
    """An object of a class __torch__.*: attributes, no behaviour."""

    attributes: dict[object, object] = field(default_factory=dict)


_Opener: TypeAlias = Callable[[np.dtype[np.generic], str, int], _Storage]


def _unpickled(data: bytes, storage: _Opener) -> object:
    """Interprets the opcodes torch writes (protocols 2 to 5); `pickletools.genops` cuts them, and executes nothing.

    Raises ModelError for a global or opcode outside the allowed ones, ValueError, IndexError, KeyError or TypeError
    for a program that makes no sense.
    """
    stack: list[object] = []
    marks: list[list[object]] = []  # the stacks that lie below each open MARK
    memo: dict[int, object] = {}  # a dict: an index in the billions costs one entry, not a table

    def items_since_mark() -> list[object]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    def popped(count: int) -> list[object]:
        if count > len(stack):
            raise IndexError("the stack is empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    argument: Any  # of the type its opcode says
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "TUPLE":
            items = items_since_mark()
            stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(popped(int(name[-1]))))
        elif name in ("SETITEM", "SETITEMS"):
            pairs = popped(2) if name == "SETITEM" else items_since_mark()
            _fill(stack[-1], pairs)
        elif name in ("APPEND", "APPENDS"):
            items = popped(1) if name == "APPEND" else items_since_mark()
            if not isinstance(stack[-1], list):
                raise TypeError("APPEND to what is no list")
            stack[-1].extend(items)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "INST"):
            stack.append(_allowed(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = popped(2)
            stack.append(_allowed(f"{module}.{attribute}" if isinstance(module, str) else repr(type(module))))
        elif name == "NEWOBJ":
            cls, _arguments = popped(2)
            if not (isinstance(cls, _Global) and cls.name.startswith("__torch__.")):
                raise TypeError("NEWOBJ of what is no module class")
            stack.append(_Module())
        elif name == "BUILD":
            target, attributes = stack[-2], popped(1)[0]
            if isinstance(target, _Module) and isinstance(attributes, dict):
                target.attributes = attributes  # an OrderedDict is built too: its _metadata is no tensor
        elif name == "BINPERSID":
            stack.append(_storage(popped(1)[0], storage))
        elif name == "REDUCE":
            function, arguments = popped(2)
            if not isinstance(function, _Global) or not isinstance(arguments, tuple):
                raise TypeError("REDUCE of what is no function")
            stack.append(_result(function.name, arguments))
        elif name == "STOP":
            break
        else:
            raise ModelError(f"data.pkl uses the opcode {name}", expected="what torch writes for tensors and modules")
    return stack[-1]


_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _allowed(name: str) -> _Global:
    if name in _CALLS or name in _STORAGES or name.startswith("__torch__."):
        return _Global(name)
    asked = f"data.pkl asks for {name[:100]!r}"
    raise ModelError(asked, expected="tensors and modules only", remedy="do not trust this file")


def _fill(target: object, pairs: list[object]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise TypeError("SETITEMS on what is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, (str, int)):  # nested tuples can take hours to hash
            raise TypeError(f"a dict key of {type(key)}")
        target[key] = value


def _storage(identity: object, storage: _Opener) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(count)) if name in _STORAGES:
            return storage(_STORAGES[name], key, count)
    raise ModelError("data.pkl names no storage", expected="('storage', type, key, device, length)")


def _result(function: str, arguments: tuple[object, ...]) -> object:
    match function, arguments:
        case "torch._utils._rebuild_tensor_v2", (_Storage(storage), int(offset), tuple(shape), tuple(strides), *_):
            return _view(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (np.ndarray() as tensor, *_):
            return tensor
        case "torch.jit._pickle.build_intlist", (list(items),):
            return items
        case "collections.OrderedDict", ():
            return {}
    raise TypeError(f"{function} with other arguments than torch gives it")


def _view(storage: Array, offset: int, shape: tuple[object, ...], strides: tuple[object, ...]) -> Array:
    """A tensor over its storage (offset and strides in elements), refused unless every element lies inside."""
    numbers = [n for n in (offset, *shape, *strides) if isinstance(n, int) and n >= 0]
    if len(numbers) != 1 + 2 * len(shape) or len(shape) != len(strides) or len(shape) > 8:
        raise ModelError("data.pkl has a malformed tensor")
    sizes, steps = numbers[1 : 1 + len(shape)], numbers[1 + len(shape) :]
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # More elements than the storage has: one number spread over a huge shape, which a copy would make real.
    if 0 in sizes or last >= len(storage) or math.prod(sizes) > len(storage):
        facts = f"offset {offset}, shape {shape}, strides {strides}"[:200]
        raise ModelError("data.pkl has a tensor outside its storage", expected=f"{len(storage)} values", got=facts)
    steps = [step * storage.itemsize if size > 1 else 0 for size, step in zip(sizes, steps, strict=True)]
    return np.lib.stride_tricks.as_strided(storage[offset:], sizes, steps, writeable=False)


# --- names ------------------------------------------------------------------------------------------------------------

_HUGGING_FACE = (  # OpenAI's words and theirs, replaced in this order
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".attn.", ".self_attn."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".c_fc.", ".fc1."),
    (".c_proj.", ".fc2."),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # their spelling
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("ln_final.", "text_model.final_layer_norm."),
)
_HUGGING_FACE_WHOLE = {  # names whose words occur in others
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
_TRANSPOSED = ("visual.proj", "text_projection")  # a Linear's (out, in) there, a plain (in, out) matrix here


def openai_state(state: Mapping[str, Array]) -> State:
    """The weights of a CLIP with ViT image tower under OpenAI's names, from OpenAI's or Hugging Face's (detected).

    The result holds exactly what the architecture needs, with the shapes that follow from the embeddings' own: patch
    embedding (width, 3, patch, patch), positions (grid^2 + 1, width), text_projection (text width, embedding). Entries
    that are no weights (position_ids, attn_mask, input_resolution …) are left out; dtypes stay. Names and shapes say
    nothing about the activation: that it is QuickGELU is the caller's knowledge. Raises ModelError with the file's own
    key for what is missing, of another shape, no float, or not finite.
    """
    theirs = any(key.startswith(("vision_model.", "text_model.")) for key in state)
    if not theirs and not any(key.startswith("visual.") for key in state):
        raise ModelError("no CLIP state dict", expected="keys visual.* or vision_model.*", got=sorted(state)[:5])

    def read_shape(key: str, pattern: str) -> tuple[int, ...]:
        source = _their_names(key)[0] if theirs else key
        got = _present(state, source).shape
        if len(got) != len(pattern.split(", ")) or 0 in got:
            raise ModelError(f"key {source!r} has another shape", expected=f"({pattern})", got=got)
        return got[::-1] if theirs and key in _TRANSPOSED else got

    width, _, patch, _ = read_shape("visual.conv1.weight", "width, 3, patch, patch")
    positions, _ = read_shape("visual.positional_embedding", "grid^2 + 1, width")
    vocab, text_width = read_shape("token_embedding.weight", "vocabulary, width")
    context, _ = read_shape("positional_embedding", "context, width")
    _, dim = read_shape("text_projection", "embedding, width" if theirs else "width, embedding")
    if math.isqrt(positions - 1) ** 2 != positions - 1 or positions < 2:
        raise ModelError("image positions", expected="a square number and one", got=positions)
    if width % 64 or text_width % 64:
        raise ModelError("widths", expected="multiples of 64, the size of a head", got=(width, text_width))

    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (positions, width),
        "visual.proj": (width, dim),
        "token_embedding.weight": (vocab, text_width),
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, dim),
        "logit_scale": (),
    }
    for norm, size in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text_width)):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    for prefix, size in (("visual.transformer.resblocks.", width), ("transformer.resblocks.", text_width)):
        for block in range(_blocks(state, _their_names(prefix)[0] if theirs else prefix)):
            shapes |= {f"{prefix}{block}.{name}": shape for name, shape in _block_shapes(size).items()}
    return {key: _weight(state, key, shape, theirs) for key, shape in shapes.items()}


def _block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, outputs, inputs in (
        ("attn.out_proj.", width, width),
        ("mlp.c_fc.", 4 * width, width),
        ("mlp.c_proj.", width, 4 * width),
        ("attn.in_proj_", 3 * width, width),
    ):
        shapes |= {f"{name}weight": (outputs, inputs), f"{name}bias": (outputs,)}
    for name in ("ln_1", "ln_2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def _blocks(state: Mapping[str, Array], prefix: str) -> int:
    """How many blocks there are, at least one; a gap in the numbers shows as a missing key later."""
    return max(1, len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}))


def _their_names(key: str) -> list[str]:
    """Hugging Face's name of an OpenAI key; three of them for the packed q, k and v."""
    name = _HUGGING_FACE_WHOLE.get(key, key)
    if name == key:
        for ours, theirs in _HUGGING_FACE:
            name = name.replace(ours, theirs)
    return [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"] if "in_proj_" in name else [name]


def _weight(state: Mapping[str, Array], key: str, shape: tuple[int, ...], theirs: bool) -> Array:
    sources = _their_names(key) if theirs else [key]
    turned = theirs and key in _TRANSPOSED
    expected = shape[::-1] if turned else shape if len(sources) == 1 else (shape[0] // 3, *shape[1:])
    parts = [_present(state, source) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        if part.shape != expected:
            raise ModelError(f"key {source!r} has another shape", expected=expected, got=part.shape)
        if part.dtype.kind != "f":
            raise ModelError(f"key {source!r}", expected="floats", got=part.dtype)
        if not np.isfinite(part).all():
            raise ModelError(f"key {source!r}", expected="finite numbers", got="infinite ones or NaN")
    weight = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return weight.T if turned else weight


def _present(state: Mapping[str, Array], key: str) -> Array:
    if key not in state:
        raise ModelError(f"key {key!r} is missing from the state dict")
    return state[key]
