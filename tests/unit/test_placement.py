"""Which part of a frame lies where in a network's picture."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bank import Look, SquareMode
from edge.bundle import EncoderFacts
from edge.placement import REGIONS, Placement, cropped, fitted, regions_of, touched
from edge.values import Region
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS

F32 = np.float32
HEIGHT, WIDTH = 20, 30
MODES: list[SquareMode] = ["pad", "squash", "crop"]
STRETCH, LETTERBOX = DETECTOR_FACTS, DETECTOR_FACTS.model_copy(update={"resize": "letterbox"})  # both 64 x 32 px


def facts(square: SquareMode, size: int = 16) -> EncoderFacts:
    return ENCODER_FACTS.model_copy(update={"square": square, "size": size})


def box(*edges: float) -> NDArray[np.float32]:
    return np.array(edges, F32)


def taken(one: NDArray[np.float32], margin: float = 0.0) -> set[tuple[int, int]]:
    ((x1, y1, x2, y2),) = touched(one[None], WIDTH, HEIGHT, margin).tolist()
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


# ---- the pixels that a box touches ----

edge_px = st.floats(-40, 60, width=32)


@given(x=edge_px, y=edge_px, w=st.floats(0.0625, 50, width=32), h=st.floats(0.0625, 50, width=32))
def test_a_box_takes_the_pixels_that_the_box_touches(x: float, y: float, w: float, h: float) -> None:
    one = box(x, y, x + w, y + h)
    x1, y1, x2, y2 = one.tolist()
    pixels = {(i, j) for i in range(WIDTH) for j in range(HEIGHT) if i < x2 and i + 1 > x1 and j < y2 and j + 1 > y1}
    own = taken(one)
    if pixels:
        assert own == pixels
    else:
        assert len(own) >= 1, "at least a pixel, also for a box outside the frame"


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
def test_boxes_at_the_borders(one: NDArray[np.float32], wanted: tuple[int, int, int, int]) -> None:
    x1, y1, x2, y2 = wanted
    assert touched(one[None], WIDTH, HEIGHT).tolist() == [[x1, y1, x2, y2]]


@pytest.mark.parametrize("far", [1e20, float("inf")])
def test_a_box_that_reaches_beyond_all_numbers_is_the_frame(far: float) -> None:
    assert touched(box(-far, -far, far, far)[None], WIDTH, HEIGHT).tolist() == [[0, 0, WIDTH, HEIGHT]]


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
    assert touched(box(10, 5, 20, 15)[None], WIDTH, HEIGHT, margin).tolist() == [list(wanted)]


def test_boxes_are_left_alone() -> None:
    boxes = np.array([[1.5, 1.5, 4, 4], [-9, 3, 99, 12.25]], F32)
    before = boxes.copy()
    touched(boxes, WIDTH, HEIGHT, 0.5)
    cropped(boxes, WIDTH, HEIGHT, facts("pad"), Look(None, 0.5), "head")
    assert (boxes == before).all()


# ---- regions of a person ----


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


# ---- the detector's picture ----


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((64, 32), (0, 0, 64, 32)),
        ((100, 100), (16, 0, 32, 32)),
        ((1000, 100), (0, 13, 64, 6)),
        ((3000, 1), (0, 15, 64, 1)),
        ((1, 3000), (31, 0, 1, 32)),
        ((1, 1), (16, 0, 32, 32)),
        ((33, 16), (0, 0, 64, 31)),  # a row more at the bottom
    ],
)
def test_a_letterbox_keeps_the_aspect_ratio(size: tuple[int, int], wanted: tuple[int, ...]) -> None:
    width, height = size
    for one, target in ((LETTERBOX, wanted), (STRETCH, (0, 0, 64, 32))):
        placement = fitted(width, height, one)
        assert placement.sources.tolist() == [[0, 0, width, height]]
        assert placement.targets.tolist() == [list(target)]


# ---- the encoder's pictures ----


@pytest.mark.parametrize(
    ("mode", "one", "source", "target"),
    [
        ("squash", (3, 4, 9, 16), (3, 4, 9, 16), (0, 0, 16, 16)),
        ("crop", (3, 4, 9, 16), (3, 7, 9, 13), (0, 0, 16, 16)),
        ("crop", (3, 4, 10, 9), (4, 4, 9, 9), (0, 0, 16, 16)),
        ("crop", (3, 4, 9, 17), (3, 7, 9, 13), (0, 0, 16, 16)),  # 7 px to share: the smaller half above
        ("pad", (3, 4, 9, 16), (3, 4, 9, 16), (4, 0, 8, 16)),
        ("pad", (3, 4, 15, 10), (3, 4, 15, 10), (0, 4, 16, 8)),
        ("pad", (3, 4, 4, 20), (3, 4, 4, 20), (7, 0, 1, 16)),
        ("pad", (0, 4, 30, 4), (0, 4, 30, 5), (0, 7, 16, 1)),
        ("pad", (50, 50, 60, 60), (29, 19, 30, 20), (0, 0, 16, 16)),
    ],
)
def test_how_a_box_becomes_a_square(
    mode: SquareMode, one: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    placement = cropped(box(*one)[None], WIDTH, HEIGHT, facts(mode), Look(), "whole")
    assert placement.sources.tolist() == [list(source)]
    assert placement.targets.tolist() == [list(target)]
    for other in MODES:
        look = cropped(box(*one)[None], WIDTH, HEIGHT, facts(other), Look(mode), "whole")
        assert (look.table == placement.table).all(), "what the look says goes before what the bundle says"


boxes_px = st.lists(st.tuples(*[st.floats(-40, 60, width=32)] * 4), max_size=5)


@given(boxes_px, st.sampled_from(MODES), st.sampled_from([-0.3, 0.0, 0.2, 1.0]), st.sampled_from(list(REGIONS)))
def test_whatever_the_boxes_every_picture_has_a_part_of_the_frame(
    people: list[tuple[float, ...]], mode: SquareMode, margin: float, region: Region
) -> None:
    boxes = np.array(people, F32).reshape(-1, 4)
    placement = cropped(boxes, WIDTH, HEIGHT, facts(mode), Look(None, margin), region)
    assert len(placement) == len(boxes)
    for x1, y1, x2, y2, left, top, width, height in placement.table.tolist():
        assert 0 <= x1 < x2 <= WIDTH
        assert 0 <= y1 < y2 <= HEIGHT
        assert width >= 1
        assert height >= 1
        assert left >= 0
        assert top >= 0
        assert left + width <= 16
        assert top + height <= 16
        assert max(width, height) == 16
        if mode == "crop":
            assert x2 - x1 == y2 - y1
        else:
            assert ([x1, y1, x2, y2] == touched(regions_of(boxes, region), WIDTH, HEIGHT, margin)).all(axis=1).any()


@pytest.mark.parametrize("n", [0, 1, 64])
def test_the_table_is_a_row_of_eight_per_picture(n: int) -> None:
    boxes = np.array([[i / 4, 2, i / 2 + 1, 17] for i in range(n)], F32).reshape(n, 4)
    placement = cropped(boxes, WIDTH, HEIGHT, facts("pad"), Look(), "whole")
    assert placement.table.shape == (n, 8)
    assert placement.table.dtype == np.int32
    assert placement.table.flags.c_contiguous
    assert (placement.table[:, :4] == placement.sources).all()
    assert (placement.table[:, 4:] == placement.targets).all()


@pytest.mark.parametrize(
    ("sources", "targets", "name"),
    [
        (np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int32), "sources"),
        (np.zeros((2, 4), np.int32), np.zeros((1, 4), np.int32), "targets"),
        (np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32), "sources"),
    ],
)
def test_a_placement_of_another_shape_is_refused(
    sources: NDArray[np.int32], targets: NDArray[np.int32], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"Placement.{name} must be int32 \(n, 4\), got"):
        Placement(sources, targets)
