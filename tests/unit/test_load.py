"""A box at its limits: cameras and describer get what the ladder allows, and log and event hear of each step."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.capture import CameraState
from edge.config import LoadConfig
from edge.ladder import CALM_S, HOT_S, SLOW_S, Heat
from edge.load import EVERY_S, Load, heat

CONFIG = LoadConfig(max_fps=10.0, hot_c=90.0, cool_c=80.0)


class Eyes:
    """Cameras that make so many frames per second more than the pace they are given, and count what becomes of them.

    box: frames per second of each that somebody takes.
    """

    def __init__(self, *names: str, fps: float = 25.0, live: bool = True) -> None:
        self.fps, self.live, self.max_fps, self.box = fps, live, fps, 1000.0
        self.counts = {name: [0.0, 0.0, 0.0] for name in names}  # frames, paced, replaced

    def pace(self, max_fps: float | None) -> None:
        self.max_fps = max_fps or self.fps

    def live_on(self, seconds: float) -> None:
        offered = min(self.fps, self.max_fps)
        for counts in self.counts.values():
            counts[0] += self.fps * seconds
            counts[1] += (self.fps - offered) * seconds
            counts[2] += max(0.0, offered - self.box) * seconds

    @property
    def states(self) -> list[CameraState]:
        return [
            CameraState(name, self.live, "up", int(frames), {"paced": int(paced), "replaced": int(replaced)})
            for name, (frames, paced, replaced) in self.counts.items()
        ]


class Hands:
    """A describer that notes its limits."""

    def __init__(self, has_smaller: bool = True) -> None:
        self.has_smaller = has_smaller
        self.max_crops, self.smaller = 0, False

    def limit(self, max_crops: int) -> None:
        self.max_crops = max_crops

    def use_smaller(self, on: bool) -> None:
        assert not on or self.has_smaller
        self.smaller = on


class Box:
    """A Load over made-up parts, and its clock. said: what the next events carry."""

    def __init__(self, root: Path, eyes: Eyes, hands: Hands | None = None) -> None:
        self.root, self.eyes, self.hands, self.now = root, eyes, hands or Hands(), 50.0
        self.said: list[str] = []
        self.load = Load(CONFIG, 32, eyes, self.hands, self.said.append, root)  # type: ignore[arg-type]

    def go(self, seconds: float, turn: float = 0.1) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += turn
            self.eyes.live_on(turn)
            self.load.turn(self.now)

    def sensor(self, millidegrees: str) -> None:
        zone = self.root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "type").write_text("gpu-thermal\n")
        (zone / "temp").write_text(f"{millidegrees}\n")

    @property
    def allowed(self) -> tuple[float, int, bool]:
        return self.eyes.max_fps, self.hands.max_crops, self.hands.smaller


def test_the_pace_is_set_from_the_beginning(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door"))
    assert box.allowed == (10.0, 32, False)
    box.go(300)
    assert box.said == []


def test_a_hot_box_does_less_says_so_and_takes_it_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = Box(tmp_path, Eyes("door"))
    box.sensor("93400")
    box.go(4 * (HOT_S + 2 * EVERY_S))
    assert box.allowed == (2.5, 8, True)
    assert box.said[0] == "93 °C at gpu-thermal: 5 frames per second instead of 10"
    assert (len(box.said), box.load.ladder.level, box.load.ladder.name) == (4, 4, "the smaller detector")
    box.sensor("61000")
    box.go(4 * (CALM_S + 2 * EVERY_S))
    assert box.allowed == (10.0, 32, False)
    assert len(box.said) == 8
    assert [record.getMessage() for record in caplog.records] == box.said


def test_a_box_with_too_many_cameras_settles_where_it_keeps_up(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door", "yard"))
    box.eyes.box = 3.0
    box.go(3 * (SLOW_S + 4 * EVERY_S))
    assert box.allowed == (5.0, 32, False), "3 of 5 frames are no trouble"
    assert box.said == ["30 % of the frames could be looked at: 5 frames per second instead of 10"]
    box.eyes.box = 2.8
    box.go(3 * (SLOW_S + 4 * EVERY_S))
    assert box.allowed == (2.5, 32, False)


def test_cameras_that_make_fewer_frames_are_no_sign_of_too_much(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door", fps=1.0))
    box.eyes.box = 1.0
    box.go(300)
    assert (box.said, box.allowed) == ([], (10.0, 32, False))


@pytest.mark.parametrize("eyes", [Eyes(), Eyes("film", live=False)])
def test_where_no_camera_is_live_nothing_is_given_up(eyes: Eyes, tmp_path: Path) -> None:
    box = Box(tmp_path, eyes)
    box.sensor("99000")
    box.go(300)
    assert (box.said, box.load.ladder.level) == ([], 0)


def test_a_bundle_without_a_smaller_detector_has_a_step_less(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door"), Hands(has_smaller=False))
    box.sensor("93400")
    box.go(6 * (HOT_S + 2 * EVERY_S))
    assert box.allowed == (2.5, 8, False)


def test_a_new_configuration_is_in_force_at_once_on_the_same_step(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door"))
    box.sensor("93400")
    box.go(HOT_S + 2 * EVERY_S)
    ladder = box.load.ladder
    box.load.configure(LoadConfig(max_fps=4.0, hot_c=95.0), 16)
    assert box.allowed == (2.0, 16, False)
    assert box.load.ladder is ladder, "whoever watches it goes on"


def test_the_machine_is_not_read_in_each_turn(tmp_path: Path) -> None:
    box = Box(tmp_path, Eyes("door"))
    box.sensor("93400")
    box.go(0.1)
    box.sensor("1000")
    box.go(EVERY_S * 0.9)
    assert box.load.ladder._hot_s == 0
    box.sensor("93400")
    box.go(HOT_S + 2 * EVERY_S)
    assert len(box.said) == 1


def test_how_hot_it_is(tmp_path: Path) -> None:
    assert heat(tmp_path) == Heat()
    thermal = tmp_path / "sys/class/thermal"
    for number, (name, temperature) in enumerate([("cpu-thermal", "51000"), ("gpu-thermal", "61500"), ("cv0", "")]):
        (thermal / f"thermal_zone{number}").mkdir(parents=True)
        (thermal / f"thermal_zone{number}/type").write_text(name)
        (thermal / f"thermal_zone{number}/temp").write_text(temperature)
    assert heat(tmp_path) == Heat(61.5, "gpu-thermal")
    (thermal / "cooling_device3").mkdir()
    (thermal / "cooling_device3/type").write_text("gpu-throttle-alert")
    (thermal / "cooling_device3/cur_state").write_text("1")
    assert heat(tmp_path) == Heat(61.5, "gpu-thermal", ("gpu",))
