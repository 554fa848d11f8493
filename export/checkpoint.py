"""Reads CLIP's state dict from the files it is published in, without torch and without running what they hold."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from edge.errors import ModelError
from export.pickles import Array, Module, Storage, unpickled

State: TypeAlias = dict[str, Array]

_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a bare pickle behind a magic number
_PICKLE_LIMIT = 4 << 20  # bytes; a ViT's is about 0.1 MB; 4 million opcodes take 4 s
_MODULE_LIMIT = 50_000  # values met while flattening modules: a small pickle may name one child many times over
_NAME_LIMIT = 500  # characters in a tensor's dotted name; a module that holds itself would make one without end


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

    def storage(self, dtype: np.dtype[np.generic], key: str, count: int) -> Storage:
        if key not in self._storages:
            self._storages[key] = self._read(f"{self._root}data/{key}")
        data = self._storages[key]
        if len(data) != count * dtype.itemsize:
            raise ModelError(f"storage {key[:100]!r}", expected=f"{count * dtype.itemsize} bytes", got=len(data))
        return Storage(np.frombuffer(data, dtype))


def _state_from_archive(archive: _Archive) -> State:
    try:
        root = unpickled(archive.pickle(), archive.storage)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # genops' refusals, an empty stack
        raise ModelError(f"data.pkl is damaged: {error!r}") from error
    if isinstance(root, Module):
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


def _flattened(root: Module) -> State:
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
            if isinstance(value, Module):
                waiting.append((f"{full}.", value))
            elif isinstance(value, np.ndarray):
                state[full] = value
    return state
