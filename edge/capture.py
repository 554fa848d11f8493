"""Cameras, video files and folders of images become Frames; a live camera reconnects, and its latest frame wins."""

from __future__ import annotations

import logging
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import cv2

from edge.config import CameraConfig, is_url_or_device
from edge.errors import CaptureError
from edge.failpoints import failpoint
from edge.images import SUFFIXES, image_files, read_image
from edge.values import Frame, Image

logger = logging.getLogger(__name__)

# By itself FFmpeg prints many lines, some with a camera's password in them; what matters is said here. Its level is
# read when the first video is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # s between attempts to reach a live camera
CLOSE_SECONDS = 2.0  # how long close() waits; a thread that hangs in a dead camera's read is left behind
URLS = ("rtsp://", "rtsps://", "http://", "https://")

# A source yields pictures, as seconds since 1970 and (H, W, 3) uint8 BGR, and the mishaps that it goes on after.
# What ends it before its time it raises, as CaptureError.
Pictures = Generator[tuple[float, Image] | CaptureError, None, None]


def _folder(folder: Path, files: Sequence[Path]) -> Pictures:
    """Every image that can be read, captured when it is read."""
    unreadable = 0
    for path in files:
        try:
            yield time.time(), read_image(path)
        except CaptureError as error:
            unreadable += 1
            yield error
    if unreadable == len(files):
        raise CaptureError(f"{folder}: none of its {len(files)} images can be read")


def _video(path: Path, capture: cv2.VideoCapture) -> Pictures:
    """Every frame from the grabbed one on, captured at the start of the reading plus its position in the video."""
    start, position, frames = time.time(), 0.0, 0
    promised, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    try:
        grabbed = True
        while grabbed:
            position = max(position, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            grabbed, image = capture.retrieve()
            if grabbed:
                yield start + position, cast(Image, image)
                frames += 1
                grabbed = capture.grab()
    finally:
        capture.release()
    if promised > 0 and rate > 0:
        # By time as well as by number: many headers hold no number, and where the rate varies OpenCV guesses a wrong
        # one. The slack is for sound that outlasts the picture.
        missing = promised - max(frames, position * rate + 1)
        if missing > min(0.5 * rate, 0.1 * promised):
            raise CaptureError(f"{path}: the video breaks off", expected=f"{promised:.0f} frames", got=frames)


def _live(source: str, timeout: float, wait: Callable[[float], bool]) -> Pictures:
    """Frames as they come, captured when they have come; reconnects until `wait(seconds)` says False."""
    delay = FIRST_DELAY
    while True:
        if source.isdecimal():
            capture = cv2.VideoCapture(int(source))  # its driver has a timeout of its own
        else:
            limit = int(timeout * 1000)
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
            capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
        problem = "broke off" if capture.isOpened() else "cannot be opened"
        try:
            while (read := capture.read())[0]:
                delay = FIRST_DELAY
                yield time.time(), cast(Image, read[1])
        finally:
            capture.release()
        pause = delay * random.uniform(0.5, 1)  # so that many boxes do not fall upon a camera at once
        yield CaptureError(f"{_shown(source)}: {problem}", remedy=f"next attempt in {pause:.1f} s")
        if not wait(pause):
            return
        delay = min(2 * delay, LONGEST_DELAY)


def _shown(source: str) -> str:
    """A source as people may see it: of a URL only scheme, user and host, as passwords hide in path and query too."""
    return re.sub(
        r"^(.*?:/+)(?:([^/?#:@]*)(:?).*@)?([^/?#]*).*",
        lambda url: url[1] + (f"{url[2]}:***@" if url[3] else "" if url[2] is None else "***@") + url[4],
        source,
        flags=re.DOTALL,
    )


def _opened(source: str, timeout: float, wait: Callable[[float], bool]) -> Pictures:
    """The pictures of a source. Raises CaptureError where a file or folder has none; live cameras may come later."""
    if is_url_or_device(source):
        if not source.isdecimal() and not source.startswith(URLS):
            raise CaptureError(f"{_shown(source)}: unknown kind of address", expected=" or ".join(URLS))
        return _live(source, timeout, wait)
    path = Path(source)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            if not (files := image_files(path)):
                raise CaptureError(f"{path}: no images", expected="files named " + " ".join(SUFFIXES))
            return _folder(path, files)
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise CaptureError(f"{_shown(source)}: {getattr(error, 'strerror', error)}") from error
    capture = cv2.VideoCapture()
    # An absolute path, as FFmpeg would take "door:1.avi" for an address.
    if not stat.S_ISREG(mode) or not capture.open(str(path.absolute()), cv2.CAP_FFMPEG) or not capture.grab():
        raise CaptureError(f"{path}: no video", expected="a video file, a folder of images, a URL or a device number")
    return _video(path, capture)


Phase = Literal["starting", "up", "away", "frozen", "off", "ended"]


@dataclass(frozen=True)
class CameraState:
    """How one camera does.

    live: no file or folder. phase: starting, no picture yet; up, pictures come; away, it is called in vain; frozen,
    pictures come and show the same to the last bit; off, outside its schedule; ended, read to its end, or given up.
    frames: captured so far. drops: by reason, those that never left here: "replaced" by a newer one before anyone took
    them, "paced" as more than wanted, "unreadable" (these are no frames). reconnects: connections after the first.
    error: the latest, also when it is over. frame_at: time.monotonic() of the latest picture. beat_at: of the latest
    sign of life of the thread that reads it, be it an attempt, a picture or a wait; there is none after the end.
    """

    name: str
    live: bool = True
    phase: Phase = "starting"
    frames: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)
    reconnects: int = 0
    error: str | None = None
    frame_at: float | None = None
    beat_at: float = field(default_factory=time.monotonic)

    @property
    def connected(self) -> bool:
        """The latest attempt to read gave a picture, and it was not the same one as ever."""
        return self.phase == "up"

    @property
    def dropped(self) -> int:
        """For any reason."""
        return sum(self.drops.values())


@dataclass
class _Camera:
    """What a camera's thread and the taker of its frames share, guarded by the condition of Cameras."""

    pictures: Pictures
    state: CameraState
    frame: Frame | None = None  # captured, not yet taken
    ended: bool = False

    def note(self, **changes: Any) -> None:
        self.state = replace(self.state, beat_at=time.monotonic(), **changes)

    def drop(self, reason: str) -> None:
        self.note(drops={**self.state.drops, reason: self.state.drops.get(reason, 0) + 1})


class Cameras:
    """Several sources at once, each read by a thread of its own; a context manager.

    Files and folders wait until a frame is taken, so that every frame is delivered. Live cameras do not wait: of them
    the newest frame is kept, and numbers that are missing were dropped.

    failures: what ended a source before its time; complete once `done`.
    """

    def __init__(self, configs: Sequence[CameraConfig], *, timeout: float = 10.0) -> None:
        """timeout: seconds after which a silent network camera is given up and called anew.

        Raises CaptureError where a video or folder cannot be read; live cameras may be away.
        """
        self.failures: list[CaptureError] = []
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._cameras = []
        for config in configs:
            try:
                pictures = _opened(config.source, timeout, self._wait)
            except CaptureError as error:
                raise CaptureError(f"camera {config.name!r}: {error}") from error
            self._cameras.append(_Camera(pictures, CameraState(config.name, is_url_or_device(config.source))))

    def __enter__(self) -> Cameras:
        for camera in self._cameras:
            # A daemon, as a read from a dead camera may outlast the program's wish to end.
            thread = threading.Thread(target=self._run, args=(camera,), name=camera.state.name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every source, within CLOSE_SECONDS. Frames not yet taken are gone."""
        with self._changed:
            self._closed = True
            for camera in self._cameras:
                camera.frame = None
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._threads:
            self._threads.pop().join(max(0.0, deadline - time.monotonic()))

    def next(self, timeout: float) -> list[Frame]:
        """What is there, at most one frame of each camera; waits up to `timeout` seconds for the first.

        Empty where none came in time, and at once when there is nothing to wait for.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.done or any(c.frame for c in self._cameras), timeout)
            frames = [camera.frame for camera in self._cameras if camera.frame]
            for camera in self._cameras:
                camera.frame = None
            self._changed.notify_all()
            return frames

    @property
    def done(self) -> bool:
        """True when every source has ended and every frame was taken; a live camera does not end."""
        with self._changed:
            return all(camera.ended and not camera.frame for camera in self._cameras)

    @property
    def states(self) -> list[CameraState]:
        """One per camera, in the order of the configuration."""
        with self._changed:
            return [camera.state for camera in self._cameras]

    def _run(self, camera: _Camera) -> None:
        """The body of a camera's thread."""
        name, failure = camera.state.name, None
        try:
            for picture in camera.pictures:
                failpoint("box.capture")
                if isinstance(picture, CaptureError):
                    self._note(camera, picture)
                else:
                    self._offer(camera, *picture)
                if self._closed:
                    break
        except CaptureError as error:
            failure = CaptureError(f"camera {name!r}: {error}")
        except Exception as error:  # whatever it is: a thread that dies must not look like a quiet camera
            failure = CaptureError(f"camera {name!r}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        camera.pictures.close()
        if failure:
            logger.warning("%s", failure, extra={"camera": name})
        with self._changed:
            if failure:
                self.failures.append(failure)
                camera.note(error=str(failure))
            camera.note(phase="ended")
            camera.ended = True
            self._changed.notify_all()

    def _offer(self, camera: _Camera, captured_at: float, image: Image) -> None:
        """Put a picture where next() finds it."""
        with self._changed:
            if self._closed:
                return
            name, number, live = camera.state.name, camera.state.frames, camera.state.live
            if live and not camera.state.connected:
                logger.info("camera %r: connected", name, extra={"camera": name})
            again = live and number > 0 and not camera.state.connected
            camera.note(
                phase="up",
                frames=number + 1,
                frame_at=time.monotonic(),
                reconnects=camera.state.reconnects + again,
            )
            while not live and not self._changed.wait_for(lambda: self._closed or not camera.frame, 1.0):
                camera.note()
            if live and camera.frame:
                camera.drop("replaced")
            if not self._closed:
                camera.frame = Frame(name, number, captured_at, image)
                self._changed.notify_all()

    def _note(self, camera: _Camera, mishap: CaptureError) -> None:
        """Say what a source goes on after."""
        if not self._closed:  # afterwards nobody wants to hear of it
            with self._changed:
                camera.note(error=str(mishap), **({"phase": "away"} if camera.state.live else {}))
                if not camera.state.live:
                    camera.drop("unreadable")
            logger.warning("camera %r: %s", camera.state.name, mishap, extra={"camera": camera.state.name})

    def _wait(self, seconds: float) -> bool:
        """Pause a live camera's thread. False when it is time to stop."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, seconds)
