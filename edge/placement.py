"""Which part of a frame lies where in the picture that a network takes: whole numbers, and no pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bank import Look
from edge.bundle import DetectorFacts, EncoderFacts
from edge.values import Floats, Region

Ints = NDArray[np.int32]

# Of an upright person's box: where each region begins and ends, as shares of its height.
REGIONS: dict[Region, tuple[float, float]] = {
    "whole": (0.0, 1.0),
    "head": (0.0, 0.3),
    "upper": (0.1, 0.6),
    "lower": (0.4, 1.0),
    "feet": (0.75, 1.0),
}


@dataclass(frozen=True, eq=False)
class Placement:
    """n pictures of one frame; what a target leaves of its picture is filled with a colour.

    sources: (n, 4) int32 x1 y1 x2 y2 px of the frame, at least one pixel each and inside it. targets: (n, 4) int32 left
    top width height px of the picture, inside it too.
    """

    sources: Ints
    targets: Ints

    def __post_init__(self) -> None:
        for name, array in (("sources", self.sources), ("targets", self.targets)):
            if array.dtype != np.int32 or array.shape != (len(self.sources), 4):
                raise ValueError(f"Placement.{name} must be int32 (n, 4), got {array.dtype} {array.shape}")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def table(self) -> Ints:
        """(n, 8): x1 y1 x2 y2 left top width height, as the kernels of edge/pixels.cu read it."""
        return np.concatenate([self.sources, self.targets], axis=1)


def fitted(frame_width: int, frame_height: int, facts: DetectorFacts) -> Placement:
    """The whole frame as the detector takes it: one picture.

    stretch ignores the aspect ratio, as Darknet's own test code does; letterbox keeps it.
    """
    target = 0, 0, facts.width, facts.height
    if facts.resize == "letterbox":
        scale = min(facts.width / frame_width, facts.height / frame_height)
        target = _centred(frame_width * scale, frame_height * scale, facts.width, facts.height)
    return Placement(np.array([[0, 0, frame_width, frame_height]], np.int32), np.array([target], np.int32))


def cropped(
    boxes: Floats, frame_width: int, frame_height: int, facts: EncoderFacts, look: Look, region: Region
) -> Placement:
    """The region of each box (n, 4) px x1 y1 x2 y2 as the encoder takes it: n pictures.

    pad keeps the whole person, squash ignores the aspect ratio, crop is CLIP's own centre crop; which of them is said
    by the look, and where it does not, by the bundle.
    """
    square, size = look.square or facts.square, facts.size
    sources = touched(regions_of(boxes, region), frame_width, frame_height, look.margin)
    targets = np.full((len(boxes), 4), (0, 0, size, size), np.int32)
    if square == "crop":
        lengths = sources[:, 2:] - sources[:, :2]
        edges = lengths.min(axis=1, keepdims=True)
        corners = sources[:, :2] + (lengths - edges) // 2
        sources = np.concatenate([corners, corners + edges], axis=1)
    elif square == "pad":
        for row, (x1, y1, x2, y2) in enumerate(sources.tolist()):
            width, height = x2 - x1, y2 - y1
            longest = max(width, height)
            targets[row] = _centred(size * width / longest, size * height / longest, size, size)
    return Placement(sources, targets)


def touched(boxes: Floats, frame_width: int, frame_height: int, margin: float = 0.0) -> Ints:
    """The pixels that each box (n, 4) px x1 y1 x2 y2 touches, at least one: (n, 4) int32, x1 y1 x2 y2 inside the frame.

    margin: added on each side as a share of the box's width and height, as far as the frame reaches; less than 0 cuts
    off.
    """
    grow = margin * (boxes[:, 2:] - boxes[:, :2]) if margin else np.float32(0)
    # clipped before they become whole numbers, which have an end
    starts = np.clip(np.floor(boxes[:, :2] - grow), 0, (frame_width - 1, frame_height - 1)).astype(np.int32)
    ends = np.clip(np.ceil(boxes[:, 2:] + grow), starts + 1, (frame_width, frame_height)).astype(np.int32)
    return np.concatenate([starts, ends], axis=1)


def regions_of(boxes: Floats, region: Region) -> Floats:
    """The part of each box (n, 4) px x1 y1 x2 y2 in which `region` of an upright person lies: (n, 4)."""
    top, bottom = REGIONS[region]
    heights = boxes[:, 3] - boxes[:, 1]
    parts = np.array(boxes, np.float32)
    parts[:, 1], parts[:, 3] = boxes[:, 1] + top * heights, boxes[:, 1] + bottom * heights
    return parts


def _centred(inner_width: float, inner_height: float, width: int, height: int) -> tuple[int, int, int, int]:
    """left top width height (px) of a picture of about this size in the middle of another."""
    inner_w, inner_h = max(1, round(inner_width)), max(1, round(inner_height))
    return (width - inner_w) // 2, (height - inner_h) // 2, inner_w, inner_h
