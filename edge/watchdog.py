"""Whether the box goes on: systemd's watchdog is fed only while the loop and every camera's thread make progress.

A hang is a thread that does not come back: of the loop, from a network or a disk; of a camera, from its driver. No
hang is a camera that is away, dark, frozen or off by its schedule, nor a scene without anybody: there is nothing that
a new start would mend.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from edge import notify
from edge.capture import CameraState
from edge.errors import ConfigError

WITHOUT = 60.0  # s: what the limits come from where no systemd watches
RESOLVER = 40.0  # s for a name that no server answers: the C library asks three servers, 5 s each, twice; and slack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Seconds without progress that are not yet a hang.

    stage: of the loop in one stage, a third of WatchdogSec. systemd kills when it was not fed for all of it, so a hang
    is over after four thirds, and a stage may now and then take two thirds without harm.
    taken: until a picture of each camera is taken: a round of the loop has several stages.
    reading: of the thread of a camera that is up: its read gives up after the capture timeout. What is live never ends:
    a thread that has is dead.
    reaching: of any other: it opens, within the timeout, waits as long for the first picture, and had to ask for the
    address of a name before, for which there is no timeout.
    """

    stage: float
    taken: float
    reading: float
    reaching: float

    @classmethod
    def of(cls, watchdog: float, timeout: float) -> Limits:
        """watchdog: WatchdogSec. timeout: of capture. Both in seconds."""
        stage = watchdog / 3
        return cls(stage, watchdog, max(stage, 2 * timeout), max(stage, 2 * timeout + RESOLVER))


@dataclass(frozen=True)
class Hang:
    """Something that does not go on. what: in words, the same as long as it lasts. since: seconds, monotonic."""

    what: str
    since: float

    def sentence(self, now: float) -> str:
        return f"{self.what} for {now - self.since:.0f} s"


@dataclass(frozen=True)
class _Mark:
    """What was seen of a camera: when its phase began, and when last a picture was taken, of so many offered."""

    phase: str
    phase_at: float
    taken: int
    taken_at: float
    offered: int


class Judge:
    """Beats and states to hangs; no clock, no thread. `now` and all other times are seconds, monotonic."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._marks: dict[str, _Mark] = {}

    def __call__(self, now: float, stage: str, beat_at: float, states: Sequence[CameraState]) -> list[Hang]:
        """stage: what the loop last began, at `beat_at`. Remembers the states for the next call."""
        hangs = [Hang(f"the loop hangs in {stage!r}", beat_at)] if now - beat_at > self._limits.stage else []
        self._marks = {state.name: self._marked(now, state) for state in states}
        for state in states:
            hangs += self._of(now, state, self._marks[state.name])
        return hangs

    def _marked(self, now: float, state: CameraState) -> _Mark:
        old = self._marks.get(state.name)
        if old is None or old.phase != state.phase:
            return _Mark(state.phase, now, state.taken, now, state.offered)
        if state.taken != old.taken:
            return _Mark(state.phase, old.phase_at, state.taken, now, state.offered)
        return old

    def _of(self, now: float, state: CameraState, mark: _Mark) -> list[Hang]:
        limits, name = self._limits, f"camera {state.name!r}"
        if state.phase == "off" or (state.phase == "ended" and not state.live):
            return []
        # a thread that has just come back from its schedule's pause had no reason to beat before
        beat_at = max(state.beat_at, mark.phase_at)
        if now - beat_at > (limits.reading if state.phase in ("up", "ended") else limits.reaching):
            return [Hang(f"{name}: its thread gives no sign of life", beat_at)]
        waiting = state.live and state.phase == "up" and state.offered > mark.offered
        if waiting and now - mark.taken_at > limits.taken:
            return [Hang(f"{name}: its pictures come and none is taken", mark.taken_at)]
        return []


class Watchdog:
    """Watches over the loop and the cameras; a context manager with a thread of its own.

    Under systemd, with WatchdogSec=, feeds it; elsewhere it only tells. Raises ConfigError where the environment says
    how in no number.
    """

    def __init__(self, states: Callable[[], Sequence[CameraState]], *, timeout: float = 10.0) -> None:
        """timeout: of capture, in seconds."""
        self._fed = _systemd_wants()
        watchdog = self._fed or WITHOUT
        self._states, self._third = states, watchdog / 3
        self._judge, self._judging = Judge(Limits.of(watchdog, timeout)), threading.Lock()
        self._beat = ("start", time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def beat(self, stage: str) -> None:
        """The loop goes on, with this stage."""
        self._beat = (stage, time.monotonic())

    def trouble(self) -> str | None:
        """What does not go on, and for how long, in one sentence; from any thread."""
        now, hangs = self._look()
        return "; ".join(hang.sentence(now) for hang in hangs) or None

    def _look(self) -> tuple[float, list[Hang]]:
        with self._judging:
            states, now = self._states(), time.monotonic()
            stage, beat_at = self._beat
            return now, self._judge(now, stage, beat_at, states)

    def _run(self) -> None:
        told: dict[str, Hang] = {}
        fed_at = -self._third
        while not self._ended.wait(self._third / 4):
            now, hangs = self._look()
            if self._fed and not hangs and now - fed_at >= self._third:
                notify.alive()
                fed_at = now
            for hang in hangs:
                if hang.what not in told:
                    log.error("%s", hang.sentence(now))
            for what in told.keys() - {hang.what for hang in hangs}:
                log.warning("over: %s", what)
            told = {hang.what: hang for hang in hangs}

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()


def _systemd_wants() -> float | None:
    """Seconds within which systemd wants to be told that this process is alive; None where it does not watch it."""
    text = os.environ.get("WATCHDOG_USEC")
    if text is None or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError("WATCHDOG_USEC", expected="a number of microseconds", got=repr(text))
    return int(text) / 1e6
