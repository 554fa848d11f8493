"""Live cameras through OpenCV: of the network by its FFmpeg, devices by the system's driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

import cv2

from edge.errors import CaptureError
from edge.images import MAX_PIXELS
from edge.knock import knock
from edge.values import Image

# By itself FFmpeg prints many lines, some with a camera's password in them; what matters is said here. It is read when
# the first video is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# Over TCP, as is OpenCV's default. No picture is waited for just to learn how many come per second: on 10 per second
# that takes 3 s, in which no other camera can be opened.
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|fpsprobesize;0")

THREADS = 2  # that decode one camera; with each one more its pictures come one later
SLICE = 0.5  # s; the longest that a thread waits without a sign of life where this file does the waiting
# OpenCV opens one network camera after the other, whichever thread asks; who waits here can say that it is alive.
_OPENING = threading.Lock()


@contextmanager
def _translated() -> Iterator[None]:
    """What OpenCV throws is the end of one connection, not of the camera's thread: the next one may be better."""
    try:
        yield
    except cv2.error as error:
        raise CaptureError("cannot be opened or read: OpenCV refuses it") from error


class OpenCv:
    """Reads one camera; a Reader of edge/live.py.

    Its pictures keep the size with which the connection began: where the camera's change, OpenCV scales them.
    """

    about = "FFmpeg, through OpenCV"

    def __init__(self, source: str, timeout: float) -> None:
        """timeout: seconds for each step: the first answer, the opening, a picture. A device's driver has its own."""
        self._source, self._timeout = source, timeout
        self._capture = cv2.VideoCapture()
        self._opening = self._opened()

    def grab(self) -> bool:
        """True when a picture has come; False when it is still being opened.

        Raises CaptureError where it cannot be opened, or no picture came in time.
        """
        with _translated():
            for _ in self._opening:
                return False
            begun = time.monotonic()
            good = self._capture.grab()
        # Out of time FFmpeg still gives what its threads hold back, a picture for each time-out.
        if not self._source.isdecimal() and time.monotonic() - begun >= self._timeout:
            raise CaptureError(f"no picture for {self._timeout:g} s")
        if not good:
            raise CaptureError("broke off")
        return True

    def retrieve(self) -> Image | None:
        """The picture that has come; None where it cannot be read. Raises CaptureError where OpenCV is at its end."""
        with _translated():
            good, image = self._capture.retrieve()
        return cast(Image, image) if good else None

    def close(self) -> None:
        """At once, but for the reading of a device."""
        self._opening.close()
        self._capture.release()

    def _opened(self) -> Generator[None, None, None]:
        """Open it, in steps of which each takes at most `timeout`, and the look-up of a name."""
        if self._source.isdecimal():
            self._capture.open(int(self._source))
        else:
            knock(self._source, self._timeout)  # or all other cameras would wait with this one
            yield
            while not _OPENING.acquire(timeout=SLICE):
                yield
            try:
                limit = int(self._timeout * 1000)
                limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
                limits += [cv2.CAP_PROP_N_THREADS, THREADS]
                self._capture.open(self._source, cv2.CAP_FFMPEG, limits)
            finally:
                _OPENING.release()
        if not self._capture.isOpened():
            raise CaptureError("cannot be opened")
        width, height = (int(self._capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > MAX_PIXELS:  # said before one is made: a camera must not take the box's memory
            raise CaptureError(f"its pictures of {width} x {height} px are too large")
        yield
