"""Whether anything moves before a camera: a frame of an empty scene need not be looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import cv2
import numpy as np

from edge.config import MotionConfig
from edge.values import Floats, Frame, Image

SIZE = (160, 120)  # px: a person 80 px high of 576 is 17 here, and a frame takes about a millisecond
USUAL_S, UNREST_S = 10.0, 60.0  # seconds in which what stays becomes usual, and what flutters is known for that
LEAST, UNRESTS = 10.0, 4.0  # grey levels, and times a pixel's own unrest, by which it differs that has changed
MOST = 2.0  # times that difference: more teaches nothing, as whoever walks by is not the pixel's own unrest
OTHER = 0.5  # of the picture; where more has changed it is another picture, not motion in this one


class MotionGate:
    """Lets frames pass while something moves or somebody is there, and hold_s longer; remembers each camera.

    Of each pixel of a small grey picture it knows what is usual, and how much that wavers by itself: noise, a video's
    compression, leaves. What differs by clearly more has changed. The light's own changes are taken out first.
    spared: frames that were not wanted, by camera.
    """

    def __init__(self, config: MotionConfig, apart: Collection[str] = ()) -> None:
        """apart: names of cameras whose pictures have nothing to do with each other: all of them are wanted."""
        self.configure(config, apart)
        self._scenes: dict[str, _Scene] = {}
        self.spared: Counter[str] = Counter()

    def configure(self, config: MotionConfig, apart: Collection[str] = ()) -> None:
        """Go by this from the next frames on."""
        self._config, self._apart = config, frozenset(apart)

    def wanted(self, frame: Frame, watched: bool) -> bool:
        """Whether to look at this frame; call it with every frame of a camera, in order.

        watched: somebody is followed there now. A camera's first frames, for hold_s, are always wanted, and where
        motion.enabled is false every frame is.
        """
        if not self._config.enabled or frame.camera in self._apart:
            return True
        picture, at = _shrunk(frame.image), frame.captured_at
        scene = self._scenes.get(frame.camera)
        if scene is None:
            self._scenes[frame.camera] = _Scene(picture, at)
            return True
        changed = scene.changed(picture, at, watched)
        # a clock that was put back must not keep the gate open until it has caught up
        if watched or changed >= self._config.share or at < scene.moved_at:
            scene.moved_at = at
        if at - scene.moved_at < self._config.hold_s:
            return True
        self.spared[frame.camera] += 1
        return False


class _Scene:
    """What is usual before one camera. moved_at: when something last moved, seconds since 1970."""

    def __init__(self, picture: Floats, at: float) -> None:
        self.moved_at = self._at = at
        self._begin(picture)

    def _begin(self, picture: Floats) -> None:
        self._usual, self._unrest, self._seen = picture, np.zeros_like(picture), 1

    def changed(self, picture: Floats, at: float, watched: bool) -> float:
        """The share of the picture that is not as usual; then learns from it."""
        passed, self._at = max(0.0, at - self._at), at
        self._seen += 1
        self._usual = self._usual * _brightness(picture, self._usual)
        difference = np.abs(picture - self._usual)
        enough = LEAST + UNRESTS * self._unrest
        share = float(np.mean(difference > enough))
        if share > OTHER:
            self._begin(picture)
            return share
        at_least = 1 / self._seen  # the first frames are averaged
        self._usual += max(at_least, 1 - math.exp(-passed / USUAL_S)) * (picture - self._usual)
        if not watched:  # people are not the unrest of the place where they walk
            most = np.minimum(difference, MOST * enough)
            self._unrest += max(at_least, 1 - math.exp(-passed / UNREST_S)) * (most - self._unrest)
        return share


def _shrunk(image: Image) -> Floats:
    """(120, 160) float32 grey levels, without most of the noise."""
    small = cv2.cvtColor(cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.GaussianBlur(small.astype(np.float32), (3, 3), 0), np.float32)


def _brightness(picture: Floats, usual: Floats) -> float:
    """How many times as bright as usual it is: by the median of every ninth pixel, which no person moves far."""
    now, before = np.median(picture[::3, ::3]), np.median(usual[::3, ::3])
    return float(now / before) if min(now, before) > 1 else 1.0
