"""Where people count: polygons in a camera's picture, and whose feet are in one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

from edge.values import Floats

Point = tuple[float, float]  # x, y in 0..1 of the picture's width and height, from the top left
Polygon = Sequence[Point]  # corners in order; the last one is joined to the first

_LEAST = 1e-6  # of the picture: less than a pixel of any camera


def inside(zones: Sequence[Polygon], boxes: Floats, width: int, height: int) -> NDArray[np.bool_]:
    """(n,) bool: the middle of the lower edge of boxes (n, 4), px, lies in one of the zones; no zones: all do.

    A zone's border belongs to it, so that one along the picture's edge holds people who are cut off there.
    """
    if not zones:
        return np.ones(len(boxes), np.bool_)
    size = np.array([width, height], np.float32)
    corners = [np.asarray(zone, np.float32) * size for zone in zones]  # each (k, 2) float32, px
    feet = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, boxes[:, 3]], axis=1).tolist()  # n pairs x, y
    return np.array([any(cv2.pointPolygonTest(zone, foot, False) >= 0 for zone in corners) for foot in feet], np.bool_)


def flaw_of(polygon: Polygon) -> str | None:
    """Why nobody could say what is inside, in words; None where it can be said."""
    for i, corner in enumerate(polygon):
        if corner in polygon[:i]:
            return f"the corner {list(corner)} comes twice; the last corner is joined to the first by itself"
    sides = list(zip(polygon, [*polygon[1:], *polygon[:1]], strict=True))
    for (i, one), (j, other) in combinations(enumerate(sides), 2):
        neighbours = j - i in (1, len(sides) - 1)
        if not neighbours and _meet(*one, *other):
            shown = " and ".join(f"{list(a)}-{list(b)}" for a, b in (one, other))
            return f"the sides {shown} meet; name the corners in order, as if walking round the zone"
    if abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in sides)) / 2 < _LEAST:
        return "its corners lie on one line"
    return None


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the segments ab and cd have a point in common."""
    beside = _turn(a, b, c), _turn(a, b, d), _turn(c, d, a), _turn(c, d, b)
    if beside[0] * beside[1] < 0 and beside[2] * beside[3] < 0:
        return True
    ends = ((a, b, c), (a, b, d), (c, d, a), (c, d, b))
    return any(turn == 0 and _spans(*end) for turn, end in zip(beside, ends, strict=True))


def _turn(a: Point, b: Point, c: Point) -> float:
    """Twice the area of abc: its sign says on which side of ab c lies, 0 that it lies on their line."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _spans(a: Point, b: Point, c: Point) -> bool:
    """Whether c, a point on the line ab, lies between a and b."""
    return all(min(a[axis], b[axis]) <= c[axis] <= max(a[axis], b[axis]) for axis in (0, 1))
