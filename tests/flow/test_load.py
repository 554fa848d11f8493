"""Real cameras before a box that cannot keep up, and a real box that describes no more frames than it may."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq

from edge.capture import Cameras, CameraState
from edge.clock import synchronised
from edge.config import CameraConfig, LoadConfig
from edge.events import decode
from edge.load import Load
from tests.flow.conftest import command
from tests.http_camera import RATE, http_camera, quiet_scenes

DEADLINE = 30.0  # s


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of http:// cameras."""
    with http_camera(quiet_scenes(tmp_path / "scenes")) as address:
        yield address


class Hands:
    """A describer that does nothing."""

    has_smaller = False

    def limit(self, max_crops: int) -> None:
        pass

    def use_smaller(self, on: bool) -> None:
        pass


def until(what: str, true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


def test_a_loop_that_is_too_slow_for_real_cameras_steps_down_and_one_that_keeps_up_steps_up(
    tmp_path: Path, address: str
) -> None:
    """The box's clock runs fast, so that nobody waits for two minutes; the cameras' do not."""
    said: list[str] = []
    configs = [CameraConfig(name=name, source=f"{address}/{name}") for name in ("dark", "empty")]
    with Cameras(configs) as cameras:
        load, now = Load(LoadConfig(max_fps=4 * RATE), 4, cameras, Hands(), said.append, tmp_path), 0.0  # type: ignore[arg-type]

        def states() -> dict[str, CameraState]:
            return {state.name: state for state in cameras.states}

        def replaced() -> int:
            return states()["dark"].drops.get("replaced", 0)

        until("both cameras", lambda: all(state.frames for state in states().values()))
        while not said:  # a turn takes as long as three pictures, or four
            seen = replaced()
            until("pictures that nobody took", lambda seen=seen: replaced() >= seen + 2)
            cameras.next(1)
            now += 10
            load.turn(now)
            assert now < 100
        assert re.fullmatch(r"\d\d? % of the frames could be looked at: 8 frames per second instead of 16", said[0])
        while len(said) < 2:
            cameras.next(1)
            now += 10
            load.turn(now)
            assert now < 1000
        assert re.fullmatch(r"\d+ % of the frames could be looked at: 16 frames per second again", said[1])


def test_a_box_describes_no_more_frames_than_it_may_and_says_how_its_clock_is(
    tmp_path: Path, address: str, mini: Path
) -> None:
    config = tmp_path / "edge.toml"
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger, socket.rcvtimeo = 0, int(1000 * DEADLINE)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        config.write_text(
            f'device = "box"\nbundle = "{mini}"\n[[camera]]\nname = "yard"\nsource = "{address}/empty"\n'
            f'[health]\naddress = ""\n[publish]\naddress = "tcp://127.0.0.1:{port}"\ntransport = "push"\n'
            f"[load]\nmax_fps = {RATE / 4}\n"
        )
        done = command("edge", "run", "--config", config, "--max-frames", 4)
        events = [decode(socket.recv_multipart()).header for _ in range(4)]
    for before, after in pairwise(events[1:]):  # the first may have come before the box had said how many it wants
        assert after.captured_at - before.captured_at > 0.4 * 4 / RATE
        assert after.frame - before.frame >= 2
    assert {event.clock for event in events} == {"unsynchronised" if synchronised() is False else None}
    assert all(event.notices == () for event in events)
    dropped = re.search(r"camera yard: \d+ frames, (\d+) dropped", done.stdout)
    assert dropped, done.stdout
    assert int(dropped[1]) >= 4
