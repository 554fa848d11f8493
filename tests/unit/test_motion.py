"""When the gate opens: for people, not for noise, light, or what flutters by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.config import MotionConfig
from edge.motion import MotionGate
from edge.values import Frame, Image

CONFIG = MotionConfig(enabled=True)
HOLD = CONFIG.hold_s
WIDTH, HEIGHT, RATE = 320, 240, 5  # px, frames a second
START = 1_700_000_000.0
Levels = NDArray[np.float64]  # (H, W) grey


class Scene:
    """A still place before a noisy camera; `change` says what else there is to see at a second."""

    def __init__(self, noise: float = 4.0, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._noises = self._random.normal(0, noise, (40, HEIGHT, WIDTH))  # drawn once, for the time it takes
        coarse = self._random.uniform(40, 200, (HEIGHT // 20, WIDTH // 20))
        self._place: Levels = np.kron(coarse, np.ones((20, 20)))

    def at(self, second: float, change: Callable[[Levels, float], Levels] = lambda place, second: place) -> Image:
        seen = change(self._place.copy(), second) + self._random.choice(self._noises)
        return np.repeat(np.clip(seen, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def course(
    gate: MotionGate,
    scene: Scene,
    first: float,
    last: float,
    change: Callable[[Levels, float], Levels] = lambda place, second: place,
    watched: bool = False,
) -> Iterator[bool]:
    """What the gate says of each frame from second `first` to `last`."""
    for number in range(round(first * RATE), round(last * RATE)):
        second = number / RATE
        yield gate.wanted(Frame("door", number, START + second, scene.at(second, change)), watched)


def somebody(place: Levels, second: float) -> Levels:
    """Dark, 10 x 30 px, walking 20 px a second, as far away as on a camera's picture of 24 px of 192."""
    x = int(20 * second) % (WIDTH - 10)
    place[150:180, x : x + 10] = 30
    return place


def closed(gate: MotionGate, scene: Scene) -> None:
    """The gate after half a minute of nothing: open at first, until it knows the camera's noise."""
    said = list(course(gate, scene, 0, 30))
    assert all(said[: round(HOLD * RATE)])
    assert not any(said[round((HOLD + 5) * RATE) :])


@pytest.mark.parametrize("noise", [0.0, 4.0, 12.0])  # grey levels: none, usual, at night
def test_a_person_opens_it_and_nothing_closes_it(noise: float) -> None:
    gate, scene = MotionGate(CONFIG), Scene(noise)
    closed(gate, scene)
    assert all(course(gate, scene, 30, 40, somebody)), "from the first frame on"
    after = list(course(gate, scene, 40, 60))
    assert all(after[: round((HOLD - 0.5) * RATE)])
    assert not any(after[round((HOLD + 8) * RATE) :]), "where they stood last is as before"


def test_who_stands_still_is_part_of_the_scene_unless_watched() -> None:
    def still(place: Levels, second: float) -> Levels:
        return somebody(place, 3)

    for watched in (False, True):
        gate, scene = MotionGate(CONFIG), Scene()
        closed(gate, scene)
        said = list(course(gate, scene, 30, 100, still, watched))
        assert all(said[: 5 * RATE])
        assert said[-1] is watched


@pytest.mark.parametrize("per_second", [1.0, -1.0])
def test_daylight_that_changes_does_not_open_it(per_second: float) -> None:
    def dusk(place: Levels, second: float) -> Levels:
        return place * (1 + 0.01 * per_second * max(0.0, second - 30)) + 0.2 * per_second * max(0.0, second - 30)

    gate, scene = MotionGate(CONFIG), Scene()
    closed(gate, scene)
    assert not any(course(gate, scene, 30, 60, dusk))


def test_a_person_is_seen_while_the_light_changes() -> None:
    def cloud(place: Levels, second: float) -> Levels:
        return somebody(place * (1 - 0.02 * max(0.0, second - 30)), second)

    gate, scene = MotionGate(CONFIG), Scene()
    closed(gate, scene)
    assert all(course(gate, scene, 30, 45, cloud))


def test_a_light_that_is_switched_opens_it_once() -> None:
    def lamp(place: Levels, second: float) -> Levels:
        glow = np.linspace(0, 120, WIDTH)  # from the right: no mere change of brightness
        return place * 0.5 + (glow if second >= 30 else 0)

    gate, scene = MotionGate(CONFIG), Scene()
    list(course(gate, scene, 0, 30, lamp))
    said = list(course(gate, scene, 30, 60, lamp))
    assert all(said[: round((HOLD - 0.5) * RATE)])
    assert not any(said[round((HOLD + 3) * RATE) :])


def test_what_flutters_by_itself_is_learned_and_a_person_is_seen_all_the_same() -> None:
    """A branch of 60 x 8 px before the sky, and the picture a little different every second, as videos are."""
    random = np.random.default_rng(7)

    def windy(place: Levels, second: float) -> Levels:
        shift = int(random.integers(-4, 5))
        place[40 + shift : 48 + shift, 100:160] = 20
        return place + (3 if round(second * RATE) % RATE == 0 else 0)

    gate, scene = MotionGate(CONFIG), Scene()
    list(course(gate, scene, 0, 60, windy))
    assert sum(course(gate, scene, 60, 120, windy)) < 0.1 * 60 * RATE
    assert all(course(gate, scene, 120, 130, lambda place, second: somebody(windy(place, second), second)))


def test_people_who_are_watched_do_not_make_the_gate_blind_for_the_next() -> None:
    """Somebody walks the same way over and over, the place is empty for 20 s, then comes another."""
    gate, scene = MotionGate(CONFIG), Scene()
    closed(gate, scene)
    list(course(gate, scene, 30, 150, somebody, watched=True))
    quiet = list(course(gate, scene, 150, 170))
    assert not any(quiet[-5 * RATE :])
    assert all(course(gate, scene, 170, 175, somebody))


def test_cameras_are_apart_and_their_pictures_of_any_size() -> None:
    gate = MotionGate(CONFIG)
    for number in range(100):
        for name, size in (("a", (1, 1)), ("b", (1080, 1920)), ("c", (700, 300))):
            picture = np.full((*size, 3), 90, np.uint8)
            if name == "b" and number >= 50:
                picture[500:800, 10 * number : 10 * number + 150] = 200
            said = gate.wanted(Frame(name, number, START + number / RATE, picture), False)
            assert said is (number < HOLD * RATE or (name == "b" and number >= 50)), (name, number)


def test_another_size_of_picture_goes_on() -> None:
    gate = MotionGate(CONFIG)
    for number in range(200):
        size = (240, 320) if number < 100 else (480, 640)
        said = gate.wanted(Frame("a", number, START + number / RATE, np.full((*size, 3), 90, np.uint8)), False)
    assert not said


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_does_not_hold_it_open(jump: float) -> None:
    gate, still = MotionGate(CONFIG), np.full((240, 320, 3), 90, np.uint8)
    for number in range(100):
        assert gate.wanted(Frame("a", number, START + number / RATE, still), False) is (number < HOLD * RATE)
    said = [gate.wanted(Frame("a", n, START + jump + n / RATE, still), False) for n in range(100, 200)]
    assert sum(said) <= HOLD * RATE
    assert not said[-1]


def test_without_the_key_every_frame_is_wanted() -> None:
    gate, still = MotionGate(MotionConfig()), np.full((240, 320, 3), 90, np.uint8)
    assert all(gate.wanted(Frame("a", number, START + number, still), False) for number in range(100))


def test_pictures_that_have_nothing_to_do_with_each_other_are_all_wanted() -> None:
    gate, still = MotionGate(CONFIG, ["folder"]), np.full((240, 320, 3), 90, np.uint8)
    assert all(gate.wanted(Frame("folder", number, START + number, still), False) for number in range(100))
    assert not gate.spared
