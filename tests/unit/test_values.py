"""The values between stages refuse what they do not promise, and empty is a value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge.values import Category, Choice, Detections, Frame, Matches

SHIRT = Category("shirt", "the shirt is", ("red", "green", "blue"), ("rot", None, "蓝"))
HAT = Category("hat", "on the head is", ("a hat", "nothing"), (None, None))
F32 = np.float32


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 3), F32), r"Frame.image must be uint8 \(n, n, 3\), got float32 \(2, 3, 3\)"),
        (np.zeros((2, 3), np.uint8), r"must be uint8 \(n, n, 3\), got uint8 \(2, 3\)"),
        (np.zeros((2, 3, 4), np.uint8), r"got uint8 \(2, 3, 4\)"),
        (np.zeros((1, 2, 3, 3), np.uint8), r"got uint8 \(1, 2, 3, 3\)"),
        (np.zeros((0, 3, 3), np.uint8), r"must have pixels, got \(0, 3, 3\)"),
        (np.zeros((3, 0, 3), np.uint8), r"must have pixels, got \(3, 0, 3\)"),
    ],
)
def test_a_frame_refuses(image: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frame("door", 0, 0.0, image)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 7)])
def test_a_frame_knows_its_size(height: int, width: int) -> None:
    frame = Frame("door", 0, 0.0, np.zeros((height, width, 3), np.uint8))
    assert (frame.height, frame.width) == (height, width)
    with pytest.raises(FrozenInstanceError):
        frame.number = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (np.zeros((2, 4)), np.zeros(2, F32), r"Detections.boxes must be float32 \(n, 4\), got float64 \(2, 4\)"),
        (np.zeros((2, 5), F32), np.zeros(2, F32), r"got float32 \(2, 5\)"),
        (np.zeros(4, F32), np.zeros(1, F32), r"got float32 \(4,\)"),
        (np.zeros((2, 4), F32), np.zeros(3, F32), r"Detections.scores must be float32 \(2\), got float32 \(3,\)"),
        (np.zeros((2, 4), F32), np.zeros(2), r"got float64 \(2,\)"),
        (np.zeros((1, 4), F32), np.zeros((1, 1), F32), r"got float32 \(1, 1\)"),
    ],
)
def test_detections_refuse(boxes: NDArray[Any], scores: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detections(boxes, scores)


def test_nobody_is_a_value() -> None:
    nobody = Detections.empty()
    assert len(nobody) == 0
    assert len(nobody[np.zeros(0, bool)]) == 0
    assert len(nobody[:3]) == 0


def test_detections_are_chosen_by_mask_index_and_slice() -> None:
    people = Detections(np.arange(12, dtype=F32).reshape(3, 4), np.array([0.9, 0.8, 0.7], F32))
    for keep in (np.array([True, False, True]), np.array([0, 2]), slice(None, None, 2)):
        kept = people[keep]
        assert kept.scores.tolist() == people.scores[[0, 2]].tolist()
        assert kept.boxes.tolist() == people.boxes[[0, 2]].tolist()
    assert len(people) == 3


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ((), (), "two or more different options"),
        (("one",), (None,), "two or more different options"),
        (("a", "b", "a"), (None, None, None), "two or more different options"),
        (("a", "b"), (), "a label or None per option"),
        (("a", "b"), ("x", "y", "z"), "a label or None per option"),
    ],
)
def test_a_category_refuses(options: tuple[str, ...], labels: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"Category 'c'.*{message}"):
        Category("c", "q", options, labels)


@pytest.mark.parametrize("probabilities", [np.zeros((2, 4), F32), np.zeros((2, 5)), np.zeros(5, F32)])
def test_matches_refuse(probabilities: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"Matches.probabilities must be float32 \(n, 5\)"):
        Matches((SHIRT, HAT), probabilities)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_matches_count_people(n: int) -> None:
    assert len(Matches((SHIRT, HAT), np.zeros((n, 5), F32))) == n
    assert len(Matches((), np.zeros((n, 0), F32))) == n


def test_without_questions_there_are_no_answers() -> None:
    assert Matches((), np.zeros((2, 0), F32)).answers(1, 3) == ()


def test_answers_come_most_probable_first() -> None:
    matches = Matches((SHIRT, HAT), np.array([[0, 0, 0, 0, 0], [0.25, 0.25, 0.5, 0.125, 0.875]], F32))
    shirt, hat = matches.answers(1, 2)
    assert shirt.category is SHIRT
    assert shirt.top == (Choice("blue", 0.5, "蓝"), Choice("red", 0.25, "rot")), "equals stay in the file's order"
    assert hat.top == (Choice("nothing", 0.875), Choice("a hat", 0.125))
    assert [len(answer.top) for answer in matches.answers(1, 99)] == [3, 2], "all where there are fewer"
    assert [type(choice.probability) for choice in shirt.top] == [float, float], "plain numbers, for JSON"


@given(hnp.arrays(F32, (2, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 4))
def test_answers_agree_with_sorting_by_hand(probabilities: NDArray[np.float32], top_k: int) -> None:
    matches = Matches((SHIRT, HAT), probabilities)
    for person in range(2):
        row = probabilities[person].tolist()
        for category, own, answer in zip((SHIRT, HAT), (row[:3], row[3:]), matches.answers(person, top_k), strict=True):
            wanted = sorted(range(len(own)), key=lambda i, own=own: (-own[i], i))[:top_k]
            assert answer.top == tuple(Choice(category.options[i], own[i], category.labels[i]) for i in wanted)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"temperature": 0.0}, "a temperature > 0"),
        ({"temperature": -1.0}, "a temperature > 0"),
        ({"temperature": float("nan")}, "a temperature > 0"),
        ({"temperature": float("inf")}, "a temperature > 0"),
        ({"threshold": -0.01}, r"a temperature > 0 and a threshold in 0\.\.1"),
        ({"threshold": 1.01}, r"a temperature > 0 and a threshold in 0\.\.1"),
        ({"threshold": float("nan")}, r"a temperature > 0 and a threshold in 0\.\.1"),
        ({"bias": (0.0, 1.0)}, "no bias or a finite one per option"),
        ({"bias": (0.0,) * 4}, "no bias or a finite one per option"),
        ({"bias": (0.0, float("nan"), 0.0)}, "no bias or a finite one per option"),
        ({"bias": (0.0, 0.0, float("-inf"))}, "no bias or a finite one per option"),
    ],
)
def test_a_category_refuses_a_calibration(calibration: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Category 'shirt' must have {message}"):
        replace(SHIRT, **calibration)


@pytest.mark.parametrize(
    "calibration",
    [{"temperature": 1e-9}, {"temperature": 1e9}, {"threshold": 0.0}, {"threshold": 1.0}, {"bias": (-9.0, 0.0, 9.0)}],
)
def test_a_category_takes_a_calibration(calibration: dict[str, Any]) -> None:
    assert replace(SHIRT, **calibration) != SHIRT or calibration == {"threshold": 0.0}


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (np.zeros((2, 3), F32), r"Matches.support must be float32 \(2, 2\), got float32 \(2, 3\)"),
        (np.zeros((1, 2), F32), r"got float32 \(1, 2\)"),
        (np.zeros((2, 2)), r"got float64 \(2, 2\)"),
        (np.zeros(2, F32), r"got float32 \(2,\)"),
    ],
)
def test_matches_refuse_a_support(support: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matches((SHIRT, HAT), np.zeros((2, 5), F32), support)


@pytest.mark.parametrize(
    ("threshold", "unknown"), [(0.0, False), (0.25, False), (0.5, False), (0.5000001, True), (1.0, True)]
)
def test_an_answer_below_its_threshold_is_unknown(threshold: float, unknown: bool) -> None:
    matches = Matches((replace(SHIRT, threshold=threshold), HAT), np.array([[0.25, 0.5, 0.25, 1, 0]], F32))
    for top_k in (1, 3):
        shirt, hat = matches.answers(0, top_k)
        assert shirt.unknown is unknown
        assert shirt.top[0].option == "green", "the best is told all the same"
        assert hat.unknown is False


def test_each_answer_has_its_own_support() -> None:
    shares = np.full((2, 5), 0.25, F32)
    plain = Matches((SHIRT, HAT), shares)
    assert [answer.support for answer in plain.answers(1, 1)] == [None, None]
    seen = Matches((SHIRT, HAT), shares, np.array([[0.125, 0.25], [0.5, 1.0]], F32))
    assert [answer.support for answer in seen.answers(0, 1)] == [0.125, 0.25]
    assert [answer.support for answer in seen.answers(1, 1)] == [0.5, 1.0]
    assert type(seen.answers(1, 1)[0].support) is float
    assert Matches((SHIRT, HAT), shares[:0], np.zeros((0, 2), F32)).support is not None


def test_a_category_looks_at_a_region_there_is() -> None:
    with pytest.raises(ValueError, match=r"Category 'c' must look at whole or head .*, got 'nose'"):
        Category("c", "q", ("a", "b"), (None, None), region="nose")  # type: ignore[arg-type]
