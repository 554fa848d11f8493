"""Video files and folders of images: every picture, in order."""

from __future__ import annotations

import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import cv2

from edge.address import shown
from edge.errors import CaptureError
from edge.images import SUFFIXES, image_files, read_image
from edge.steps import Step, Steps
from edge.values import Image


def open_footage(source: str) -> Steps:
    """The pictures of a file or folder. Raises CaptureError where there are none."""
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
        raise CaptureError(f"{shown(source)}: {getattr(error, 'strerror', error)}") from error
    capture = cv2.VideoCapture()
    # An absolute path, as FFmpeg would take "door:1.avi" for an address.
    if not stat.S_ISREG(mode) or not capture.open(str(path.absolute()), cv2.CAP_FFMPEG) or not capture.grab():
        raise CaptureError(f"{path}: no video", expected="a video file, a folder of images, a URL or a device number")
    return _video(path, capture)


def _folder(folder: Path, files: Sequence[Path]) -> Steps:
    """Every image that can be read, captured when it is read."""
    unreadable = 0
    for path in files:
        try:
            yield Step("up", picture=(time.time(), read_image(path)))
        except CaptureError as error:
            unreadable += 1
            yield Step("up", dropped="unreadable", error=error)
    if unreadable == len(files):
        raise CaptureError(f"{folder}: none of its {len(files)} images can be read")


def _video(path: Path, capture: cv2.VideoCapture) -> Steps:
    """Every frame from the grabbed one on, captured at the start of the reading plus its position in the video."""
    start, position, frames = time.time(), 0.0, 0
    promised, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    try:
        grabbed = True
        while grabbed:
            position = max(position, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            grabbed, image = capture.retrieve()
            if grabbed:
                yield Step("up", picture=(start + position, cast(Image, image)))
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
