"""People cut out of their frame: which pixels, and how they become a square."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bank import Look, SquareMode
from edge.bundle import EncoderFacts
from edge.crop import REGIONS, crops_of, cut, qualities_of, regions_of, resized, to_square
from edge.values import Detections, Frame, Image, Region
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
        (-0.1, (11, 6, 19, 14)),
        (-0.15, (11, 6, 19, 14)),  # whatever the rest of the box touches
        (-0.5, (15, 10, 16, 11)),  # nothing is left: a pixel
        (-3.0, (29, 19, 30, 20)),  # inside out
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


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.3])
def test_a_look_has_its_margin_and_its_square_and_shows_the_region(n: int, region: Region, margin: float) -> None:
    boxes = np.array([[i, i, i + 4 + i, i + 9] for i in range(n)], F32).reshape(n, 4)
    one = Frame("door", 0, 0.0, chart())
    for square in (None, *MODES):
        crops = crops_of(one, Detections(boxes, np.ones(n, F32)), facts("crop"), Look(square, margin), region)
        assert crops.shape == (n, 16, 16, 3)
        top, bottom = REGIONS[region]
        for crop, (x1, y1, x2, y2) in zip(crops, boxes.tolist(), strict=True):
            part = box(x1, y1 + top * (y2 - y1), x2, y1 + bottom * (y2 - y1))
            assert (crop == to_square(cut(chart(), part, margin), facts(square or "crop"))).all()


def test_without_a_look_the_whole_box_is_squared_as_the_bundle_says() -> None:
    people = Detections(box(3, 3, 9, 15).reshape(1, 4), np.ones(1, F32))
    one = Frame("door", 0, 0.0, chart())
    for mode in MODES:
        (crop,) = crops_of(one, people, facts(mode))
        assert (crop == to_square(chart()[3:15, 3:9], facts(mode))).all()


# ---- regions_of ----


@given(st.lists(st.tuples(edge_px, edge_px, st.floats(0, 60, width=32), st.floats(0, 60, width=32)), max_size=5))
def test_regions_are_shares_of_the_height_of_each_box(people: list[tuple[float, float, float, float]]) -> None:
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in people], F32).reshape(-1, 4)
    before = boxes.copy()
    for region, (top, bottom) in REGIONS.items():
        parts = regions_of(boxes, region)
        assert parts.dtype == F32
        assert parts.shape == boxes.shape
        for part, (x1, y1, x2, y2) in zip(parts.tolist(), boxes.tolist(), strict=True):
            assert part == pytest.approx([x1, y1 + top * (y2 - y1), x2, y1 + bottom * (y2 - y1)], abs=1e-4)
    assert (regions_of(boxes, "whole") == boxes).all()
    assert (boxes == before).all()


def test_head_body_and_feet_together_are_the_whole_person() -> None:
    """No place between them is looked at by no question, and the head lies above the feet."""
    edges = sorted(REGIONS[name] for name in REGIONS if name != "whole")
    assert edges[0][0] == 0
    assert max(bottom for _, bottom in edges) == 1
    assert all(after[0] <= before[1] for before, after in pairwise(edges))
    assert REGIONS["head"][1] <= REGIONS["lower"][0] <= REGIONS["feet"][0]


# ---- qualities_of ----


def of(*boxes: tuple[float, ...], scores: tuple[float, ...] = (), image: Image | None = None) -> list[float]:
    """The qualities of these boxes in a frame of noise, 400 x 400 px."""
    people = Detections(np.array(boxes, F32).reshape(-1, 4), np.array(scores or (1,) * len(boxes), F32))
    one = Frame("door", 0, 0.0, frame(400, 400).image if image is None else image)
    before = one.image.copy()
    qualities = qualities_of(one, people)
    assert qualities.dtype == F32
    assert ((qualities >= 0) & (qualities <= 1)).all()
    assert (one.image == before).all()
    return [float(quality) for quality in qualities]


TALL = (100.0, 100.0, 160.0, 260.0)  # 160 px: full height


def test_the_quality_of_nobody() -> None:
    assert of() == []


def laplacian_variance(image: Image) -> float:
    """By plain loops: of the four neighbours less four times the pixel, the border mirrored without its edge."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(float)
    height, width = grey.shape
    values = []
    for y in range(height):
        for x in range(width):
            up, down = grey[abs(y - 1), x], grey[y + 1 if y + 1 < height else max(height - 2, 0), x]
            left, right = grey[y, abs(x - 1)], grey[y, x + 1 if x + 1 < width else max(width - 2, 0)]
            values.append(up + down + left + right - 4 * grey[y, x])
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


@pytest.mark.parametrize("height", [20, 80, 160, 161, 200])
@pytest.mark.parametrize("score", [0.3, 1.0])
def test_quality_against_plain_loops(height: int, score: float) -> None:
    image = cv2.GaussianBlur(frame(400, 400).image, (0, 0), 2.0)
    one = (50.0, 60.0, 70.0, 60.0 + height)
    person = image[60 : 60 + height, 50:70]
    if height > 160:  # near and far are measured alike
        person = resized(person, round(20 * 160 / height), 160)
    variance = laplacian_variance(person)
    wanted = min(height / 160, 1) * variance / (variance + 200) * score
    assert of(one, scores=(score,), image=image) == pytest.approx([wanted], rel=1e-4)


def test_the_more_blurred_the_worse() -> None:
    noise = frame(400, 400).image
    blurred = [noise, *(cv2.GaussianBlur(noise, (0, 0), sigma) for sigma in (1, 2, 4, 8))]
    qualities = [of(TALL, image=image)[0] for image in blurred]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[0] > 0.9
    assert qualities[-1] < 0.05
    assert of(TALL, image=np.full_like(noise, 90)) == [0]


@pytest.mark.parametrize(
    ("one", "cut_off"),
    [
        ((3, 3, 60, 163), False),
        ((2, 3, 60, 163), True),
        ((3, 2, 60, 162), True),
        ((340, 250, 397.5, 397.5), False),
        ((340, 250, 398, 397), True),
        ((340, 250, 397, 398), True),
    ],
)
def test_whoever_the_border_cuts_counts_half(one: tuple[float, ...], cut_off: bool) -> None:
    image = frame(400, 400).image
    x1, y1, x2, y2 = (int(edge) for edge in np.floor(one))
    variance = laplacian_variance(image[y1 : y2 + (one[3] > y2), x1 : x2 + (one[2] > x2)])
    whole = min((one[3] - one[1]) / 160, 1) * variance / (variance + 200)
    assert of(one) == pytest.approx([whole * (0.5 if cut_off else 1)], rel=1e-4)


def test_whoever_another_covers_is_worse_to_see() -> None:
    alone = of(TALL)[0]
    half = (130.0, 100.0, 190.0, 260.0)  # IoU 1/3
    touching, away = (160.0, 100.0, 220.0, 260.0), (250.0, 100.0, 310.0, 260.0)
    assert of(TALL, half)[0] == pytest.approx(alone * 2 / 3, rel=1e-4)
    assert of(TALL, touching, away)[0] == pytest.approx(alone)
    assert of(TALL, half, away, touching)[0] == of(TALL, half)[0], "the one that covers most counts"
    assert of(TALL, TALL) == [0, 0]


@pytest.mark.parametrize(
    "one",
    [
        (10, 10, 11, 11),  # a pixel
        (10.2, 10.2, 10.4, 10.4),
        (10, 10, 10, 10),
        (-50, -50, -10, -10),  # outside
        (500, 500, 600, 700),
        (-10, 100, 5, 300),
        (0, 0, 400, 400),
    ],
)
def test_any_box_has_a_quality(one: tuple[float, ...]) -> None:
    (quality,) = of(one)
    assert quality < 0.51
    assert len(of(one, TALL, one)) == 3


@given(st.lists(st.tuples(edge_px, edge_px, st.floats(0, 60, width=32), st.floats(0, 60, width=32)), max_size=6))
def test_quality_is_a_share_and_nobody_depends_on_the_order(people: list[tuple[float, ...]]) -> None:
    boxes = [(x, y, x + w, y + h) for x, y, w, h in people]
    scores = tuple((i + 1) / 8 for i in range(len(boxes)))
    image = frame(40, 50).image
    qualities = of(*boxes, scores=scores, image=image)
    assert of(*boxes[::-1], scores=scores[::-1], image=image) == qualities[::-1]
