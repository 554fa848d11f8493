"""The picture for people: its size, what is in it, and that no number of people breaks it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.draw import draw
from edge.values import Category, Detections, Frame, Image, Matches
from tests.fakes import GENDER, SLEEVE, frame

F32 = np.float32
WIDTH, PANEL = 1152, 700
PAPER = (32, 30, 28)


def people(boxes: list[tuple[float, ...]]) -> Detections:
    return Detections(np.array(boxes, F32).reshape(-1, 4), np.full(len(boxes), 0.9, F32))


def matches(n: int, *categories: Category) -> Matches:
    options = sum(len(category.options) for category in categories)
    return Matches(categories, np.full((n, options), 0.5, F32))


def drawn(height: int, width: int, boxes: list[tuple[float, ...]], *categories: Category) -> Image:
    """Of a grey frame, after checking what holds for every picture."""
    one = Frame("door", 0, 0.0, np.full((height, width, 3), 90, np.uint8))
    found = people(boxes)
    picture = draw(one, found, matches(len(boxes), *categories))
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (round(width * min(WIDTH / width, 1400 / height)) + PANEL, 3)
    assert (one.image == 90).all(), "the frame is not drawn on"
    assert found.boxes.tolist() == people(boxes).boxes.tolist()
    return picture


def written(panel: Image) -> NDArray[np.intp]:
    """The rows of the panel that are not plain paper."""
    return np.nonzero((panel != PAPER).any(axis=(1, 2)))[0]


@pytest.mark.parametrize(("height", "width"), [(576, 768), (1080, 1920), (300, 200), (20, 1000), (1, 1)])
def test_the_picture_is_the_frame_enlarged_beside_the_panel(height: int, width: int) -> None:
    assert drawn(height, width, []).shape[0] == round(height * min(WIDTH / width, 1400 / height))


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (2, 4000)])
def test_a_frame_flatter_than_a_line_is_drawn_too(height: int, width: int) -> None:
    assert drawn(height, width, []).shape[0] >= 1


def test_an_empty_street_says_so() -> None:
    picture = drawn(576, 768, [])
    assert (picture[:, :WIDTH] == 90).all()
    rows = written(picture[:, WIDTH:])
    assert len(rows)
    assert rows.min() > picture.shape[0] - 40, "one line at the foot"


def test_one_person_is_boxed_and_described() -> None:
    picture = drawn(576, 768, [(100, 100, 200, 400)], SLEEVE, GENDER)
    empty = drawn(576, 768, [])
    changed = np.nonzero((picture[:, :WIDTH] != empty[:, :WIDTH]).any(axis=2))
    x1, x2, y1, y2 = (round(edge * 1.5) for edge in (100, 200, 100, 400))
    assert abs(int(changed[1].min()) - x1) <= 4
    assert abs(int(changed[1].max()) - x2) <= 4
    assert abs(int(changed[0].max()) - y2) <= 4
    assert y1 - 40 <= changed[0].min() <= y1, "the number stands on the box"
    assert (picture[y1 + 10 : y2 - 10, x1 + 10 : x2 - 10] == 90).all(), "nothing covers the person"
    rows = written(picture[:, WIDTH:])
    assert rows.min() < 40
    assert rows.max() < 150, "nobody is missing: no line at the foot"


def test_everybody_is_boxed_and_the_panel_counts_whom_it_cannot_hold() -> None:
    boxes = [(20.0 * i, 100.0, 20.0 * i + 15, 160.0) for i in range(30)]
    picture = drawn(576, 768, boxes, SLEEVE, GENDER)
    for x1, _, x2, y2 in boxes:
        edge = picture[round(y2 * 1.5), round(x1 * 1.5) : round(x2 * 1.5)]
        assert (edge != 90).any()
    foot = written(picture[:, WIDTH:])
    assert foot.max() > picture.shape[0] - 24, "and 24 more"
    alone = drawn(576, 768, boxes[:1], SLEEVE, GENDER)
    assert written(alone[:, WIDTH:]).max() < foot.max()


def test_the_panel_ends_with_the_first_who_does_not_fit() -> None:
    """The second would fit, but a panel that skips a number misleads."""
    talk = Category("talk", "q", ("word " * 600, "hm"), (None, None))
    found = people([(10, 10, 60, 90), (100, 10, 160, 90)])
    told = Matches((talk,), np.array([[1, 0], [0, 1]], F32))
    assert written(draw(frame(300, 400), found, told)[:, WIDTH:]).min() > 800
    assert written(draw(frame(300, 400), found[1:], Matches((talk,), told.probabilities[1:]))[:, WIDTH:]).min() < 40


@pytest.mark.parametrize("n", [0, 1, 2, 30])
@pytest.mark.parametrize("categories", [(), (SLEEVE,), (SLEEVE, GENDER) * 20])
def test_any_number_of_people_and_questions(n: int, categories: tuple[Category, ...]) -> None:
    drawn(300, 400, [(i, i, i + 50, i + 100) for i in range(n)], *categories)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 400, 300),
        (0, 0, 1, 1),
        (399, 299, 400, 300),
        (399.9, 0, 400, 300),
        (5, 5, 5, 5),
        (-50, -50, -10, -10),
        (-50, -50, 20, 20),
        (500, 500, 600, 600),
        (390, 290, 900, 900),
        (200, 200, 100, 100),
    ],
)
def test_a_box_at_the_border_or_outside(box: tuple[float, ...]) -> None:
    drawn(300, 400, [box], SLEEVE)


def test_the_thumbnail_shows_the_person() -> None:
    one = Frame("door", 0, 0.0, np.zeros((576, 768, 3), np.uint8))
    one.image[100:400, 100:200] = (0, 255, 0)
    picture = draw(one, people([(100, 100, 200, 400)]), matches(1, SLEEVE))
    green = np.nonzero((picture[:, WIDTH:] == (0, 255, 0)).all(axis=2))
    assert len(green[0]) > 1000


def test_an_option_that_two_categories_share_is_told_apart() -> None:
    """ "dark" alone would say neither hair nor trousers, so the category's name is drawn before it."""
    hair = Category("hair", "q", ("dark", "fair"), (None, None))
    trousers = Category("trousers", "q", ("dark", "light"), (None, None))
    boots = Category("boots", "q", ("black", "brown"), (None, None))
    one, found = frame(576, 768), people([(100, 100, 200, 400)])
    shared, alone = (draw(one, found, matches(1, hair, other))[:, WIDTH:] for other in (trousers, boots))
    assert (
        np.nonzero((shared != PAPER).any(axis=(0, 2)))[0].max() > np.nonzero((alone != PAPER).any(axis=(0, 2)))[0].max()
    )


def test_zones_are_outlined() -> None:
    one = Frame("door", 0, 0.0, np.full((576, 768, 3), 90, np.uint8))
    nobody, whole = people([]), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    triangle = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75)]
    plain, zoned = draw(one, nobody, matches(0)), draw(one, nobody, matches(0), zones=[whole, triangle])
    drawn_on = (plain != zoned).any(axis=2)[:, :WIDTH]  # (864, 1152) bool
    assert drawn_on[[0, -1]].all()
    assert drawn_on[:, [0, -1]].all()
    assert drawn_on[432, [288, 576]].all(), "the sides of the triangle at half its height"
    assert drawn_on.mean() < 0.02, "outlines, no areas"
    assert (plain == zoned)[:, WIDTH:].all()
