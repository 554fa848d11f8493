"""People cut out of their frame: which pixels, and how they become a square."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import EncoderFacts, Look, SquareMode
from edge.crop import crops_of, cut, resized, to_square
from edge.values import Detections, Frame, Image
from tests.fakes import ENCODER_FACTS, frame

F32 = np.float32
HEIGHT, WIDTH = 20, 30
FILL = ENCODER_FACTS.fill_bgr
MODES: list[SquareMode] = ["pad", "squash", "crop"]


def facts(square: SquareMode, size: int = 16) -> EncoderFacts:
    return ENCODER_FACTS.model_copy(update={"square": square, "size": size})


def chart(height: int = HEIGHT, width: int = WIDTH) -> Image:
    """Every pixel says where it is: (x, y, 7)."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([xs, ys, np.full_like(xs, 7)], axis=2).astype(np.uint8)


def places(crop: Image) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for x, y, _ in crop.reshape(-1, 3)}


def box(*edges: float) -> NDArray[np.float32]:
    return np.array(edges, F32)


# ---- cut ----

edge_px = st.floats(-40, 60, width=32)


@given(x=edge_px, y=edge_px, w=st.floats(0.0625, 50, width=32), h=st.floats(0.0625, 50, width=32))
def test_cut_takes_the_pixels_that_the_box_touches(x: float, y: float, w: float, h: float) -> None:
    one = box(x, y, x + w, y + h)
    x1, y1, x2, y2 = one.tolist()
    touched = {(i, j) for i in range(WIDTH) for j in range(HEIGHT) if i < x2 and i + 1 > x1 and j < y2 and j + 1 > y1}
    taken = places(cut(chart(), one))
    if touched:
        assert taken == touched
    else:
        assert len(taken) >= 1, "at least a pixel, also for a box outside the frame"


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (box(3, 4, 6, 6), (3, 4, 6, 6)),
        (box(3.9, 4.1, 5.1, 5.9), (3, 4, 6, 6)),
        (box(3, 4, 4, 5), (3, 4, 4, 5)),  # one pixel
        (box(3.2, 4.2, 3.3, 4.3), (3, 4, 4, 5)),  # less than one
        (box(3, 4, 3, 4), (3, 4, 4, 5)),  # nothing
        (box(0, 0, 30, 20), (0, 0, 30, 20)),  # all
        (box(-5, -5, 2, 2), (0, 0, 2, 2)),
        (box(28, 18, 99, 99), (28, 18, 30, 20)),
        (box(-9, -9, -5, -5), (0, 0, 1, 1)),  # outside: the nearest pixel
        (box(50, 50, 60, 60), (29, 19, 30, 20)),
        (box(30, 20, 30, 20), (29, 19, 30, 20)),
        (box(6, 6, 3, 4), (6, 6, 7, 7)),  # inside out
    ],
)
def test_cut_at_the_borders(one: NDArray[np.float32], wanted: tuple[int, int, int, int]) -> None:
    x1, y1, x2, y2 = wanted
    crop = cut(chart(), one)
    assert crop.shape == (y2 - y1, x2 - x1, 3)
    assert (crop == chart()[y1:y2, x1:x2]).all()


@pytest.mark.parametrize("far", [1e20, float("inf")])
def test_cut_of_a_box_that_reaches_beyond_all_numbers_is_the_frame(far: float) -> None:
    assert cut(chart(), box(-far, -far, far, far)).shape == chart().shape


@pytest.mark.parametrize(
    ("margin", "wanted"),
    [
        (0.0, (10, 5, 20, 15)),
        (0.1, (9, 4, 21, 16)),
        (0.05, (9, 4, 21, 16)),
        (0.25, (7, 2, 23, 18)),
        (1.0, (0, 0, 30, 20)),
    ],
)
def test_the_margin_is_a_share_of_the_box_as_far_as_the_frame_reaches(margin: float, wanted: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = wanted
    assert places(cut(chart(), box(10, 5, 20, 15), margin)) == places(chart()[y1:y2, x1:x2])


def test_cut_neither_copies_nor_changes() -> None:
    image, one = chart(), box(1.5, 1.5, 4, 4)
    assert np.shares_memory(cut(image, one, 0.5), image)
    assert (image == chart()).all()
    assert one.tolist() == [1.5, 1.5, 4, 4]


# ---- to_square ----

sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@given(sizes, st.sampled_from(MODES), st.sampled_from([1, 2, 15, 16]))
def test_a_plain_colour_stays_it_in_a_square(size: tuple[int, int], mode: SquareMode, side: int) -> None:
    crop = np.full((*size, 3), (200, 100, 50), np.uint8)
    before = crop.copy()
    square = to_square(crop, facts(mode, side))
    assert square.shape == (side, side, 3)
    assert square.dtype == np.uint8
    own = (square == (200, 100, 50)).all(axis=2)
    if mode == "pad":
        fill = (square == FILL).all(axis=2)
        assert (own | fill).all()
        height, width = (max(1, round(side * edge / max(size))) for edge in size)
        ys, xs = np.nonzero(own)
        assert (len(set(ys)), len(set(xs))) == (height, width), "the aspect ratio is kept"
        assert abs(ys.min() - (side - 1 - ys.max())) <= 1, "in the middle"
        assert abs(xs.min() - (side - 1 - xs.max())) <= 1
    else:
        assert own.all()
    assert (crop == before).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (1, 2), (16, 16), (17, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_every_crop_becomes_a_square(height: int, width: int, mode: SquareMode) -> None:
    assert to_square(frame(height, width).image, facts(mode)).shape == (16, 16, 3)


def person() -> Image:
    """Tall, with a blue head, a grey body and red shoes."""
    crop = np.full((64, 32, 3), 128, np.uint8)
    crop[:8], crop[-8:] = (255, 0, 0), (0, 0, 255)
    return crop


def test_pad_and_squash_keep_head_and_shoes_and_crop_loses_them() -> None:
    padded, squashed, cropped = (to_square(person(), facts(mode)) for mode in MODES)
    assert (padded[:2, 4:12] == (255, 0, 0)).all()
    assert (padded[-2:, 4:12] == (0, 0, 255)).all()
    assert (padded[:, :4] == FILL).all()
    assert (padded[:, 12:] == FILL).all()
    assert (squashed[:2] == (255, 0, 0)).all()
    assert (squashed[-2:] == (0, 0, 255)).all()
    assert (cropped == 128).all()


def test_a_crop_of_the_right_size_is_left_as_it_is() -> None:
    image = frame(16, 16).image
    for mode in MODES:
        assert (to_square(image, facts(mode)) == image).all()


def test_shrinking_averages() -> None:
    """8 x 8 to 2 x 2: every pixel is the mean of its 4 x 4, as CLIP's antialiased resize has it, nearly."""
    image = frame(8, 8).image
    means = image.reshape(2, 4, 2, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resized(image, 2, 2) - means).max() <= 0.51


@pytest.mark.parametrize(("height", "width"), [(600, 30), (30, 600)])
def test_shrinking_averages_also_where_the_other_side_grows(height: int, width: int) -> None:
    """A thin person, squashed: stripes of one pixel become grey, not other stripes."""
    stripes = np.zeros((height, width, 3), np.uint8)
    if height > width:
        stripes[::2] = 255
    else:
        stripes[:, ::2] = 255
    square = resized(stripes, 224, 224)
    assert square.min() > 80
    assert square.max() < 176


def test_growing_is_smooth() -> None:
    """Bicubic, not nearest: between black and white lie many greys."""
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 255
    assert len(np.unique(resized(image, 16, 16))) > 5


# ---- crops_of ----


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_one_crop_per_person(n: int, mode: SquareMode) -> None:
    boxes = np.array([[i, i, i + 4 + i, i + 9] for i in range(n)], F32).reshape(n, 4)
    one = Frame("door", 0, 0.0, chart())
    crops = crops_of(one, Detections(boxes, np.ones(n, F32)), facts("pad"), Look(mode, 0.1))
    assert crops.shape == (n, 16, 16, 3)
    assert crops.dtype == np.uint8
    for crop, edges in zip(crops, boxes, strict=True):
        assert (crop == to_square(cut(chart(), edges, 0.1), facts(mode))).all()
