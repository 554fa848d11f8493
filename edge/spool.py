"""Events on disk until they are acknowledged: their numbers, and the bounds on what is kept."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from edge.config import SpoolConfig
from edge.events import MAX_NOTICE, Event, Stamp, encode
from edge.failpoints import failpoint
from edge.journal import Journal
from edge.link import Stream
from edge.protocol import Data, Gone
from edge.records import DamagedError, DiskRefusedError
from edge.shelf import CHUNK, MEMORY_BYTES, Shelf, words

Answer = TypeVar("Answer")

TICK = 1.0  # s between two looks of the thread behind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpoolHealth:
    """What a person or a monitor wants to know of a spool."""

    in_memory: bool  # the disk refuses, and a kill would lose what waits
    waiting: int  # entries not acknowledged
    size: int  # bytes of disk in use
    dropped: int  # events, since the start
    trouble: str  # the disk's last words, while it refuses
    oldest_s: float | None  # of this spool's running time, since the oldest entry came; None: nothing waits


class Spool:
    """Keeps what `append` is given until `forget` is told that it arrived; a context manager, for any threads.

    Each opening draws a new epoch, and so does each return from memory to the disk: after a power cut the disk may
    have forgotten numbers that were delivered, and a number is never given to two events. Raises ConfigError for a
    path that cannot be a spool, or that another process uses; a disk that refuses is no error: the spool then begins
    in memory.
    """

    def __init__(self, config: SpoolConfig) -> None:
        self._config, self._path = config, config.path
        self._dropped = 0
        self._shelf = Shelf(config)
        self._lock = self._shelf.lock
        newest = max(journal.newest for journal in self._shelf.journals())
        self._clock_start = time.monotonic() - newest  # the clock goes on where it was
        self._behind = threading.Thread(target=self._keep_house, name="spool", daemon=True)
        self._behind.start()

    def append(self, build: Callable[[Stamp], Event]) -> None:
        """Keep the event that `build` makes of its number. It is asked again when the disk refuses the first."""
        with self._lock:
            failpoint("box.before-append")
            if not any(self._written(build) for _ in range(3)):
                self._shelf.to_memory("the disk damages what is written")
                self._written(build)
            failpoint("box.after-append")
            self._enforce_bounds()

    def say(self, text: str) -> None:
        """Have the next event carry this notice; of many that wait for one, the oldest leave."""
        with self._lock:
            self._shelf.notices.append(text[:MAX_NOTICE])

    def _written(self, build: Callable[[Stamp], Event]) -> bool:
        live = self._shelf.live
        notices = tuple(self._shelf.notices)
        frames = encode(build(Stamp(live.epoch, live.next, notices)))
        try:
            live.append(frames, self._now())
        except DamagedError as error:
            self._shelf.lose(live, str(error))
            return False
        except DiskRefusedError as error:
            self._shelf.to_memory(str(error))
            return False
        for _ in notices:
            self._shelf.notices.popleft()
        return True

    def _enforce_bounds(self) -> None:
        if self._shelf.in_memory:
            live = self._shelf.live
            self._shrink([live], live.size, MEMORY_BYTES, "memory full")
        else:
            self._shrink(self._shelf.journals(), self._size, self._config.max_bytes, "spool full")

    def _shrink(self, journals: list[Journal], size: Callable[[], int], most: int, reason: str) -> None:
        for journal in journals:
            with self._shelf.mended(journal):
                while size() > most and self._drop(journal, reason, max(1, journal.waiting() // 100)):
                    pass

    def _drop(self, journal: Journal, reason: str, count: int, older_than: float = float("inf")) -> int:
        dropped = journal.drop(reason, count, older_than=older_than)
        if dropped and not self._dropped:
            log.warning("spool %s: %s: the oldest events leave; the collector is told which", self._path, reason)
        self._dropped += dropped
        return dropped

    def _now(self) -> float:
        """Seconds of this spool's running time: no clock that anybody sets has a say."""
        return time.monotonic() - self._clock_start

    def stream(self) -> Stream:
        """As edge.link.Source has it."""
        with self._lock:
            live = self._shelf.live
            heads = (journal.head() for journal in self._shelf.journals())
            return next((head for head in heads if head), Stream(live.epoch, live.next, live.next))

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """As edge.link.Source has it."""
        with self._lock:
            for journal in self._shelf.journals():
                with self._shelf.mended(journal):
                    if found := journal.read(epoch, start, events, size):
                        return found
            return []

    def forget(self, epoch: int, end: int) -> None:
        """As edge.link.Source has it. Where the disk refuses, it is forgotten in memory at least."""
        with self._lock:
            failpoint("box.before-forget")
            self._shelf.forget(epoch, end)
            failpoint("box.after-forget")

    def waiting(self) -> int:
        """Entries not acknowledged yet."""
        with self._lock:
            return sum(self._of_each(Journal.waiting))

    def _size(self) -> int:
        return sum(self._of_each(lambda journal: journal.size() if journal.path else 0))

    def _of_each(self, ask: Callable[[Journal], Answer]) -> list[Answer]:
        answers = []
        for journal in self._shelf.journals():
            with self._shelf.mended(journal):
                answers.append(ask(journal))
        return answers

    @property
    def health(self) -> SpoolHealth:
        """How it is."""
        with self._lock:
            waiting, size = self.waiting(), self._size()
            queued = next((at for at in self._of_each(Journal.oldest) if at is not None), None)
            oldest = None if queued is None else max(self._now() - queued, 0.0)
            return SpoolHealth(self._shelf.in_memory, waiting, size, self._dropped, self._shelf.trouble, oldest)

    def _keep_house(self) -> None:
        """What the camera loop must not wait for."""
        seconds = min(self._config.fsync_ms / 1000, TICK) if self._config.fsync == "interval" else TICK
        tidy_at = 0.0
        while not self._shelf.closing:
            needed = self._shelf.needed.wait(seconds)
            self._shelf.needed.clear()
            try:
                self._shelf.flush()
                if needed or time.monotonic() >= tidy_at:
                    tidy_at = time.monotonic() + TICK
                    self._shelf.tidy()
                    self._drop_old()
            except OSError as error:
                self._shelf.trouble = words(error)
            except Exception:  # a fault of ours; the thread goes on, for the sake of what is still to come
                log.exception("spool %s", self._path)
        self._shelf.flush()

    def _drop_old(self) -> None:
        more = 1
        while more:
            with self._lock:  # a chunk at a time
                for journal in self._shelf.journals():
                    with self._shelf.mended(journal):
                        more = self._drop(journal, "too old", CHUNK, self._now() - self._config.max_age_s)
                    if more:
                        break

    def close(self) -> None:
        """Let go of the files. What is in memory goes to the disk, if that takes it by now; else it is lost."""
        if not self._shelf.closing:
            self._shelf.closing = True
            self._shelf.needed.set()
            self._behind.join()
            self._shelf.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
