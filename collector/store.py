"""What the boxes saw, kept in one SQLite file: every event once, however often it arrives."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from pydantic import TypeAdapter, ValidationError

from edge.errors import ConfigError, StoreError
from edge.events import Answer, Event, Header, Person

SCHEMA_VERSION = 1  # PRAGMA user_version
BUSY_SECONDS = 60.0  # how long another program may hold a write open (a backup, a person at `sqlite3`)
APPLICATION_ID = 0x4C4F4F4B  # "LOOK": tells a store from another program's SQLite file
SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    # One row per event: the header's fields, and when it came (seconds since 1970, UTC). `id` is the order of arrival.
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
        camera TEXT NOT NULL, frame INTEGER NOT NULL, captured_at REAL NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bundle TEXT NOT NULL, bank TEXT NOT NULL,
        embedding_dim INTEGER NOT NULL, skipped INTEGER NOT NULL, received_at REAL NOT NULL,
        UNIQUE (device, epoch, seq)
    )""",
    # One row per person, `number` from 0 in the event's order. Box in px of the source frame; answers as the JSON of
    # the wire; embedding as embedding_dim little-endian float16; crop as JPEG or NULL.
    """CREATE TABLE people (
        event INTEGER NOT NULL REFERENCES events (id), number INTEGER NOT NULL,
        x1 REAL NOT NULL, y1 REAL NOT NULL, x2 REAL NOT NULL, y2 REAL NOT NULL, score REAL NOT NULL,
        answers TEXT NOT NULL, embedding BLOB NOT NULL, crop BLOB,
        PRIMARY KEY (event, number)
    )""",
)
# the header's fields that are columns of the same name
_FIELDS = ("device", "epoch", "seq", "camera", "frame", "captured_at", "bundle", "bank", "embedding_dim", "skipped")
_ANSWERS = TypeAdapter(tuple[Answer, ...])
_DISK_FAILED = ("database or disk is full", "disk I/O error")  # SQLite's words; its codes come with Python 3.11


class Store:
    """An open store file; a context manager. To be used by the thread that opened it.

    `create` makes the file where there is none; without it the file must be a store already. Raises ConfigError for a
    file that cannot be opened, is no store, or was written by a newer version. This and every method raise StoreError
    when the disk is full or fails; the methods also when the file is damaged, or locked for BUSY_SECONDS.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        wanted = "a file in a folder that can be written" if create else "an existing file"
        try:
            self._db = sqlite3.connect(uri, timeout=BUSY_SECONDS, uri=True, isolation_level=None)
            try:
                self._prepare(create)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.OperationalError as error:
            if str(error) in _DISK_FAILED:
                raise StoreError(f"store {path}: {error}") from error
            raise ConfigError(f"store {path} cannot be opened", expected=wanted, got=error) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"store {path} is no lookout store", got=error, remedy="choose another file") from error

    def _prepare(self, create: bool) -> None:
        with self._transaction("IMMEDIATE" if create else "DEFERRED"):  # IMMEDIATE finds out at once if it can write
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if create and not tables:
                for statement in SCHEMA:
                    self._db.execute(statement)
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            got = "another program's SQLite file" if tables else "an empty file"
            raise ConfigError(f"store {self.path} is no lookout store", got=got, remedy="choose another file")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"store {self.path} was written by a newer lookout",
                expected=f"schema {SCHEMA_VERSION}",
                got=version,
                remedy="update lookout here or choose another file",
            )
        if create:
            self._db.execute("PRAGMA journal_mode = WAL")  # people can read while events come in
            self._db.execute("PRAGMA synchronous = FULL")  # a committed batch survives a power cut

    def add(self, events: Sequence[Event], received_at: float) -> list[Event]:
        """Insert all of `events` or none, in one transaction; return the new ones, in order.

        An event whose (device, epoch, seq) is there already, in the store or earlier in `events`, is left out: the
        first one stays. received_at: seconds since 1970, UTC.
        """
        with self._translated(), self._transaction("IMMEDIATE"):
            return [event for event in events if self._insert(event, received_at)]

    def _insert(self, event: Event, received_at: float) -> bool:
        header = event.header
        inserted = self._db.execute(
            f"INSERT INTO events (received_at, width, height, {', '.join(_FIELDS)})"
            f" VALUES (?, ?, ?{', ?' * len(_FIELDS)}) ON CONFLICT (device, epoch, seq) DO NOTHING",
            (received_at, *header.frame_size, *(getattr(header, name) for name in _FIELDS)),
        )
        if inserted.rowcount == 0:
            return False
        vectors = event.embeddings.astype("<f2")  # (n, d)
        self._db.executemany(
            "INSERT INTO people VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (inserted.lastrowid, number, *person.box, person.score, _answers(person), vector.tobytes(), crop)
                for number, (person, vector, crop) in enumerate(zip(header.people, vectors, event.crops, strict=True))
            ],
        )
        return True

    def headers(self) -> Iterator[Header]:
        """Every event's header, its people included, in the order of arrival, one at a time."""
        for _, header in self._rows():
            yield header

    def events(self) -> Iterator[Event]:
        """Every event as it was sent, in the order of arrival, one at a time."""
        query = "SELECT embedding, crop FROM people WHERE event = ? ORDER BY number"
        for key, header in self._rows():
            with self._translated():
                blobs = self._db.execute(query, (key,)).fetchall()
            vectors = np.frombuffer(b"".join(vector for vector, _ in blobs), "<f2").astype(np.float16)
            yield Event(header, vectors.reshape(len(blobs), header.embedding_dim), tuple(crop for _, crop in blobs))

    def categories(self) -> list[str]:
        """The names of all categories that anyone in the store was asked about, in the order of arrival."""
        query = (
            "SELECT json_extract(answer.value, '$.category') FROM people, json_each(people.answers) AS answer"
            " GROUP BY 1 ORDER BY min(people.rowid), answer.key"  # SQLite: the key of the row that min() found
        )
        with self._translated():
            return [name for (name,) in self._db.execute(query)]

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Several readings that see the same events, whatever arrives meanwhile. Not for `add`."""
        with self._translated(), self._transaction("DEFERRED"):
            yield

    def _rows(self) -> Iterator[tuple[int, Header]]:
        events = f"SELECT id, width, height, {', '.join(_FIELDS)} FROM events ORDER BY id"
        people = "SELECT score, answers, crop IS NOT NULL, x1, y1, x2, y2 FROM people WHERE event = ? ORDER BY number"
        with self._translated():
            for key, width, height, *row in self._db.execute(events):
                fields = dict(zip(_FIELDS, row, strict=True))
                everyone = tuple(
                    Person(box=tuple(box), score=score, answers=_ANSWERS.validate_json(answers), crop=bool(crop))
                    for score, answers, crop, *box in self._db.execute(people, (key,))
                )
                yield key, Header(frame_size=(width, height), people=everyone, **fields)

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        self._db.execute(f"BEGIN {kind}")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite ends it itself on some errors, a full disk among them
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValidationError) as error:
            raise StoreError(f"store {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _answers(person: Person) -> str:
    """The answers as the JSON of the wire."""
    return _ANSWERS.dump_json(person.answers, exclude_none=True).decode()
