"""Nodes held in fp32: what changes in a graph, what does not, that its types hold, and that it says the same."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge.ort import OrtSession
from export.checkpoint import read_checkpoint
from export.clip import onnx_from_clip
from export.darknet import onnx_from_darknet
from export.hold import RUNGS, float32_nodes, held_in_fp32
from tests import clip_states as files
from tests.rounding import rounded

HALF, FLOAT, INT = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
FLOATS = {HALF, FLOAT}

rungs = pytest.mark.parametrize("rung", RUNGS)


@pytest.fixture(scope="module")
def image() -> onnx.ModelProto:
    return onnx_from_clip(files.random_state(layers=3), precision="fp16").image


@pytest.fixture(scope="module")
def detector(root: Path = Path()) -> onnx.ModelProto:
    mini = root / "export/mini"
    return onnx_from_darknet(mini / "yolov4-mini.cfg", mini / "yolov4-mini.weights", precision="fp16")


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types | {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}


def check_strong(model: onnx.ModelProto) -> dict[str, int]:
    """No node mixes floats, no Cast is one in name only or undone by the next, and nothing is there twice or unused."""
    onnx.checker.check_model(model, full_check=True)
    types, graph = types_of(model), model.graph
    for node in graph.node:
        used = {types[value] for value in (*node.input, *node.output) if value} & FLOATS
        if node.op_type == "Cast":
            assert types[node.input[0]] != types[node.output[0]], node.name
        elif node.op_type != "Resize":  # its scales are float32 always
            assert len(used) <= 1, node.name
    casts = [(node.input[0], types[node.output[0]]) for node in graph.node if node.op_type == "Cast"]
    assert len(set(casts)) == len(casts)
    used_values = {value for node in graph.node for value in node.input} | {output.name for output in graph.output}
    assert used_values >= {output for node in graph.node for output in node.output}
    assert used_values >= {tensor.name for tensor in graph.initializer}
    assert len({tensor.name for tensor in graph.initializer}) == len(graph.initializer)
    return types


def named(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """All nodes but the Casts between floats."""
    types = types_of(model)
    glue = [node for node in model.graph.node if {types[value] for value in (*node.input, *node.output)} == FLOATS]
    assert all(node.op_type == "Cast" for node in glue)
    return {node.name: node for node in model.graph.node if node not in glue}


def run(model: onnx.ModelProto, image: Any) -> Any:
    with OrtSession(model.SerializeToString()) as session:
        return session.run({"image": image})


def pixels(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


# ---- what a rung is ----


def test_rungs_name_what_they_say_and_hold_what_came_before(image: onnx.ModelProto) -> None:
    names = [node.name for node in image.graph.node]
    found = [{name for name in names if rung(name)} for rung in RUNGS.values()]
    assert list(RUNGS) == ["attention", "norms", "blocks"]
    assert found[0] < found[1] < found[2]
    assert found[0] == {name for name in names if re.search(r"attention/(logits|softmax|mix)$", name)}
    assert len(found[0]) == 3 * 3
    norms = {node.name for node in image.graph.node if node.op_type == "LayerNormalization"}
    assert norms <= found[1]
    assert {name for name in names if name.endswith("/residual")} <= found[1]
    assert {name for name in names if name.startswith("image/block")} <= found[2]
    assert not any(rung("text/block0/attention/logits") or rung("embedding") for rung in RUNGS.values())


# ---- the graph ----


@rungs
def test_a_held_graph_is_strongly_typed_and_nothing_else_changed(image: onnx.ModelProto, rung: str) -> None:
    before = image.SerializeToString(deterministic=True)
    held = held_in_fp32(image, RUNGS[rung])
    assert image.SerializeToString(deterministic=True) == before
    old_types, types = types_of(image), check_strong(held)
    old, new = named(image), named(held)
    assert list(new) == list(old)  # the same nodes in the same order
    for name, node in new.items():
        assert (node.op_type, node.attribute, node.output) == (old[name].op_type, old[name].attribute, old[name].output)
        if types[node.output[0]] in FLOATS:
            assert types[node.output[0]] == (FLOAT if RUNGS[rung](name) else old_types[name]), name
    assert [held.graph.input, held.graph.output] == [image.graph.input, image.graph.output]
    assert (held.ir_version, held.opset_import) == (image.ir_version, image.opset_import)


def test_no_names_no_change_and_all_names_no_half(image: onnx.ModelProto, detector: onnx.ModelProto) -> None:
    for model in (image, detector):
        same = held_in_fp32(model, lambda name: False)
        assert sorted(map(str, same.graph.node)) == sorted(map(str, model.graph.node))
        assert same.graph.initializer == model.graph.initializer
        types = check_strong(held_in_fp32(model, lambda name: True))
        assert HALF not in types.values()


def test_between_two_held_nodes_lies_no_cast(image: onnx.ModelProto) -> None:
    held = held_in_fp32(image, RUNGS["norms"])
    nodes = {node.name: node for node in held.graph.node}
    assert nodes["image/block1/attention/softmax"].input[0] == "image/block1/attention/logits"
    assert nodes["image/block1/attention/mix"].input[0] == "image/block1/attention/softmax"
    assert nodes["image/block0/ln_1"].input[0] == "image/ln_pre"
    assert nodes["image/block1/ln_1"].input[0] == "image/block0/mlp/residual"
    assert nodes["image/ln_post"].input[0] == "image/pooled"
    blocks = held_in_fp32(image, RUNGS["blocks"])
    casts = [n.name for n in blocks.graph.node if n.op_type == "Cast"]
    assert casts == ["image/pixels", "image/normalised/float16", "image/class/float32"]


@pytest.mark.parametrize("name", ["4_conv", "106", "100", "_maxpool", "_upsample", "_route", "_shortcut"])
def test_any_node_of_the_detector_can_be_held(detector: onnx.ModelProto, name: str) -> None:
    """Resize keeps its scales, Slice and Gather their numbers, Concat takes any number of inputs."""
    chosen = [node.name for node in detector.graph.node if name in node.name and "/float" not in node.name]
    assert chosen
    held = held_in_fp32(detector, lambda one: one in chosen)
    types = check_strong(held)
    assert all(types[one] == FLOAT for one in chosen)
    got, before = run(held, pixels(1, 416, 416, 3)), run(detector, pixels(1, 416, 416, 3))
    np.testing.assert_allclose(got["scores"], before["scores"], atol=0.01)


def by_hand(nodes: list[onnx.NodeProto], *weights: tuple[str, Any], outputs: tuple[tuple[str, int], ...]) -> Any:
    ends = [helper.make_tensor_value_info(name, kind, ["n", 2]) for name, kind in outputs]
    source = helper.make_tensor_value_info("x", HALF, ["n", 2])
    graph = helper.make_graph(nodes, "g", [source], ends, [numpy_helper.from_array(a, name) for name, a in weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, name: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [name], name=name, **attributes)


def test_a_shared_weight_keeps_its_float16_copy_for_others() -> None:
    nodes = [node("Mul", "a", "x", "w"), node("Mul", "b", "a", "w"), node("Mul", "c", "b", "w")]
    model = by_hand(nodes, ("w", np.array([0.1, 3], np.float16)), outputs=(("c", HALF),))
    held = held_in_fp32(model, lambda name: name in ("a", "b"))
    check_strong(held)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in held.graph.initializer}
    assert {name: array.dtype for name, array in weights.items()} == {"w": np.float16, "w/float32": np.float32}
    assert (weights["w"] == weights["w/float32"]).all()
    assert [list(n.input) for n in held.graph.node] == [
        ["x"],
        ["x/float32", "w/float32"],
        ["a", "w/float32"],
        ["b"],
        ["b/float16", "w"],
    ]


def test_outputs_of_the_graph_keep_name_and_type() -> None:
    """One that a held node makes, one that others use too, and one that is itself a Cast."""
    nodes = [node("Exp", "a", "x"), node("Exp", "b", "a"), node("Cast", "c", "a", to=FLOAT), node("Neg", "d", "c")]
    outputs = (("a", HALF), ("b", HALF), ("c", FLOAT), ("d", FLOAT))
    model = by_hand(nodes, outputs=outputs)
    x = np.array([[0.3, -1]], np.float16)
    for chosen in ("a", "b", "d", "ab", "ad", "abd"):
        held = held_in_fp32(model, chosen.__contains__)
        onnx.checker.check_model(held, full_check=True)
        assert held.graph.output == model.graph.output
        types_of(held)
        with OrtSession(held.SerializeToString()) as session:
            got = session.run({"x": x})
        for name, kind in outputs:
            assert got[name].dtype == (np.float16 if kind == HALF else np.float32)
        np.testing.assert_allclose(got["d"], -np.exp(x.astype(np.float32)), atol=2e-3)


def test_what_has_no_float16_is_as_it_was(image: onnx.ModelProto) -> None:
    """Casts to and from whole numbers are no glue, and a node of shapes has nothing to hold."""
    held = held_in_fp32(
        image, lambda name: name in ("image/pixels", "image/normalised", "image/projection", "embedding")
    )
    assert sorted(map(str, held.graph.node)) == sorted(map(str, image.graph.node))


# ---- what it says ----


@rungs
@pytest.mark.parametrize("seed", [0, 1])
def test_more_in_fp32_is_nearer_to_fp32(rung: str, seed: int) -> None:
    """By a GPU's rounding; a hair is left for luck, as one rounding less may happen to be the worse one."""
    state = files.random_state(seed, layers=3)
    typed = onnx_from_clip(state, precision="fp16").image
    x = pixels(8, 64, 64, 3)
    wanted = run(onnx_from_clip(state).image, x)["embedding"]
    plain, held = (
        1 - (run(rounded(model), x)["embedding"] * wanted).sum(axis=1).min()
        for model in (typed, held_in_fp32(typed, RUNGS[rung]))
    )
    assert 0 < plain < 1e-4
    assert held < plain + 2e-6
    if rung == "blocks":
        assert held < plain


@rungs
def test_any_batch(image: onnx.ModelProto, rung: str) -> None:
    held, x = held_in_fp32(image, RUNGS[rung]), pixels(9, 64, 64, 3)
    whole = run(held, x)["embedding"]
    for n in (1, 2, 9):
        np.testing.assert_allclose(run(held, x[:n])["embedding"], whole[:n], atol=2e-3)


# ---- for builders that choose types themselves ----


def test_float32_nodes(image: onnx.ModelProto) -> None:
    plain = onnx_from_clip(files.random_state(layers=3)).image
    names = {node.name for node in plain.graph.node}
    kinds = {node.name: node.op_type for node in plain.graph.node}
    found = float32_nodes(image) & names
    always = Counter(kinds[name] for name in found)
    assert always["LayerNormalization"] == 3 * 2 + 2
    assert always["Softmax"] == 3
    assert always["MatMul"] == 1  # the projection
    assert always["Conv"] == 0
    for rung in RUNGS.values():
        more = float32_nodes(held_in_fp32(image, rung)) & names
        assert found <= more
        assert {name for name in names if rung(name) and kinds[name] != "Cast"} <= more
    floats = {name for name, kind in types_of(plain).items() if kind == FLOAT}
    assert float32_nodes(plain) == names & floats


# ---- the real compiler ----


@pytest.mark.parametrize("rung", [*RUNGS, "mistyped"])
def test_tensorrt_builds_it_strongly_typed(rung: str) -> None:
    """TensorRT-RTX parses and compiles without a GPU, and refuses a graph whose types do not fit."""
    trt = pytest.importorskip("tensorrt_rtx", reason="the compiler is not installed")
    typed = onnx_from_clip(read_checkpoint(Path("export/mini/clip-mini.safetensors")), precision="fp16").image
    if rung == "mistyped":
        held = held_in_fp32(typed, RUNGS["attention"])
        (mix,) = (one for one in held.graph.node if one.name == "image/block0/attention/mix")
        mix.input[1] = "image/block0/attention/value/heads"  # float16, beside the softmax's float32
    else:
        held = held_in_fp32(typed, RUNGS[rung])
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse(held.SerializeToString())
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    profile.set_shape("image", (1, 128, 128, 3), (8, 128, 128, 3), (8, 128, 128, 3))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config) if parsed else None
    assert (plan is None) == (rung == "mistyped")
