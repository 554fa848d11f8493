"""People cut out of their frame, as the encoder takes them: margin, square, size."""

from __future__ import annotations

import cv2
import numpy as np

from edge.bundle import EncoderFacts
from edge.values import Detections, Floats, Frame, Image


def crops_of(frame: Frame, people: Detections, facts: EncoderFacts, margin: float = 0.0) -> Image:
    """(n, S, S, 3) uint8 BGR, one per person; n may be 0.

    margin: added on each side as a share of the box's width and height, as far as the frame reaches.
    """
    crops = [to_square(cut(frame.image, box, margin), facts) for box in people.boxes]
    return np.stack(crops) if crops else np.zeros((0, facts.size, facts.size, 3), np.uint8)


def cut(image: Image, box: Floats, margin: float = 0.0) -> Image:
    """The pixels (h, w, 3) that a box (4,) px x1 y1 x2 y2 touches, at least one; a view, not a copy."""
    height, width = image.shape[:2]
    grow = margin * (box[2:] - box[:2]) if margin else 0
    # clipped before they become whole numbers, which have an end
    x1, y1 = np.clip(np.floor(box[:2] - grow), 0, (width - 1, height - 1)).astype(int)
    x2, y2 = np.clip(np.ceil(box[2:] + grow), (x1 + 1, y1 + 1), (width, height)).astype(int)
    return image[y1:y2, x1:x2]


def to_square(crop: Image, facts: EncoderFacts) -> Image:
    """(h, w, 3) -> (S, S, 3) uint8 BGR.

    pad keeps the whole person and fills the sides, squash ignores the aspect ratio, crop is CLIP's own centre crop.
    """
    height, width = crop.shape[:2]
    match facts.square:
        case "squash":
            return resized(crop, facts.size, facts.size)
        case "crop":
            edge = min(height, width)
            top, left = (height - edge) // 2, (width - edge) // 2
            return resized(crop[top : top + edge, left : left + edge], facts.size, facts.size)
        case "pad":
            scale = facts.size / max(height, width)
            inner_w, inner_h = max(1, round(width * scale)), max(1, round(height * scale))
            left, top = (facts.size - inner_w) // 2, (facts.size - inner_h) // 2
            square = np.empty((facts.size, facts.size, 3), np.uint8)
            square[:] = facts.fill_bgr
            square[top : top + inner_h, left : left + inner_w] = resized(crop, inner_w, inner_h)
            return square


def resized(image: Image, width: int, height: int) -> Image:
    """Area average where it shrinks (CLIP's resize is antialiased), bicubic where it grows, as CLIP's is."""
    # one side shrinks, the other grows: INTER_AREA averages only where both shrink, hence the two steps
    smaller = min(width, image.shape[1]), min(height, image.shape[0])
    averaged = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(averaged, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
