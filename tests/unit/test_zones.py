"""Whose feet are in a zone, against another library's polygons; and which polygons are none."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from edge.config import read_edge_config
from edge.errors import ConfigError
from edge.values import Floats
from edge.zones import Point, flaw_of, inside

WIDTH, HEIGHT = 640, 480
SQUARE = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
ARROW = [(0.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5)]  # not convex


def standing_at(*feet: Point) -> Floats:
    """Boxes 20 px wide whose lower edge's middle is there, given in 0..1 of the picture."""
    return np.array([[x * WIDTH - 10, 0, x * WIDTH + 10, y * HEIGHT] for x, y in feet], np.float32).reshape(-1, 4)


@pytest.mark.parametrize("zones", [[], [SQUARE], [SQUARE, ARROW]])
def test_nobody_is_an_answer(zones: list[list[Point]]) -> None:
    found = inside(zones, standing_at(), WIDTH, HEIGHT)
    assert found.shape == (0,)
    assert found.dtype == np.bool_


def test_without_zones_everybody_counts() -> None:
    assert inside([], standing_at((0.1, 0.1), (0.9, 1.0)), WIDTH, HEIGHT).tolist() == [True, True]


def test_feet_count_not_heads_or_middles() -> None:
    boxes = np.array([[310, 100, 330, 300], [310, 200, 330, 470]], np.float32)  # feet in the square, head in the square
    assert inside([SQUARE], boxes, WIDTH, HEIGHT).tolist() == [True, False]


def test_several_zones_are_one_area() -> None:
    people = standing_at((0.3, 0.3), (0.05, 0.05), (0.2, 0.9), (0.99, 0.99))
    zones = [SQUARE, [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.0, 0.1)]]
    assert inside(zones, people, WIDTH, HEIGHT).tolist() == [True, True, False, False]


def test_the_border_is_inside() -> None:
    people = standing_at((0.25, 0.25), (0.5, 0.25), (0.75, 0.5), (0.25, 0.75), (0.24, 0.5), (0.5, 0.76))
    assert inside([SQUARE], people, WIDTH, HEIGHT).tolist() == [True, True, True, True, False, False]


@given(st.integers(1, 4000), st.integers(1, 4000), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_zone_of_the_whole_picture_holds_everybody(width: int, height: int, foot: Point) -> None:
    x, y = np.float32(foot[0] * width), np.float32(foot[1] * height)
    people = np.array([[x, 0, x, y], [0, 0, 0, height], [width, 0, width, height]], np.float32)
    assert inside([[(0, 0), (1, 0), (1, 1), (0, 1)]], people, width, height).all()


decimal = st.integers(0, 50).map(lambda n: n / 50)
corners = st.lists(st.tuples(decimal, decimal), min_size=3, max_size=8)


@given(corners, st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_inside_is_what_matplotlib_says(polygon: list[Point], feet: list[Point]) -> None:
    assume(flaw_of(polygon) is None)
    outline = Outline([(x * WIDTH, y * HEIGHT) for x, y in [*polygon, polygon[0]]], closed=True)
    people = standing_at(*feet)
    points = np.array([[x * WIDTH, y * HEIGHT] for x, y in feet]).reshape(-1, 2)
    # radius: the outline grown or shrunk, depending on its direction; between the two is the border, and rounding
    grown, shrunk = (outline.contains_points(points, radius=radius) for radius in (0.01, -0.01))
    sure = grown == shrunk
    assert inside([polygon], people, WIDTH, HEIGHT)[sure].tolist() == grown[sure].tolist()


Whole = tuple[int, int]


def common_point(a: Whole, b: Whole, c: Whole, d: Whole) -> bool:
    """Whether segments have a point in common, by solving for it with exact numbers."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = a, b, c, d
    determinant = (bx - ax) * (cy - dy) - (by - ay) * (cx - dx)
    if determinant:
        s = Fraction((cx - ax) * (cy - dy) - (cy - ay) * (cx - dx), determinant)
        t = Fraction((bx - ax) * (cy - ay) - (by - ay) * (cx - ax), determinant)
        return 0 <= s <= 1 and 0 <= t <= 1
    if (bx - ax) * (cy - ay) != (by - ay) * (cx - ax):
        return False  # parallel
    return max(min(a, b), min(c, d)) <= min(max(a, b), max(c, d))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=3, max_size=7))
def test_a_polygon_is_sound_where_no_two_sides_meet(polygon: list[Whole]) -> None:
    sides = list(zip(polygon, polygon[1:] + polygon[:1], strict=True))
    apart = [(s, t) for (i, s), (j, t) in combinations(enumerate(sides), 2) if j - i not in (1, len(sides) - 1)]
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in sides)
    sound = len(set(polygon)) == len(polygon) and area != 0 and not any(common_point(*s, *t) for s, t in apart)
    assert (flaw_of([(x / 8, y / 8) for x, y in polygon]) is None) == sound  # eighths are exact


@pytest.mark.parametrize(
    ("polygon", "said"),
    [
        ([(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], "meet; name the corners in order"),  # a bow tie
        ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], "on one line"),
        ([(0.1, 0.1), (0.9, 0.1), (0.5, 0.9), (0.1, 0.1)], "[0.1, 0.1] comes twice"),
        ([(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.7, 0.0), (1.0, 0.0), (0.5, 0.0001), (0.2, 0.9)], "meet"),
    ],
)
def test_the_configuration_refuses_what_is_no_area(polygon: list[Point], said: str, tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(
        'device = "b"\nbundle = "b"\n[[camera]]\nname = "door"\nsource = "a.avi"\n'
        f'[[camera.zone]]\nname = "path"\npolygon = {[list(corner) for corner in polygon]}\n'
    )
    with pytest.raises(ConfigError, match=r"edge.toml: camera.0.zone.0.polygon: ") as caught:
        read_edge_config(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_takes_a_polygon_that_is_not_convex(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(
        'device = "b"\nbundle = "b"\n[[camera]]\nname = "door"\nsource = "a.avi"\n'
        f'[[camera.zone]]\nname = "path"\npolygon = {[list(corner) for corner in ARROW]}\n'
    )
    assert read_edge_config(file).camera[0].zone[0].polygon == tuple(ARROW)
