"""How well people can be seen."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.crop import qualities_of
from edge.imaging import resized
from edge.values import Detections, Frame, Image
from tests.fakes import frame

F32 = np.float32
edge_px = st.floats(-40, 60, width=32)


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
