"""Writes the ONNX graph of a Darknet detector, node by node, from its cfg and its weights.

Sources: the layers and the .weights format are AlexeyAB's Darknet (src/parser.c, src/*_layer.c); the box decode is
YOLOv3's with YOLOv4's scale_x_y, and Scaled-YOLOv4's where new_coords=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edge.bundle import Precision
from edge.errors import ModelError
from export.darknet_cfg import (
    IMAGE,
    Convolutional,
    Layer,
    MaxPool,
    Network,
    Route,
    Shortcut,
    Upsample,
    Yolo,
    network_from_cfg,
)

OPSET, IR_VERSION = 17, 8  # written out: the onnx package's own defaults are newer than older runtimes read
_MAX_WEIGHT_BYTES = 2_000_000_000  # an ONNX file is one protobuf message, which ends at 2 GiB


def onnx_from_darknet(
    cfg: Path,
    weights: Path,
    *,
    size: int | tuple[int, int] | None = None,
    keep: Sequence[int] = (0,),
    precision: Precision = "fp32",
    bn_epsilon: float = 1e-5,
) -> onnx.ModelProto:
    """The detector as an ONNX model: opset 17, dynamic batch n, no NMS.

    Input `image` uint8 (n, H, W, 3) BGR, already resized to the net size. Outputs, for the A anchors in the order head,
    row, column, anchor: `boxes` float32 (n, A, 4) x1 y1 x2 y2 in 0..1 of the input and not clipped to it, `scores`
    float32 (n, A, K) objectness x class probability of the K classes of `keep`, in its order.

    `size` is (H, W), or one number for a square, in place of the height and width of [net]; anchors stay what they are,
    pixels of the net input, as when the cfg is edited. `precision` fp16 makes weights and feature maps float16; pixel
    scaling and box decode stay float32. `bn_epsilon` is added to the batch-norm variance: 1e-5 in Darknet, 1e-6 in
    cv2.dnn.

    Raises ModelError when the cfg or the weights are wrong or unsupported, `size` is no multiple of the network's
    overall stride, or `keep` names no class of the network.
    """
    network = network_from_cfg(cfg, size)
    heads = [layer for layer in network.layers if isinstance(layer, Yolo)]
    for head in heads:
        if (head.classes, head.new_coords) != (heads[0].classes, heads[0].new_coords):
            raise head.section.fault("classes and new_coords must be the same in every [yolo]")
    if not keep or len(set(keep)) != len(keep) or not all(0 <= k < heads[0].classes for k in keep):
        expected = f"different numbers from 0 to {heads[0].classes - 1}"
        raise ModelError(f"keep does not fit the classes of {cfg.name}", expected=expected, got=list(keep))
    dtype = np.float32 if precision == "fp32" else np.float16
    return _Writer(network, _read_weights(weights, network), list(keep), np.dtype(dtype), bn_epsilon).model()


def _read_weights(path: Path, network: Network) -> dict[int, npt.NDArray[np.float32]]:
    """The flat parameters of each convolution by layer number; views of one array, which is read only if it fits.

    Format: int32 major, minor, revision; images seen, int64 since version 0.2, int32 before; then float32 per
    convolution in cfg order. Everything is little-endian.
    """
    counts = {i: _parameters(network, i) for i, layer in enumerate(network.layers) if isinstance(layer, Convolutional)}
    total = sum(counts.values())
    if 4 * total > _MAX_WEIGHT_BYTES:
        raise ModelError("the network is too large for ONNX", expected=f"{_MAX_WEIGHT_BYTES} bytes", got=4 * total)
    try:
        actual = path.stat().st_size
        head = np.fromfile(path, "<i4", count=3)
        if len(head) < 3 or not (0 <= head[0] <= 1000 and 0 <= head[1] <= 1000):
            raise ModelError(f"{path.name} is not a Darknet weights file", expected="major and minor version", got=head)
        start = 20 if head[0] * 10 + head[1] >= 2 else 16
        if actual != start + 4 * total:
            raise ModelError(
                f"{path.name} does not fit the cfg",
                expected=f"{start + 4 * total} bytes",
                got=f"{actual} bytes",
                remedy="use the cfg that the weights were trained with, or fetch the weights again",
            )
        values = np.fromfile(path, "<f4", count=total, offset=start)
    except OSError as exc:
        raise ModelError(f"cannot read {path}", got=exc.strerror) from exc
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(values, ends[:-1]), strict=True))


def _parameters(network: Network, number: int) -> int:
    layer = network.layers[number]
    assert isinstance(layer, Convolutional)
    channels = 3 if layer.inputs[0] == IMAGE else network.shapes[layer.inputs[0]][0]
    kernel = layer.filters * (channels // layer.groups) * layer.size**2
    return kernel + layer.filters * (4 if layer.batch_normalize else 1)


def _fold(
    layer: Convolutional, flat: npt.NDArray[np.float32], epsilon: float, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Kernel (filters, channels / groups, size, size) and bias (filters,); batch-norm is folded in in float64.

    The file holds beta, gamma, mean, variance (filters each) and the kernel; without batch-norm bias and kernel.
    """
    if not np.isfinite(flat).all():
        raise layer.section.fault("weights are not finite", remedy="the weights file is damaged: fetch it again")
    n = layer.filters
    with np.errstate(all="ignore"):  # what goes wrong shows as inf or nan below
        if layer.batch_normalize:
            beta, gamma, mean, variance = flat[: 4 * n].astype(np.float64).reshape(4, n)
            scale = gamma / np.sqrt(variance + epsilon)
            kernel = (flat[4 * n :].reshape(n, -1) * scale[:, None]).astype(dtype)
            bias = (beta - mean * scale).astype(dtype)
        else:
            kernel, bias = flat[n:].astype(dtype), flat[:n].astype(dtype)
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        what = f"weights do not fit in {dtype} with batch-norm epsilon {epsilon:g}"
        raise layer.section.fault(what, expected="variances that are not negative, and weights in range")
    return kernel.reshape(n, -1, layer.size, layer.size), bias


class _Writer:
    """The graph in the making. A method that adds a node returns the name of the tensor the node makes."""

    def __init__(
        self,
        network: Network,
        weights: dict[int, npt.NDArray[np.float32]],
        keep: list[int],
        dtype: np.dtype[Any],
        bn_epsilon: float,
    ) -> None:
        self.network, self.weights, self.keep, self.dtype, self.bn_epsilon = network, weights, keep, dtype, bn_epsilon
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(dtype)
        # Filled in place: helper.make_graph and make_model copy all weights once each.
        self.proto = onnx.ModelProto(ir_version=IR_VERSION, producer_name="lookout")
        self.proto.opset_import.add(version=OPSET)
        self.graph = self.proto.graph

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.graph.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        array = np.asarray(value, np.dtype(dtype).newbyteorder("<"))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.graph.initializer.add(name=name, dims=array.shape, data_type=kind, raw_data=array.tobytes())
        return name

    def model(self) -> onnx.ModelProto:
        network = self.network
        outputs: dict[int, str] = {IMAGE: self.image()}
        heads: list[str] = []
        for number, layer in enumerate(network.layers):
            inputs = [outputs[i] for i in layer.inputs]
            name = f"{number}_{layer.section.kind}"
            if isinstance(layer, Yolo):
                heads.append(self.head(layer, network.shapes[number], inputs[0], name))
            else:
                outputs[number] = self.layer(number, layer, inputs, name)
        anchors = self.decode(heads)
        info, size = helper.make_tensor_value_info, [network.height, network.width]
        self.graph.name = "detector"
        self.graph.input.append(info("image", TensorProto.UINT8, ["n", *size, 3]))
        self.graph.output.append(info("boxes", TensorProto.FLOAT, ["n", anchors, 4]))
        self.graph.output.append(info("scores", TensorProto.FLOAT, ["n", anchors, len(self.keep)]))
        onnx.checker.check_model(self.proto, full_check=True)
        return self.proto

    def image(self) -> str:
        """uint8 (n, H, W, 3) BGR -> (n, 3, H, W) BGR in 0..1. Where BGR becomes RGB: see `convolution`."""
        x = self.node("Cast", ["image"], "pixels", to=TensorProto.FLOAT)
        x = self.node("Transpose", [x], "planes", perm=[0, 3, 1, 2])
        x = self.node("Mul", [x, self.constant("scale", 1 / 255, np.float32)], "scaled")  # in fp32: 1/255 is inexact
        return x if self.dtype == np.float32 else self.node("Cast", [x], "scaled_half", to=self.onnx_dtype)

    def layer(self, number: int, layer: Layer, inputs: list[str], name: str) -> str:
        if isinstance(layer, Convolutional):
            return self.activated(self.convolution(number, layer, inputs[0], name), layer.activation, name)
        if isinstance(layer, Shortcut):
            return self.activated(self.node("Add", inputs, name), layer.activation, name)
        if isinstance(layer, Route):
            return self.route(layer, inputs, name)
        if isinstance(layer, MaxPool):
            before, after = layer.padding // 2, layer.padding - layer.padding // 2
            pads, window, strides = [before, before, after, after], [layer.size] * 2, [layer.stride] * 2
            return self.node("MaxPool", inputs, name, kernel_shape=window, strides=strides, pads=pads)
        assert isinstance(layer, Upsample)
        scales = self.constant(f"{name}/scales", [1, 1, layer.stride, layer.stride], np.float32)
        return self.node(
            "Resize",
            [inputs[0], "", scales],
            name,
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )

    def convolution(self, number: int, layer: Convolutional, x: str, name: str) -> str:
        kernel, bias = _fold(layer, self.weights[number], self.bn_epsilon, self.dtype)
        if layer.inputs[0] == IMAGE:
            # Darknet expects RGB. Turning its kernel round once costs nothing; a Gather would cost every frame.
            kernel = kernel[:, ::-1]
        return self.node(
            "Conv",
            [x, self.constant(f"{name}/kernel", kernel, self.dtype), self.constant(f"{name}/bias", bias, self.dtype)],
            name,
            kernel_shape=[layer.size] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            group=layer.groups,
        )

    def activated(self, x: str, activation: str, name: str) -> str:
        if activation == "leaky":
            return self.node("LeakyRelu", [x], f"{name}/leaky", alpha=0.1)
        if activation == "relu":
            return self.node("Relu", [x], f"{name}/relu")
        if activation == "logistic":
            return self.node("Sigmoid", [x], f"{name}/logistic")
        if activation == "swish":
            return self.node("Mul", [x, self.node("Sigmoid", [x], f"{name}/sigmoid")], f"{name}/swish")
        if activation == "mish" and self.dtype == np.float32:
            # Mish is x tanh(softplus x), softplus x = -log sigmoid(-x), and tanh is odd. ONNX Runtime's CPU kernels are
            # vectorised for these nodes but not for Softplus: YOLOv4-416 takes 929 ms with them and 1449 ms with it on
            # one core, 557 and 830 ms on two. At both ends the limits come out right: sigmoid 0 gives tanh(-inf) = -1.
            minus = self.node("Neg", [x], f"{name}/minus")
            log = self.node("Log", [self.node("Sigmoid", [minus], f"{name}/sigmoid")], f"{name}/log")
            return self.node("Mul", [minus, self.node("Tanh", [log], f"{name}/tanh")], f"{name}/mish")
        if activation == "mish":  # in float16 a sigmoid near 1 has too few digits left for its log
            softplus = self.node("Softplus", [x], f"{name}/softplus")
            return self.node("Mul", [x, self.node("Tanh", [softplus], f"{name}/tanh")], f"{name}/mish")
        return x  # linear

    def route(self, layer: Route, inputs: list[str], name: str) -> str:
        if layer.groups > 1:
            parts = []
            for part, (number, x) in enumerate(zip(layer.inputs, inputs, strict=True)):
                channels = self.network.shapes[number][0] // layer.groups
                limits = [layer.group_id * channels, (layer.group_id + 1) * channels, 1]
                slots = [
                    self.constant(f"{name}/{part}/{slot}", [limit], np.int64)
                    for slot, limit in zip(("start", "end", "axis"), limits, strict=True)
                ]
                parts.append(self.node("Slice", [x, *slots], f"{name}/{part}"))
            inputs = parts
        return inputs[0] if len(inputs) == 1 else self.node("Concat", inputs, name, axis=1)

    def head(self, layer: Yolo, shape: tuple[int, int, int], x: str, name: str) -> str:
        """(n, anchors x (5 + classes), h, w) -> float32 (n, h x w x anchors, 5 + K): the classes of `keep` only."""
        anchors, cells = len(layer.anchors), shape[1] * shape[2]
        wanted = [*range(5), *(5 + k for k in self.keep)]  # x, y, w, h, objectness, classes
        channels = [a * (5 + layer.classes) + j for a in range(anchors) for j in wanted]
        if channels != list(range(shape[0])):
            x = self.node("Gather", [x, self.constant(f"{name}/channels", channels, np.int64)], f"{name}/kept", axis=1)
        if self.dtype != np.float32:
            x = self.node("Cast", [x], f"{name}/float", to=TensorProto.FLOAT)
        split = self.constant(f"{name}/split", [0, anchors, len(wanted), cells], np.int64)  # 0: n, as it comes
        x = self.node("Reshape", [x, split], f"{name}/anchors")
        x = self.node("Transpose", [x], f"{name}/cells", perm=[0, 3, 1, 2])  # (n, h w, anchors, 5 + K)
        rows = self.constant(f"{name}/rows", [0, cells * anchors, len(wanted)], np.int64)
        return self.node("Reshape", [x, rows], name)

    def decode(self, heads: list[str]) -> int:
        """The rows of all heads -> `boxes` and `scores`; returns A, the number of rows.

        Centre x = (column + s sigmoid(tx) - (s - 1) / 2) / columns with s = scale_x_y, width = exp(tw) anchor / W, y
        and height alike, score = sigmoid(objectness) sigmoid(class). With new_coords the layer before has already
        applied the sigmoids, and width = (2 tw)^2 anchor / W. All heads at once: they differ in constants per row.
        """
        network = self.network
        gains, offsets, halves = [], [], []
        for layer, (_, height, width) in zip(network.layers, network.shapes, strict=True):
            if isinstance(layer, Yolo):
                new_coords, grid, s = layer.new_coords, np.array([width, height]), layer.scale_x_y
                y, x, a = np.indices((height, width, len(layer.anchors))).reshape(3, -1)
                gains.append(np.broadcast_to(s / grid, (len(a), 2)))
                offsets.append((np.stack([x, y], axis=1) - (s - 1) / 2) / grid)
                # half the anchor: the corners lie that far from the centre
                halves.append(np.array(layer.anchors)[a] / [network.width, network.height] / 2)
        rows = self.node("Concat", heads, "rows", axis=1)
        sizes = self.constant("row", [2, 2, 1, len(self.keep)], np.int64)
        txy, twh, objectness, classes = parts = ["txy", "twh", "objectness", "classes"]
        self.graph.node.append(helper.make_node("Split", [rows, sizes], parts, name="split", axis=-1))
        if new_coords:
            wh = self.node("Mul", [twh, twh], "wh")
            halves = [4 * half for half in halves]
        else:
            txy, objectness, classes = (self.node("Sigmoid", [t], f"{t}/sigmoid") for t in (txy, objectness, classes))
            wh = self.node("Exp", [twh], "wh")
        xy = self.node("Mul", [txy, self.constant("gain", np.concatenate(gains), np.float32)], "xy/scaled")
        xy = self.node("Add", [xy, self.constant("offset", np.concatenate(offsets), np.float32)], "xy")
        half = self.node("Mul", [wh, self.constant("half", np.concatenate(halves), np.float32)], "wh/half")
        corners = [self.node("Sub", [xy, half], "top_left"), self.node("Add", [xy, half], "bottom_right")]
        self.node("Concat", corners, "boxes", axis=-1)
        self.node("Mul", [objectness, classes], "scores")
        return sum(len(half) for half in halves)
