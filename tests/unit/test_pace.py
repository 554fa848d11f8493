"""Which pictures are wanted, where a camera makes too many."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.pace import Pace


def taken(pace: Pace, rate: float, seconds: float, jitter: float, start: float = 1e5) -> list[float]:
    """The times of the pictures taken of a camera of this rate, each up to `jitter` intervals early or late."""
    chance = random.Random(0)
    times = [start + (i + chance.uniform(-jitter, jitter)) / rate for i in range(int(seconds * rate))]
    return [now for now in times if pace.wanted(now)]


@given(st.floats(1, 60), st.floats(0.2, 60), st.floats(0, 0.24))
def test_about_so_many_are_wanted_and_never_many_more(rate: float, max_fps: float, jitter: float) -> None:
    times = taken(Pace(max_fps), rate, 200 / max_fps, jitter)
    wanted = 200 * min(1, rate / max_fps)
    assert 0.9 * wanted - 3 <= len(times) <= wanted + 2
    for i, now in enumerate(times):
        assert sum(now <= other < now + 5 / max_fps for other in times[i : i + 20]) <= 7


@pytest.mark.parametrize("rate", [5.0, 9.9, 10.0])
def test_a_camera_that_is_no_faster_than_wanted_loses_nothing(rate: float) -> None:
    assert len(taken(Pace(10.0), rate, 30, 0.2)) == int(30 * rate)


def test_without_a_pace_all_are_wanted() -> None:
    assert len(taken(Pace(), 25, 4, 0)) == 100


def test_a_new_pace_counts_at_once() -> None:
    pace = Pace(0.1)
    assert len(taken(pace, 25, 4, 0)) <= 2
    pace.max_fps = 10
    assert 36 <= len(taken(pace, 25, 4, 0, start=1e5 + 4)) <= 42
    pace.max_fps = None
    assert len(taken(pace, 25, 4, 0, start=1e5 + 8)) == 100
