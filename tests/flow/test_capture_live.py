"""Live cameras over real sockets: they vanish, return, stall and outrun their consumer."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.capture import CLOSE_SECONDS, Cameras, CameraState
from edge.config import CameraConfig
from edge.values import Frame
from tests.http_camera import http_camera

SECONDS = 15.0  # the deadline of whatever should happen soon


class HttpCamera:
    """An MJPEG camera on the loopback: 100 frames a second, frame i of a connection has brightness 2 i.

    frames: how many it sends on each connection; then it says nothing more, and keeps the connection.
    """

    def __init__(self, frames: int = 125, port: int = 0) -> None:
        gone = self._gone = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                try:
                    for i in range(frames):
                        jpeg = bytes(cv2.imencode(".jpg", np.full((48, 64, 3), 2 * i, np.uint8))[1])
                        self.wfile.write(
                            b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                        )
                        self.wfile.write(jpeg + b"\r\n")
                        if gone.wait(0.01):
                            return
                    gone.wait()
                except OSError:
                    pass  # the client left

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://me:secret@127.0.0.1:{self.port}/video?token=secret"

    def __enter__(self) -> HttpCamera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._gone.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a peer that lets itself be called and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def cameras(*sources: str, timeout: float = 10.0) -> Cameras:
    """Named a, b, … in this order."""
    return Cameras([CameraConfig(name=chr(ord("a") + i), source=s) for i, s in enumerate(sources)], timeout=timeout)


def until(opened: Cameras, what: str, reached: Callable[[CameraState], bool]) -> CameraState:
    """Camera a's state once it is as awaited; nothing is taken meanwhile."""
    deadline = time.monotonic() + SECONDS
    while not reached(state := opened.states[0]):
        assert time.monotonic() < deadline, f"not {what} within {SECONDS} s: {opened.states}"
        time.sleep(0.005)
    return state


def next_frames(opened: Cameras) -> list[Frame]:
    frames = opened.next(SECONDS)
    assert frames, f"no frame within {SECONDS} s: {opened.states}"
    return frames


def brightness_of(frame: Frame) -> int:
    return round(float(frame.image.mean()) / 2)


def test_the_latest_frame_wins() -> None:
    with HttpCamera() as camera, cameras(camera.url) as opened:
        before = time.time()
        until(opened, "30 frames captured", lambda state: state.frames >= 30)
        (frame,) = next_frames(opened)
        assert frame.number >= 29
        assert brightness_of(frame) == frame.number  # the picture is as new as its number
        assert before <= frame.captured_at <= time.time()
        assert opened.states[0].dropped >= frame.number  # every one before it

        until(opened, "another 10 frames captured", lambda state: state.frames > frame.number + 10)
        (later,) = next_frames(opened)
        assert later.number > frame.number + 9
        assert brightness_of(later) == later.number
        assert not opened.done
    state = opened.states[0]
    assert state.frames - state.dropped in (2, 3)  # those taken, and one that may have waited at the end


def test_a_camera_that_vanishes_and_returns(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    with HttpCamera() as camera, cameras(camera.url) as opened:
        first = next_frames(opened)[-1]
        camera.close()
        state = until(opened, "noticed that the camera is gone", lambda state: not state.connected)
        assert state.error is not None
        assert state.error.startswith(f"http://me:***@127.0.0.1:{camera.port}: broke off; next attempt in ")
        until(opened, "called in vain", lambda state: "cannot be opened" in (state.error or ""))
        opened.next(0.0)  # what it still had
        with HttpCamera(port=camera.port):
            (again,) = next_frames(opened)
            assert again.number > first.number
            assert brightness_of(again) < again.number  # of the new connection
            assert opened.states[0].connected
        assert opened.failures == []
    messages = [re.sub(r"\d+\.\d+ s", "S", message) for message in caplog.messages]
    shown = f"camera 'a': http://me:***@127.0.0.1:{camera.port}"
    assert messages[:3] == [
        "camera 'a': connected",
        f"{shown}: broke off; next attempt in S",
        f"{shown}: cannot be opened: connection refused; next attempt in S",
    ]
    assert messages.count("camera 'a': connected") == 2
    assert "secret" not in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_silent_peer_is_noticed(scheme: str, silent: int) -> None:
    start = time.monotonic()
    with cameras(f"{scheme}://127.0.0.1:{silent}/", timeout=0.5) as opened:
        until(opened, "given up", lambda state: "cannot be opened" in (state.error or ""))
        assert 0.4 < time.monotonic() - start < 5
        assert opened.next(0.0) == []
        assert not opened.done


def test_a_camera_that_falls_silent_is_called_anew() -> None:
    with HttpCamera(frames=10) as camera, cameras(camera.url, timeout=0.5) as opened:
        until(opened, "noticed the silence", lambda state: "no picture for 0.5 s" in (state.error or ""))
        until(opened, "connected again", lambda state: state.frames > 10)


def test_a_device_that_is_not_there() -> None:
    with cameras("63") as opened:
        state = until(opened, "reported", lambda state: state.error is not None)
        assert str(state.error).startswith("63: cannot be opened; next attempt in ")


def test_what_opencv_throws_is_no_end_of_a_camera() -> None:
    """A number that fits no C int: its thread goes on, and the watchdog has nothing to kill."""
    with cameras("99999999999999999999") as opened:
        state = until(opened, "away", lambda state: state.error is not None)
        assert "cannot be opened or read: OpenCV refuses it; next attempt in" in str(state.error)
        until(opened, "called anew", lambda later: later.error != state.error)
        assert (opened.states[0].phase, opened.failures) == ("away", [])


def test_a_camera_does_not_take_the_memory_of_a_box(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "huge.jpg"), np.zeros((10_000, 10_400), np.uint8))  # grey takes the test less itself
    with http_camera(tmp_path) as address, cameras(f"{address}/huge") as opened:
        state = until(opened, "refused", lambda state: state.error is not None)
    assert ": its pictures of 10400 x 10000 px are too large; next attempt in" in str(state.error)
    assert (state.phase, state.frames, state.dropped) == ("away", 0, 0)


def test_next_gives_up_after_its_timeout(silent: int) -> None:
    with cameras(f"http://127.0.0.1:{silent}/") as opened:
        start = time.monotonic()
        assert opened.next(0.2) == []
        assert 0.2 <= time.monotonic() - start < 5


def test_close_does_not_wait_for_a_read_that_hangs(silent: int, caplog: pytest.LogCaptureFixture) -> None:
    opened = cameras(f"http://127.0.0.1:{silent}/", f"rtsp://127.0.0.1:{silent}/", timeout=60)
    with opened:
        assert opened.next(0.2) == []
        start = time.monotonic()
    assert time.monotonic() - start < CLOSE_SECONDS + 1
    assert opened.next(60.0) == []
    opened.close()
    assert caplog.records == []


def test_close_wakes_a_camera_between_two_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with cameras(f"http://127.0.0.1:{port}/") as opened:
        until(opened, "called in vain", lambda state: state.error is not None)
    assert opened.done  # its thread has ended


def test_live_cameras_and_a_file_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "b.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(20):
        video.write(np.zeros((48, 64, 3), np.uint8))
    video.release()
    numbers: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    with HttpCamera() as one, HttpCamera() as two, cameras(one.url, str(path), two.url) as opened:
        deadline = time.monotonic() + SECONDS
        while len(numbers["b"]) < 20 or min(len(numbers["a"]), len(numbers["c"])) < 5:
            assert time.monotonic() < deadline, f"not 20 and 5 frames within {SECONDS} s: {numbers}"
            frames = next_frames(opened)
            assert len({frame.camera for frame in frames}) == len(frames)
            for frame in frames:
                numbers[frame.camera].append(frame.number)
        assert not opened.done
    assert numbers["b"] == list(range(20))
    assert all(numbers[name] == sorted(set(numbers[name])) for name in "ac")


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from edge.capture import Cameras
from edge.config import CameraConfig
try:
    with Cameras([CameraConfig(name=source, source=source) for source in sys.argv[1:]], timeout=60) as cameras:
        print("ready", flush=True)
        cameras.next(60)
        print("a frame?")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_ends_a_program_whose_cameras_hang(silent: int) -> None:
    sources = [f"http://me:secret@127.0.0.1:{silent}/", f"rtsp://me:secret@127.0.0.1:{silent}/"]
    command = [sys.executable, "-c", PROGRAM, *sources]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            program.send_signal(signal.SIGINT)
            out, errors = program.communicate(timeout=SECONDS)
        finally:
            program.kill()
    assert (program.returncode, out, errors) == (0, "interrupted\n", "")


def test_a_camera_is_read_by_its_schedule_alone() -> None:
    now = [datetime(2024, 1, 1, 6, 59)]
    with HttpCamera(frames=10_000) as camera:
        config = CameraConfig(name="a", source=camera.url, schedule=("Mon 07:00-19:00",))
        with Cameras([config], today=lambda: now[0]) as opened:
            until(opened, "off", lambda state: state.phase == "off")
            assert opened.next(0.3) == []
            now[0] = datetime(2024, 1, 1, 7, 0)
            assert next_frames(opened)
            now[0] = datetime(2024, 1, 1, 19, 0)
            off = until(opened, "off again", lambda state: state.phase == "off")
            opened.next(0.0)
            assert opened.next(0.3) == []
            now[0] = datetime(2024, 1, 8, 12, 0)
            until(opened, "on again", lambda state: state.frames > off.frames)
            assert opened.states[0].reconnects == 1
            assert not opened.done


def test_a_paced_camera_gives_about_so_many_pictures() -> None:
    with HttpCamera(frames=10_000) as camera, cameras(camera.url) as opened:
        opened.pace(10.0)
        start = until(opened, "up", lambda state: state.frames > 10)
        later = until(opened, "100 more", lambda state: state.frames >= start.frames + 100)
        paced = later.drops["paced"] - start.drops.get("paced", 0)
        assert 80 <= paced <= 95
        opened.pace(None)
        start = until(opened, "all", lambda state: state.frames > later.frames + 10)
        later = until(opened, "50 more", lambda state: state.frames >= start.frames + 50)
        assert later.drops["paced"] == start.drops["paced"]


def test_every_record_of_a_camera_says_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with HttpCamera(frames=3) as camera, cameras(camera.url, "http://127.0.0.1:1/", timeout=0.3) as opened:
        deadline = time.monotonic() + SECONDS
        while any(state.error is None for state in opened.states):
            assert time.monotonic() < deadline, opened.states
    assert {record.camera for record in caplog.records} == {"a", "b"}  # type: ignore[attr-defined]
