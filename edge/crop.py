"""People cut out of their frame, as the encoder takes them: margin, square, size."""

from __future__ import annotations

import cv2
import numpy as np

from edge.bank import Look
from edge.boxes import iou
from edge.bundle import EncoderFacts
from edge.values import Detections, Floats, Frame, Image, Region

# Of an upright person's box: where each region begins and ends, as shares of its height.
REGIONS: dict[Region, tuple[float, float]] = {
    "whole": (0.0, 1.0),
    "head": (0.0, 0.3),
    "upper": (0.1, 0.6),
    "lower": (0.4, 1.0),
    "feet": (0.75, 1.0),
}

FULL_HEIGHT = 160  # px; encoders see 128 to 224, and more of a person adds little
SHARP = 200.0  # variance of the Laplacian, grey levels², at which a crop counts half
BORDER = 2.0  # px; a box that ends there may go on


def crops_of(
    frame: Frame, people: Detections, facts: EncoderFacts, look: Look | None = None, region: Region = "whole"
) -> Image:
    """(n, S, S, 3) uint8 BGR, one per person; n may be 0. look: without one, the whole box as the bundle squares it."""
    look = look or Look()
    facts = facts if look.square is None else facts.model_copy(update={"square": look.square})
    crops = [to_square(cut(frame.image, part, look.margin), facts) for part in regions_of(people.boxes, region)]
    return np.stack(crops) if crops else np.zeros((0, facts.size, facts.size, 3), np.uint8)


def regions_of(boxes: Floats, region: Region) -> Floats:
    """The part of each box (n, 4) px x1 y1 x2 y2 in which `region` of an upright person lies: (n, 4)."""
    top, bottom = REGIONS[region]
    heights = boxes[:, 3] - boxes[:, 1]
    parts = np.array(boxes, np.float32)
    parts[:, 1], parts[:, 3] = boxes[:, 1] + top * heights, boxes[:, 1] + bottom * heights
    return parts


def qualities_of(frame: Frame, people: Detections) -> Floats:
    """How well each person can be seen: (n,) float32 in 0..1, a product of what speaks for a look.

    The box's height up to FULL_HEIGHT, its sharpness (the variance of the Laplacian, which blur lowers: Pech-Pacheco et
    al. 2000), the detector's score, one less its largest IoU with another box, and half for a box cut by the border.
    """
    qualities = np.zeros(len(people), np.float32)
    for i, box in enumerate(people.boxes):
        height = min(float(box[3] - box[1]) / FULL_HEIGHT, 1)
        person = cut(frame.image, box)
        if person.shape[0] > FULL_HEIGHT:  # near and far are then measured alike, and a crowd up close costs no more
            person = resized(person, max(1, round(person.shape[1] * FULL_HEIGHT / person.shape[0])), FULL_HEIGHT)
        grey = cv2.cvtColor(person, cv2.COLOR_BGR2GRAY)
        variance = float(cv2.Laplacian(grey, cv2.CV_32F).var())
        others = np.delete(people.boxes, i, axis=0)
        free = 1 - float(iou(box, others).max(initial=0))
        border = (box <= BORDER).any() or box[2] >= frame.width - BORDER or box[3] >= frame.height - BORDER
        sharp = variance / (variance + SHARP)
        qualities[i] = height * sharp * people.scores[i] * free * (0.5 if border else 1)
    return qualities


def cut(image: Image, box: Floats, margin: float = 0.0) -> Image:
    """The pixels (h, w, 3) that a box (4,) px x1 y1 x2 y2 touches, at least one; a view, not a copy.

    margin: added on each side as a share of the box's width and height, as far as the frame reaches; less than 0 cuts
    off.
    """
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
            longest = max(height, width)
            inner_w, inner_h = (max(1, round(facts.size * edge / longest)) for edge in (width, height))
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
