"""The journals of a spool in the order of delivery: which one is written, and what follows one that fails.

First come those that are only delivered: what could be read of damaged files, and what was in memory. Then the spool's
own file; and while the disk refuses that one, a journal in memory, which is then the one that is written.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from edge import disk
from edge.aside import (
    beside,
    claimed,
    finish_setting_aside,
    keep,
    log_is_damaged,
    next_name,
    set_aside,
    unlink,
)
from edge.config import SpoolConfig
from edge.errors import ConfigError
from edge.events import MAX_NOTICE, MAX_NOTICES
from edge.journal import WAL_BYTES, Journal, checkpoint, sync
from edge.leaves import LOST, readable
from edge.records import DamagedError, DiskRefusedError

MEMORY_BYTES = 32 << 20  # what is kept while the disk refuses
RETRY = 30.0  # s until damaged files are read again that could not be, for lack of room mostly
CHUNK = 500  # entries that are copied at a time
AT_ONCE = 1 << 18  # bytes of memory that are

log = logging.getLogger(__name__)


class Shelf:
    """Opens the files of a spool; `close` lets go of them.

    lock: around everything but `flush` and `tidy`, which are for a thread of their own. notices: for the next event.
    trouble: the disk's last words, while it refuses. needed: there is a damaged file to read. Raises ConfigError.
    """

    def __init__(self, config: SpoolConfig) -> None:
        self.lock = threading.RLock()
        self.notices: deque[str] = deque(maxlen=MAX_NOTICES)
        self.trouble = ""
        self.needed = threading.Event()
        self.closing = False
        self._config, self._path = config, config.path
        self._files = threading.RLock()  # no file gets another name while it is synced; taken after `lock`
        self._delivered: list[Journal] = []  # those that are only delivered
        self._disk: Journal | None = None
        self._memory: Journal | None = None
        self._forgotten: dict[int, int] = {}  # epoch -> the end of what was forgotten of it, since the start
        self._synced = (0, 0)  # epoch, and the number below which a power cut takes nothing
        self._sync_at = self._rescue_at = 0.0
        self._claim = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self._path.is_dir():
            raise ConfigError(f"spool.path: {self._path} is a folder", expected="a file")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise ConfigError(f"spool.path: {self._path}: {words(error)}", expected="a file in a folder") from error
        except OSError as error:
            log.warning("spool %s: %s", self._path, error)  # and so will be what follows
        for step in (self._take, self._look_beside):
            try:
                step()
            except OSError as error:
                log.warning("spool %s: %s", self._path, error)
        try:
            self._begin()
        except (OSError, DiskRefusedError) as error:
            self.to_memory(words(error))

    def _take(self) -> None:
        """Before anything is written. Raises ConfigError when the spool is another process's, OSError."""
        if self._claim < 0:
            self._claim = claimed(self._path)

    def _look_beside(self) -> None:
        if self._claim >= 0:
            finish_setting_aside(self._path)
            if log_is_damaged(self._path):
                self._set_aside(self._path, "its write-ahead log")
        for path in beside(self._path, "rescued"):
            self._open_rescued(path)

    def _open_rescued(self, path: Path) -> None:
        try:
            self._delivered.append(Journal(path))
        except (DamagedError, ConfigError) as error:
            self._set_aside(path, str(error))
        except DiskRefusedError as error:
            self._notice(f"{path.name}: {error}: what is in it is delivered after the next start")

    def _begin(self) -> Journal:
        """A new epoch on the disk, in a fresh file if this one is damaged. Raises OSError, DiskRefusedError."""
        for _ in range(2):
            try:
                if self._disk is None:
                    self._disk = self._opened()
                self._take()
                self._disk.begin()
                disk.sync(self._path.parent)
                return self._disk
            except DamagedError as error:
                self._set_aside(self._path, str(error))
        raise DiskRefusedError("it damages what is written")

    def _opened(self) -> Journal:
        return Journal(self._path, durable=self._config.fsync == "event")

    def journals(self) -> list[Journal]:
        """All, in the order of delivery; the last one is written."""
        return [*self._delivered, *(one for one in (self._disk, self._memory) if one is not None)]

    @property
    def live(self) -> Journal:
        """The one that is written."""
        return self.journals()[-1]

    @property
    def in_memory(self) -> bool:
        """The disk refuses."""
        return self._memory is not None

    def forget(self, epoch: int, end: int) -> None:
        """As edge.link.Source has it."""
        self._forgotten[epoch] = max(
            end, self._forgotten.get(epoch, 0)
        )  # for what is still to be read of damaged files
        for journal in self.journals():
            with self.mended(journal):
                journal.forget(epoch, end)

    def _forget_again(self, journal: Journal) -> None:
        """What was forgotten while this journal was not there."""
        while (head := journal.head()) and self._forgotten.get(head.epoch, 0) > head.first:
            journal.forget(head.epoch, self._forgotten[head.epoch])

    @contextmanager
    def mended(self, journal: Journal) -> Iterator[None]:
        """A journal that turns out to be damaged is set aside; one that the disk refuses is left for later."""
        try:
            yield
        except DamagedError as error:
            self.lose(journal, str(error))
        except DiskRefusedError as error:
            self.trouble = str(error)

    def to_memory(self, trouble: str) -> None:
        """Write in memory from now on."""
        self.trouble = trouble
        if self._memory is None:
            self._memory = Journal(None)
            self._memory.begin()
            self._notice(f"{trouble}: events are kept in memory, up to {MEMORY_BYTES >> 20} MiB of them")

    def lose(self, journal: Journal, trouble: str) -> None:
        """It is damaged; another takes its place if it was being written."""
        try:
            if journal.path is not None:
                self._set_aside(journal.path, trouble)
            elif journal is self._memory:
                self._notice(f"{journal.next} events in memory are lost: {trouble}")
                self._memory = None
            if self._disk is None and self._memory is None:
                self._begin()
        except (OSError, DiskRefusedError) as error:
            self.to_memory(words(error))

    def _set_aside(self, path: Path, trouble: str) -> None:
        """Rename a damaged file, which is never deleted. Raises OSError."""
        self._take()
        with self._files:
            for journal in [one for one in self.journals() if one.path == path]:
                journal.close()
                if journal is self._disk:
                    self._disk = None
                else:
                    self._delivered.remove(journal)
            aside = set_aside(path, self._path)
        self._notice(f"damaged: {trouble}; set aside as {aside.name}, and what can be read is sent")
        self._rescue_at = 0.0
        self.needed.set()

    def _remove(self, journal: Journal) -> None:
        """Nothing is in it that is still needed. Raises OSError."""
        assert journal.path is not None
        with self._files:
            journal.close()
            unlink(journal.path)

    def _notice(self, text: str) -> None:
        log.warning("spool %s: %s", self._path, text)
        self.notices.append(f"spool {self._path.name}: {text}"[:MAX_NOTICE])

    # --- for the thread behind ----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """What was appended goes to the disk, as the policy has it, and long logs go into their files."""
        trouble, damaged = "", None
        # SQLite begins a log anew when all of it is in the file, which never is while others write without a pause
        pause = self.lock if any(_log_size(one) > 4 * WAL_BYTES for one in self.journals()) else nullcontext()
        with pause, self._files:
            for journal in self.journals():
                try:
                    self._tend(journal)
                except (OSError, DiskRefusedError) as error:
                    trouble = words(error)
                except DamagedError as error:
                    trouble, damaged = str(error), journal
        with self.lock:
            if damaged is not None and damaged in self.journals():
                self.lose(damaged, trouble)
            elif trouble and trouble != self.trouble:
                self._notice(trouble)  # an append will find out too, if it is more than a passing fault
            if not self.in_memory:
                self.trouble = trouble

    def _tend(self, journal: Journal) -> None:
        if journal.path is None:
            return
        now, mark = time.monotonic(), (journal.epoch, journal.next)
        if journal is self._disk and self._config.fsync == "interval" and (now >= self._sync_at or self.closing):
            self._sync_at = now + self._config.fsync_ms / 1000
            if mark != self._synced:
                sync(journal.path)
                self._synced = mark
        if _log_size(journal) > WAL_BYTES:
            checkpoint(journal.path)

    def tidy(self) -> None:
        """Damaged files are read, what is delivered goes, the disk is tried again. Raises OSError."""
        if time.monotonic() >= self._rescue_at and not self.closing:
            self._rescue_at = time.monotonic() + RETRY
            for aside in beside(self._path, "damaged"):
                self._rescue(aside)
        with self.lock:
            done = [journal for journal in self._delivered if not journal.head()]
            self._delivered = [journal for journal in self._delivered if journal not in done]
        for journal in done:
            self._remove(journal)
        if self.in_memory:
            self._back_to_disk()

    def _rescue(self, aside: Path) -> None:
        """What can be read of a damaged file becomes a journal of its own, and the file is kept under another name."""
        path = next_name(self._path, "rescued")
        saved: Journal | None = None
        found = lost = 0
        try:
            saved = Journal(path)
            records = readable(aside)
            while chunk := list(itertools.islice(records, CHUNK)):
                saved.copy(chunk)
                found += len(chunk)
                lost += sum(record.last - record.first + 1 for record in chunk if record.reason == LOST)
                self._tend(saved)
                self.flush()
                if self.closing:
                    raise DiskRefusedError("there was no time to read it")
            checkpoint(path)
            with self.lock:
                self._forget_again(saved)
                kept = keep(aside).name
                self._delivered.append(saved)
                self._notice(
                    f"{found} entries were read of {aside.name}, {lost} numbers between are lost; kept as {kept}"
                )
        except (OSError, DiskRefusedError, DamagedError) as error:
            log.warning("spool %s: %s: %s; tried again later", self._path, aside.name, error)
            if saved is not None:
                self._remove(saved)

    def _back_to_disk(self) -> None:
        """If the disk takes events again, what is in memory becomes a file beside the spool."""
        saved: Journal | None = None
        try:
            with self.lock:
                memory, disk = self._memory, self._disk
                assert memory is not None
                if disk is not None and not disk.head():  # a full disk does not even let us delete what was delivered
                    self._disk = None
                    self._remove(disk)
                if shutil.disk_usage(self._path.parent).free < memory.size() + 4 * AT_ONCE:
                    return  # not before there is room, or every try would wear the disk
                self._begin_again()
            path = next_name(self._path, "rescued")
            saved = Journal(path)
            self._save(memory, saved, path)
        except (OSError, DiskRefusedError, DamagedError, ConfigError) as error:
            with self.lock:
                self.trouble = words(error)
            if saved is not None:
                self._remove(saved)
            return
        with suppress(DiskRefusedError, DamagedError):
            checkpoint(path)

    def _begin_again(self) -> None:
        """Raises OSError, DiskRefusedError, ConfigError."""
        old = self._disk
        try:
            self._begin()
        except DiskRefusedError:
            if old is None or self._disk is not old:
                raise
            self._disk = None  # by that name there may be another file by now
            try:
                self._forget_again(self._begin())
            except BaseException:
                if self._disk is not None:
                    self._disk.close()
                self._disk = old
                raise
            old.close()

    def _save(self, memory: Journal, saved: Journal, path: Path) -> None:
        """Entries stay in memory, and are delivered from there, until all are saved."""
        at = 0

        def save() -> bool:
            nonlocal at
            with self.lock:
                found = memory.records(at, AT_ONCE)
            if not found:
                return False
            (key, first), (last, _) = found[0], found[-1]
            if at and key - (first.last - first.first) > at:
                raise DiskRefusedError("what was saved is delivered")  # all of it: begin anew
            saved.copy([record for _, record in found])
            at = last + 1
            return True

        while save():
            checkpoint(path)
            self.flush()
        with self.lock:
            while save():
                pass
            head = memory.head()
            saved.forget(memory.epoch, head.first if head else memory.next)
            self._delivered.append(saved)
            self._memory, self.trouble = None, ""
            memory.close()
            self._notice("the disk takes events again")

    def close(self) -> None:
        """Let go of the files. What waits in memory is lost, and said so."""
        if self._memory is not None and (lost := self._memory.waiting()):
            log.error("spool %s: %d events that were in memory are lost", self._path, lost)
        for journal in self.journals():
            journal.close()
        if self._claim >= 0:
            os.close(self._claim)


def _log_size(journal: Journal) -> int:
    """Bytes. On a disk where nothing can be written there may be no log."""
    with suppress(FileNotFoundError):
        return Path(f"{journal.path}-wal").stat().st_size
    return 0


def words(error: Exception) -> str:
    """What is wrong, in a few words."""
    return str(getattr(error, "strerror", None) or error)
