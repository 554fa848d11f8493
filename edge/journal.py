"""One SQLite database of what waits to be delivered: entries of one or more epochs, in order, each with its checksum.

Entries of an epoch lie in a row: the one whose last number is n has id = base + n, so that a number is found without an
index. Ids only skip where a Gone stands for several numbers: an entry that is missing is noticed.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edge.link import Stream
from edge.protocol import Data, Gone
from edge.records import (
    COLUMNS,
    CREATION,
    END,
    PAGE,
    DamagedError,
    DiskRefusedError,
    Record,
    Run,
    checked,
    crc_of,
    event_record,
    frames_of,
    gone_record,
    is_spool,
    runs_of,
    translated,
)

WAL_BYTES = 4 << 20  # of write-ahead log, after which it is moved into the file
BUSY_SECONDS = 5.0


class Journal:
    """An open database; path None: in memory. For one thread at a time.

    durable: a commit returns when it is on the disk; else it is safe from everything but a power cut. Every method
    raises DiskRefusedError or DamagedError. Opening raises ConfigError for another program's file or a newer schema;
    where nothing can be written, what is there can still be read.
    """

    def __init__(self, path: Path | None, *, durable: bool = False) -> None:
        self.path = path
        self.epoch, self.next = 0, 0  # the one that is written, after `begin`
        self.newest = 0.0  # when the newest entry was queued
        self._fixed = False  # opened to be read only
        uri = "file::memory:" if path is None else path.absolute().as_uri()
        if path is not None and not path.exists():
            try:
                path.touch(0o600)  # it is about people
            except OSError as error:
                raise DiskRefusedError(error.strerror) from error
        try:
            self._open(uri, durable)
        except DiskRefusedError:
            log = Path(f"{path}-wal")
            if path is None or not path.exists() or (log.exists() and log.stat().st_size):
                raise
            self._fixed = True  # where nothing can be written, not even the index of an empty log
            self._open(f"{uri}?immutable=1", durable)

    def _open(self, uri: str, durable: bool) -> None:
        with translated():
            self._db = sqlite3.connect(
                uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare(durable)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, durable: bool) -> None:
        with translated():
            known = is_spool(self._db, self.path)
            if not known:
                self._db.execute(f"PRAGMA page_size = {PAGE}")
            (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
            if not known:
                if mode == "delete":
                    raise DiskRefusedError("a file system without shared memory, which a write-ahead log needs")
                with self._transaction():
                    for statement in CREATION:
                        self._db.execute(statement)
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("PRAGMA wal_autocheckpoint = 0")  # a checkpoint waits for the disk: see `checkpoint`
            self._db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self._db.execute("PRAGMA secure_delete = OFF")  # where it is on, zeros over all that was delivered
        with translated(reading=True):
            self._runs = {run.epoch: run for run in runs_of(self._db)}
            start = self._end = max((run.start for run in self._runs.values()), default=1)
            for key, record in self._ends("DESC"):
                self._end, self.newest = key + 1, record.queued
            if self._end < start:
                raise DamagedError("the last entries of an epoch are not there")
            self._floor = self._end  # all before it is delivered; from there on to _end nothing is missing
            for key, record in self._ends("ASC"):
                self._floor = key - (record.last - record.first)
            self._prune()

    def _ends(self, order: str) -> Iterator[tuple[int, Record]]:
        for key, *row in self._db.execute(f"SELECT id, {COLUMNS} FROM entries ORDER BY id {order} LIMIT 1"):
            yield key, self._placed(key, row)

    def _placed(self, key: int, row: Sequence[Any]) -> Record:
        """The record with this id. Raises DamagedError unless it is as it was written, and where it was written."""
        record = checked(row)
        run = self._runs.get(record.epoch)
        if run is None or key != run.base + record.last or not run.start <= run.base + record.first <= key < run.end:
            raise DamagedError(f"number {record.last} of epoch {record.epoch} is not in its place")
        return record

    def begin(self) -> None:
        """Draw a new epoch and write to it from now on, from number 0."""
        epoch, start = secrets.randbits(62), self._end
        runs = [run if run.end < END else run._replace(end=start) for run in self._runs.values() if run.start < start]
        runs.append(Run(start, END, epoch, start))
        try:
            with translated(), self._transaction():
                self._db.execute("DELETE FROM epochs WHERE start < ? OR start = ?", (runs[0].start, start))
                self._db.execute("DELETE FROM entries WHERE id < ?", (self._floor,))
                self._insert_epoch(runs[-1])
        except DiskRefusedError as error:
            if "readonly" in str(error) and not self._fixed and self._is_writable():
                raise DamagedError("it says that it is read-only") from error
            raise
        self._runs = {run.epoch: run for run in runs}
        self._prune()
        self.epoch, self.next = epoch, 0

    def _prune(self) -> None:
        """What is delivered is no epoch of this file any more."""
        while self._runs and (run := next(iter(self._runs.values()))).end <= self._floor:
            del self._runs[run.epoch]

    def _is_writable(self) -> bool:
        files = [Path(f"{self.path}{form}") for form in ("", "-wal", "-shm")]
        probe = Path(f"{self.path}.part")  # a disk with an error says that it is writable, and is not
        with suppress(OSError):
            probe.touch()
            probe.unlink()
            return all(os.access(file, os.W_OK) for file in files if file.exists())
        return False

    def append(self, frames: Sequence[bytes], queued: float) -> None:
        """Keep the event whose number is `next`."""
        record = event_record(self.epoch, self.next, queued, frames)
        with translated():
            self._insert(self._end, record)
        self.next += 1
        self._end += 1
        self.newest = queued

    def copy(self, records: Sequence[Record]) -> None:
        """Keep entries of other journals, with their numbers; those of an epoch one after the other, without a hole."""
        runs, end = list(self._runs.values()), self._end
        with translated(), self._transaction():
            for record in records:
                if not runs or runs[-1].epoch != record.epoch:
                    runs[-1:] = [run._replace(end=end) for run in runs[-1:]]
                    runs.append(Run(end, END, record.epoch, end - record.first))
                    self._insert_epoch(runs[-1])
                if runs[-1].base + record.first != end:
                    raise ValueError(f"number {record.first} of epoch {record.epoch} does not follow")
                end = runs[-1].base + record.last + 1
                self._insert(end - 1, record)
                self.newest = record.queued
        self._runs, self._end = {run.epoch: run for run in runs}, end

    def _insert(self, key: int, record: Record) -> None:
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (key, *record))

    def _insert_epoch(self, run: Run) -> None:
        row = (run.start, run.epoch, run.base)
        self._db.execute("INSERT INTO epochs VALUES (?, ?, ?, ?)", (*row, crc_of(*row)))

    def head(self) -> Stream | None:
        """The epoch of the oldest entry still to be delivered, and which of its numbers are; None: nothing is."""
        if self._floor >= self._end:
            return None
        run = next(iter(self._runs.values()))
        return Stream(run.epoch, self._floor - run.base, min(run.end, self._end) - run.base)

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """As edge.link.Source has it; nothing for an epoch that is not here, or from numbers that are delivered on."""
        found: list[Data | Gone] = []
        run = self._runs.get(epoch)
        if run is None:
            return []
        at = max(run.base + start, run.start, self._floor)
        for key, record in self._records(at, min(run.end, self._end), events):
            if record.body is None:
                found.append(Gone(first=at - run.base, last=record.last, reason=record.reason or ""))
            else:
                frames = frames_of(record.body)
                found.append(Data(record.last, frames))
                size -= sum(map(len, frames))
            at = key + 1
            if size <= 0:
                break
        return found

    def records(self, at: int, size: int) -> list[tuple[int, Record]]:
        """(id, entry) of about `size` bytes of entries, from the id `at` on; less what is delivered of the first."""
        at = max(at, self._floor)
        found: list[tuple[int, Record]] = []
        for key, record in self._records(at, self._end, -1):
            found.append((key, record))
            size -= len(record.body or b"")
            if size <= 0:
                break
        for key, record in found[:1]:
            first = record.last - (key - at)
            if record.reason is not None and record.first < first:
                found[0] = key, gone_record(record.epoch, first, record.last, record.queued, record.reason)
        return found

    def _records(self, at: int, end: int, count: int) -> Iterator[tuple[int, Record]]:
        """The entries at the ids at <= id < end. Raises DamagedError where one is not in its place, or missing."""
        if at >= end:
            return
        query = f"SELECT id, {COLUMNS} FROM entries WHERE id >= ? ORDER BY id LIMIT ?"
        with translated(reading=True):
            for key, *row in self._db.execute(query, (at, count)):
                record = self._placed(key, row)
                if key - (record.last - record.first) > at or key < at:
                    break
                yield key, record
                at, count = key + 1, count - 1
                if at >= end:
                    return
        if count:
            raise DamagedError(f"what should be at {at} is not there")

    def forget(self, epoch: int, end: int) -> None:
        """Every number of this epoch below `end` has arrived, when it is the oldest one here; else nothing happens.

        When the disk refuses, it is done the next time.
        """
        run = self._runs.get(epoch)
        if run is None or not run.start <= self._floor < min(run.base + end, run.end, self._end):
            return
        self._floor = min(run.base + end, run.end, self._end)
        self._prune()
        with translated():
            self._db.execute("DELETE FROM entries WHERE id < ?", (self._floor,))

    def drop(self, reason: str, count: int = -1, *, older_than: float = float("inf")) -> int:
        """The oldest events leave, and a Gone takes their place: `count` of them, or all queued before `older_than`.

        The newest entry always stays. Returns how many events left.
        """
        dropped, at = 0, self._floor
        left: list[tuple[int, Record]] = []  # (id, Gone): what takes the place of the entries up to there
        for key, record in self._records(at, self._end - 1, -1):
            if record.body is not None and (dropped == count or record.queued >= older_than):
                break
            before = left[-1][1] if left else None
            first, why = record.first, (record.reason or "") if record.body is None else reason
            if before is not None and (before.epoch, before.reason) == (record.epoch, why):
                first = left.pop()[1].first
            left.append((key, gone_record(record.epoch, first, record.last, record.queued, why)))
            dropped += record.body is not None
            at = key + 1
        if dropped:
            with translated(), self._transaction():
                self._db.execute("DELETE FROM entries WHERE id < ?", (at,))
                for key, record in left:
                    self._insert(key, record)
        return dropped

    def waiting(self) -> int:
        """How many entries are still to be delivered."""
        with translated(reading=True):
            found = self._db.execute(
                "SELECT id, last - first FROM entries WHERE body IS NULL AND id >= ?", (self._floor,)
            )
            skipped = sum(key - max(key - more, self._floor) for key, more in found)
        return int(self._end - self._floor - skipped)

    def oldest(self) -> float | None:
        """When the oldest entry still to be delivered was queued; None: there is none."""
        query = "SELECT queued FROM entries WHERE id >= ? ORDER BY id LIMIT 1"
        with translated(reading=True):
            found = self._db.execute(query, (self._floor,)).fetchone()
        return found[0] if found else None

    def size(self) -> int:
        """Bytes in use, deleted entries left out."""
        with translated(reading=True):
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(pages - free) * PAGE

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite ends it itself on some errors, a full disk among them
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):  # closing checkpoints, which a full disk refuses; nothing is lost by that
            self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def sync(path: Path) -> None:
    """What was appended to the journal at `path` is on the disk when this returns. Raises OSError.

    The file itself is not opened here: closing it would release SQLite's locks on it.
    """
    descriptor = os.open(f"{path}-wal", os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint(path: Path) -> None:
    """Move what was appended from the write-ahead log into the file, on the disk, while others go on."""
    with translated():
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        finally:
            connection.close()
