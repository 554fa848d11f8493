"""The Darknet exporter against its oracles: cv2.dnn, torch's outputs for the mini detector, and a table of errors."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.errors import ModelError
from edge.images import read_image
from export.darknet import onnx_from_darknet
from export.darknet_cfg import network_from_cfg
from export.recipe import read_recipe
from tests.darknet_nets import conv, net, section, write_weights, yolov4, yolov4_tiny

ROOT = Path(__file__).parents[2]
MINI_CFG, MINI_WEIGHTS = ROOT / "export/mini/yolov4-mini.cfg", ROOT / "export/mini/yolov4-mini.weights"
OFFICIAL = ROOT.parent / "shared/data/darknet"

Array = npt.NDArray[np.float32]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def picture(height: int, width: int, count: int = 1, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(count, height, width, 3) uint8: blobs of full contrast, so that every part of the net sees something else."""
    rng = np.random.default_rng(seed)
    images = [cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), 4) * 600 + 128 for _ in range(count)]
    return np.clip(images, 0, 255).astype(np.uint8)


def from_cv2(cfg: Path, weights: Path, image: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Boxes (A, 4) x1 y1 x2 y2 and scores (A, classes) of one (H, W, 3) BGR image; heads in cfg order."""
    oracle = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    oracle.setInput(cv2.dnn.blobFromImage(image, 1 / 255, swapRB=True))
    heads = [name for name in oracle.getLayerNames() if name.startswith("yolo")]
    rows = np.concatenate(oracle.forward(heads))
    return corners(rows), rows[:, 5:]


def corners(rows: Array) -> Array:
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def close(got: Array, wanted: Array, tolerance: float) -> None:
    """Absolute for values up to 1, relative beyond: random weights make boxes wider than the image."""
    assert got.shape == wanted.shape
    assert np.isfinite(wanted).all()
    assert np.max(np.abs(got - wanted) / np.maximum(1, np.abs(wanted))) < tolerance


# --- YOLOv4 and YOLOv4-tiny, full size ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[yolov4_tiny, yolov4], ids=["yolov4-tiny", "yolov4"])
def full_net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The cfg text at 416 x 416 and a file of random weights, which fits every size."""
    folder = tmp_path_factory.mktemp("darknet")
    text = request.param(416, 416)
    (folder / "net.cfg").write_text(text)
    weights = write_weights(folder / "net.cfg", folder / "net.weights")
    yield text, weights
    weights.unlink()  # pytest keeps its folders, and these are 258 MB


@pytest.mark.parametrize("size", [416, 608])
def test_full_size_equals_cv2(full_net: tuple[str, Path], size: int, tmp_path: Path) -> None:
    text, weights = full_net
    cfg = tmp_path / "edited.cfg"
    cfg.write_text(text.replace("=416\n", f"={size}\n"))
    image = picture(size, size)
    wanted_boxes, wanted_scores = from_cv2(cfg, weights, image[0])
    keep = [0, 79, 7]
    model = onnx_from_darknet(weights.with_name("net.cfg"), weights, size=size, keep=keep, bn_epsilon=1e-6)
    boxes, scores = session(model).run(None, {"image": image})
    assert scores.max() - scores.min() > 0.3  # a net whose scores are all alike would prove nothing
    close(boxes[0], wanted_boxes, 1e-3)
    close(scores[0], wanted_scores[:, keep], 1e-3)


def test_weights_have_the_official_size(full_net: tuple[str, Path]) -> None:
    """Bytes of the published yolov4-tiny.weights and yolov4.weights."""
    assert full_net[1].stat().st_size == {38: 24_251_276, 162: 257_717_640}[full_net[0].count("[") - 1]


@pytest.mark.parametrize(("name", "generate"), [("yolov4", yolov4), ("yolov4-tiny", yolov4_tiny)])
def test_the_structures_are_the_official_ones(name: str, generate: Callable[..., str], tmp_path: Path) -> None:
    official = OFFICIAL / f"{name}.cfg"
    if not official.exists():
        pytest.skip("no official cfg beside this repository")
    (tmp_path / "net.cfg").write_text(generate(416, 416))
    ours, theirs = network_from_cfg(tmp_path / "net.cfg"), network_from_cfg(official, 416)
    assert [bare(layer) for layer in ours.layers] == [bare(layer) for layer in theirs.layers]
    assert ours.shapes == theirs.shapes


def bare(layer: object) -> dict[str, object]:
    """A layer's kind and every option that shapes the answer; not its place in the file."""
    return {"kind": type(layer)} | {name: value for name, value in vars(layer).items() if name != "section"}


# --- the mini detector -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_fp32() -> onnx.ModelProto:
    return onnx_from_darknet(MINI_CFG, MINI_WEIGHTS, bn_epsilon=1e-6)


@pytest.fixture(scope="module")
def reference() -> dict[str, Array]:
    with np.load(ROOT / "tests/golden/yolov4-mini.reference.npz") as file:
        return dict(file)


def pets_image(reference: dict[str, Array]) -> npt.NDArray[np.uint8]:
    """The (1, 416, 416, 3) BGR bytes behind pets650_blob, which is RGB planes of exactly byte / 255."""
    blob = reference["pets650_blob"]
    image = np.rint(blob * 255).astype(np.uint8)
    assert np.array_equal(image.astype(np.float32) / np.float32(255), blob)
    return image.transpose(0, 2, 3, 1)[..., ::-1]


def test_mini_equals_torch(mini_fp32: onnx.ModelProto, reference: dict[str, Array]) -> None:
    boxes, scores = session(mini_fp32).run(None, {"image": pets_image(reference)})
    rows = reference["pets650_torch"]
    assert (scores > 0.5).sum() > 5  # people were found
    close(boxes[0], corners(rows), 1e-4)
    close(scores[0], rows[:, 4:5] * rows[:, 5:6], 1e-4)


@pytest.mark.parametrize("name", ["synthetic0", "synthetic1"])
def test_mini_equals_torch_on_pixels_between_bytes(
    name: str, mini_fp32: onnx.ModelProto, reference: dict[str, Array]
) -> None:
    """No byte image is these pixels, so they enter behind the graph's scaling: float planes, in the graph's BGR."""
    model = onnx.ModelProto()
    model.CopyFrom(mini_fp32)
    front = [node for node in model.graph.node if node.output[0] in ("pixels", "planes", "scaled")]
    assert len(front) == 3
    for node in front:
        model.graph.node.remove(node)
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("scaled", 1, ["n", 3, 416, 416]))
    planes = np.ascontiguousarray(reference[f"{name}_blob"][:, ::-1])
    boxes, scores = session(model).run(None, {"scaled": planes})
    rows = reference[f"{name}_torch"]
    close(boxes[0], corners(rows), 1e-4)
    close(scores[0], rows[:, 4:5] * rows[:, 5:6], 1e-4)


def test_mini_at_the_smaller_size_equals_cv2(tmp_path: Path) -> None:
    """The recipe's smaller detector on the people of frame 650: the same weights, fewer pixels."""
    size = read_recipe(ROOT / "configs/models-mini.toml").detector.smaller
    assert size is not None
    text = MINI_CFG.read_text()
    assert text.count("=416\n") == 2
    (tmp_path / "edited.cfg").write_text(text.replace("=416\n", f"={size}\n"))
    image = cv2.resize(read_image(ROOT / "export/mini/pets-650.jpg"), (size, size))
    wanted_boxes, wanted_scores = from_cv2(tmp_path / "edited.cfg", MINI_WEIGHTS, image)
    model = onnx_from_darknet(MINI_CFG, MINI_WEIGHTS, size=size, bn_epsilon=1e-6)
    boxes, scores = session(model).run(None, {"image": image[None]})
    sure = scores[0, :, 0] > 0.5
    assert sure.sum() > 5  # people were found
    close(boxes[0], wanted_boxes, 1e-4)
    told = wanted_scores[:, 0] > 0  # OpenCV says 0 below a threshold of its own
    assert told[sure].all()
    close(scores[0][told], wanted_scores[told], 1e-4)


def test_mini_fp16_is_typed_and_near_fp32(mini_fp32: onnx.ModelProto, reference: dict[str, Array]) -> None:
    half = onnx_from_darknet(MINI_CFG, MINI_WEIGHTS, bn_epsilon=1e-6, precision="fp16")
    image = pets_image(reference)
    boxes, scores = session(half).run(None, {"image": image})
    wanted_boxes, wanted_scores = session(mini_fp32).run(None, {"image": image})
    assert boxes.dtype == scores.dtype == np.float32
    assert np.abs(scores - wanted_scores).max() < 0.01
    close(boxes, wanted_boxes, 0.01)
    sure = wanted_scores[0, :, 0] > 0.3
    assert iou(boxes[0, sure], wanted_boxes[0, sure]).min() > 0.99


def iou(a: Array, b: Array) -> Array:
    """Row by row."""
    inner = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(axis=1)
    both = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1)
    return inner / (both - inner)  # type: ignore[no-any-return]


def test_fp16_graph_mixes_no_types() -> None:
    """What TensorRT's strongly typed mode asks: all inputs of a node of one float type, and every change a Cast."""
    model = onnx_from_darknet(MINI_CFG, MINI_WEIGHTS, precision="fp16")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    types |= {t.name: t.data_type for t in model.graph.initializer} | {"image": onnx.TensorProto.UINT8}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    kinds: dict[str, set[int]] = {}
    for node in model.graph.node:
        seen = {types[name] for name in [*node.input, *node.output] if name} & floats
        if node.op_type == "Resize":
            seen -= {types[node.input[2]]}  # scales are float32 by the standard
        assert node.op_type == "Cast" or len(seen) == 1, node.name
        kinds.setdefault(node.op_type, set()).update(seen)
    assert kinds["Conv"] == kinds["MaxPool"] == kinds["Softplus"] == {onnx.TensorProto.FLOAT16}
    assert kinds["Split"] == kinds["Exp"] == {onnx.TensorProto.FLOAT}


def test_interface(mini_fp32: onnx.ModelProto) -> None:
    assert [(o.domain, o.version) for o in mini_fp32.opset_import] == [("", 17)]
    assert (mini_fp32.ir_version, mini_fp32.producer_name) == (8, "lookout")
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in [*mini_fp32.graph.input, *mini_fp32.graph.output]
    }
    assert shapes == {
        "image": (onnx.TensorProto.UINT8, ["n", 416, 416, 3]),
        "boxes": (onnx.TensorProto.FLOAT, ["n", 10647, 4]),
        "scores": (onnx.TensorProto.FLOAT, ["n", 10647, 1]),
    }


# --- small nets: every option of every layer ---------------------------------------------------------------------

FIRST = conv(8, 3, "leaky")


def one_head(anchors: int = 2, **options: object) -> str:
    """A head of 3 classes on whatever comes before."""
    pairs = (9, 14, 21, 11, 30, 40)[: 2 * anchors]
    logistic = "logistic" if options.get("new_coords") else "linear"
    return section("convolutional", filters=anchors * 8, size=1, stride=1, pad=1, activation=logistic) + section(
        "yolo", mask=tuple(range(anchors)), anchors=pairs, classes=3, num=anchors, thresh=0, **options
    )


def plain(**options: object) -> str:
    defaults: dict[str, object] = {"filters": 8, "size": 3, "stride": 1, "pad": 1, "activation": "leaky"}
    return section("convolutional", **(defaults | options))


POOLS = {
    f"maxpool size {size} stride {stride}": FIRST + section("maxpool", size=size, stride=stride) + one_head()
    for size in (2, 3, 5, 9, 13)
    for stride in (1, 2)
}
ACTIVATED = {
    f"activation {name}": FIRST + conv(6, 3, name) + one_head()
    for name in ("mish", "leaky", "linear", "relu", "logistic", "swish")
}
BODIES = {
    **POOLS,
    **ACTIVATED,
    "no batch-norm": plain() + plain(batch_normalize=0) + one_head(),
    "groups": FIRST + plain(groups=4, filters=12, batch_normalize=1) + one_head(),
    "depthwise": FIRST + plain(groups=8) + one_head(),
    "no padding": FIRST + plain(pad=0, size=3) + plain(pad=0, size=1) + one_head(),
    "own padding": FIRST + plain(pad=0, padding=2) + one_head(),
    "even kernel": FIRST + plain(size=2, stride=2) + plain(size=5) + one_head(),
    "stride 2": FIRST + plain(stride=2) + plain(stride=2, size=1) + one_head(),
    "shortcut": FIRST + plain() + section("shortcut", from_=-2, activation="linear") + one_head(),
    "shortcut activated": FIRST + plain() + section("shortcut", from_=0, activation="leaky") + one_head(),
    "route": FIRST + plain(filters=5) + section("route", layers="-1, 0") + one_head(),
    "route back": FIRST + plain() + section("route", layers=-2) + one_head(),
    "route of four": FIRST + plain() + plain() + section("route", layers=(-1, -3, 0, 1)) + one_head(),
    "route groups": FIRST + section("route", layers=-1, groups=4, group_id=2) + one_head(),
    "upsample": FIRST + plain(stride=2) + section("upsample", stride=2) + one_head(),
    "upsample by three": FIRST + section("upsample", stride=3) + one_head(),
    "scale_x_y": FIRST + one_head(scale_x_y=1.2),
    "new_coords": FIRST + plain(stride=2) + one_head(anchors=3, scale_x_y=2.0, new_coords=1),
    "mask out of order": FIRST
    + section("convolutional", filters=16, size=1, stride=1, activation="linear")
    + section("yolo", mask=(2, 0), anchors=(5, 6, 7, 8, 9, 10), num=3, classes=3, scale_x_y=1.1, thresh=0),
    "two heads": FIRST + plain(stride=2) + one_head(3) + section("route", layers=-3) + one_head(1, scale_x_y=1.1),
    "three heads": FIRST
    + (plain(stride=2) + one_head(1) + section("route", layers=-3))
    + (plain(stride=2) + one_head(2, scale_x_y=1.2) + section("route", layers=-3))
    + (section("upsample", stride=2) + one_head(3)),
}


def written(folder: Path, text: str, seed: int = 0) -> tuple[Path, Path]:
    cfg = folder / "net.cfg"
    cfg.write_text(text)
    return cfg, write_weights(cfg, folder / "net.weights", seed)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", BODIES)
def test_layer_equals_cv2(name: str, height: int, width: int, tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, net(width, height) + BODIES[name])
    image = picture(height, width)
    wanted_boxes, wanted_scores = from_cv2(cfg, weights, image[0])
    boxes, scores = session(onnx_from_darknet(cfg, weights, keep=(2, 0, 1), bn_epsilon=1e-6)).run(
        None, {"image": image}
    )
    assert np.ptp(scores, axis=1).min() > 1e-3
    close(boxes[0], wanted_boxes, 1e-5)
    close(scores[0], wanted_scores[:, [2, 0, 1]], 1e-5)


def test_route_takes_the_group_of_each_layer(tmp_path: Path) -> None:
    """Darknet splits each layer, then joins the parts; spelt out in three routes, as cv2.dnn cannot load it in one."""
    part = {"groups": 2, "group_id": 1}
    short = FIRST + plain() + section("route", layers=(-1, -2), **part)
    long = FIRST + plain() + section("route", layers=-1, **part) + section("route", layers=-3, **part)
    long += section("route", layers=(-2, -1))
    results = []
    for text in (short, long):
        model = onnx_from_darknet(*written(tmp_path, net(32, 32) + text + one_head()))
        results.append(session(model).run(None, {"image": picture(32, 32)}))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_batch_is_its_images(count: int, tmp_path: Path) -> None:
    run = session(onnx_from_darknet(*written(tmp_path, net(32, 32) + BODIES["three heads"]))).run
    images = picture(32, 32, count)
    boxes, scores = run(None, {"image": images})
    for i in range(count):
        one_boxes, one_scores = run(None, {"image": images[i : i + 1]})
        close(boxes[i], one_boxes[0], 1e-5)
        close(scores[i], one_scores[0], 1e-5)
    assert count == 1 or np.abs(boxes[0] - boxes[1]).max() > 1e-3


def test_mish_keeps_its_limits(tmp_path: Path) -> None:
    """x tanh(log(1 + exp x)) in float64 against the graph's form of it, far beyond where exp overflows float32."""
    values = np.array([-1e4, -100, -20, -5, -1, 0, 0.5, 5, 20, 90, 1e4], np.float64)
    text = net(1, 1) + plain(filters=11, size=1, activation="mish") + one_head()
    cfg, weights = written(tmp_path, text)
    flat = np.fromfile(weights, "<f4", offset=20)
    flat[:11], flat[11:44] = values, 0  # bias, kernel: what the image shows does not matter
    weights.write_bytes(weights.read_bytes()[:20] + flat.tobytes())
    model = onnx_from_darknet(cfg, weights)
    model.graph.output.append(onnx.helper.make_tensor_value_info("0_convolutional/mish", 1, ["n", 11, 1, 1]))
    got = session(model).run(["0_convolutional/mish"], {"image": np.zeros((1, 1, 1, 3), np.uint8)})[0]
    close(got.ravel(), values * np.tanh(np.logaddexp(0, values)), 2e-6)


def test_batch_norm_epsilon_counts(tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, net(32, 32) + FIRST + one_head())
    kernels = []
    for epsilon in (1e-6, 0.5):
        model = onnx_from_darknet(cfg, weights, bn_epsilon=epsilon)
        kernel = next(t for t in model.graph.initializer if t.name == "0_convolutional/kernel")
        kernels.append(onnx.numpy_helper.to_array(kernel))
    flat = np.fromfile(weights, "<f4", offset=20).astype(np.float64)
    gamma, variance = flat[8:16], flat[24:32]
    raw = flat[32 : 32 + 8 * 27].reshape(8, 3, 3, 3)[:, ::-1]  # RGB kernels, turned to read BGR
    for kernel, epsilon in zip(kernels, (1e-6, 0.5), strict=True):
        close(kernel, raw * (gamma / np.sqrt(variance + epsilon))[:, None, None, None], 1e-6)


def test_old_header_has_32_bits_of_seen(tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, net(32, 32) + FIRST + one_head())
    new = onnx_from_darknet(cfg, weights)
    weights.write_bytes(struct.pack("<iiii", 0, 1, 0, 7) + weights.read_bytes()[20:])
    assert onnx_from_darknet(cfg, weights) == new


def test_training_options_and_comments_change_nothing(tmp_path: Path) -> None:
    text = net(32, 32) + FIRST + one_head()
    cfg, weights = written(tmp_path, text)
    bare_model = onnx_from_darknet(cfg, weights)
    text = text.replace(
        "[net]\n", "\ufeff# a comment\r\n; another\n[net]\nsubdivisions=64\nsteps=1,2\nmosaic=1 # yes\n"
    )
    text = text.replace("[yolo]\n", "[yolo]\n  jitter = .3\nnms_kind=greedynms\nlearning_rate=1\n")
    text = text.replace("stride=1\n", " stride = 1 # px\r\n\n").replace("pad=1\n", "pad=1\ndilation=1\n")
    cfg.write_text(text)
    assert onnx_from_darknet(cfg, weights) == bare_model


@pytest.mark.parametrize(
    ("size", "boxes"), [(None, 32 * 32), (64, 64 * 64), ((32, 96), 32 * 96)]
)  # stride 1: an anchor pair per pixel
def test_size_is_height_width(size: int | tuple[int, int] | None, boxes: int, tmp_path: Path) -> None:
    model = onnx_from_darknet(*written(tmp_path, net(32, 32) + FIRST + one_head()), size=size)
    height, width = (32, 32) if size is None else (size, size) if isinstance(size, int) else size
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [0, height, width, 3]
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 2 * boxes


# --- what is refused ---------------------------------------------------------------------------------------------

GOOD = net(32, 32) + FIRST + plain() + one_head()  # lines: 1 [net], 7 and 16 [convolutional]; heads below
ERRORS = [
    ("", "has no layers"),
    ("[net]\nwidth=32\nheight=32\n", "has no layers"),
    (FIRST, "line 1: section -1 is not supported: expected [net] first, got [convolutional]"),
    (GOOD + "[dropout]\n", "section 4 is not supported: expected one of [convolutional]"),
    (GOOD + net(32, 32), "is not supported"),
    ("width=3\n" + GOOD, "line 1 is not a cfg line"),
    (GOOD + "what\n", "is not a cfg line: expected [section] or option=value, got 'what'"),
    (GOOD.replace("width=32", "wdth=32"), "[net], line 3: wdth is not a known option"),
    (GOOD.replace("width=32", "width=0"), "[net], line 3: width: expected a whole number from 1 to 65536, got 0"),
    (GOOD.replace("width=32", "width=99999999999999999999"), "[net], line 3: width"),
    (GOOD.replace("width=32\n", ""), "[net], line 1: width is missing"),
    (GOOD.replace("channels=3", "channels=1"), "[net], line 5: channels is not supported: expected 3, got 1"),
    (GOOD.replace("stride=1", "stride=-1"), "section 0 [convolutional], line 11: stride"),
    (GOOD.replace("size=3", "size=0"), "section 0 [convolutional], line 10: size"),
    (GOOD.replace("filters=8", "filters=1000000000"), "section 0 [convolutional], line 9: filters"),
    (GOOD.replace("filters=8", "filters=1000000"), "section 0 [convolutional], line 7: output is too large"),
    (GOOD.replace("leaky", "gelu"), "section 0 [convolutional], line 13: activation: expected one of linear, leaky"),
    (GOOD.replace("activation=leaky\n", ""), "activation is missing"),
    (GOOD.replace("pad=1", "pad=1\npad=1"), "section 0 [convolutional], line 13: pad is given twice"),
    (GOOD.replace("pad=1", "dilation=2"), "line 12: dilation is not supported: expected 1, got 2"),
    (GOOD.replace("pad=1", "antialiasing=1"), "antialiasing is not supported"),
    (GOOD.replace("pad=1", "stride_x=2"), "stride_x is not a known option"),
    (GOOD.replace("pad=1", "share_index=0"), "share_index is not a known option"),
    (net(32, 32) + plain(groups=3, filters=9) + one_head(), "first layer: expected [convolutional] with groups=1"),
    (net(32, 32) + section("maxpool", size=2, stride=2) + one_head(), "first layer"),
    (net(32, 32) + FIRST + plain(groups=3) + one_head(), "groups: expected channels and filters that 3 groups divide"),
    (net(32, 32) + FIRST, "no [yolo] section"),
    (net(40, 32) + FIRST + 4 * plain(stride=2) + one_head(), "multiples of 16, the network's overall stride"),
    (net(32, 32) + FIRST + 9 * plain(stride=2) + one_head(), "overall stride"),
    (net(32, 32) + plain(size=99, pad=0) + one_head(), "size is larger than the map: expected a map of at least 99"),
    (net(32, 32) + FIRST + section("route", layers=5) + one_head(), "layers: expected layers before layer 1, got 5"),
    (net(32, 32) + FIRST + section("route", layers=-2) + one_head(), "layers: expected layers before layer 1, got -2"),
    (net(32, 32) + FIRST + section("route", layers="-1,x") + one_head(), "layers: expected whole numbers"),
    (net(32, 32) + FIRST + section("route") + one_head(), "layers is missing"),
    (
        net(32, 32) + FIRST + section("route", layers=-1, groups=3) + one_head(),
        "channels that 3 groups divide, got [8]",
    ),
    (net(32, 32) + FIRST + section("route", layers=-1, groups=2, group_id=2) + one_head(), "from 0 to 1, got 2"),
    (net(32, 32) + FIRST + plain(stride=2) + section("route", layers=(-1, 0)) + one_head(), "maps of different sizes"),
    (net(32, 32) + FIRST + plain(filters=4) + section("shortcut", from_=0) + one_head(), "from adds another shape"),
    (net(32, 32) + FIRST + plain() + section("shortcut", from_="-1,0") + one_head(), "from: expected one layer"),
    (net(32, 32) + FIRST + section("shortcut", from_=0, weights_type="per_channel"), "weights_type is not supported"),
    (net(32, 32) + FIRST + section("maxpool", size=2, stride=2, padding=9) + one_head(), "from 0 to 2, got 9"),
    (net(32, 32) + FIRST + section("maxpool", size=2) + one_head(), "stride is missing"),
    (net(32, 32) + FIRST + section("upsample", stride=2, scale=0.5) + one_head(), "scale is not supported"),
    (net(32, 32) + FIRST + 4 * section("upsample", stride=200) + one_head(), "output is too large"),
    (net(32, 32) + FIRST + 30 * section("route", layers=(-1, -1)) + one_head(), "output is too large"),
    (GOOD + section("route", layers=-1) + one_head(), "a layer with feature maps, got layer 3, a [yolo]"),
    (GOOD + one_head(), "input: expected a layer with feature maps, got layer 3, a [yolo]"),
    (GOOD.replace("mask=0,1", "mask=0,2"), "mask: expected anchors from 0 to 1, got 0,2"),
    (GOOD.replace("anchors=9,14,", "anchors=9,"), "anchors: expected num = 2 pairs, 4 numbers, got 3 numbers"),
    (GOOD.replace("anchors=9,", "anchors=nan,"), "anchors: expected numbers"),
    (GOOD.replace("classes=3", "classes=4"), "expected 2 x (5 + 4) = 18 channels, got 16"),
    (GOOD.replace("classes=3", "classes=3\nscale_x_y=1,2"), "scale_x_y: expected one number"),
    (GOOD.replace("classes=3", "classes=3\nnew_coords=2"), "new_coords: expected a whole number from 0 to 1"),
    (GOOD + section("route", layers=-3) + one_head(new_coords=1), "must be the same in every [yolo]"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_wrong_cfg_is_named(text: str, message: str, tmp_path: Path) -> None:
    cfg, weights = tmp_path / "net.cfg", tmp_path / "net.weights"
    cfg.write_text(text)
    weights.write_bytes(bytes(100))
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        onnx_from_darknet(cfg, weights)
    assert "net.cfg" in str(caught.value)


@pytest.mark.parametrize("size", [31, 0, -32, (32, 33), (32, 0), 1 << 40])
def test_wrong_size_is_named(size: int | tuple[int, int], tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, net(32, 32) + FIRST + plain(stride=2) + one_head())
    with pytest.raises(ModelError, match=r"stride|too large"):
        onnx_from_darknet(cfg, weights, size=size)


@pytest.mark.parametrize("keep", [(), (3,), (-1,), (1, 1)])
def test_wrong_keep_is_named(keep: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"keep does not fit .* numbers from 0 to 2"):
        onnx_from_darknet(*written(tmp_path, GOOD), keep=keep)


def test_files_that_are_no_cfg(tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, GOOD)
    with pytest.raises(ModelError, match=r"cannot read .*nowhere.cfg: got No such file"):
        onnx_from_darknet(tmp_path / "nowhere.cfg", weights)
    with pytest.raises(ModelError, match="cannot read"):
        onnx_from_darknet(tmp_path, weights)
    with pytest.raises(ModelError, match="not text"):
        onnx_from_darknet(MINI_WEIGHTS, weights)
    cfg.write_text(GOOD + "#" * (1 << 20))
    with pytest.raises(ModelError, match="too large for a cfg"):
        onnx_from_darknet(cfg, weights)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, GOOD)
    good = weights.read_bytes()
    with pytest.raises(ModelError, match=r"cannot read .*nowhere"):
        onnx_from_darknet(cfg, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="cannot read"):
        onnx_from_darknet(cfg, tmp_path)
    for wrong in (good[:-1], good[:-4], good[:100], good + b"\0", good + bytes(4000)):
        weights.write_bytes(wrong)
        with pytest.raises(ModelError, match=f"expected {len(good)} bytes, got {len(wrong)} bytes"):
            onnx_from_darknet(cfg, weights)
    for wrong in (b"", good[:11], struct.pack("<iii", -1, 2, 5) + good[12:], b"PK\3\4" * 9):
        weights.write_bytes(wrong)
        with pytest.raises(ModelError, match="is not a Darknet weights file"):
            onnx_from_darknet(cfg, weights)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (20, np.nan, r"section 0 \[convolutional\], line 7: weights are not finite"),
        (-4, np.inf, r"section 2 \[convolutional\], line 22: weights are not finite"),
        (20 + 4 * 24, -1.0, r"section 0 \[convolutional\], line 7: weights do not fit in float32"),  # a variance
    ],
)
def test_damaged_weights_name_their_section(at: int, value: float, message: str, tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, GOOD)
    raw = bytearray(weights.read_bytes())
    struct.pack_into("<f", raw, at % len(raw), value)
    weights.write_bytes(raw)
    with pytest.raises(ModelError, match=message):
        onnx_from_darknet(cfg, weights)


def test_weights_beyond_float16(tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, GOOD)
    raw = bytearray(weights.read_bytes())
    struct.pack_into("<f", raw, 20, 1e5)
    weights.write_bytes(raw)
    onnx_from_darknet(cfg, weights)
    with pytest.raises(ModelError, match=r"section 0 .* do not fit in float16"):
        onnx_from_darknet(cfg, weights, precision="fp16")


def test_nothing_is_read_before_the_size_fits(tmp_path: Path) -> None:
    """A cfg that asks for 1.7 GB of weights costs nothing when the file is small."""
    cfg, weights = tmp_path / "net.cfg", tmp_path / "net.weights"
    cfg.write_text(net(1, 1) + plain(filters=20000, size=1) + plain(filters=20000, size=1) + one_head())
    weights.write_bytes(struct.pack("<iiiq", 0, 2, 5, 0))
    with pytest.raises(ModelError, match=r"expected 16\d{8} bytes, got 20 bytes"):
        onnx_from_darknet(cfg, weights)
    cfg.write_text(net(1, 1) + plain(filters=1 << 20) + plain(filters=1 << 20) + one_head())
    with pytest.raises(ModelError, match="too large for ONNX"):
        onnx_from_darknet(cfg, weights)


# --- fuzz: whatever the bytes, a ModelError or a graph -----------------------------------------------------------

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINES = (net(32, 32) + BODIES["three heads"] + BODIES["route groups"] + BODIES["maxpool size 2 stride 2"]).split("\n")


def survives(cfg: Path, weights: Path) -> None:
    with contextlib.suppress(ModelError):
        onnx_from_darknet(cfg, weights)


@fuzz
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(LINES) - 1),
            st.sampled_from(["drop", "double", "swap", "value", "text"]),
            st.sampled_from(
                ["0", "-1", "1", "2", "3", "-7", "255", "4096", "999999999", "1e9", "nan", "", "-1,-1,-1", "é"]
            ),
            st.text(max_size=20),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_cfg(edits: list[tuple[int, str, str, str]], tmp_path: Path) -> None:
    lines = list(LINES)
    for index, how, value, text in edits:
        index %= len(lines)
        if how == "drop":
            lines[index] = ""
        elif how == "double":
            lines.insert(index, lines[index])
        elif how == "swap":
            lines[index], lines[-1 - index] = lines[-1 - index], lines[index]
        elif how == "value":
            lines[index] = lines[index].split("=")[0] + "=" + value
        else:
            lines[index] = text
    cfg, weights = tmp_path / "net.cfg", tmp_path / "net.weights"
    cfg.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:  # weights that fit, where the cfg can be read and does not ask for many: then the graph is written too
        layers = network_from_cfg(cfg)
    except ModelError:
        weights.write_bytes(bytes(20))
    else:
        if max(np.prod(shape) for shape in layers.shapes) < 1e6:
            write_weights(cfg, weights)
    survives(cfg, weights)


@fuzz
@given(raw=st.binary(max_size=300))
def test_random_bytes_as_cfg(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.cfg").write_bytes(raw)
    survives(tmp_path / "net.cfg", MINI_WEIGHTS)


@fuzz
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=8), cut=st.integers(0, 9)
)
def test_bit_flips_in_weights(flips: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    cfg, weights = written(tmp_path, GOOD)
    raw = bytearray(weights.read_bytes())
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    weights.write_bytes(raw[: len(raw) - max(0, cut - 6)])
    survives(cfg, weights)
