"""A box gives up no more than it must, in the order told, without flapping, and takes all of it back: on made-up boxes.

The made-up box warms up and cools down by Newton's law, and a frame costs it time, each crop some more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import LoadConfig
from edge.ladder import CALM_S, HOT_S, PATIENCE_S, PROVEN_S, SLOW_S, Heat, Ladder, Limits

CONFIG = LoadConfig(max_fps=10.0, hot_c=90.0, cool_c=80.0)
HOT, MILD, COOL = Heat(93.2, "gpu-thermal"), Heat(85.0, "gpu-thermal"), Heat(70.0, "gpu-thermal")
LOOK = 2.0  # s between two observations
HOUR = 3600.0


def ladder(max_crops: int = 32, smaller: bool = True) -> Ladder:
    return Ladder(CONFIG, max_crops, smaller)


class Watched:
    """A ladder and a clock. told: every sentence, with its time."""

    def __init__(self, one: Ladder) -> None:
        self.ladder, self.now = one, 1000.0
        self.told: list[tuple[float, str]] = []

    def go(self, seconds: float, achieved: float | None = 1.0, heat: Heat = COOL, look: float = LOOK) -> list[str]:
        """What was said meanwhile."""
        before = len(self.told)
        for _ in range(math.ceil(seconds / look)):
            self.now += look
            if told := self.ladder.observe(self.now, achieved, heat):
                self.told.append((self.now, told))
        return [text for _, text in self.told[before:]]


# ---- the steps ----


@pytest.mark.parametrize(
    ("max_crops", "smaller", "steps"),
    [
        (32, True, [(10, 32, False), (5, 32, False), (2.5, 32, False), (2.5, 8, False), (2.5, 8, True)]),
        (32, False, [(10, 32, False), (5, 32, False), (2.5, 32, False), (2.5, 8, False)]),
        (3, False, [(10, 3, False), (5, 3, False), (2.5, 3, False), (2.5, 1, False)]),
        (1, True, [(10, 1, False), (5, 1, False), (2.5, 1, False), (2.5, 1, True)]),
    ],
)
def test_the_steps_down_and_up_again(max_crops: int, smaller: bool, steps: list[tuple[float, int, bool]]) -> None:
    box = Watched(ladder(max_crops, smaller))
    seen = [box.ladder.limits]
    for level in range(1, len(steps)):
        assert len(box.go(HOT_S + LOOK, heat=HOT)) == 1
        assert box.ladder.level == level
        seen.append(box.ladder.limits)
    assert seen == [Limits(*step) for step in steps]
    assert box.go(HOUR, heat=HOT) == [], "never deeper than the last step"
    assert box.ladder.level == len(steps) - 1
    for level in reversed(range(len(steps) - 1)):
        assert len(box.go(CALM_S + LOOK)) == 1
        assert box.ladder.limits == seen[level]
    assert box.ladder.level == 0
    assert box.go(HOUR) == []


def test_each_step_is_one_plain_sentence_with_its_numbers() -> None:
    box = Watched(ladder())
    assert box.ladder.name == "everything"
    said = box.go(2 * (HOT_S + LOOK), heat=HOT)
    assert box.ladder.name == "2.5 frames per second"
    said += box.go(HOT_S + LOOK, heat=Heat(99.6, "cpu-thermal", ("cpu", "gpu")))
    assert box.ladder.name == "8 people per frame"
    said += box.go(SLOW_S + LOOK, achieved=0.414)
    assert box.ladder.name == "the smaller detector"
    said += box.go(CALM_S + LOOK) + box.go(CALM_S + LOOK, None, Heat()) + box.go(CALM_S + LOOK, None)
    said += box.go(CALM_S + LOOK, 0.96, Heat())
    assert said == [
        "93 °C at gpu-thermal: 5 frames per second instead of 10",
        "93 °C at gpu-thermal: 2.5 frames per second instead of 5",
        "100 °C at cpu-thermal, the system slows down cpu, gpu: 8 people per frame instead of 32",
        "41 % of the frames could be looked at: the smaller detector instead of the larger",
        "70 °C at gpu-thermal, 100 % of the frames could be looked at: the larger detector again",
        "all is well: 32 people per frame again",
        "70 °C at gpu-thermal: 5 frames per second again",
        "96 % of the frames could be looked at: 10 frames per second again",
    ]
    assert all(len(text) < 200 for text in said)


def test_throttled_is_hot_whatever_the_sensors_say() -> None:
    for heat in (Heat(None, "", ("gpu",)), Heat(40.0, "a", ("gpu",))):
        box = Watched(ladder())
        (said,) = box.go(HOT_S + LOOK, heat=heat)
        assert "the system slows down gpu: 5 frames" in said


# ---- down, and not at once ----


def test_trouble_must_last() -> None:
    box = Watched(ladder())
    assert box.go(HOT_S - LOOK, heat=HOT) == []
    assert box.go(HOUR) == []
    assert box.go(SLOW_S - LOOK, achieved=0.1) == []
    assert box.go(HOUR) == []
    assert box.ladder.level == 0


def test_what_trembles_about_the_bound_counts_by_what_it_mostly_is() -> None:
    box = Watched(ladder())
    for _ in range(200):
        box.go(LOOK, heat=HOT)
        box.go(2 * LOOK, heat=MILD)
    assert box.told == []
    for _ in range(60):
        box.go(2 * LOOK, heat=HOT)
        box.go(LOOK, heat=MILD)
    assert box.told


def test_nothing_known_is_nothing_wrong() -> None:
    box = Watched(ladder())
    assert box.go(HOUR, None, Heat()) == []
    assert box.go(HOUR, 1.0, Heat()) == []
    box.go(HOT_S + LOOK, heat=HOT)
    box.go(CALM_S + LOOK, None, Heat())
    assert box.ladder.level == 0, "nor does it keep a box down"


def test_between_hot_and_cool_and_between_slow_and_well_it_stays() -> None:
    box = Watched(ladder())
    box.go(HOT_S + LOOK, heat=HOT)
    assert box.go(6 * HOUR, heat=MILD) == []
    assert box.go(6 * HOUR, 0.7) == []
    assert box.go(6 * HOUR, heat=Heat(None, "", ())) == [
        "100 % of the frames could be looked at: 10 frames per second again"
    ]


# ---- up, and with patience ----


def tries(box: Watched, hours: float) -> list[float]:
    """Seconds between steps up, of a box that is too hot, or not, as soon as it does everything."""
    at: list[float] = []
    end = box.now + hours * HOUR
    while box.now < end:
        if box.go(LOOK, heat=COOL if box.ladder.level else HOT) and box.ladder.level == 0:
            at.append(box.now)
    return [b - a for a, b in pairwise(at)]


def test_each_try_that_fails_makes_the_next_one_wait_longer_up_to_a_bound() -> None:
    box = Watched(ladder())
    box.go(HOT_S + LOOK, heat=HOT)
    waits = tries(box, 6)
    assert waits[:4] == pytest.approx([HOT_S + min(CALM_S * 2**n, PATIENCE_S) for n in (1, 2, 3, 4)], abs=10)
    assert max(waits) == pytest.approx(HOT_S + PATIENCE_S, abs=10)
    assert waits == sorted(waits)


def test_after_a_long_calm_the_failures_are_forgotten() -> None:
    box = Watched(ladder())
    box.go(HOT_S + LOOK, heat=HOT)
    tries(box, 3)
    box.go(PATIENCE_S + LOOK)
    assert box.ladder.level == 0
    box.go(PROVEN_S + LOOK)
    box.go(HOT_S + LOOK, heat=HOT)
    assert box.ladder.level == 1
    box.go(CALM_S + LOOK)
    assert box.ladder.level == 0


# ---- clocks ----


@pytest.mark.parametrize("jump", [0.0, -5000.0, 3600.0, 1e9])
def test_a_clock_that_jumps_is_no_heat_and_no_calm(jump: float) -> None:
    box = Watched(ladder())
    box.go(HOT_S - 12, heat=HOT)
    box.now += jump
    assert box.go(LOOK, heat=HOT) == [], "of the time between nobody knows how it was"
    box.go(HOT_S, heat=HOT)
    level = box.ladder.level
    assert level == 1
    box.now += jump
    box.go(LOOK)
    assert box.ladder.level == level
    box.go(CALM_S)
    assert box.ladder.level == 0


def test_a_box_so_slow_that_it_is_seldom_asked_steps_down_all_the_same() -> None:
    box = Watched(ladder())
    box.go(200, 0.01, look=40.0)
    assert box.ladder.level == 4


# ---- a new configuration ----


def test_a_new_configuration_keeps_the_step() -> None:
    box = Watched(ladder())
    box.go(2 * (HOT_S + LOOK), heat=HOT)
    box.ladder.configure(LoadConfig(max_fps=20.0, hot_c=95.0, cool_c=90.0), 8)
    assert (box.ladder.level, box.ladder.limits) == (2, Limits(5.0, 8))
    assert box.go(HOUR, heat=HOT) == [], "that is not hot any more"
    box.ladder.configure(CONFIG, 1)
    box.go(HOUR, heat=HOT)
    assert box.ladder.level == 3
    box.ladder.configure(CONFIG, 32)
    assert box.ladder.limits == Limits(2.5, 8)


# ---- made-up boxes ----


@dataclass
class Box:
    """A board in a warm place, cameras before it, and people before them.

    rise: °C above `ambient` at full load, reached with the time constant `tau`, s. frame, crop: s that one costs;
    people: in each picture. The smaller detector takes half the time.
    """

    ambient: float
    rise: float
    tau: float
    frame: float
    crop: float
    people: int
    cameras: int
    celsius: float = field(init=False)

    def __post_init__(self) -> None:
        self.celsius = self.ambient

    def busy(self, limits: Limits) -> float:
        """Share of the time that it would work if it kept up; above 1 it cannot."""
        cost = self.frame * (0.5 if limits.smaller_net else 1.0) + self.crop * min(self.people, limits.max_crops)
        return self.cameras * limits.max_fps * cost

    def live(self, seconds: float, limits: Limits) -> float:
        """Share of the frames that it keeps up with."""
        busy = self.busy(limits)
        end = self.ambient + self.rise * min(busy, 1.0)
        self.celsius = end + (self.celsius - end) * math.exp(-seconds / self.tau)
        return min(1.0, 1 / busy)


boxes = st.builds(
    Box,
    ambient=st.floats(-20, 75),
    rise=st.floats(1, 90),
    tau=st.floats(5, 1200),
    frame=st.floats(0.001, 0.3),
    crop=st.floats(0.0001, 0.05),
    people=st.integers(0, 40),
    cameras=st.integers(1, 10),
)


def watch(box: Box, watched: Watched, hours: float, noise: Callable[[], float] = lambda: 0.0) -> Iterable[float]:
    """Its temperature at each look."""
    end = watched.now + hours * HOUR
    while watched.now < end:
        achieved = box.live(5.0, watched.ladder.limits)
        watched.go(5.0, achieved, Heat(box.celsius + noise(), "soc"), look=5.0)
        yield box.celsius


def most_in_an_hour(times: list[float]) -> int:
    return max((sum(at <= one < at + HOUR for one in times) for at in times), default=0)


@given(box=boxes, smaller=st.booleans(), max_crops=st.integers(1, 64), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_any_box_settles_where_it_can_stay_and_comes_back(box: Box, smaller: bool, max_crops: int, seed: int) -> None:
    noise = partial(Random(seed).gauss, 0.0, 0.5)  # of the sensor
    watched = Watched(ladder(max_crops, smaller))
    steps = watched.ladder._steps
    list(watch(box, watched, 4, noise))
    times = [at for at, _ in watched.told]
    assert most_in_an_hour(times) <= 24
    before = len(watched.told)
    heat = list(watch(box, watched, 3, noise))
    late = [at for at, _ in watched.told[before:]]
    assert most_in_an_hour(late) <= 10, "by then it knows what it can do"
    least = box.busy(steps[-1])
    if box.ambient + box.rise * min(least, 1.0) < CONFIG.hot_c - 2:
        hot = sum(one >= CONFIG.hot_c + 1 for one in heat) / len(heat)
        assert hot < 0.1, "and is seldom too hot"
    else:
        assert watched.ladder.level >= len(steps) - 2, "nothing more to give up"

    # the sun goes down, and the people home
    box.ambient, box.people, box.frame, box.rise = 5.0, 0, min(box.frame, 0.09 / box.cameras), 50.0
    list(watch(box, watched, 2))
    assert watched.ladder.level == 0, "all of it is done again"
    before = len(watched.told)
    list(watch(box, watched, 2))
    assert len(watched.told) == before, "for good"
