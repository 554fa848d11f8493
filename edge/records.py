"""What lies in a spool's file: its tables, an entry with its checksum, and what it means when SQLite says no."""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import ConfigError

SCHEMA_VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x4C4F5350  # "LOSP": tells a spool from another program's SQLite file
SCHEMA = (
    # An entry: see Record. `gone` is for counting.
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        queued REAL NOT NULL, crc INTEGER NOT NULL, reason TEXT, body BLOB
    )""",
    "CREATE INDEX gone ON entries (id) WHERE body IS NULL",
    # start: the id at which its numbers begin; the next epoch's start is where they end. crc: over the others.
    """CREATE TABLE epochs (
        start INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, base INTEGER NOT NULL, crc INTEGER NOT NULL
    )""",
)
CREATION = (f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {SCHEMA_VERSION}", *SCHEMA)
PAGE = 4096  # bytes
END = 2**62  # beyond every id
COLUMNS = "epoch, first, last, queued, crc, reason, body"  # of a Record

# SQLite's words when what is in the file is not in doubt; its codes come with Python 3.11
_REFUSALS = ("full", "I/O error", "readonly", "unable to open", "lock", "permission denied")
_LENGTH = struct.Struct("<I")


class DiskRefusedError(Exception):
    """The disk is full, read-only, gone or failing; what was there is not in doubt."""


class DamagedError(Exception):
    """What is in the file is not what was written, or cannot be read."""


class Record(NamedTuple):
    """The numbers first..last of an epoch.

    queued: s of the spool's own clock. For an event first = last, and body is its frames, deflated; for what is gone
    body is None, and there is a reason. crc: over all the others.
    """

    epoch: int
    first: int
    last: int
    queued: float
    crc: int
    reason: str | None
    body: bytes | None


class Run(NamedTuple):
    """The ids start <= id < end are those of an epoch; that of its number n is base + n."""

    start: int
    end: int
    epoch: int
    base: int


def event_record(epoch: int, number: int, queued: float, frames: Sequence[bytes]) -> Record:
    """Of an event: each frame after its length in 4 bytes, little-endian; then zlib at its fastest."""
    data = b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))
    body, queued = zlib.compress(data, 1), float(queued)  # as SQLite will give it back
    return Record(epoch, number, number, queued, crc_of(epoch, number, number, queued, None, body=body), None, body)


def gone_record(epoch: int, first: int, last: int, queued: float, reason: str) -> Record:
    """Of numbers that are not to be had any more."""
    return Record(epoch, first, last, queued, crc_of(epoch, first, last, float(queued), reason), reason, None)


def checked(row: Sequence[Any]) -> Record:
    """The record with these columns, when they are as they were written. Raises DamagedError."""
    record = Record(*row)
    *head, crc, reason, body = row
    if not isinstance(body, bytes | None) or crc != crc_of(*head, reason, body=body):
        raise DamagedError(f"the entry of number {record.last} of epoch {record.epoch} does not match its checksum")
    return record


def crc_of(*columns: object, body: bytes | None = None) -> int:
    """A checksum over columns of a row, and the long one among them."""
    return zlib.crc32(body or b"", zlib.crc32(repr((*columns, body is None)).encode()))


def frames_of(body: bytes) -> tuple[bytes, ...]:
    """The frames of an event, from the body of its record."""
    data, at, frames = zlib.decompress(body), 0, []
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        frames.append(data[at - length : at])
    return tuple(frames)


def is_spool(database: sqlite3.Connection, path: Path | None) -> bool:
    """Whether a spool is in it, rather than nothing yet; it is not changed.

    Raises ConfigError for another program's file or a newer schema, DamagedError, sqlite3.Error.
    """
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    found = [
        " ".join((sql or "").split()) for (sql,) in database.execute("SELECT sql FROM sqlite_master ORDER BY rowid")
    ]
    known = [" ".join(sql.split()) for sql in SCHEMA]
    if (application, version, found) == (APPLICATION_ID, SCHEMA_VERSION, known):
        return True
    if (application, version, found) == (0, 0, []):
        return False
    if found != known and application != APPLICATION_ID:
        raise ConfigError(f"spool {path}: another program's SQLite file", remedy="name another file in spool.path")
    if found != known and version > SCHEMA_VERSION:
        raise ConfigError(
            f"spool {path} was written by a newer lookout", expected=f"schema {SCHEMA_VERSION}", got=version
        )
    raise DamagedError("the schema is not what was written")  # one without the other: no program did that


def runs_of(database: sqlite3.Connection) -> list[Run]:
    """In order. Raises DamagedError, sqlite3.Error."""
    rows = database.execute("SELECT start, epoch, base, crc FROM epochs ORDER BY start").fetchall()
    if any(crc != crc_of(*columns) for *columns, crc in rows):
        raise DamagedError("an epoch does not match its checksum")
    ends = [start for start, *_ in rows[1:]] + [END]
    return [Run(start, end, epoch, base) for (start, epoch, base, _), end in zip(rows, ends, strict=False)]


@contextmanager
def translated(*, reading: bool = False) -> Iterator[None]:
    """SQLite's errors become DiskRefusedError or DamagedError.

    reading: an I/O error is damage: what stands in a bad sector does not come back by waiting.
    """
    try:
        yield
    except sqlite3.ProgrammingError:  # a fault of ours
        raise
    except UnicodeDecodeError as error:  # a text, or SQLite's own words about one
        raise DamagedError(str(error)) from error
    except sqlite3.DatabaseError as error:
        text = str(error)
        refused = any(words in text for words in _REFUSALS) and not (reading and "I/O error" in text)
        raise (DiskRefusedError if refused else DamagedError)(text) from error
