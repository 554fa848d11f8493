"""A box at its limits: every few seconds, how hot it is and whether it keeps up, and what it may do from there on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edge import jetson
from edge.capture import Cameras
from edge.config import LoadConfig
from edge.describe import Describer
from edge.ladder import Heat, Ladder
from edge.share import Share

EVERY_S = 2.0  # between two looks: sensors are slow to read

log = logging.getLogger(__name__)


class Load:
    """Keeps cameras and describer within what the box can do.

    ladder: the step it is on. say: how to have the next event tell. root: of the machine's files, "/" or a made-up
    tree. Where no camera is live nothing is given up: files wait, and what becomes of them depends on no weather.
    """

    def __init__(
        self,
        config: LoadConfig,
        max_crops: int,
        cameras: Cameras,
        describer: Describer,
        say: Callable[[str], None],
        root: Path = Path("/"),
    ) -> None:
        self.ladder = Ladder(config, max_crops, describer.has_smaller)
        self._cameras, self._describer, self._say, self._root = cameras, describer, say, root
        self._share = Share()
        self._due = float("-inf")
        self._apply()

    def configure(self, config: LoadConfig, max_crops: int) -> None:
        """Go by these from the next frames on; the step stays."""
        self.ladder.configure(config, max_crops)
        self._apply()

    def turn(self, now: float) -> None:
        """Between two batches of frames; now: seconds, monotonic."""
        if now < self._due:
            return
        self._due = now + EVERY_S
        states = self._cameras.states
        if not any(state.live for state in states):
            return
        if told := self.ladder.observe(now, self._share(now, states), heat(self._root)):
            log.warning("%s", told)
            self._say(told)
            self._apply()

    def _apply(self) -> None:
        limits = self.ladder.limits
        self._cameras.pace(limits.max_fps)
        self._describer.limit(limits.max_crops)
        self._describer.use_smaller(limits.smaller_net)
        self._share.forget()


def heat(root: Path) -> Heat:
    """Of a machine: its hottest part, and what it slows down."""
    zones = jetson.temperatures(root)
    where = max(zones, key=lambda name: zones[name], default="")
    return Heat(zones.get(where), where, jetson.throttled(root))
