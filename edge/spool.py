"""Events on disk until they are acknowledged: numbers, bounds, and what is done when the disk refuses or forgets."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from edge.config import SpoolConfig
from edge.errors import ConfigError
from edge.events import Event, Stamp, encode
from edge.failpoints import failpoint
from edge.journal import DamagedError, DiskRefusedError, Journal, checkpoint, readable, sync
from edge.link import Stream
from edge.protocol import Data, Gone

MEMORY_BYTES = 32 << 20  # what is kept while the disk refuses
WAL_BYTES = 4 << 20  # of write-ahead log, after which it is moved into the file
WAL_MOST = 64 << 20  # of it, after which appending waits for that
TICK = 1.0  # s between two looks of the thread behind, unless fsync_ms is shorter
DAMAGED = "damaged on disk"  # why an event is gone
MAX_NOTICES = 20  # per event, and waiting for one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpoolHealth:
    """What a person or a monitor wants to know of a spool."""

    in_memory: bool  # the disk refuses, and a kill would lose what waits
    waiting: int  # entries not acknowledged
    size: int  # bytes of disk in use
    dropped: int  # events, since the start
    trouble: str  # the disk's last words, while it refuses


class Spool:
    """Keeps what `append` is given until `forget` is told that it arrived; a context manager, for any threads.

    Each opening draws a new epoch, and so does each fall-back to memory: after a power cut the disk may have forgotten
    numbers that were delivered, and a number is never given to two events. Raises ConfigError for a path that cannot
    be a spool, or that another process uses; a disk that refuses is no error: the spool then begins in memory.
    """

    def __init__(self, config: SpoolConfig) -> None:
        self._config, self._path = config, config.path
        self._lock = threading.RLock()  # the journals
        self._files = threading.Lock()  # the names of the live file, against the thread behind; taken after _lock
        self._notices: deque[str] = deque(maxlen=MAX_NOTICES)
        self._dropped, self._trouble = 0, ""
        self._synced = (0, 0)  # epoch, and the number below which a power cut takes nothing
        self._rescued: list[Journal] = []  # from damaged files and from memory; they are only delivered
        self._disk: Journal | None = None
        self._memory: Journal | None = None
        self._clock_start = time.monotonic()
        self._claim: IO[bytes] | None = None
        self._closing = threading.Event()
        try:
            self._open()
        except BaseException:
            self._let_go()
            raise
        self._behind = threading.Thread(target=self._keep_house, name="spool", daemon=True)
        self._behind.start()

    def _open(self) -> None:
        if self._path.is_dir():
            raise ConfigError(f"spool.path: {self._path} is a folder", expected="a file")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._claim = _claimed(self._path)
            self._finish_setting_aside()
            for path in self._beside("rescued"):
                with suppress(DiskRefusedError, DamagedError):  # the file stays, for a person
                    self._rescued.append(Journal(path))
            try:
                self._open_disk()
            except DamagedError as error:
                self._set_aside(str(error))
        except (OSError, DiskRefusedError) as error:
            self._to_memory(str(getattr(error, "strerror", None) or error))

    def _open_disk(self) -> None:
        """Raises DiskRefusedError or DamagedError."""
        disk = Journal(self._path, durable=self._config.fsync == "event")
        try:
            disk.head()
            newest = disk.newest()
            disk.begin()
        except BaseException:
            disk.close()
            raise
        self._disk = disk
        self._clock_start = min(self._clock_start, time.monotonic() - newest)  # the clock goes on where it was
        with suppress(OSError):
            _sync_folder(self._path.parent)

    def append(self, build: Callable[[Stamp], Event]) -> None:
        """Keep the event that `build` makes of its number. It may be asked twice, when the disk refuses the first."""
        with self._lock:
            failpoint("box.before-append")
            try:
                self._write(build)
            except DamagedError as error:
                self._replace_disk(str(error))
                self._write(build)
            except DiskRefusedError as error:
                self._to_memory(str(error))
                self._write(build)
            failpoint("box.after-append")
            self._enforce_bounds()

    def _write(self, build: Callable[[Stamp], Event]) -> None:
        live = self._journals()[-1]
        notices = tuple(self._notices)
        live.append(encode(build(Stamp(live.epoch, live.next, notices))), self._now())
        for _ in notices:
            self._notices.popleft()

    def _enforce_bounds(self) -> None:
        if self._memory is not None:
            self._shrink(self._memory, self._memory.size, MEMORY_BYTES, "memory full")
        else:
            for journal in self._journals():
                with self._mended(journal):
                    if journal.waiting() > 1:
                        self._shrink(journal, self._size, self._config.max_bytes, "spool full")
                        return

    def _shrink(self, journal: Journal, size: Callable[[], int], most: int, reason: str) -> None:
        with self._mended(journal):
            while size() > most and (dropped := journal.drop(reason, count=max(1, journal.waiting() // 100))):
                self._say_dropped(dropped, reason)

    def _say_dropped(self, count: int, reason: str) -> None:
        if not self._dropped:
            log.warning("%s: %s: the oldest events leave; the collector is told which", self._path, reason)
        self._dropped += count

    def _journals(self) -> list[Journal]:
        """In the order of delivery; the last one is being written."""
        return [*self._rescued, *(one for one in (self._disk, self._memory) if one is not None)]

    def _now(self) -> float:
        """Seconds of this spool's running time: no clock that anybody sets has a say."""
        return time.monotonic() - self._clock_start

    def stream(self) -> Stream:
        """As edge.link.Source has it."""
        with self._lock:
            for journal in self._journals():
                with self._mended(journal):
                    if (found := journal.head()) is not None:
                        return found
            live = self._journals()[-1]
            return Stream(live.epoch, live.next, live.next)

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """As edge.link.Source has it."""
        with self._lock:
            for journal in self._journals():
                with self._mended(journal):
                    if found := journal.read(epoch, start, events, size):
                        return found
            return []

    def forget(self, epoch: int, end: int) -> None:
        """As edge.link.Source has it. Where the disk refuses, it is forgotten in memory at least."""
        with self._lock:
            failpoint("box.before-forget")
            for journal in self._journals():
                with self._mended(journal):
                    journal.forget(epoch, end)
            failpoint("box.after-forget")

    def waiting(self) -> int:
        """Entries not acknowledged yet."""
        with self._lock:
            total = 0
            for journal in self._journals():
                with self._mended(journal):
                    total += journal.waiting()
            return total

    @property
    def synced(self) -> bool:
        """Whether a power cut now would take nothing, by the policy `interval`."""
        with self._lock:
            return self._disk is not None and self._synced == (self._disk.epoch, self._disk.next)

    @property
    def health(self) -> SpoolHealth:
        """How it is."""
        with self._lock:
            return SpoolHealth(self._memory is not None, self.waiting(), self._size(), self._dropped, self._trouble)

    def _size(self) -> int:
        total = 0
        for journal in self._journals():
            with self._mended(journal):
                total += journal.size() if journal.path else 0
        return total

    def _mended(self, journal: Journal) -> _Mended:
        return _Mended(self, journal)

    # --- trouble ------------------------------------------------------------------------------------------------------

    def _notice(self, text: str) -> None:
        log.warning("%s", text)
        self._notices.append(text[:500])

    def _to_memory(self, trouble: str) -> None:
        self._trouble = trouble
        self._memory = Journal(None)
        self._memory.begin()
        self._notice(
            f"spool {self._path}: {trouble}: events are kept in memory, up to {MEMORY_BYTES >> 20} MiB of them"
        )

    def _replace_disk(self, trouble: str) -> None:
        """A fresh file in the place of the damaged one."""
        try:
            self._set_aside(trouble)
        except (OSError, DiskRefusedError) as error:
            self._to_memory(str(error))

    def _set_aside(self, trouble: str) -> None:
        """Rename the damaged file, which is never deleted, and begin another. Raises OSError, DiskRefusedError."""
        with self._files:
            if self._disk is not None:
                self._disk.close()
                self._disk = None
            aside = _free_name(self._path, "damaged")
            _rename(self._path, aside)
            self._notice(
                f"spool {self._path}: damaged ({trouble}): set aside as {aside.name}; what can be read is sent"
            )
            self._open_disk()

    def _finish_setting_aside(self) -> None:
        """A kill between two renames leaves the log of a file that has another name already."""
        asides = self._beside("damaged")
        if asides and not self._path.exists():
            _rename(self._path, asides[-1])

    def _beside(self, what: str) -> list[Path]:
        return sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}.{what}-*[0-9]"))

    def lost_faith(self, journal: Journal, trouble: str) -> None:
        """A journal is damaged: the one that is written is replaced, one that is only delivered is read once more."""
        if journal is self._disk:
            self._replace_disk(trouble)
        elif journal in self._rescued:
            self._rescued.remove(journal)
            journal.close()
            assert journal.path is not None
            aside = _free_name(self._path, "damaged")
            with suppress(OSError):
                _rename(journal.path, aside)
            self._notice(f"spool {journal.path}: damaged ({trouble}): set aside as {aside.name}")

    # --- the thread behind --------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """What the camera loop must not wait for."""
        seconds = min(self._config.fsync_ms / 1000, TICK) if self._config.fsync == "interval" else TICK
        looked = time.monotonic()
        while not self._closing.wait(seconds):
            try:
                self._flush()
                self._catch_up()
                if time.monotonic() - looked >= TICK:
                    looked = time.monotonic()
                    self._tidy()
            except Exception:  # a fault of ours; the thread goes on, for the sake of what is still to come
                log.exception("spool %s", self._path)
        self._flush()

    def _flush(self) -> None:
        with self._files:
            disk = self._disk
            if disk is None:
                return
            number = (disk.epoch, disk.next)
            try:
                if self._config.fsync == "interval" and number != self._synced:
                    sync(self._path)
                    self._synced = number
                if Path(f"{self._path}-wal").stat().st_size > WAL_BYTES:
                    checkpoint(self._path)
            except (OSError, DiskRefusedError, DamagedError) as error:
                if str(error) != self._trouble:  # an append will find out too, if it is more than a passing fault
                    log.warning("spool %s: %s", self._path, error)
                    self._trouble = str(error)

    def _catch_up(self) -> None:
        """A log that is written without a pause never begins anew: before it fills the disk, the loop has to wait."""
        with suppress(OSError, DiskRefusedError, DamagedError):
            if Path(f"{self._path}-wal").stat().st_size > WAL_MOST:
                with self._lock, self._files:
                    checkpoint(self._path)

    def _tidy(self) -> None:
        """Once in a while: what is too old leaves, damaged files are read, the disk is tried again."""
        for aside in self._beside("damaged"):
            self._rescue(aside)
        with self._lock:
            for journal in self._journals():
                with self._mended(journal):
                    if dropped := journal.drop("too old", older_than=self._now() - self._config.max_age_s):
                        self._say_dropped(dropped, "too old")
            for journal in [one for one in self._rescued if one.head() is None]:
                self._rescued.remove(journal)
                journal.close()
                assert journal.path is not None
                _unlink(journal.path)
        if self._memory is not None:
            self._back_to_disk()

    def _rescue(self, aside: Path) -> None:
        """What can be read of a damaged file becomes a journal of its own, and the file is kept under another name."""
        rescued = _free_name(self._path, "rescued")
        part = rescued.with_name(rescued.name + ".part")
        _unlink(part)
        found = lost = 0
        try:
            with Journal(part) as journal:
                chunk: list[tuple[int, Data | Gone, float]] = []
                for epoch, entry, queued in _with_holes(readable(aside)):
                    chunk.append((epoch, entry, queued))
                    if isinstance(entry, Gone) and entry.reason == DAMAGED:
                        lost += entry.count
                    else:
                        found += 1
                    if len(chunk) > 500:
                        journal.copy(chunk)
                        chunk = []
                journal.copy(chunk)
            _rename(part, rescued)
            _rename(aside, _kept(aside))
            opened = Journal(rescued)
        except (OSError, sqlite3.Error, DiskRefusedError, DamagedError) as error:
            log.warning("spool %s: %s; tried again later", aside, error)
            return
        with self._lock:
            self._rescued.append(opened)
            self._notice(
                f"spool {self._path}: {found} entries of the damaged file were read, {lost} numbers between are lost;"
                f" it is kept as {_kept(aside).name}"
            )

    def _back_to_disk(self) -> None:
        """The disk takes events again, it seems: what is in memory becomes a file beside it."""
        with self._lock:
            memory = self._memory
            assert memory is not None
            rescued = _free_name(self._path, "rescued")
            part = rescued.with_name(rescued.name + ".part")
            opened = None
            try:
                if self._claim is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._claim = _claimed(self._path)
                _unlink(part)
                memory.backup(part)  # even when it is empty: it shows whether the disk takes anything
                if memory.waiting():
                    _rename(part, rescued)
                    opened = Journal(rescued)
                else:
                    _unlink(part)
                if self._disk is None:
                    self._open_disk()
            except DamagedError as error:
                self._set_aside(str(error))
            except (OSError, DiskRefusedError, ConfigError) as error:
                self._trouble = str(error)
                if opened is not None:
                    opened.close()
                with suppress(OSError):
                    _unlink(part)
                    _unlink(rescued)
                return
            if opened is not None:
                self._rescued.append(opened)
            memory.close()
            self._memory, self._trouble = None, ""
            self._notice(f"spool {self._path}: the disk takes events again")

    def close(self) -> None:
        """Let go of the files, on the disk what can be. What waits in memory is lost, and said so."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._behind.join()
        with self._lock:
            if self._memory is not None and (lost := self._memory.waiting()):
                log.error("spool %s: %d events that were in memory are lost", self._path, lost)
            self._let_go()

    def _let_go(self) -> None:
        for journal in self._journals():
            journal.close()
        if self._claim is not None:
            self._claim.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Mended:
    """`with`: a journal that turns out to be damaged is set aside; one that the disk refuses is left for later."""

    def __init__(self, spool: Spool, journal: Journal) -> None:
        self._spool, self._journal = spool, journal

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if isinstance(error, DamagedError):
            self._spool.lost_faith(self._journal, str(error))
        return isinstance(error, (DamagedError, DiskRefusedError))


def _with_holes(entries: Iterator[tuple[int, int, Data | Gone, float]]) -> Iterator[tuple[int, Data | Gone, float]]:
    """(epoch, entry, queued) of a damaged file's entries, and a Gone for what is missing between them.

    entries: (id, epoch, entry, queued). Ids tell what is missing: epochs lie in a row, and all but the first that is
    still there begin with number 0.
    """
    before: tuple[int, int, int] | None = None  # id, epoch, last
    for key, epoch, entry, queued in entries:
        first, last = (entry.seq, entry.seq) if isinstance(entry, Data) else (entry.first, entry.last)
        if before is not None and epoch == before[1]:
            if first > before[2] + 1:
                yield epoch, Gone(first=before[2] + 1, last=first - 1, reason=DAMAGED), queued
        elif before is not None and (missing := key - last - before[0] - 1) >= 0:
            if missing:
                yield before[1], Gone(first=before[2] + 1, last=before[2] + missing, reason=DAMAGED), queued
            if first:
                yield epoch, Gone(first=0, last=first - 1, reason=DAMAGED), queued
        yield epoch, entry, queued
        before = (key, epoch, last)


def _claimed(path: Path) -> IO[bytes]:
    """An open file that tells other processes that this spool is taken. Raises ConfigError when it is, OSError."""
    claim = path.with_name(path.name + ".lock").open("ab")  # held as long as the spool is open
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        claim.close()
        remedy = "stop the other box, or give this one a spool.path of its own"
        raise ConfigError(f"spool {path}: another process uses it", remedy=remedy) from error
    return claim


def _rename(path: Path, to: Path) -> None:
    """A database by all its names; the file itself first: what a kill leaves behind is then not taken for whole."""
    for end in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            Path(f"{path}{end}").rename(f"{to}{end}")


def _unlink(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)


def _free_name(path: Path, what: str) -> Path:
    """`path`.what-N, the first N that is free for all of its forms."""
    number = 1
    while list(path.parent.glob(f"{glob.escape(path.name)}.*-{number:04}*")):
        number += 1
    return path.with_name(f"{path.name}.{what}-{number:04}")


def _kept(aside: Path) -> Path:
    """The name of a damaged file once it was read."""
    return aside.with_name(aside.name.replace(".damaged-", ".kept-"))


def _sync_folder(folder: Path) -> None:
    """New names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
