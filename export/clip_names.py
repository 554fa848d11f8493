"""CLIP's state dict under OpenAI's names, whoever named it, with every shape checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge.errors import ModelError
from export.checkpoint import State
from export.pickles import Array

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
