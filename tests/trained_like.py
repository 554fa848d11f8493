"""Random weights of full size whose figures are a trained network's, and networks that are louder than they need be.

Where the figures are from:
- CLIP's kernels: the spread that OpenAI's code starts from (github.com/openai/CLIP, clip/model.py:
  `initialize_parameters`, and `VisionTransformer.__init__`), times what training made of it in this repository's mini
  (export/mini/clip-mini.safetensors; std times the root of the fan-in: in_proj 0.77 to 0.82, out_proj 0.40, c_fc 0.72
  to 0.78, c_proj 1.01 to 1.13), with its LayerNorm gains (0.8 to 1.1) and biases (0.02 to 0.06).
- Massive activations: Sun, Chen, Kolter, Liu, *Massive Activations in Large Language Models* (2024, arXiv 2402.17762),
  what it says of ViTs: above 100 and a thousand times the median, in fixed channels, at a few tokens, from early on.
- YOLOv4's batch norms and heads: the mini's (export/mini/yolov4-mini.weights), trained on the same kinds of layers:
  variances from 4e-3 to 190, gamma 0.5 to 1.5, beta -0.2 to 0.35, and heads with a bias of -3.9 for objectness and +3
  for the class, so that few boxes are seen.
No one's trained weights of full size were looked at: what those have beyond these figures is not shown here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.bank import PromptBank
from edge.values import Category, Floats
from export.darknet_cfg import IMAGE, Convolutional, Yolo, network_from_cfg
from tests.clip_states import State, random_state

_TOKENS, _CHANNELS = (7, 33), (138, 447)  # any
_MASSIVE = 400.0


def clip_state(seed: int = 0, width: int = 768, layers: int = 12) -> State:
    """ViT-B/32's image tower, beside a text tower that is as small as can be; massive activations at two tokens."""
    sizes = {"image_size": 224, "patch": 32, "width": width, "layers": layers, "dim": 512}
    state = random_state(seed, **sizes, text_width=64, text_layers=1, dtype=np.float32)
    rng = np.random.default_rng(seed)
    spread = {"attn.in_proj_": 0.8, "attn.out_proj.": 0.4, "mlp.c_fc.": 0.75, "mlp.c_proj.": 1.05}
    for key, value in state.items():
        if not key.startswith("visual."):
            continue
        for part, std in spread.items():
            if part in key:
                # a few values far out, as training leaves them: Student's t of 6 degrees of freedom, of this spread
                values = rng.standard_t(6, value.shape) / np.sqrt(1.5)
                state[key] = (values * (std / np.sqrt(value.shape[-1]) if value.ndim == 2 else 0.04)).astype(np.float32)
        if "attn.in_proj_weight" in key:
            state[key][: 2 * width] *= 2.2  # its logits reach 13, as the mini's do
        if ".ln_" in key:
            state[key] = rng.normal(0.95 if key.endswith("weight") else 0.0, 0.06, value.shape).astype(np.float32)
    for token, channel, sign in zip(_TOKENS, _CHANNELS, (1, -1), strict=True):
        # LayerNorm makes sqrt(width) of what is alone in its row; its gain makes the rest
        state["visual.positional_embedding"][token, channel] = sign * 60.0
        state["visual.ln_pre.weight"][channel] = _MASSIVE / np.sqrt(width)
    return {key: value.astype(np.float16).astype(np.float32) for key, value in state.items()}  # as it is published


def louder(state: State, factor: float) -> State:
    """The same image tower with a residual stream of `factor` times its size, divided out by each LayerNorm."""
    parts = (".ln_pre.", ".attn.out_proj.", ".mlp.c_proj.")
    return {
        key: value.astype(np.float32) * np.float32(factor)
        if key.startswith("visual.") and any(part in key for part in parts)
        else value
        for key, value in state.items()
    }


def words_for(
    vectors: Floats, categories: int = 13, options: int = 4, seed: int = 0, scale: float = 100.0
) -> PromptBank:
    """Words that such vectors (n, d) differ by: over the crops, logits spread by 2, as those of a trained CLIP do.

    An option lies where the crops are, in a direction in which they differ.
    """
    rng = np.random.default_rng(seed)
    mean = vectors.mean(axis=0)
    away = vectors - mean
    rows = rng.normal(size=(categories * options, len(vectors))) @ away
    rows *= 2 / scale / (rows @ away.T).std(axis=1, keepdims=True)
    rows -= (rows @ mean)[:, None] * mean / (mean @ mean)  # no option is everybody's best
    # what is left to unit length lies where no crop differs
    _, _, basis = np.linalg.svd(np.concatenate([away, mean[None]]), full_matrices=True)
    rest = basis[-1] if len(basis) > len(vectors) + 1 else mean / np.linalg.norm(mean)
    rows = rows + np.sqrt(np.maximum(0, 1 - (rows**2).sum(axis=1, keepdims=True))) * rest
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = tuple(f"option {i}" for i in range(options))
    asked = tuple(Category(f"question {i}", f"question {i}", names, (None,) * options) for i in range(categories))
    return PromptBank(asked, rows.astype(np.float32), "", "", "words.toml")


def trained_like(cfg: Path, weights: Path, loud: float = 1.0, seed: int = 0) -> Path:
    """The weights that tests.darknet_nets wrote, with batch norms and heads like trained ones.

    A channel's variance and its kernel change together, so that what comes out keeps its size. loud: one channel in 50
    is that many times as large where only one convolution reads it, which takes so much less of it.
    """
    rng = np.random.default_rng(seed)
    network, data = network_from_cfg(cfg), weights.read_bytes()
    layers, readers = network.layers, Counter(number for layer in network.layers for number in layer.inputs)
    values, at = np.frombuffer(data[20:], "<f4").copy(), 0
    gains: dict[int, npt.NDArray[np.float32]] = {}
    for number, layer in enumerate(layers):
        if not isinstance(layer, Convolutional):
            continue
        n, source = layer.filters, layer.inputs[0]
        inputs = (3 if source == IMAGE else network.shapes[source][0]) // layer.groups
        own = 4 * n if layer.batch_normalize else n
        kernel = values[at + own : at + own + n * inputs * layer.size**2].reshape(n, inputs, -1)
        if source in gains:
            kernel /= gains[source][:, None]
        after = layers[number + 1] if number + 1 < len(layers) else None
        if layer.batch_normalize:
            beta, gamma, mean, variance = values[at : at + own].reshape(4, n)
            beta[:], gamma[:] = rng.normal(0.05, 0.1, n), np.clip(rng.normal(1, 0.15, n), 0.5, 1.5)
            wide = np.exp(rng.uniform(np.log(4e-3), np.log(190), n)).astype(np.float32)
            mean *= np.sqrt(wide / variance)
            kernel *= np.sqrt(wide / variance)[:, None, None]
            variance[:] = wide
            if isinstance(after, Convolutional) and after.inputs[0] == number and readers[number] == 1:
                gains[number] = np.where(rng.random(n) < 0.02, loud, 1).astype(np.float32)
                beta *= gains[number]
                gamma *= gains[number]
        elif isinstance(after, Yolo):
            kernel.reshape(len(after.anchors), 5 + after.classes, -1)[:, 4:] *= 3  # some are people, most are not
            bias = values[at : at + n].reshape(len(after.anchors), 5 + after.classes)
            bias[:, :4], bias[:, 4], bias[:, 5:] = rng.normal(0, 0.1, bias[:, :4].shape), -3.9, 3.0
        at += own + kernel.size
    assert at == len(values)
    weights.write_bytes(data[:20] + values.tobytes())
    return weights


def with_naive_norms(typed: onnx.ModelProto) -> onnx.ModelProto:
    """Each LayerNormalization of a typed fp16 graph as many exporters write it: eight nodes, all in float16.

    The graph also gives `variance` (n, t, 1), of the first block's first one.
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    graph = model.graph
    half = TensorProto.FLOAT16
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()

    def constant(name: str, array: np.ndarray) -> str:
        if name not in done:
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float16), name))
            done.add(name)
        return name

    for node in typed.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        name, source = node.name, f"{node.name}/naive"
        nodes.append(helper.make_node("Cast", [node.input[0]], [source], to=half))
        scale, shift = (constant(f"{one}/half", numpy_helper.to_array(weights[one])) for one in node.input[1:])
        two, epsilon = constant("naive/two", np.array(2)), constant("naive/epsilon", np.array(1e-5))
        n = [f"{name}/naive/{i}" for i in range(9)]
        nodes += [
            helper.make_node("ReduceMean", [source], [n[0]], axes=[-1]),
            helper.make_node("Sub", [source, n[0]], [n[1]]),
            helper.make_node("Pow", [n[1], two], [n[2]]),
            helper.make_node("ReduceMean", [n[2]], [n[3]], axes=[-1]),
            helper.make_node("Add", [n[3], epsilon], [n[4]]),
            helper.make_node("Sqrt", [n[4]], [n[5]]),
            helper.make_node("Div", [n[1], n[5]], [n[6]]),
            helper.make_node("Mul", [n[6], scale], [n[7]]),
            helper.make_node("Add", [n[7], shift], [n[8]]),
            helper.make_node("Cast", [n[8]], [node.output[0]], to=TensorProto.FLOAT),
        ]
        if name == "image/block0/ln_1":
            nodes.append(helper.make_node("Cast", [n[3]], ["variance"], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.append(helper.make_tensor_value_info("variance", TensorProto.FLOAT, ["n", "t", 1]))
    onnx.checker.check_model(model, full_check=True)
    return model
