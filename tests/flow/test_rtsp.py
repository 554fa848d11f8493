"""Cameras over RTSP, from GStreamer's own server: they stop, stall, send nonsense, change their size, refuse."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from edge import gstreamer
from edge.address import shown
from edge.capture import Cameras, CameraState
from edge.config import CameraConfig, Decoder
from edge.errors import CaptureError
from edge.live import Reader
from edge.opencv import OpenCv
from edge.still import Still
from edge.values import Frame
from tests.chaos.proxy import Fault, Proxy
from tests.flow.conftest import PICTURE
from tests.flow.test_run import collecting, config, process, rows
from tests.rtsp_server import RtspServer, missing

SECONDS = 30.0  # the deadline of whatever should happen soon
TIMEOUT = 1.0  # s without a picture after which a camera is given up

pytestmark = pytest.mark.skipif(bool(why := missing()), reason=str(why))

lacking = gstreamer.lacking()
GST = pytest.param("gstreamer", marks=pytest.mark.skipif(bool(lacking), reason=f"GStreamer in this Python: {lacking}"))
DECODERS = ["ffmpeg", GST]
decoders = pytest.mark.parametrize("decoder", DECODERS)


def cameras(decoder: Decoder, *urls: str, timeout: float = TIMEOUT) -> Cameras:
    """Named a, b, … in this order."""
    configs = [CameraConfig(name=chr(ord("a") + i), source=url) for i, url in enumerate(urls)]
    return Cameras(configs, timeout=timeout, decoder=decoder)


def until(opened: Cameras, what: str, reached: Callable[[list[CameraState]], bool]) -> list[Frame]:
    """The frames that came until the states are as awaited."""
    deadline, frames = time.monotonic() + SECONDS, list[Frame]()
    while not reached(states := opened.states):
        assert time.monotonic() < deadline, f"not {what} within {SECONDS:g} s: {states}"
        frames += opened.next(0.05)
    assert opened.failures == []
    return frames


def fresh(states: list[CameraState], than: float = 0.0) -> bool:
    """Every camera is up, with a picture younger than a second, and than `than`, monotonic."""
    now = time.monotonic()
    return all(s.phase == "up" and s.frame_at and s.frame_at > max(than, now - 1) for s in states)


def look(opened: Cameras, size: tuple[int, int] | None = None) -> Frame:
    """A picture that comes from now on, of this width and height."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for frame in opened.next(1.0):
            if size in (None, (frame.width, frame.height)):
                return frame
    raise AssertionError(f"no picture of {size} within {SECONDS:g} s: {opened.states}")


@decoders
def test_a_camera_that_stops_and_starts(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # a first picture may take more than a second on a busy machine; that a connection broke off is seen without waiting
    with RtspServer({"/door": {}}) as server, cameras(decoder, server.url("/door", "me:secret@"), timeout=10) as opened:
        until(opened, "up", fresh)
        server.stop()
        until(opened, "noticed", lambda states: states[0].phase == "away")
        until(opened, "called in vain", lambda states: "refused" in str(states[0].error))
        server.start()
        again = time.monotonic()
        until(opened, "up again", lambda states: fresh(states, again))
        (state,) = opened.states
        assert state.reconnects == 1
        assert state.connected
    assert [state.phase for state in opened.states] == ["ended"]
    by = "GStreamer, with software" if decoder == "gstreamer" else "FFmpeg, through OpenCV"
    assert caplog.messages[:2] == [f"camera 'a': decoded by {by}", "camera 'a': connected"]
    assert {record.camera for record in caplog.records if record.name.startswith("edge.")} == {"a"}  # type: ignore[attr-defined]
    assert "secret" not in caplog.text
    assert f"rtsp://me:***@127.0.0.1:{server.port}: broke off; next attempt in" in caplog.text


@pytest.mark.parametrize("decoder", [GST])
def test_what_a_pipeline_tells_does_not_gather_while_pictures_come(decoder: Decoder) -> None:
    """A message each second, for weeks, would be gigabytes."""
    with RtspServer({"/door": {"fps": 25}}) as server, closing(gstreamer.GStreamer(server.url("/door"), 10)) as reader:
        deadline, told = time.monotonic() + SECONDS, list[bool]()
        while len(told) < 60:
            assert time.monotonic() < deadline, f"{len(told)} pictures within {SECONDS:g} s"
            if reader.grab():
                told.append(reader._bus.have_pending())
        assert sum(told[-40:]) < 3, "one may come just now"


@decoders
def test_a_camera_that_stalls_while_its_connection_stays(decoder: Decoder) -> None:
    """Once with the server's own packets of RTCP still coming, once with nothing at all."""
    with (
        RtspServer({"/door": {}}) as server,
        Proxy(server.port) as proxy,
        cameras(decoder, f"rtsp://127.0.0.1:{proxy.port}/door") as opened,
    ):
        until(opened, "up", fresh)
        server.tell("stall /door")
        start = time.monotonic()
        until(opened, "noticed", lambda states: states[0].phase == "away")
        assert time.monotonic() - start < TIMEOUT + 3
        age = opened.states[0].frame_at
        assert age is not None
        assert time.monotonic() - age > TIMEOUT - 0.5
        server.tell("flow /door")
        flowing = time.monotonic()
        until(opened, "up again", lambda states: fresh(states, flowing))
        proxy.begin(Fault("half-open"))
        until(opened, "noticed again", lambda states: states[0].phase == "away")
        until(opened, "up a third time", fresh)
        assert opened.states[0].reconnects == 2
        assert proxy.hits["half-open"] == 1


@decoders
def test_a_damaged_stream_does_not_poison_what_comes_after(decoder: Decoder, capfd: pytest.CaptureFixture[str]) -> None:
    facts = {"pattern": "snow", "size": (320, 240), "fps": 25}
    with RtspServer({"/door": facts, "/whole": facts}) as server:
        with cameras(decoder, server.url("/door"), server.url("/whole")) as opened:
            until(opened, "up", fresh)
            for order in ("garbage", "lossy"):
                start, captured = time.monotonic(), opened.states[1].frames
                server.tell(f"{order} /door")
                # as long as the whole one sends a second of pictures
                frames = until(opened, order, lambda states, start=captured: states[1].frames > start + 30)  # type: ignore[misc]
                assert {frame.image.shape for frame in frames if frame.camera == "b"} == {(240, 320, 3)}
                assert opened.states[1].reconnects == 0
                server.tell("flow /door")
                start = time.monotonic()
                until(opened, f"whole after {order}", lambda states, start=start: fresh(states, start))  # type: ignore[misc]
            until_whole(opened)
        capfd.readouterr()  # GLib may say something of its own


def until_whole(opened: Cameras) -> None:
    """The first camera shows snow again, not the grey of a decoder that lacks a key frame."""
    deadline = time.monotonic() + SECONDS
    while not any(frame.camera == "a" and frame.image.std() > 20 for frame in opened.next(1.0)):
        assert time.monotonic() < deadline, f"no whole picture within {SECONDS:g} s: {opened.states}"


class Nonsense(BaseRequestHandler):
    """Answers as RTSP begins, then with whatever bytes, and goes on with them as long as somebody listens."""

    def handle(self) -> None:
        chance = random.Random(self.client_address[1])
        try:
            self.request.recv(1000)
            self.request.sendall(
                b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 999999999\r\n\r\n" * chance.randint(0, 1)
            )
            for _ in range(200):
                self.request.sendall(chance.randbytes(1000))
        except OSError:
            pass


@decoders
def test_a_peer_that_speaks_nonsense(decoder: Decoder) -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), Nonsense) as peer:
        thread = threading.Thread(target=peer.serve_forever, args=(0.01,))
        thread.start()
        try:
            port = peer.server_address[1]
            with cameras(decoder, *(f"rtsp://127.0.0.1:{port}/{i}" for i in range(3))) as opened:
                until(opened, "three in vain", lambda states: all(s.error and "opened" in s.error for s in states))
                until(opened, "called again", lambda states: min(s.beat_at for s in states) > time.monotonic() - 2)
        finally:
            peer.shutdown()
            thread.join()


@decoders
def test_a_camera_that_changes_its_size(decoder: Decoder) -> None:
    """GStreamer gives pictures of the new size; OpenCV scales them to the one with which it began."""
    with (
        RtspServer({"/door": {"pattern": "snow", "fps": 25}}) as server,
        cameras(decoder, server.url("/door")) as opened,
    ):
        assert look(opened).image.shape == (120, 160, 3)
        for width, height in ((320, 240), (64, 48), (642, 362), (160, 120)):
            server.tell(f"size /door {width} {height}")
            if decoder == "gstreamer":
                assert look(opened, (width, height)).image.std() > 20
            else:
                count = opened.states[0].frames
                frames = until(opened, "going on", lambda states, seen=count: states[0].frames > seen + 12)  # type: ignore[misc]
                assert {frame.image.shape for frame in frames} == {(120, 160, 3)}
                assert frames[-1].image.std() > 5
        assert opened.states[0].reconnects == opened.states[0].drops.get("unreadable", 0) == 0


@decoders
@pytest.mark.parametrize("kind", ["basic", "digest"])
def test_a_wrong_password_is_refused_and_not_told(
    kind: str, decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    right, wrong = "me:p%40ss%2Fw%3Ard@", "me:se%40cret@"
    with RtspServer({"/door": {}}, login=("me", "p@ss/w:rd", kind)) as server:
        urls = [server.url("/door", right), server.url("/door", wrong), server.url("/door")]
        with cameras(decoder, *urls, timeout=10) as opened:
            until(opened, "told", lambda states: all(state.error for state in states[1:]) and fresh(states[:1]))
            states = opened.states
    problem = "cannot be opened: it refuses this user and password" if decoder == "gstreamer" else "cannot be opened"
    for state, url in zip(states[1:], urls[1:], strict=True):
        assert re.fullmatch(re.escape(f"{shown(url)}: {problem}; next attempt in ") + r"\d+\.\d s", str(state.error))
        assert state.phase == "away"
    for secret in ("p@ss", "p%40ss", "se@cret", "se%40cret", "cret"):
        assert secret not in caplog.text
        assert secret not in repr(states)


@decoders
def test_ten_cameras_none_of_which_starves(decoder: Decoder) -> None:
    """Of different rates, some of them faster than anybody takes."""
    rates = [8, 10, 10, 12, 12, 15, 15, 20, 25, 30]
    mounts = {f"/{i}": {"fps": rate, "size": (96, 64)} for i, rate in enumerate(rates)}
    with RtspServer(mounts) as server, cameras(decoder, *map(server.url, mounts), timeout=10) as opened:
        until(opened, "all up", fresh)
        before, taken, began = opened.states, dict.fromkeys("abcdefghij", 0), time.monotonic()
        while time.monotonic() < began + 3:
            frames = opened.next(1.0)
            assert len({frame.camera for frame in frames}) == len(frames)
            for frame in frames:
                taken[frame.camera] += 1
            opened.next(0)  # and one more thrown away
        assert fresh(opened.states)
        came = [after.frames - one.frames for after, one in zip(opened.states, before, strict=True)]
        assert all(n >= 2 * rate for n, rate in zip(came, rates, strict=True)), came
        assert min(taken.values()) >= 5, taken

        opened.pace(2.0)
        start = opened.states
        until(opened, "paced", lambda states: states[9].frames >= start[9].frames + 60)
        paced = [
            one.drops.get("paced", 0) - was.drops.get("paced", 0) for one, was in zip(opened.states, start, strict=True)
        ]
        assert paced[9] >= 50
        assert fresh(opened.states)


@decoders
def test_other_cameras_after_a_reload(decoder: Decoder) -> None:
    with RtspServer({"/a": {}, "/b": {"size": (96, 64)}}) as server:
        a, b = (CameraConfig(name=name, source=server.url(f"/{name}")) for name in "ab")
        with Cameras([a], timeout=TIMEOUT, decoder=decoder) as opened:
            until(opened, "up", fresh)
            opened.replace([b, a])
            until(opened, "both up", fresh)
            states = {state.name: state for state in opened.states}
            assert [state.name for state in opened.states] == ["b", "a"]
            assert states["a"].reconnects == 0
            opened.replace([b])
            count = opened.states[0].frames
            frames = until(opened, "more of b", lambda states: states[0].frames > count + 2)
            assert {frame.camera for frame in frames} == {"b"}


@decoders
@pytest.mark.parametrize("codec", ["x265", "jpeg"])
def test_other_codecs(codec: str, decoder: Decoder) -> None:
    with RtspServer({"/door": {"codec": codec}}) as server, cameras(decoder, server.url("/door")) as opened:
        assert look(opened).image.std() > 5  # a white ball


def pictures(reader: Reader, n: int) -> Iterator[np.ndarray[Any, Any]]:
    while n:
        if reader.grab():
            image = reader.retrieve()
            assert image is not None
            n -= 1
            yield image


@decoders
def test_what_is_frozen_and_what_is_merely_dark(decoder: Decoder, tmp_path: Path) -> None:
    """Of a black picture without noise every decoded one is the same; one with noise, however dark, is not."""
    chance = np.random.default_rng(0)
    for i in range(30):
        cv2.imwrite(str(tmp_path / f"{i:02}.jpg"), 18 + chance.poisson(4, (120, 160)).astype(np.uint8))
    dark = {"files": f"{tmp_path}/%02d.jpg", "fps": 25}
    call = OpenCv if decoder == "ffmpeg" else gstreamer.GStreamer
    with RtspServer({"/stuck": {"pattern": "black", "fps": 25}, "/dark": dark}) as server:
        for mount, expected in (("/stuck", True), ("/dark", False)):
            reader, still = call(server.url(mount), 10.0), Still(1.0)
            try:
                told = [still.frozen(image, i / 25) for i, image in enumerate(pictures(reader, 40))]
            finally:
                reader.close()
            assert any(told) == told[-1] == expected, mount


@pytest.mark.skipif(bool(lacking), reason=f"GStreamer in this Python: {lacking}")
def test_fifty_connections_leave_nothing_behind() -> None:
    this = psutil.Process()
    with RtspServer({"/door": {"fps": 25, "gop": 1, "size": (64, 48)}}, login=("me", "pw", "digest")) as server:
        counts = []
        for i in range(50):
            good = i % 5 > 0
            reader = gstreamer.GStreamer(server.url("/door", "me:pw@" if good else "me:no@"), 10.0)
            try:
                list(pictures(reader, 1))
            except CaptureError:
                assert not good
            else:
                assert good
            reader.close()
            if i in (9, 49):
                until_still(this)
                counts.append((this.num_fds(), this.num_threads()))
        before, after = counts
        assert after[0] <= before[0] + 1, counts
        assert after[1] <= before[1] + 1, counts


def until_still(process: psutil.Process) -> None:
    """Threads that are ending have ended."""
    deadline, seen = time.monotonic() + 5, (-1, 0)
    while time.monotonic() < deadline:
        now = process.num_threads()
        seen = (now, seen[1] + 1 if now == seen[0] else 0)
        if seen[1] > 100:
            return
        os.sched_yield()


def test_the_box_describes_people_before_and_after_an_outage(mini: Path, tmp_path: Path) -> None:
    image = cv2.imread(str(PICTURE))
    for shift in range(10):
        cv2.imwrite(str(tmp_path / f"{shift}.jpg"), np.roll(image, 4 * shift, axis=1))
    facts = {"files": f"{tmp_path}/%d.jpg", "size": image.shape[1::-1], "fps": 5}
    store = tmp_path / "store.db"

    def people() -> int:
        (number,) = rows(store, "SELECT count(*) FROM people")[0]
        assert isinstance(number, int)
        return number

    def people_beyond(number: int) -> int:
        deadline = time.monotonic() + 2 * SECONDS
        while (now := people()) <= number:
            assert time.monotonic() < deadline, f"no more than {number} people within {2 * SECONDS:g} s"
            assert box.poll() is None, box.communicate()[1]
            time.sleep(0.05)
        return now

    with (
        RtspServer({"/pan": facts}) as server,
        collecting(store) as (_, address),
        process("edge", "run", "--config", config(tmp_path, mini, server.url("/pan"), address=address)) as box,
    ):
        assert box.stderr is not None
        people_beyond(0)
        server.stop()
        assert next(line for line in box.stderr if "broke off" in line)
        assert next(line for line in box.stderr if "refused" in line)
        server.start()
        assert next(line for line in box.stderr if "pan" in line and "connected" in line)
        people_beyond(people() + 5)
        box.send_signal(signal.SIGTERM)
        said, log = box.communicate(timeout=SECONDS)
    assert box.returncode == 0, log
    assert "camera pan:" in said
