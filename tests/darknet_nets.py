"""Darknet networks for tests: the structures of YOLOv4 and YOLOv4-tiny as cfg text, and random weights for any cfg."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.darknet_cfg import IMAGE, Convolutional, Yolo, network_from_cfg

ANCHORS = (12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401)
TINY_ANCHORS = (10, 14, 23, 27, 37, 58, 81, 82, 135, 169, 344, 319)


def section(kind: str, **options: object) -> str:
    """One section; `layers=(-1, -4)` becomes `layers=-1,-4`, and a final underscore hides a Python keyword."""
    lines = [f"[{kind}]"]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        lines.append(f"{name.rstrip('_')}={text}")
    return "\n".join([*lines, "", ""])


def net(width: int, height: int) -> str:
    return section("net", batch=1, width=width, height=height, channels=3)


def conv(filters: int, size: int, activation: str, stride: int = 1) -> str:
    return section(
        "convolutional", batch_normalize=1, filters=filters, size=size, stride=stride, pad=1, activation=activation
    )


def head(mask: tuple[int, ...], anchors: tuple[int, ...], classes: int, scale_x_y: float) -> str:
    """The linear convolution before a [yolo], and the [yolo]; thresh=0 keeps cv2.dnn from zeroing low scores."""
    filters = len(mask) * (5 + classes)
    return section("convolutional", filters=filters, size=1, stride=1, pad=1, activation="linear") + section(
        "yolo", mask=mask, anchors=anchors, classes=classes, num=len(anchors) // 2, scale_x_y=scale_x_y, thresh=0
    )


def yolov4(width: int = 608, height: int = 608, classes: int = 80) -> str:
    """YOLOv4 (Bochkovskiy et al. 2020): CSPDarknet53 with Mish, SPP, PANet with leaky ReLU, three heads; 161 layers."""
    text = net(width, height) + conv(32, 3, "mish")
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        half = max(filters // 2, 64)
        inner = filters // 2  # differs from `half` in the first stage only
        block = conv(inner, 1, "mish") + conv(half, 3, "mish") + section("shortcut", from_=-3, activation="linear")
        text += conv(filters, 3, "mish", stride=2) + conv(half, 1, "mish") + section("route", layers=-2)
        text += conv(half, 1, "mish") + blocks * block + conv(half, 1, "mish")
        text += section("route", layers=(-1, -3 * blocks - 4)) + conv(filters, 1, "mish")

    def narrow(filters: int, convolutions: int) -> str:
        """1x1 and 3x3 in turn, starting and ending narrow."""
        pair = (conv(filters, 1, "leaky"), conv(2 * filters, 3, "leaky"))
        return "".join(pair[i % 2] for i in range(convolutions))

    text += narrow(512, 3)
    for size, back in ((5, -2), (9, -4), (13, 0)):  # spatial pyramid pooling
        text += section("maxpool", stride=1, size=size) + (section("route", layers=back) if back else "")
    text += section("route", layers=(-1, -3, -5, -6)) + narrow(512, 3)
    for filters, tap in ((256, 85), (128, 54)):  # up, joined with the backbone at strides 16 and 8
        text += conv(filters, 1, "leaky") + section("upsample", stride=2) + section("route", layers=tap)
        text += conv(filters, 1, "leaky") + section("route", layers=(-1, -3)) + narrow(filters, 5)
    text += conv(256, 3, "leaky") + head((0, 1, 2), ANCHORS, classes, 1.2)
    for filters, back, mask, scale in ((256, -16, (3, 4, 5), 1.1), (512, -37, (6, 7, 8), 1.05)):  # and down again
        text += section("route", layers=-4) + conv(filters, 3, "leaky", stride=2)
        text += section("route", layers=(-1, back)) + narrow(filters, 6) + head(mask, ANCHORS, classes, scale)
    return text


def yolov4_tiny(width: int = 416, height: int = 416, classes: int = 80) -> str:
    """YOLOv4-tiny: leaky ReLU, partial stages through route groups, 2x2 max pooling, two heads; 38 layers."""
    text = net(width, height) + conv(32, 3, "leaky", stride=2) + conv(64, 3, "leaky", stride=2)
    for filters in (64, 128, 256):
        text += conv(filters, 3, "leaky") + section("route", layers=-1, groups=2, group_id=1)
        text += 2 * conv(filters // 2, 3, "leaky") + section("route", layers=(-1, -2)) + conv(filters, 1, "leaky")
        text += section("route", layers=(-6, -1)) + section("maxpool", size=2, stride=2)
    text += conv(512, 3, "leaky") + conv(256, 1, "leaky") + conv(512, 3, "leaky")
    text += head((3, 4, 5), TINY_ANCHORS, classes, 1.05)
    text += section("route", layers=-4) + conv(128, 1, "leaky") + section("upsample", stride=2)
    text += section("route", layers=(-1, 23)) + conv(256, 3, "leaky") + head((1, 2, 3), TINY_ANCHORS, classes, 1.05)
    return text


def write_weights(cfg: Path, weights: Path, seed: int = 0) -> Path:
    """Random weights that keep the scale of the feature maps from layer to layer, and heads that spread.

    A kernel of variance 1.7 / fan-in suits ReLU-like activations; batch-norm then changes scales by little and shifts
    freely. Convolutions that end in a shortcut are small, so that eight sums in a row do not grow, and those before a
    [yolo] too, so that the logits stay where a sigmoid still shows differences.
    """
    rng = np.random.default_rng(seed)
    network = network_from_cfg(cfg)
    layers = network.layers
    with weights.open("wb") as file:
        file.write(np.array([0, 2, 5], "<i4").tobytes() + np.array([32013312], "<i8").tobytes())
        for i, layer in enumerate(layers):
            if not isinstance(layer, Convolutional):
                continue
            source = layer.inputs[0]
            fan_in = (3 if source == IMAGE else network.shapes[source][0]) // layer.groups * layer.size**2
            n = layer.filters
            after = layers[i + 1] if i + 1 < len(layers) else None
            gain = {"shortcut": 0.3, "yolo": 0.3}.get("" if after is None else after.section.kind, 1.0)
            if layer.batch_normalize:
                beta, mean = rng.normal(0, 0.2, n), rng.normal(0, 0.2, n)
                gamma, variance = rng.uniform(0.8, 1.2, n), rng.uniform(0.7, 1.3, n)
                parts = [beta, gamma, mean, variance]
            else:
                parts = [rng.normal(0, 1.5 if isinstance(after, Yolo) else 0.3, n)]
            for part in parts:
                file.write(part.astype("<f4").tobytes())
            kernel = rng.standard_normal(n * fan_in, dtype=np.float32)
            kernel *= np.float32(gain * (1.7 / fan_in) ** 0.5)
            file.write(kernel.tobytes())
    return weights
