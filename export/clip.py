"""Writes CLIP's two towers as ONNX graphs, node by node from the state dict.

The architecture is Radford et al., *Learning Transferable Visual Models From Natural Language Supervision* (2021), with
a ViT (Dosovitskiy et al., 2020) as image tower: pre-norm blocks, heads of 64, QuickGELU. Sizes are read off the shapes.

fp16 is written, not converted: each value's type is chosen here, so the graph is strongly typed as TensorRT 10+ wants
it. Weights, matrix products and the residual stream are float16; LayerNorm, softmax and everything after the last
LayerNorm (one row per input, so it costs nothing) are float32 between explicit Casts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.bundle import Precision
from edge.errors import ModelError
from export.checkpoint import State
from export.clip_names import openai_state
from export.pickles import Array

_HEAD = 64  # values per attention head, in every CLIP of OpenAI's
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of pixels in 0..1, RGB
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_EPSILON = 1e-5  # LayerNorm's
_MASKED = np.float32(-1e9)  # exp() of it is 0; not -inf, which TensorRT's fusions can turn into NaN
_OPSET, _IR_VERSION = 17, 8  # 17 has LayerNormalization; newer ones are unread by the oldest runtimes


@dataclass(frozen=True)
class ClipGraphs:
    """Both towers and the facts of the model that go into a manifest."""

    image: onnx.ModelProto  # `image` uint8 (n, image_size, image_size, 3) BGR -> `embedding` float32 (n, d), unit
    text: onnx.ModelProto  # `tokens` int64 (n, context) -> `embedding` float32 (n, d), unit
    image_size: int  # px
    embedding_dim: int  # d
    context: int  # tokens
    vocab: int  # tokens
    logit_scale: float  # multiplies a cosine; the state dict holds its logarithm


def onnx_from_clip(state: Mapping[str, Array], *, precision: Precision = "fp32") -> ClipGraphs:
    """The graphs of a state dict in OpenAI's or Hugging Face's names; outputs are float32 in either precision.

    The batch axis is dynamic; node names tell the layer ("image/block3/attention/softmax"), and each node's output is
    called as the node. Raises ModelError where `openai_state` does, and for weights outside float16's range.
    """
    weights = openai_state(state)
    image = _Graph("image", weights, precision)
    text = _Graph("text", weights, precision)
    conv, positions = weights["visual.conv1.weight"], weights["visual.positional_embedding"]
    grid = round(float(np.sqrt(len(positions) - 1)))
    size, dim = grid * conv.shape[2], weights["text_projection"].shape[1]
    vocab, context = len(weights["token_embedding.weight"]), len(weights["positional_embedding"])
    _image_tower(image)
    _text_tower(text)
    return ClipGraphs(
        image=image.model(helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", size, size, 3]), dim),
        text=text.model(helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", context]), dim),
        image_size=size,
        embedding_dim=dim,
        context=context,
        vocab=vocab,
        logit_scale=float(np.exp(weights["logit_scale"].astype(np.float64))),
    )


class _Graph:
    """A tower in the making: its state dict, and the nodes and constants written so far."""

    def __init__(self, name: str, state: State, precision: Precision) -> None:
        self.name, self.state, self.half = name, state, precision == "fp16"
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        with np.errstate(over="ignore"):  # said below, with the name
            array = np.asarray(value).astype(dtype)
        if not np.isfinite(array).all():
            raise ModelError(f"weight {name} is outside the range of {array.dtype}", remedy='export it as "fp32"')
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, value: npt.ArrayLike) -> str:
        return self.constant(name, value, np.float16 if self.half else np.float32)

    def to_float32(self, value: str) -> str:
        return self.node("Cast", f"{value}/float32", value, to=TensorProto.FLOAT) if self.half else value

    def from_float32(self, value: str) -> str:
        return self.node("Cast", f"{value}/float16", value, to=TensorProto.FLOAT16) if self.half else value

    def layer_norm(self, x: str, name: str, key: str) -> str:
        """float32 in and out: float16 overflows at 65504, which the variance's squares reach at activations of 256."""
        scale = self.constant(f"{name}/scale", self.state[f"{key}.weight"], np.float32)
        bias = self.constant(f"{name}/shift", self.state[f"{key}.bias"], np.float32)
        return self.node("LayerNormalization", name, x, scale, bias, axis=-1, epsilon=_EPSILON)

    def linear(self, x: str, name: str, weight: Array, bias: Array) -> str:
        """x @ weight.T + bias, weight (out, in) as torch stores it."""
        product = self.node("MatMul", name, x, self.weight(f"{name}/weight", weight.T))
        return self.node("Add", f"{name}/biased", product, self.weight(f"{name}/bias", bias))

    def reshape(self, x: str, name: str, shape: list[int]) -> str:
        """A 0 in `shape` keeps that axis."""
        return self.node("Reshape", name, x, self.constant(f"{name}/shape", shape, np.int64))

    def model(self, source: onnx.ValueInfoProto, dim: int) -> onnx.ModelProto:
        embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dim])
        graph = helper.make_graph(self._nodes, self.name, [source], [embedding], self._constants)
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="lookout")
        onnx.checker.check_model(model, full_check=True)
        return model


def _image_tower(g: _Graph) -> None:
    conv = g.state["visual.conv1.weight"]  # (w, 3, p, p)
    width, _, patch, _ = conv.shape
    positions = g.state["visual.positional_embedding"].astype(np.float32)  # (1 + patches, w)
    positions[0] += g.state["visual.class_embedding"]
    patches = len(positions) - 1
    # Mean and std stay nodes of their own, in float32: folded into the convolution they would put 0..255 against
    # a large bias, which float16 cannot carry, and they cost nothing measurable. BGR is the kernel's axis reversed.
    mean = g.constant("image/mean", 255 * _MEAN[::-1].reshape(3, 1, 1), np.float32)
    scale = g.constant("image/scale", 1 / (255 * _STD[::-1].reshape(3, 1, 1)), np.float32)
    x = g.node("Cast", "image/pixels", "image", to=TensorProto.FLOAT)  # (n, S, S, 3) BGR
    x = g.node("Transpose", "image/channels_first", x, perm=[0, 3, 1, 2])  # (n, 3, S, S)
    x = g.node("Sub", "image/centred", x, mean)
    x = g.from_float32(g.node("Mul", "image/normalised", x, scale))
    kernel = g.weight("image/patches/weight", conv[:, ::-1])
    x = g.node("Conv", "image/patches", x, kernel, kernel_shape=[patch, patch], strides=[patch, patch])  # (n, w, g, g)
    x = g.reshape(x, "image/patches/flat", [0, width, patches])  # (n, w, patches)
    x = g.node("Transpose", "image/patches/tokens", x, perm=[0, 2, 1])  # (n, patches, w)
    # The class token joins as a row of zeros: what it adds is already in its position.
    x = g.node("Pad", "image/class", x, g.constant("image/class/pads", [0, 1, 0, 0, 0, 0], np.int64))  # (n, t, w)
    x = g.node("Add", "image/positions", x, g.weight("image/positions/weight", positions))
    x = g.from_float32(g.layer_norm(g.to_float32(x), "image/ln_pre", "visual.ln_pre"))
    layers = _layers(g, "visual.transformer.resblocks.")
    for layer in range(layers):
        # Only the class token is read at the end, so the last block computes it alone: a 12th less to do.
        x = _block(g, x, f"image/block{layer}", f"visual.transformer.resblocks.{layer}", first=layer == layers - 1)
    x = g.reshape(x, "image/pooled", [-1, width])  # (n, 1, w) -> (n, w)
    _embedding(g, x, "visual.ln_post", "visual.proj")


def _text_tower(g: _Graph) -> None:
    positions = g.state["positional_embedding"]
    context = len(positions)
    causal = np.triu(np.full((context, context), _MASKED), 1)  # a token sees itself and those before it
    mask = g.constant("text/mask", causal, np.float32)
    table = g.weight("text/table", g.state["token_embedding.weight"])
    x = g.node("Gather", "text/tokens", table, "tokens", axis=0)  # (n, t, w)
    x = g.node("Add", "text/positions", x, g.weight("text/positions/weight", positions))
    for layer in range(_layers(g, "transformer.resblocks.")):
        x = _block(g, x, f"text/block{layer}", f"transformer.resblocks.{layer}", mask=mask)
    end = g.node("ArgMax", "text/end", "tokens", axis=1, keepdims=1)  # (n, 1): the end token has the highest id
    x = g.node("GatherND", "text/pooled", x, end, batch_dims=1)  # (n, w)
    _embedding(g, x, "ln_final", "text_projection")


def _block(g: _Graph, x: str, name: str, key: str, *, mask: str | None = None, first: bool = False) -> str:
    """x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x)); with `first`, of the first token alone."""
    y = g.from_float32(g.layer_norm(g.to_float32(x), f"{name}/ln_1", f"{key}.ln_1"))  # (n, t, w)
    rows = y
    if first:
        index = g.constant(f"{name}/first", [0], np.int64)
        x = g.node("Gather", f"{name}/first/residual", x, index, axis=1)  # (n, 1, w)
        rows = g.node("Gather", f"{name}/first/query", y, index, axis=1)  # (n, 1, w)
    x = g.node("Add", f"{name}/attention/residual", x, _attention(g, rows, y, f"{name}/attention", f"{key}.attn", mask))
    y = g.from_float32(g.layer_norm(g.to_float32(x), f"{name}/ln_2", f"{key}.ln_2"))
    y = g.linear(y, f"{name}/mlp/up", g.state[f"{key}.mlp.c_fc.weight"], g.state[f"{key}.mlp.c_fc.bias"])  # (n, t, 4w)
    # QuickGELU, x * sigmoid(1.702 x): Hendrycks & Gimpel's approximation, in which CLIP was trained
    steep = g.node("Mul", f"{name}/mlp/steep", y, g.weight(f"{name}/mlp/steepness", 1.702))
    y = g.node("Mul", f"{name}/mlp/gelu", y, g.node("Sigmoid", f"{name}/mlp/sigmoid", steep))
    y = g.linear(y, f"{name}/mlp/down", g.state[f"{key}.mlp.c_proj.weight"], g.state[f"{key}.mlp.c_proj.bias"])
    return g.node("Add", f"{name}/mlp/residual", x, y)  # (n, t, w)


def _attention(g: _Graph, rows: str, y: str, name: str, key: str, mask: str | None) -> str:
    """softmax(q k^T / sqrt(64)) v per head (Vaswani et al., 2017), queries from `rows`, keys and values from `y`."""
    weight = g.state[f"{key}.in_proj_weight"].astype(np.float32)  # (3w, w): q, k, v stacked
    bias = g.state[f"{key}.in_proj_bias"].astype(np.float32)
    width = weight.shape[1]
    weight[:width] *= _HEAD**-0.5  # 1/8, a power of two: into the queries without rounding
    bias[:width] *= _HEAD**-0.5
    heads: list[str] = []
    for part, source, perm in (("query", rows, [0, 2, 1, 3]), ("key", y, [0, 2, 3, 1]), ("value", y, [0, 2, 1, 3])):
        third = slice(len(heads) * width, (len(heads) + 1) * width)
        z = g.linear(source, f"{name}/{part}", weight[third], bias[third])  # (n, t, w)
        z = g.reshape(z, f"{name}/{part}/split", [0, 0, width // _HEAD, _HEAD])  # (n, t, h, 64)
        heads.append(g.node("Transpose", f"{name}/{part}/heads", z, perm=perm))  # (n, h, t, 64), keys (n, h, 64, t)
    query, keys, values = heads
    x = g.to_float32(g.node("MatMul", f"{name}/logits", query, keys))  # (n, h, t, t)
    x = x if mask is None else g.node("Add", f"{name}/masked", x, mask)
    x = g.from_float32(g.node("Softmax", f"{name}/softmax", x, axis=-1))
    x = g.node("MatMul", f"{name}/mix", x, values)  # (n, h, t, 64)
    x = g.node("Transpose", f"{name}/tokens", x, perm=[0, 2, 1, 3])  # (n, t, h, 64)
    x = g.reshape(x, f"{name}/merged", [0, 0, width])  # (n, t, w)
    return g.linear(x, f"{name}/out", g.state[f"{key}.out_proj.weight"], g.state[f"{key}.out_proj.bias"])


def _embedding(g: _Graph, x: str, norm: str, projection: str) -> None:
    x = g.layer_norm(g.to_float32(x), f"{g.name}/ln_post", norm)  # (n, w), float32 from here on
    weight = g.constant(f"{g.name}/projection/weight", g.state[projection], np.float32)
    x = g.node("MatMul", f"{g.name}/projection", x, weight)  # (n, d)
    length = g.node("ReduceL2", f"{g.name}/length", x, axes=[-1], keepdims=1)  # (n, 1)
    g.node("Div", "embedding", x, length)  # (n, d), unit


def _layers(g: _Graph, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in g.state if key.startswith(prefix)})
