"""Reads a Darknet cfg: text in; layers, their inputs and their shapes out, or a ModelError that names the line.

What an option means, and its default, is AlexeyAB's Darknet (src/parser.c). Darknet skips what it does not know; here
only options known to leave the answer alone are skipped, because a network that is read wrongly still runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from edge.errors import ModelError

IMAGE = -1  # the number under which the first layer reads the image
ACTIVATIONS = ("linear", "leaky", "mish", "relu", "logistic", "swish")

_MAX_CFG_BYTES = 1 << 20  # yolov4.cfg has 12 kB
_MAX_VALUES = 1 << 27  # of one layer's output for one image; the widest layer of YOLOv4 at 2048 x 2048 has just as many
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")

# Options that shape the answer.
_READ = {
    "net": "width height",
    "convolutional": "filters size stride pad padding groups batch_normalize activation",
    "shortcut": "from activation",
    "route": "layers groups group_id",
    "maxpool": "size stride padding",
    "upsample": "stride",
    "yolo": "mask anchors classes num scale_x_y new_coords",
}
# Options that change the arithmetic, each with the one value that is supported: Darknet's default.
_ONLY = {
    "net": "channels=3 time_steps=1",
    "convolutional": "dilation=1 antialiasing=0 flipped=0 binary=0 xnor=0 bin_output=0 cbn=0 coordconv=0 sway=0 "
    "rotate=0 stretch=0 stretch_sway=0 dontload=0 dontloadscales=0",
    "shortcut": "weights_type=none weights_normalization=none",
    "route": "",
    "maxpool": "maxpool_depth=0 out_channels=1 antialiasing=0 maxpool_zero_nonmax=0",
    "upsample": "scale=1",
    "yolo": "",
}
# Options for training, for Darknet's own scheduling, and thresholds that its host applies after the network. letter_box
# says how the host makes the input square, which here is a fact of the manifest.
_IGNORED = {
    "net": "batch subdivisions sequential_subdivisions max_batches learning_rate learning_rate_min sgdr_cycle "
    "sgdr_mult momentum decay adam B1 B2 eps policy burn_in steps scales seq_scales step scale gamma "
    "power max_crop min_crop flip blur gaussian_noise mixup cutmix mosaic mosaic_bound letter_box "
    "contrastive contrastive_jit_flip contrastive_color unsupervised label_smooth_eps resize_step "
    "attention adversarial_lr max_chart_loss angle aspect saturation exposure hue track augment_speed "
    "try_fix_nan weights_reject_freq equidistant_point badlabels_rejection_percentage "
    "num_sigmas_reject_badlabels ema_alpha use_cuda_graph loss_scale dynamic_minibatch optimized_memory "
    "workspace_size_limit_MB show_receptive_field",
    "convolutional": "assisted_excitation grad_centr reverse dot angle stream wait_stream",
    "shortcut": "",
    "route": "stream wait_stream",
    "maxpool": "",
    "upsample": "",
    "yolo": "max max_delta counters_per_class label_smooth_eps objectness_smooth iou_normalizer obj_normalizer "
    "cls_normalizer delta_normalizer iou_loss iou_thresh_kind iou_thresh ignore_thresh truth_thresh "
    "jitter resize random focal_loss nms_kind beta_nms thresh nms_threshold show_details "
    "track_history_size sim_thresh dets_for_track dets_for_show track_ciou_norm",
}
_IGNORED_ANYWHERE = "clip onlyforward dont_update burnin_update stopbackward train_only_bn learning_rate"


@dataclass(frozen=True)
class Section:
    """One `[kind]` of the cfg with its options as text.

    `number` counts as Darknet's absolute `layers=` do: from 0, without [net]. Lines count from 1.
    """

    file: str
    kind: str
    number: int
    line: int
    options: dict[str, tuple[int, str]]  # name -> line, value

    def fault(self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None) -> ModelError:
        """The error about the option named by the first word of `what`, or about the whole section."""
        line = self.options.get(what.split()[0], (self.line, ""))[0]
        place = "[net]" if self.kind == "net" else f"section {self.number} [{self.kind}]"
        return ModelError(f"{self.file}, {place}, line {line}: {what}", expected=expected, got=got, remedy=remedy)

    def text(self, option: str, default: str | None = None) -> str:
        if option in self.options:
            return self.options[option][1]
        if default is None:
            raise self.fault(f"{option} is missing")
        return default

    def integer(self, option: str, low: int, high: int, default: int | None = None) -> int:
        text = self.text(option, None if default is None else str(default))
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise self.fault(option, expected=f"a whole number from {low} to {high}", got=text)
        return int(text)

    def integers(self, option: str) -> list[int]:
        items = [item.strip() for item in self.text(option).split(",")]
        if not all(_INTEGER.fullmatch(item) for item in items):
            raise self.fault(option, expected="whole numbers between commas", got=self.text(option))
        return [int(item) for item in items]

    def positives(self, option: str, default: str | None = None) -> list[float]:
        text = self.text(option, default)
        items = [item.strip() for item in text.split(",")]
        if not all(_NUMBER.fullmatch(item) and 0 < float(item) < 1e6 for item in items):
            raise self.fault(option, expected="numbers between commas, each over 0 and below a million", got=text)
        return [float(item) for item in items]

    def activation(self, default: str | None = None) -> str:
        name = self.text("activation", default)
        if name not in ACTIVATIONS:
            raise self.fault("activation", expected="one of " + ", ".join(ACTIVATIONS), got=name)
        return name


@dataclass(frozen=True)
class Layer:
    section: Section
    inputs: tuple[int, ...]  # numbers of the layers it reads, in order; IMAGE is the image


@dataclass(frozen=True)
class Convolutional(Layer):
    filters: int
    size: int
    stride: int
    padding: int  # on each side
    groups: int
    batch_normalize: bool
    activation: str


@dataclass(frozen=True)
class Shortcut(Layer):
    activation: str


@dataclass(frozen=True)
class Route(Layer):
    groups: int  # of each input only part `group_id` of `groups` equal parts is taken
    group_id: int


@dataclass(frozen=True)
class MaxPool(Layer):
    size: int
    stride: int
    padding: int  # both sides together; the smaller half goes left and above


@dataclass(frozen=True)
class Upsample(Layer):
    stride: int


@dataclass(frozen=True)
class Yolo(Layer):
    anchors: tuple[tuple[float, float], ...]  # width, height in pixels of the net input, those of `mask` only
    classes: int
    scale_x_y: float
    new_coords: bool


@dataclass(frozen=True)
class Network:
    height: int
    width: int
    layers: tuple[Layer, ...]
    shapes: tuple[tuple[int, int, int], ...]  # channels, height, width of each layer's output


def network_from_cfg(cfg: Path, size: int | tuple[int, int] | None = None) -> Network:
    """Reads `cfg`; `size` (one number, or height and width) takes the place of the sizes in [net].

    Raises ModelError for a file that cannot be read, an option or value that is not supported, layers that do not fit
    together, and a size that is no multiple of the network's overall stride.
    """
    net, *sections = _sections(cfg)
    layers: list[Layer] = []
    for section in sections:
        layers.append(_LAYERS[section.kind](section, layers))
    if not isinstance(layers[0], Convolutional) or layers[0].groups != 1:  # whose kernel takes the turn from BGR to RGB
        raise layers[0].section.fault("first layer", expected="[convolutional] with groups=1")
    if not any(isinstance(layer, Yolo) for layer in layers):
        raise ModelError(f"{cfg.name} has no [yolo] section", remedy="only YOLOv3 and YOLOv4 detectors are read")
    if size is None:
        height, width = net.integer("height", 1, 65536), net.integer("width", 1, 65536)
    else:
        height, width = (size, size) if isinstance(size, int) else size
    stride = _overall_stride(layers, limit=max(height, width))
    if min(height, width) < 1 or height % stride or width % stride:
        raise ModelError(
            f"{cfg.name} cannot run at this net size",
            expected=f"height and width that are multiples of {stride}, the network's overall stride",
            got=f"{height} x {width}",
        )
    shapes: list[tuple[int, int, int]] = []
    for layer in layers:
        inputs = [(3, height, width) if i == IMAGE else shapes[i] for i in layer.inputs]
        shapes.append(_shape(layer, inputs))
        if math.prod(shapes[-1]) > _MAX_VALUES:
            raise layer.section.fault("output is too large", expected=f"{_MAX_VALUES} values at most", got=shapes[-1])
    return Network(height, width, tuple(layers), tuple(shapes))


def _sections(cfg: Path) -> list[Section]:
    """The cfg's sections, [net] first, every option checked to be known."""
    try:
        with cfg.open("rb") as file:
            raw = file.read(_MAX_CFG_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as exc:
        raise ModelError(f"cannot read {cfg}", got=exc.strerror) from exc
    except UnicodeDecodeError as exc:
        raise ModelError(f"{cfg.name} is not text", expected="UTF-8", got=f"{exc.reason} at byte {exc.start}") from exc
    if len(raw) > _MAX_CFG_BYTES:
        raise ModelError(f"{cfg.name} is too large for a cfg", expected=f"{_MAX_CFG_BYTES} bytes at most")
    sections: list[Section] = []
    for number, raw_line in enumerate(text.split("\n"), start=1):
        line = raw_line.split("#")[0].strip()
        if not line or line.startswith(";"):
            continue
        place = f"{cfg.name}, line {number}"
        if line.startswith("[") and line.endswith("]"):
            kind = line[1:-1]
            if kind not in _READ or (kind == "net") != (not sections):
                known = "one of " + ", ".join(f"[{name}]" for name in _LAYERS) if sections else "[net] first"
                got = line if len(line) < 40 else line[:40] + "…"
                raise ModelError(f"{place}: section {len(sections) - 1} is not supported", expected=known, got=got)
            sections.append(Section(cfg.name, kind, len(sections) - 1, number, {}))
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not sections or not name or not equals:
            raise ModelError(f"{place} is not a cfg line", expected="[section] or option=value", got=repr(line[:40]))
        twice = name in sections[-1].options
        sections[-1].options[name] = (number, value)
        if twice:
            raise sections[-1].fault(f"{name} is given twice", remedy="readers differ in which one counts")
        _check_option(sections[-1], name, value)
    if len(sections) < 2:
        raise ModelError(f"{cfg.name} has no layers", expected="[net] and the sections of a detector")
    return sections


def _check_option(section: Section, name: str, value: str) -> None:
    only = dict(pair.split("=") for pair in _ONLY[section.kind].split())
    if name in only:
        same = (
            float(value) == float(only[name])
            if _NUMBER.fullmatch(value) and only[name] != "none"
            else value == only[name]
        )
        if not same:
            raise section.fault(f"{name} is not supported", expected=only[name], got=value)
    elif name not in f"{_READ[section.kind]} {_IGNORED[section.kind]} {_IGNORED_ANYWHERE}".split():
        raise section.fault(f"{name} is not a known option", remedy="delete it if it is only for training")


def _reads(section: Section, layers: list[Layer], option: str | None = None) -> tuple[int, ...]:
    """The layer before, or those that `option` names: relative when negative, else absolute."""
    here = len(layers)
    wanted = [-1] if option is None else section.integers(option)
    if here == 0 and option is None:
        return (IMAGE,)
    numbers = tuple(here + want if want < 0 else want for want in wanted)
    for want, number in zip(wanted, numbers, strict=True):
        if not 0 <= number < here:
            raise section.fault(option or "input", expected=f"layers before layer {here}", got=want)
        if isinstance(layers[number], Yolo):
            raise section.fault(
                option or "input", expected="a layer with feature maps", got=f"layer {number}, a [yolo]"
            )
    return numbers


def _convolutional(section: Section, layers: list[Layer]) -> Layer:
    size = section.integer("size", 1, 255)
    pad = section.integer("pad", 0, 1, default=0)
    padding = section.integer("padding", 0, 255, default=0)
    return Convolutional(
        section,
        _reads(section, layers),
        filters=section.integer("filters", 1, 1 << 20),
        size=size,
        stride=section.integer("stride", 1, 255, default=1),
        padding=size // 2 if pad else padding,
        groups=section.integer("groups", 1, 1 << 20, default=1),
        batch_normalize=section.integer("batch_normalize", 0, 1, default=0) == 1,
        activation=section.activation(),  # no default: Darknet's is logistic, cv2.dnn's linear
    )


def _shortcut(section: Section, layers: list[Layer]) -> Layer:
    sources = _reads(section, layers, "from")
    if len(sources) != 1:
        raise section.fault("from", expected="one layer", got=section.text("from"))
    return Shortcut(section, _reads(section, layers) + sources, activation=section.activation("linear"))


def _route(section: Section, layers: list[Layer]) -> Layer:
    groups = section.integer("groups", 1, 1 << 20, default=1)
    group_id = section.integer("group_id", 0, groups - 1, default=0)
    return Route(section, _reads(section, layers, "layers"), groups=groups, group_id=group_id)


def _maxpool(section: Section, layers: list[Layer]) -> Layer:
    size = section.integer("size", 1, 255)  # no defaults for size and stride: Darknet's and cv2.dnn's differ
    # More than 2 (size - 1) would let a window see nothing but padding.
    padding = section.integer("padding", 0, 2 * (size - 1), default=size - 1)
    stride = section.integer("stride", 1, 255)
    return MaxPool(section, _reads(section, layers), size=size, stride=stride, padding=padding)


def _upsample(section: Section, layers: list[Layer]) -> Layer:
    return Upsample(section, _reads(section, layers), stride=section.integer("stride", 1, 255, default=2))


def _yolo(section: Section, layers: list[Layer]) -> Layer:
    num = section.integer("num", 1, 1000)
    flat, mask = section.positives("anchors"), section.integers("mask")
    if len(flat) != 2 * num:
        raise section.fault("anchors", expected=f"num = {num} pairs, {2 * num} numbers", got=f"{len(flat)} numbers")
    if not all(0 <= index < num for index in mask):
        raise section.fault("mask", expected=f"anchors from 0 to {num - 1}", got=section.text("mask"))
    scales = section.positives("scale_x_y", default="1")
    if len(scales) != 1:
        raise section.fault("scale_x_y", expected="one number", got=section.text("scale_x_y"))
    return Yolo(
        section,
        _reads(section, layers),
        anchors=tuple((flat[2 * index], flat[2 * index + 1]) for index in mask),
        classes=section.integer("classes", 1, 1 << 20),
        scale_x_y=scales[0],
        new_coords=section.integer("new_coords", 0, 1, default=0) == 1,
    )


_LAYERS: dict[str, Callable[[Section, list[Layer]], Layer]] = {
    "convolutional": _convolutional,
    "shortcut": _shortcut,
    "route": _route,
    "maxpool": _maxpool,
    "upsample": _upsample,
    "yolo": _yolo,
}


def _overall_stride(layers: list[Layer], limit: int) -> int:
    """The smallest number whose multiples every layer divides without a rest; stops early when beyond `limit`."""
    steps: list[Fraction] = []  # pixels of the net input to one cell of each layer's output
    overall = 1
    for layer in layers:
        step = max((steps[i] if i != IMAGE else Fraction(1)) for i in layer.inputs)
        if isinstance(layer, (Convolutional, MaxPool)):
            step *= layer.stride
        elif isinstance(layer, Upsample):
            step /= layer.stride
        steps.append(step)
        overall = math.lcm(overall, step.numerator)
        if overall > limit or step.denominator > _MAX_VALUES:
            break
    return overall


def _shape(layer: Layer, inputs: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Channels, height, width of the layer's output; a ModelError if the inputs do not fit it."""
    fault = layer.section.fault
    channels, height, width = inputs[0]
    if isinstance(layer, Convolutional):
        if channels % layer.groups or layer.filters % layer.groups:
            got = f"{channels} channels, {layer.filters} filters"
            raise fault("groups", expected=f"channels and filters that {layer.groups} groups divide", got=got)
        return layer.filters, *_slide(layer, height, width, 2 * layer.padding)
    if isinstance(layer, MaxPool):
        return channels, *_slide(layer, height, width, layer.padding)
    if isinstance(layer, Upsample):
        return channels, height * layer.stride, width * layer.stride
    if isinstance(layer, Shortcut):
        if inputs[1] != inputs[0]:
            raise fault("from adds another shape", expected=inputs[0], got=inputs[1])
        return inputs[0]
    if isinstance(layer, Route):
        if any(shape[1:] != (height, width) for shape in inputs):
            raise fault("layers joins maps of different sizes", expected=f"{height} x {width}", got=inputs)
        if any(shape[0] % layer.groups for shape in inputs):
            raise fault("groups", expected=f"channels that {layer.groups} groups divide", got=[c for c, _, _ in inputs])
        return sum(shape[0] // layer.groups for shape in inputs), height, width
    assert isinstance(layer, Yolo)
    expected = len(layer.anchors) * (5 + layer.classes)
    if channels != expected:
        what = "classes and mask do not fit the layer before"
        raise fault(what, expected=f"{len(layer.anchors)} x (5 + {layer.classes}) = {expected} channels", got=channels)
    return inputs[0]


def _slide(layer: Convolutional | MaxPool, height: int, width: int, padding: int) -> tuple[int, int]:
    """Places of a window of layer.size on a map with `padding` more rows and columns, rounded down as Darknet does."""
    if min(height, width) + padding < layer.size:
        expected, got = f"a map of at least {layer.size - padding}", f"{height} x {width}"
        raise layer.section.fault("size is larger than the map", expected=expected, got=got)
    return (height + padding - layer.size) // layer.stride + 1, (width + padding - layer.size) // layer.stride + 1
