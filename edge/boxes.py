"""Geometry of boxes: pure functions of x1 y1 x2 y2."""

from __future__ import annotations

import numpy as np

from edge.values import Floats


def iou(a: Floats, b: Floats) -> Floats:
    """Intersection over union of boxes (…, 4) with boxes (…, 4), x1 y1 x2 y2 -> (…), by numpy's broadcasting.

    0 where neither has area.
    """
    sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(a) + area(b) - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(union), where=union > 0), np.float32)


def area(boxes: Floats) -> Floats:
    """Of boxes (…, 4) -> (…); 0 for one turned inside out."""
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return np.asarray(sides[..., 0] * sides[..., 1], np.float32)
