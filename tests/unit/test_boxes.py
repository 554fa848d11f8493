"""IoU against counting the cells of an integer grid."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge.boxes import area, iou

Box = tuple[int, int, int, int]
F32 = np.float32

# corners in any order: a box may be turned inside out, and then covers no cell
grid_box = st.tuples(*[st.integers(-3, 6)] * 4)
float_boxes = hnp.arrays(F32, (4,), elements=st.floats(-4096, 4096, width=32))


def cells(box: Box) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def counted_iou(a: Box, b: Box) -> Fraction:
    union = len(cells(a) | cells(b))
    return Fraction(len(cells(a) & cells(b)), union) if union else Fraction(0)


def array(box: Box) -> NDArray[np.float32]:
    return np.array(box, F32)


@given(grid_box, grid_box)
def test_iou_counts_cells(a: Box, b: Box) -> None:
    assert iou(array(a), array(b)) == F32(float(counted_iou(a, b)))
    assert area(array(a)) == len(cells(a))


@given(float_boxes, float_boxes)
def test_iou_is_symmetric_and_bounded(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    there, back = iou(a, b), iou(b, a)
    assert there == back
    assert 0 <= there <= 1
    assert iou(a, a) == (1 if area(a) > 0 else 0)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_iou_of_one_with_many_and_of_pairs(n: int) -> None:
    rng = np.random.default_rng(n)
    boxes = rng.integers(0, 9, (n, 4)).astype(F32)
    one = array((2, 2, 6, 7))
    assert iou(one, boxes).shape == (n,)
    assert iou(boxes, boxes).shape == area(boxes).shape == (n,)
    table = iou(boxes[:, None], boxes[None])
    assert table.shape == (n, n)
    for i in range(n):
        for j in range(n):
            assert table[i, j] == iou(boxes[i], boxes[j])


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((0, 0, 4, 4), (4, 0, 8, 4), 0.0),  # side by side
        ((0, 0, 4, 4), (4, 4, 8, 8), 0.0),  # corner to corner
        ((0, 0, 0, 4), (0, 0, 0, 4), 0.0),  # no area, though equal
        ((4, 4, 0, 0), (0, 0, 4, 4), 0.0),  # inside out
        ((0, 0, 2, 2), (0, 0, 4, 2), 0.5),
        ((0, 0, 3840, 2160), (0, 0, 3840, 2160), 1.0),
    ],
)
def test_iou_table(a: Box, b: Box, wanted: float) -> None:
    result = iou(array(a), array(b))
    assert result == wanted
    assert result.dtype == F32


def test_nan_is_no_overlap() -> None:
    nan = np.full(4, np.nan, F32)
    assert iou(nan, array((0, 0, 4, 4))) == 0
    assert not area(nan) > 0
