"""The pictures that networks take, made on the CPU: parts of a frame, resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from edge.backend import Pictures
from edge.bank import Look
from edge.bundle import DetectorFacts, EncoderFacts
from edge.placement import Placement, cropped, fitted, touched
from edge.values import Detections, Floats, Frame, Image, Region

GREY = (128, 128, 128)  # Darknet fills a letterbox with 0.5


class HostImaging:
    """An Imaging whose pictures are arrays, made with OpenCV."""

    def fit(self, frames: Sequence[Frame], facts: DetectorFacts) -> Image:
        """(f, H, W, 3) uint8 BGR: whole frames as the detector takes them, a letterbox filled with grey."""
        pictures = [fit(frame.image, facts) for frame in frames]
        return np.stack(pictures) if pictures else np.zeros((0, facts.height, facts.width, 3), np.uint8)

    def crop(self, parts: Sequence[tuple[Frame, Floats]], facts: EncoderFacts, look: Look, region: Region) -> Image:
        """(n, S, S, 3) uint8 BGR: one picture per row of all the parts' boxes (k, 4) px, in order; n may be 0."""
        crops = [_crops(frame.image, boxes, facts, look, region) for frame, boxes in parts]
        return np.concatenate(crops) if crops else np.zeros((0, facts.size, facts.size, 3), np.uint8)

    def mirror(self, pictures: Pictures) -> Image:
        """The same with left and right changed. Raises TypeError for pictures that are not the CPU's."""
        if not isinstance(pictures, np.ndarray):
            raise TypeError("HostImaging must be given arrays, got pictures in the GPU's memory")
        return np.ascontiguousarray(pictures[:, :, ::-1])


def fit(image: Image, facts: DetectorFacts) -> Image:
    """A frame as the net takes it: (height, width, 3) uint8 BGR."""
    placement = fitted(image.shape[1], image.shape[0], facts)
    return np.asarray(_placed(image, placement, facts.width, facts.height, GREY, stretched)[0], np.uint8)


def crops_of(
    frame: Frame, people: Detections, facts: EncoderFacts, look: Look | None = None, region: Region = "whole"
) -> Image:
    """(n, S, S, 3) uint8 BGR, one per person; n may be 0. look: without one, the whole box as the bundle squares it."""
    return _crops(frame.image, people.boxes, facts, look or Look(), region)


def cut(image: Image, box: Floats) -> Image:
    """The pixels (h, w, 3) that a box (4,) px x1 y1 x2 y2 touches, at least one; a view, not a copy."""
    ((x1, y1, x2, y2),) = touched(box[None], image.shape[1], image.shape[0]).tolist()
    return image[y1:y2, x1:x2]


def resized(image: Image, width: int, height: int) -> Image:
    """Area average where it shrinks (CLIP's resize is antialiased), bicubic where it grows, as CLIP's is."""
    # one side shrinks, the other grows: INTER_AREA averages only where both shrink, hence the two steps
    smaller = min(width, image.shape[1]), min(height, image.shape[0])
    averaged = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(averaged, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def stretched(image: Image, width: int, height: int) -> Image:
    """Bilinear and without an average where it shrinks, as Darknet's resize is."""
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _crops(image: Image, boxes: Floats, facts: EncoderFacts, look: Look, region: Region) -> Image:
    placement = cropped(boxes, image.shape[1], image.shape[0], facts, look, region)
    return _placed(image, placement, facts.size, facts.size, facts.fill_bgr, resized)


def _placed(
    image: Image,
    placement: Placement,
    width: int,
    height: int,
    fill: tuple[int, int, int],
    resize: Callable[[Image, int, int], Image],
) -> Image:
    """(n, height, width, 3) uint8 BGR, one picture per row of the placement."""
    pictures = np.empty((len(placement), height, width, 3), np.uint8)
    pictures[:] = fill
    for picture, (x1, y1, x2, y2, left, top, inner_w, inner_h) in zip(pictures, placement.table.tolist(), strict=True):
        picture[top : top + inner_h, left : left + inner_w] = resize(image[y1:y2, x1:x2], inner_w, inner_h)
    return pictures
