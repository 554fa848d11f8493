"""Cameras, video files and folders of images become Frames; a live camera reconnects, and its latest frame wins."""

from __future__ import annotations

import logging
import os
import random
import re
import stat
import threading
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from edge.config import CameraConfig, is_url_or_device
from edge.errors import CaptureError
from edge.values import Frame, Image

logger = logging.getLogger(__name__)

# By themselves OpenCV and FFmpeg print many lines, some with a camera's password in them; what matters is said here.
# FFmpeg's level is read when the first video is opened; OpenCV moved its own switch after 4.10.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
getattr(cv2.utils, "logging", cv2).setLogLevel(0)

MAX_PIXELS = 100_000_000  # 300 MB decoded: no camera makes more, a decompression bomb does
MAX_BYTES = 1 << 30  # of an image file, which is read whole
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # s between attempts to reach a live camera
CLOSE_SECONDS = 2.0  # how long close() waits; a thread that hangs in a dead camera's read is left behind
URLS = ("rtsp://", "rtsps://", "http://", "https://")

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
JPEG_MARKER = re.compile(rb"\xff+[\x02-\xcf\xd8-\xfe]")  # those with a segment, and the picture's end
JPEG_END = 0xD9
JPEG_SIZE = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers whose segment holds height and width
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # over other chunks libpng only warns, on stderr


def read_image(path: Path) -> Image:
    """One JPEG, PNG, BMP or WebP file as (H, W, 3) uint8 BGR, turned as its EXIF orientation says.

    Grey, palette, 16-bit and CMYK pictures are converted; an alpha channel is dropped. Raises CaptureError where the
    file cannot be read, is no such image, is cut short or damaged, or has more than MAX_PIXELS.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        width, height, data = _checked(path.read_bytes())
        if not width or not height:
            raise ValueError("an image without pixels")
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CaptureError(f"{path}: {error}") from error
    except cv2.error as error:
        raise CaptureError(f"{path}: a damaged image") from error
    if image is None:
        raise CaptureError(f"{path}: a damaged image")
    return cast(Image, image)


def _checked(data: bytes) -> tuple[int, int, bytes]:
    """Width and height in pixels as the header says (0 where it is cut), and the bytes to decode. Raises ValueError.

    These looks ahead are needed because a decoder fills the missing part of a JPEG with grey, prints what ails a PNG,
    and allocates whatever a header asks for.
    """
    if data.startswith(b"\xff\xd8"):
        return *_jpeg_size(data), data
    if data.startswith(PNG_START):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), _png_pixels(data)
    if data.startswith(b"BM"):
        size = 2 if data[14:15] == b"\x0c" else 4  # bytes of a number: OS/2 or Windows
        width, height = (int.from_bytes(data[at : at + size], "little", signed=size == 4) for at in (18, 18 + size))
        return width, abs(height), data  # negative: stored from the top
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return *_webp_size(data), data
    raise ValueError("not a JPEG, PNG, BMP or WebP image" if data else "an empty file")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG that is there to its end; bytes after the end are allowed. Raises ValueError.

    Segments, where a thumbnail may hold an end of its own, are stepped over; within pixels no marker can occur.
    """
    width, height, at = 0, 0, 2
    while marker := JPEG_MARKER.search(data, at):
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == JPEG_END:
            return width, height
        if kind in JPEG_SIZE:
            height, width = int.from_bytes(data[at + 3 : at + 5], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError("a JPEG cut short")


def _png_pixels(data: bytes) -> bytes:
    """The PNG with only the chunks that make its pixels. Raises ValueError where one is cut short or damaged."""
    kept, at, kind = [PNG_START], len(PNG_START), b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        if len(data) < end:
            raise ValueError("a PNG cut short")
        kind, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end], "big")
        if zlib.crc32(data[at + 4 : end - 4]) != checksum:
            raise ValueError("a damaged PNG")
        if kind in PNG_PIXELS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, numbers = data[12:16], int.from_bytes(data[20:30], "little")
    if kind == b"VP8X":
        return 1 + (numbers >> 32 & 0xFFFFFF), 1 + (numbers >> 56)
    if kind == b"VP8L":
        return 1 + (numbers >> 8 & 0x3FFF), 1 + (numbers >> 22 & 0x3FFF)
    return numbers >> 48 & 0x3FFF, numbers >> 64 & 0x3FFF


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder by their suffix, sorted by name. Raises CaptureError where it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise CaptureError(f"{folder}: {error.strerror}") from error


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
            return _folder(path, image_files(path))
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise CaptureError(f"{_shown(source)}: {getattr(error, 'strerror', error)}") from error
    capture = cv2.VideoCapture()
    # An absolute path, as FFmpeg would take "door:1.avi" for an address.
    if not stat.S_ISREG(mode) or not capture.open(str(path.absolute()), cv2.CAP_FFMPEG) or not capture.grab():
        raise CaptureError(f"{path}: no video", expected="a video file, a folder of images, a URL or a device number")
    return _video(path, capture)


@dataclass(frozen=True)
class CameraState:
    """How one camera does.

    connected: the latest attempt to read gave a picture. frames: captured so far. dropped: frames that a newer one
    replaced before anyone took them, and images that could not be read. error: the latest, also when it is over.
    """

    name: str
    connected: bool = False
    frames: int = 0
    dropped: int = 0
    error: str | None = None


@dataclass
class _Camera:
    """What a camera's thread and the taker of its frames share, guarded by the condition of Cameras."""

    pictures: Pictures
    live: bool
    state: CameraState
    frame: Frame | None = None  # captured, not yet taken
    ended: bool = False

    def note(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)


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
            self._cameras.append(_Camera(pictures, is_url_or_device(config.source), CameraState(config.name)))

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
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

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
                if isinstance(picture, CaptureError):
                    self._note(camera, picture)
                else:
                    self._offer(camera, *picture)
                if self._closed:
                    break
            camera.pictures.close()
        except CaptureError as error:
            failure = CaptureError(f"camera {name!r}: {error}")
        except Exception as error:  # whatever it is: a thread that dies must not look like a quiet camera
            failure = CaptureError(f"camera {name!r}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        if failure:
            logger.warning("%s", failure)
        with self._changed:
            if failure:
                self.failures.append(failure)
                camera.note(error=str(failure))
            camera.note(connected=False)
            camera.ended = True
            self._changed.notify_all()

    def _offer(self, camera: _Camera, captured_at: float, image: Image) -> None:
        """Put a picture where next() finds it."""
        with self._changed:
            name, number = camera.state.name, camera.state.frames
            if camera.live and not camera.state.connected:
                logger.info("camera %r: connected", name)
            camera.note(connected=True, frames=number + 1)
            if not camera.live:
                self._changed.wait_for(lambda: self._closed or not camera.frame)
            elif camera.frame:
                camera.note(dropped=camera.state.dropped + 1)
            if not self._closed:
                camera.frame = Frame(name, number, captured_at, image)
                self._changed.notify_all()

    def _note(self, camera: _Camera, mishap: CaptureError) -> None:
        """Say what a source goes on after."""
        if not self._closed:  # afterwards nobody wants to hear of it
            with self._changed:
                dropped = camera.state.dropped + (0 if camera.live else 1)
                camera.note(connected=False, dropped=dropped, error=str(mishap))
            logger.warning("camera %r: %s", camera.state.name, mishap)

    def _wait(self, seconds: float) -> bool:
        """Pause a live camera's thread. False when it is time to stop."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, seconds)
