"""A live camera: called again with growing pauses, noticed when it shows nothing new, read no faster than wanted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import closing
from typing import Protocol

import numpy as np

from edge.errors import CaptureError
from edge.images import MAX_PIXELS
from edge.pace import Pace
from edge.steps import Phase, Step, Steps
from edge.still import Still
from edge.values import Image

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # s between attempts to reach a camera
HELD = 5.0  # s of pictures after which a camera that breaks off is called soon again, like one that never did before
STUCK = 30.0  # s of the same picture after which a camera is frozen
FIRST_CURE, LONGEST_CURE = 60.0, 600.0  # s between attempts to wake a frozen camera by calling it anew
BEAT = 1.0  # s; the longest pause without a sign of life
MIN_SIDE, MAX_SIDE = 16, 16_384  # px; what is smaller or longer comes out of a damaged stream


class Reader(Protocol):
    """One connection to a camera, made by whoever constructs it. Each call raises CaptureError where it is over."""

    def grab(self) -> bool:
        """Wait for the next picture. False: none yet, ask again; in the end, by a timeout of its own, it raises."""
        ...

    def retrieve(self) -> Image | None:
        """The picture that has come, (H, W, 3) uint8 BGR, never written to again; None where it cannot be read."""
        ...

    def close(self) -> None: ...


class Live:
    """The pictures of one camera as they come; it is called anew until it is no longer wanted.

    A camera that breaks off as soon as it is there, again and again, is called ever more seldom, too.
    """

    def __init__(
        self,
        call: Callable[[], Reader],
        shown: str,
        *,
        timeout: float,
        pace: Pace,
        is_open: Callable[[], bool],
        wait: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """call: make a connection. shown: the address, for people. timeout: seconds after which a camera that sends
        nothing readable is given up. is_open: whether its schedule says so now. wait: pause so many seconds; False is
        the end.
        """
        self._call, self._shown, self._timeout, self._clock = call, shown, timeout, clock
        self._pace, self._is_open, self._wait = pace, is_open, wait
        self._phase: Phase = "starting"
        self._delay = FIRST_DELAY
        self._still = Still(STUCK)
        self._cure, self._cure_at, self._cured_at = FIRST_CURE, 0.0, 0.0  # s, and two times of the clock

    def steps(self) -> Steps:
        """Its thread's life."""
        while True:
            if not self._is_open():
                self._phase = "off"
                self._still.forget()
            elif self._phase == "off":
                self._phase = "starting"
            yield Step(self._phase)
            if self._phase == "off":
                if not self._wait(BEAT):
                    return
                continue
            try:
                with closing(self._call()) as reader:
                    yield from self._read(reader)
                continue  # its schedule says so, or it is frozen
            except CaptureError as error:
                problem = error.what
            pause = self._delay * random.uniform(0.5, 1)  # so that many boxes do not fall upon a camera at once
            self._delay = min(2 * self._delay, LONGEST_DELAY)
            self._phase = "away"
            self._still.forget()
            remedy = f"next attempt in {pause:.1f} s"
            yield Step("away", error=CaptureError(f"{self._shown}: {problem}", remedy=remedy))
            while pause > 0:
                if not self._wait(min(pause, BEAT)):
                    return
                pause -= BEAT
                yield Step("away")

    def _read(self, reader: Reader) -> Steps:
        """One connection, until the camera is to be left alone or called anew. Raises CaptureError: it broke off."""
        begun: float | None = None  # when the first picture came that could be read
        bad: float | None = None  # when the first came, since the latest that could be, that could not
        while self._is_open():
            if not reader.grab():
                yield Step(self._phase)
                continue
            now = self._clock()
            # The first of a connection is looked at in any case: one that nobody looked at says nothing of the camera.
            if not self._pace.wanted(now) and begun is not None:
                yield Step(self._phase, dropped="paced")
                continue
            if (image := reader.retrieve()) is not None and fit(image):
                step = self._looked_at(image, now, begins=begun is None)
            else:
                yield Step(self._phase, dropped="unreadable")
                bad = now if bad is None else bad
                if now - bad > self._timeout:
                    raise CaptureError(f"nothing of the last {self._timeout:g} s could be read")
                continue
            bad, begun, self._phase = None, now if begun is None else begun, step.phase
            if now - begun >= HELD:
                self._delay = FIRST_DELAY
            yield step
            if self._phase == "frozen" and now >= self._cure_at:
                self._cured_at, self._cure_at = now, now + self._cure
                self._cure = min(2 * self._cure, LONGEST_CURE)
                return

    def _looked_at(self, image: Image, now: float, begins: bool) -> Step:
        """A picture to a step, which says whether it shows anything new."""
        picture = time.time(), image
        if not self._still.frozen(image, now):
            if now - self._cured_at > 2 * STUCK:  # not just what a new connection begins with
                self._cure = FIRST_CURE
            return Step("up", picture, begins=begins)
        error = CaptureError(f"{self._shown}: the same picture since {STUCK:g} s", remedy="it is called anew")
        return Step("frozen", picture, begins=begins, error=None if self._phase == "frozen" else error)


def fit(image: Image) -> bool:
    """Whether a camera can have made it: what a damaged stream decodes to may have any size."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        return False
    height, width = int(image.shape[0]), int(image.shape[1])
    return min(height, width) >= MIN_SIDE and max(height, width) <= MAX_SIDE and height * width <= MAX_PIXELS
