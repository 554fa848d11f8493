"""One SQLite database of what waits to be delivered: entries of one or more epochs, in order, each with its checksum.

Entries of an epoch lie in a row: the one whose last number is n has id = base + n, so that a number is found without an
index, and ids only skip where a Gone stands for several numbers.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edge.errors import ConfigError
from edge.link import Stream
from edge.protocol import Data, Gone

SCHEMA_VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x4C4F5350  # "LOSP": tells a spool from another program's SQLite file
SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    # An entry: the numbers first..last of an epoch. queued: s of the spool's own clock. For an event first = last, and
    # body is its frames, deflated; for what is gone body is NULL, and there is a reason. crc: over all of them but id.
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        queued REAL NOT NULL, crc INTEGER NOT NULL, reason TEXT, body BLOB
    )""",
    "CREATE INDEX gone ON entries (id) WHERE body IS NULL",
    # start: where its entries begin; the next epoch's start is where they end.
    "CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, start INTEGER NOT NULL, base INTEGER NOT NULL) WITHOUT ROWID",
)
BUSY_SECONDS = 5.0
END = 2**62  # beyond every id
SKIP = 100_000  # unreadable ids in a row after which nothing more is looked for in a damaged file
_DAMAGE = ("malformed", "not a database")  # SQLite's words; its codes come with Python 3.11
_LENGTH = struct.Struct("<I")
_COLUMNS = "epoch, first, last, queued, crc, reason, body"

_Row = tuple[int, int, int, float, int, "str | None", "bytes | None"]  # _COLUMNS


class DiskRefusedError(Exception):
    """The disk is full, read-only, gone or failing; what was there is not in doubt."""


class DamagedError(Exception):
    """What is in the file is not what was written."""


class Journal:
    """An open database; path None: in memory. For one thread at a time.

    durable: a commit returns when it is on the disk; else it is safe from everything but a power cut. Every method
    raises DiskRefusedError or DamagedError. Opening raises ConfigError for another program's file or a newer schema.
    """

    def __init__(self, path: Path | None, *, durable: bool = False) -> None:
        self.path = path
        self.epoch, self.next = 0, 0  # the one being written, after `begin`
        self._base = 0
        self._floor = -END  # the lowest id still to be delivered; what cannot be deleted yet lies below
        with _translated():
            self._db = sqlite3.connect(
                path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(durable)
            except BaseException:
                self._db.close()
                raise

    def _prepare(self, durable: bool) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._db.execute("PRAGMA wal_autocheckpoint = 0")  # a checkpoint waits for the disk: see `checkpoint`
        with self._transaction():
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                for statement in SCHEMA:
                    self._db.execute(statement)
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise ConfigError(
                f"spool {self.path}: another program's SQLite file", remedy="name another file in spool.path"
            )
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"spool {self.path} was written by a newer lookout", expected=f"schema {SCHEMA_VERSION}", got=version
            )

    def begin(self) -> None:
        """Draw a new epoch and write to it from now on, from number 0."""
        epoch = secrets.randbits(62)
        with _translated(), self._transaction():
            (start,) = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM entries").fetchone()
            self._db.execute(  # those that are delivered
                "DELETE FROM epochs WHERE NOT EXISTS (SELECT 1 FROM entries WHERE id >= start AND id < coalesce("
                "(SELECT min(later.start) FROM epochs AS later WHERE later.start > epochs.start), ?))",
                (END,),
            )
            self._db.execute("INSERT INTO epochs VALUES (?, ?, ?)", (epoch, start, start))
        self.epoch, self.next, self._base = epoch, 0, start

    def append(self, frames: Sequence[bytes], queued: float) -> None:
        """Keep the event whose number is `next`."""
        body = _deflated(frames)
        with _translated(), self._transaction():
            self._insert(self._base + self.next, self.epoch, self.next, self.next, queued, None, body)
        self.next += 1

    def copy(self, entries: Sequence[tuple[int, Data | Gone, float]]) -> None:
        """Keep entries (epoch, entry, queued) of other journals with their numbers; those of an epoch in a row."""
        with _translated(), self._transaction():
            (free,) = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM entries").fetchone()
            for epoch, entry, queued in entries:
                first, last, reason, body = _parts(entry)
                found = self._db.execute("SELECT base FROM epochs WHERE epoch = ?", (epoch,)).fetchone()
                base = found[0] if found else free - last
                if not found:
                    self._db.execute("INSERT INTO epochs VALUES (?, ?, ?)", (epoch, free, base))
                self._insert(base + last, epoch, first, last, queued, reason, body)
                free = base + last + 1

    def _insert(
        self, key: int, epoch: int, first: int, last: int, queued: float, reason: str | None, body: bytes | None
    ) -> None:
        row = (key, epoch, first, last, queued, _crc(epoch, first, last, queued, reason, body), reason, body)
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def head(self) -> Stream | None:
        """The epoch of the oldest entry still to be delivered, and which of its numbers are; None: nothing is."""
        with _translated():
            query = f"SELECT id, {_COLUMNS} FROM entries WHERE id >= ? ORDER BY id LIMIT 1"
            found = self._db.execute(query, (self._floor,)).fetchone()
            if found is None:
                return None
            epoch, first, *_ = _checked(found[1:])
            base, end = self._run(epoch)
            (last,) = self._db.execute(
                "SELECT last FROM entries WHERE id < ? ORDER BY id DESC LIMIT 1", (end,)
            ).fetchone()
            return Stream(epoch, max(first, self._floor - base), last + 1)

    def _run(self, epoch: int) -> tuple[int, int]:
        """base of an epoch, and the id before which its entries end."""
        found = self._db.execute("SELECT start, base FROM epochs WHERE epoch = ?", (epoch,)).fetchone()
        if found is None:
            raise DamagedError(f"epoch {epoch} is not among the epochs")
        start, base = found
        (end,) = self._db.execute("SELECT coalesce(min(start), ?) FROM epochs WHERE start > ?", (END, start)).fetchone()
        return base, end

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """As edge.link.Source has it; nothing for an epoch that is not here."""
        found: list[Data | Gone] = []
        with _translated():
            if self._db.execute("SELECT 1 FROM epochs WHERE epoch = ?", (epoch,)).fetchone() is None:
                return []
            base, end = self._run(epoch)
            query = f"SELECT {_COLUMNS} FROM entries WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
            for row in self._db.execute(query, (base + start, end, events)):
                its_epoch, first, last, _, _, reason, body = _checked(row)
                if its_epoch != epoch or first > start or last < start:
                    raise DamagedError(f"epoch {epoch}: number {start} is not in its place")
                if body is None:
                    found.append(Gone(first=start, last=last, reason=reason or ""))
                else:
                    frames = _inflated(body)
                    found.append(Data(start, frames))
                    size -= sum(map(len, frames))
                start = last + 1
                if size <= 0:
                    break
        return found

    def forget(self, epoch: int, end: int) -> None:
        """Every number of this epoch below `end` has arrived; when the disk refuses, it is done the next time."""
        with _translated():
            found = self._db.execute("SELECT base FROM epochs WHERE epoch = ?", (epoch,)).fetchone()
            if found is None:
                return
            limit = self._base + self.next if epoch == self.epoch else self._run(epoch)[1]
            self._floor = max(self._floor, min(found[0] + end, limit))
            with self._transaction():
                self._db.execute("DELETE FROM entries WHERE id < ?", (self._floor,))

    def drop(self, reason: str, *, older_than: float | None = None, count: int | None = None) -> int:
        """The oldest events leave, and a Gone takes their place: `count` of them, or all queued before `older_than`.

        The newest entry always stays. Returns how many events left.
        """
        where, bound = ("queued < ?", older_than) if older_than is not None else ("1", None)
        values = [self._floor] + ([bound] if bound is not None else []) + [count if count is not None else -1]
        with _translated(), self._transaction():
            oldest = self._db.execute(
                f"SELECT id, {_COLUMNS} FROM entries WHERE id >= ? AND {where} AND body IS NOT NULL"
                " AND id < (SELECT max(id) FROM entries) ORDER BY id LIMIT ?",
                values,
            )
            rows = [(key, epoch, last, queued) for key, (epoch, _, last, queued, *_) in _checked_with_ids(oldest)]
            for run in _runs(rows):
                (lowest, epoch, first, _), (highest, _, last, queued) = run[0], run[-1]
                before = self._db.execute(
                    "SELECT first FROM entries WHERE id = ? AND epoch = ? AND body IS NULL AND reason = ?",
                    (lowest - 1, epoch, reason),
                ).fetchone()
                if before is not None:
                    first, lowest = before[0], lowest - 1
                self._db.execute("DELETE FROM entries WHERE id >= ? AND id <= ?", (lowest, highest))
                self._insert(highest, epoch, first, last, queued, reason, None)
        return len(rows)

    def waiting(self) -> int:
        """How many entries are still to be delivered."""
        with _translated():
            (low,) = self._db.execute("SELECT min(id) FROM entries WHERE id >= ?", (self._floor,)).fetchone()
            if low is None:
                return 0
            (high,) = self._db.execute("SELECT max(id) FROM entries").fetchone()  # in one query they would be a scan
            low = max(low, self._floor)
            gone = self._db.execute("SELECT id, last - first FROM entries WHERE body IS NULL AND id >= ?", (low,))
            skipped = sum(key - max(key - more, low) for key, more in gone)
            return int(high - low + 1 - skipped)

    def size(self) -> int:
        """Bytes in use, deleted entries left out."""
        with _translated():
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (each,) = self._db.execute("PRAGMA page_size").fetchone()
        return int((pages - free) * each)

    def newest(self) -> float:
        """When the newest entry was queued; 0 without any."""
        with _translated():
            found = self._db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY id DESC LIMIT 1").fetchone()
            return 0.0 if found is None else _checked(found)[3]

    def backup(self, path: Path) -> None:
        """Write all of it to a new file."""
        with _translated():
            copy = sqlite3.connect(path, isolation_level=None)
            try:
                self._db.backup(copy)
            finally:
                copy.close()

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
    """Move what was appended from the write-ahead log into the file, while others go on."""
    with _translated():
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        finally:
            connection.close()


def readable(path: Path) -> Iterator[tuple[int, int, Data | Gone, float]]:
    """(id, epoch, entry, queued) of every entry of a damaged file that is as it was written, in order."""
    database = sqlite3.connect(path, isolation_level=None)
    query = f"SELECT id, {_COLUMNS} FROM entries WHERE id >= ? ORDER BY id LIMIT 1"
    failures = 0
    try:
        try:
            key = database.execute("SELECT min(id) FROM entries").fetchone()[0] or 0
        except sqlite3.Error:
            key = 1  # where ids begin
        while failures < SKIP:
            try:
                found = database.execute(query, (key,)).fetchone()
                if found is None:
                    return
                key = found[0]
                epoch, first, last, queued, _, reason, body = _checked(found[1:])
            except (sqlite3.Error, DamagedError):
                key, failures = key + 1, failures + 1
                continue
            yield (
                key,
                epoch,
                Gone(first=first, last=last, reason=reason or "") if body is None else Data(last, _inflated(body)),
                queued,
            )
            key, failures = key + 1, 0
    finally:
        database.close()


def _runs(rows: Sequence[tuple[int, int, int, float]]) -> list[list[tuple[int, int, int, float]]]:
    """Neighbours of one epoch together. rows: (id, epoch, number, queued)."""
    runs: list[list[tuple[int, int, int, float]]] = []
    for row in rows:
        if runs and (row[0], row[1]) == (runs[-1][-1][0] + 1, runs[-1][-1][1]):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _parts(entry: Data | Gone) -> tuple[int, int, str | None, bytes | None]:
    if isinstance(entry, Gone):
        return entry.first, entry.last, entry.reason, None
    return entry.seq, entry.seq, None, _deflated(entry.frames)


def _crc(epoch: int, first: int, last: int, queued: float, reason: str | None, body: bytes | None) -> int:
    head = repr((epoch, first, last, float(queued), reason, body is None)).encode()
    return zlib.crc32(body or b"", zlib.crc32(head))


def _checked(row: _Row) -> _Row:
    """The row, when it is as it was written. Raises DamagedError."""
    epoch, first, last, queued, crc, reason, body = row
    try:
        good = crc == _crc(epoch, first, last, queued, reason, body)
    except (TypeError, ValueError):  # in SQLite any column may hold any kind of value
        good = False
    if not good:
        raise DamagedError(f"the entry of number {last} of epoch {epoch} does not match its checksum")
    return row


def _checked_with_ids(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, _Row]]:
    """Each row (id, _COLUMNS), checked."""
    return ((row[0], _checked(row[1:])) for row in rows)


def _deflated(frames: Sequence[bytes]) -> bytes:
    """Frames, each after its length in 4 bytes, little-endian; then zlib at its fastest, which halves an event."""
    return zlib.compress(b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame)), 1)


def _inflated(body: bytes) -> tuple[bytes, ...]:
    data, at, frames = zlib.decompress(body), 0, []
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        frames.append(data[at - length : at])
    return tuple(frames)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TypeError as error:  # arithmetic on what should have been a number
        raise DamagedError(str(error)) from error
    except sqlite3.DatabaseError as error:
        damaged = isinstance(error, sqlite3.IntegrityError) or any(word in str(error) for word in _DAMAGE)
        raise (DamagedError if damaged else DiskRefusedError)(str(error)) from error
