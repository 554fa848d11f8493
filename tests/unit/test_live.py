"""A live camera by a clock of its own: pauses, schedules, frozen pictures, pictures that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edge.errors import CaptureError
from edge.live import HELD, LONGEST_DELAY, STUCK, Live, fit
from edge.pace import Pace
from edge.steps import Step
from edge.values import Image

BLACK = np.zeros((48, 64, 3), np.uint8)


def moving() -> Iterator[Image]:
    chance = np.random.default_rng(0)
    while True:
        yield chance.integers(0, 256, (48, 64, 3), np.uint8)


class Camera:
    """A Reader by a clock that stands still but for its pictures, and for waits.

    calls: when it was called. open: how many connections are.
    """

    def __init__(self, connections: Iterator[Iterator[Image | None]], rate: float = 10.0) -> None:
        self.now, self.calls, self.open = 1000.0, list[float](), 0
        self._connections, self._rate = connections, rate
        self._pictures: Iterator[Image | None] = iter([])
        self._picture: Image | None = None

    def __call__(self) -> Camera:
        self.calls.append(self.now)
        pictures = next(self._connections, None)
        if pictures is None:
            raise CaptureError("cannot be opened")
        self.open += 1
        self._pictures = pictures
        return self

    def grab(self) -> bool:
        self.now += 1 / self._rate
        try:
            self._picture = next(self._pictures)
        except StopIteration:
            raise CaptureError("broke off") from None
        return True

    def retrieve(self) -> Image | None:
        return self._picture

    def close(self) -> None:
        self.open -= 1

    def wait(self, seconds: float) -> bool:
        assert 0 < seconds <= 1, "a sign of life at least once a second"
        self.now += seconds
        return True

    def live(self, pace: float | None = None, is_open: Callable[[], bool] = lambda: True) -> Iterator[Step]:
        return Live(
            self, "rtsp://host", timeout=10, pace=Pace(pace), is_open=is_open, wait=self.wait, clock=lambda: self.now
        ).steps()

    def steps(self, seconds: float, **options: float) -> list[Step]:
        until, steps = self.now + seconds, []
        for step in self.live(**options):  # type: ignore[arg-type]
            steps.append(step)
            if self.now >= until:
                break
        return steps


def pauses(steps: list[Step]) -> list[float]:
    return [float(str(step.error).split(" in ")[1].split()[0]) for step in steps if step.error and step.phase == "away"]


def test_the_pauses_double_to_their_limit() -> None:
    camera = Camera(iter([]))
    steps = camera.steps(300)
    found, limits = pauses(steps)[:10], [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert all(limit / 2 - 0.1 <= pause <= limit + 0.1 for pause, limit in zip(found, limits, strict=True)), found
    assert len({round(pause / limit, 3) for pause, limit in zip(found, limits, strict=True)}) > 1, "jitter"
    assert str(steps[1].error) == f"rtsp://host: cannot be opened; next attempt in {found[0]:.1f} s"
    assert {step.phase for step in steps[1:]} == {"away"}
    assert max(b - a for a, b in zip(camera.calls, camera.calls[1:], strict=False)) <= LONGEST_DELAY + 0.1


def some(seconds: float) -> Iterator[Image]:
    return (image for image, _ in zip(moving(), range(int(seconds * 10)), strict=False))


def test_a_camera_that_breaks_off_at_once_is_called_ever_more_seldom() -> None:
    found = pauses(Camera(some(0.3) for _ in range(1000)).steps(200))
    assert max(found) > 10
    assert found[:3] == sorted(found[:3])


def test_one_that_held_is_called_at_once() -> None:
    assert max(pauses(Camera(some(HELD + 1) for _ in range(1000)).steps(200))) <= 0.5


def test_every_connection_begins_once_and_is_closed() -> None:
    camera = Camera(iter([some(2), some(3)]))
    steps = camera.steps(20)
    assert [i for i, step in enumerate([one for one in steps if one.picture]) if step.begins] == [0, 20]
    assert sum(step.begins for step in steps) == 2
    assert camera.open == 0


def test_a_pace_drops_pictures_before_they_are_retrieved() -> None:
    steps = Camera(iter([moving()]), rate=25).steps(10, pace=5)
    assert sum(step.picture is not None for step in steps) in range(49, 53)
    assert sum(step.dropped == "paced" for step in steps) in range(196, 202)
    assert {step.phase for step in steps[1:]} == {"up"}


def still_for(seconds: float) -> Iterator[Image]:
    return iter([BLACK] * int(seconds * 10))


def test_a_frozen_camera_is_told_once_called_anew_seldom_and_still_seen() -> None:
    camera = Camera(still_for(3600) for _ in range(1000))
    steps = camera.steps(1200)
    times = [round(call - camera.calls[0]) for call in camera.calls]
    assert times[:5] == [0, 30, 90, 210, 450]
    assert [str(step.error) for step in steps if step.error] == [
        f"rtsp://host: the same picture since {STUCK:g} s; it is called anew"
    ]
    assert sum(step.phase == "frozen" for step in steps if step.picture) > 11_000
    assert not any(step.phase == "away" for step in steps)
    assert sum(step.begins for step in steps) == len(times)


def test_a_frozen_camera_that_wakes_is_up() -> None:
    camera = Camera(iter([still_for(60), moving()]))
    steps = camera.steps(100)
    assert list(dict.fromkeys(step.phase for step in steps)) == ["starting", "up", "frozen"]
    assert steps[-1].phase == "up"
    assert sum(step.error is not None for step in steps) == 1


def test_a_frozen_camera_behind_a_pace_stays_frozen() -> None:
    phases = [step.phase for step in Camera((still_for(3600) for _ in range(9)), rate=25).steps(60, pace=5)]
    assert phases.index("frozen") > 0
    assert set(phases[phases.index("frozen") :]) == {"frozen"}


def test_a_picture_after_an_outage_is_not_compared_with_those_before() -> None:
    phases = [step.phase for step in Camera(iter([still_for(20), still_for(20)])).steps(42)]
    assert "frozen" not in phases


def test_what_cannot_be_read_is_counted_and_given_up_in_the_end() -> None:
    bad = [None, np.zeros((0, 0, 3), np.uint8), np.zeros((48, 64), np.uint8), np.zeros((1, 30_000, 3), np.uint8)]
    camera = Camera(iter([iter([BLACK, *bad, BLACK]), iter([None] * 1000), moving()]))
    steps = camera.steps(30)
    first = [step for step in steps if step.phase == "up"][:6]
    assert [step.dropped for step in first] == [None, *["unreadable"] * 4, None]
    errors = [str(step.error) for step in steps if step.error]
    assert "broke off" in errors[0]
    assert errors[1].startswith("rtsp://host: nothing of the last 10 s could be read; next attempt in ")
    assert steps[-1].phase == "up"


def test_what_cannot_be_read_is_given_up_behind_a_pace_too() -> None:
    """Pictures that nobody looked at say nothing of a camera: it is not up, and has no frames."""
    camera = Camera((iter([np.zeros((8, 8, 3), np.uint8)] * 10_000) for _ in range(99)), rate=25)
    steps = camera.steps(60, pace=10)
    assert {step.phase for step in steps} == {"starting", "away"}
    assert {step.dropped for step in steps} == {None, "unreadable"}
    assert not any(step.begins for step in steps)
    assert sum("could be read" in str(step.error) for step in steps) in range(4, 7)

    camera = Camera(iter([iter([*([BLACK] * 50), *([None] * 10_000)]), moving()]), rate=25)
    steps = camera.steps(20, pace=10)
    assert [str(step.error).split(";")[0] for step in steps if step.error] == [
        "rtsp://host: nothing of the last 10 s could be read"
    ]


def test_a_camera_that_comes_back_is_up_at_once_behind_a_slow_pace() -> None:
    camera = Camera(iter([some(20), moving()]))
    steps = camera.steps(30, pace=0.05)
    away = [i for i, step in enumerate(steps) if step.phase == "away"]
    assert steps[away[-1] + 1].begins
    assert {step.phase for step in steps[away[-1] + 1 :]} == {"up"}


@pytest.mark.parametrize(
    ("shape", "good"),
    [
        ((480, 640, 3), True), ((16, 16, 3), True), ((4320, 7680, 3), True), ((15, 640, 3), False),
        ((640, 15, 3), False), ((16, 20_000, 3), False), ((0, 0, 3), False),
        ((480, 640), False), ((480, 640, 4), False),
    ],
)  # fmt: skip
def test_the_sizes_that_cameras_have(shape: tuple[int, ...], good: bool) -> None:
    assert fit(np.broadcast_to(np.uint8(0), shape)) == good
    assert not fit(np.broadcast_to(np.float32(0), shape))


def test_outside_its_schedule_a_camera_is_not_called() -> None:
    camera = Camera(moving() for _ in range(9))
    hours = [(1005, 1010), (1020, 1025)]
    phases: list[str] = []
    for step in camera.live(is_open=lambda: any(begin <= camera.now < end for begin, end in hours)):
        phases.append(step.phase)
        assert (step.phase == "off") <= (camera.open == 0)
        if camera.now > 1030:
            break
    assert [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase] == [
        "off", "starting", "up", "off", "starting", "up", "off",
    ]  # fmt: skip
    assert camera.calls == [pytest.approx(1005, abs=1.1), pytest.approx(1020, abs=1.1)]
