"""CLIP state dicts for tests: random ones of any size, and the files they are published in, written without torch.

The pickles are put together by hand, opcode by opcode (Python's `pickletools` documents them), so a test can also write
what torch never would.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

State: TypeAlias = dict[str, np.ndarray]


def random_state(
    seed: int = 0,
    *,
    image_size: int = 64,
    patch: int = 16,
    width: int = 128,
    layers: int = 2,
    dim: int = 32,
    text_width: int = 64,
    text_layers: int = 2,
    context: int = 16,
    vocab: int = 100,
    dtype: Any = np.float32,
) -> State:
    """Weights under OpenAI's names, spread like a trained model's: no bias is zero, no norm plain."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> np.ndarray:
        return (mean + std * rng.standard_normal(shape, np.float32)).astype(dtype)

    state = {
        "visual.conv1.weight": normal(width, 3, patch, patch, std=(3 * patch * patch) ** -0.5),
        "visual.class_embedding": normal(width, std=0.5),
        "visual.positional_embedding": normal((image_size // patch) ** 2 + 1, width, std=0.3),
        "visual.proj": normal(width, dim, std=width**-0.5),
        "token_embedding.weight": normal(vocab, text_width, std=0.3),
        "positional_embedding": normal(context, text_width, std=0.1),
        "text_projection": normal(text_width, dim, std=text_width**-0.5),
        "logit_scale": np.array(math.log(100), dtype),
    }
    norms = [("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text_width)]
    for prefix, w, count in (("visual.", width, layers), ("", text_width, text_layers)):
        for key in (f"{prefix}transformer.resblocks.{block}" for block in range(count)):
            norms += [(f"{key}.ln_1", w), (f"{key}.ln_2", w)]
            for name, rows, columns in (
                ("attn.in_proj_", 3 * w, w),
                ("attn.out_proj.", w, w),
                ("mlp.c_fc.", 4 * w, w),
                ("mlp.c_proj.", w, 4 * w),
            ):
                state[f"{key}.{name}weight"] = normal(rows, columns, std=columns**-0.5)
                state[f"{key}.{name}bias"] = normal(rows, std=0.1)
    for key, size in norms:
        state[f"{key}.weight"] = normal(size, mean=1, std=0.2)
        state[f"{key}.bias"] = normal(size, std=0.1)
    return state


def hugging_face(state: Mapping[str, np.ndarray]) -> State:
    """The same weights as Hugging Face's CLIPModel names and lays them out, with its position_ids."""
    words = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    words |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    whole = {
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "logit_scale": "logit_scale",
    }
    theirs: State = {"text_model.embeddings.position_ids": np.arange(len(state["positional_embedding"]))[None]}
    for key, value in state.items():
        if key in whole:
            theirs[whole[key]] = value
        elif key in ("visual.proj", "text_projection"):
            theirs["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = value.T
        else:
            tower, rest = key.split("transformer.resblocks.")
            block, name = rest.split(".", 1)
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{block}."
            if "in_proj_" in name:
                for part, third in zip("qkv", np.split(value, 3), strict=True):
                    theirs[f"{layer}self_attn.{part}_proj.{name.rsplit('_', 1)[1]}"] = third
            else:
                module, kind = name.rsplit(".", 1)
                theirs[f"{layer}{words[module]}.{kind}"] = value
    return theirs


# --- pickles by hand: each function returns the opcodes that leave one value on the stack -----------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def module(class_name: str, attributes: Mapping[str, bytes]) -> bytes:
    """An object as TorchScript writes it: made without arguments, then given its attributes."""
    return named(f"__torch__.{class_name}", "Module") + b")\x81" + dict_of(attributes) + b"b"


def storage(key: str, kind: str, count: int) -> bytes:
    return tuple_of(text("storage"), named("torch", f"{kind}Storage"), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    key: str, kind: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0
) -> bytes:
    """A tensor over the storage `key` of `count` values; row-major without `strides` (in values)."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))) if strides is None else strides
    return called(
        named("torch._utils", "_rebuild_tensor_v2"),
        storage(key, kind, count),
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, strides)),
        b"\x89",
        named("collections", "OrderedDict") + b")R",
    )


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def archive(
    pickle: bytes, storages: Mapping[str, bytes], *, root: str = "archive", compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A torch zip file around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr(f"{root}/data.pkl", pickle)
        out.writestr(f"{root}/byteorder", b"little")
        for key, data in storages.items():
            out.writestr(f"{root}/data/{key}", data)
        out.writestr(f"{root}/version", b"3\n")
    return file.getvalue()


# --- whole files ------------------------------------------------------------------------------------------------------

_KINDS = {"float16": "Half", "float32": "Float", "int64": "Long"}


def _tensors(state: Mapping[str, np.ndarray]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(opcodes by name, storages by key)"""
    opcodes, storages = {}, {}
    for key, (name, value) in enumerate(state.items()):
        opcodes[name] = tensor(str(key), _KINDS[value.dtype.name], value.size, value.shape)
        storages[str(key)] = value.tobytes()
    return opcodes, storages


def torch_zip(state: Mapping[str, np.ndarray], *, nested: bool = False) -> bytes:
    """What torch.save writes for a state dict (an OrderedDict with its _metadata), or for one beside other things."""
    opcodes, storages = _tensors(state)
    items = b"".join(text(key) + value for key, value in opcodes.items())
    value = named("collections", "OrderedDict") + b")R(" + items + b"u"
    value += dict_of({"_metadata": named("collections", "OrderedDict") + b")R"}) + b"b"
    if nested:
        value = dict_of({"epoch": number(3), "state_dict": value, "name": text("clip")})
    return archive(program(value), storages)


def torchscript(state: Mapping[str, np.ndarray]) -> bytes:
    """What torch.jit.save writes for a model: a tree of modules, with OpenAI's entries beside the weights."""
    extras = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    opcodes, storages = _tensors({**state, **{key: np.array(value) for key, value in extras.items()}})
    tree: dict[str, Any] = {}
    for name, value in opcodes.items():
        *path, leaf = name.split(".")
        here = tree
        for step in path:
            here = here.setdefault(step, {})
        here[leaf] = value

    def written(branch: Mapping[str, Any], name: str) -> bytes:
        attributes = {"training": b"\x88", "_is_full_backward_hook": b"N"}
        attributes |= {key: value if isinstance(value, bytes) else written(value, key) for key, value in branch.items()}
        return module(f"multimodal.{name}.___torch_mangle_7", attributes)

    file = io.BytesIO(archive(program(written(tree, "model")), storages, root="ViT-B-32"))
    with zipfile.ZipFile(file, "a") as out:
        out.writestr("ViT-B-32/constants.pkl", program(b")"))
        out.writestr("ViT-B-32/code/__torch__/multimodal.py", "class Module: ...", zipfile.ZIP_DEFLATED)
    return file.getvalue()
