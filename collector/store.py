"""What the boxes saw, kept in one SQLite file: every event once, however often it arrives; what is missing, and why."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from pydantic import TypeAdapter, ValidationError

from collector.ledger import HIGHEST, UNKNOWN, Ledger, Stream
from collector.people import ANSWERS, PERSON, People, Place, person_of
from collector.schema import prepare
from collector.sinks import Item, Kept, Outcome, Poison
from edge.errors import ConfigError, StoreError
from edge.events import Ended, Event, Header, Person, encode
from edge.failpoints import failpoint
from edge.protocol import Data, Gone

BUSY_SECONDS = 60.0  # how long another program may hold a write open (a backup, a person at `sqlite3`)
WAL_KEPT = 64 << 20  # bytes of the -wal file that stay after a long reader (a backup, an export) made it grow
QUARANTINE = 10_000  # refused messages that are kept; the oldest leave
QUARANTINE_BYTES = 64 << 10  # of each
PRUNE_EVENTS = 256  # at most, in one step of `prune`
BACKUP_PAGES = 256  # between two reports of progress: 4 MiB
MAX_REASON = 500  # characters; more the protocol does not carry

CONFLICT = "another event has this number"
RETENTION = "removed by retention"

# the header's fields that are columns of the same name
_FIELDS = (
    "device",
    "epoch",
    "seq",
    "camera",
    "frame",
    "captured_at",
    "clock",
    "bundle",
    "bank",
    "encoder",
    "embedding_dim",
    "skipped",
)
_ENDED = TypeAdapter(tuple[Ended, ...])
_DISK_FAILED = ("database or disk is full", "disk I/O error")  # SQLite's words; its codes come with Python 3.11


@dataclass(frozen=True)
class Gap:
    """The events first..last of one epoch are not in the store, and `prune` did not remove them."""

    device: str
    epoch: int
    first: int
    last: int
    reason: str

    @property
    def count(self) -> int:
        """How many events are missing."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class DeviceStats:
    """What the store has of one device.

    captured, received: the first and the last time, seconds since 1970, UTC; None without an event. gone: how many
    events are missing, by reason. refused: how many messages were set aside, ever.
    """

    device: str
    epochs: int
    events: int
    people: int
    captured: tuple[float, float] | None
    received: tuple[float, float] | None
    gone: dict[str, int]
    refused: int


class Store:
    """An open store file; a context manager, and a Sink. To be used by the thread that opened it.

    `create` makes the file where there is none; without it the file must be a store already. The file of an older
    version becomes one of this. Raises ConfigError for a file that cannot be opened, is no store, was written by a
    newer version, or by an older one where it cannot be written. This and every method raise StoreError when the disk
    is full or fails; the methods also when the file is damaged, or locked for BUSY_SECONDS.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        wanted = "a file in a folder that can be written" if create else "an existing file"
        try:
            self._db = sqlite3.connect(uri, timeout=BUSY_SECONDS, uri=True, isolation_level=None)
            try:
                prepare(self._db, path, create)
                if create:
                    self._db.execute("PRAGMA journal_mode = WAL")  # people can read while events come in
                    self._db.execute("PRAGMA synchronous = FULL")  # a committed batch survives a power cut
                    self._db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
            except BaseException:
                self._db.close()
                raise
        except sqlite3.OperationalError as error:
            if str(error) in _DISK_FAILED:
                raise StoreError(f"store {path}: {error}") from error
            remedy = None
            if not create and "readonly" in str(error):  # readers, too, write beside a store that a collector wrote
                wanted = "a file in a folder that can be written"
                remedy = "copy it to one"
            raise ConfigError(f"store {path} cannot be opened", expected=wanted, got=error, remedy=remedy) from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"store {path} is no lookout store", got=error, remedy="choose another file") from error
        self._ledger = Ledger(self._db)
        self.people = People(self._db)  # to be read within `snapshot`

    # --- what arrives -------------------------------------------------------------------------------------------------

    def resume(self, device: str, epoch: int) -> int:
        """Every number of this epoch below it is accounted for: stored, gone, refused, or removed by `prune`."""
        with self._translated():
            return self._ledger.stream(device, epoch).next

    def add(self, items: Sequence[Item], received_at: float) -> list[Outcome]:
        """Keep all of `items` or none, in one transaction. received_at: seconds since 1970, UTC.

        What is there already, in the store or earlier in `items`, is a duplicate. Poison, and another event under a
        number that has one, are set aside. The header of an event names the device, epoch and number of its item.
        """
        streams: dict[tuple[str, int], Stream] = {}
        outcomes = []
        with self._translated(), self._transaction("IMMEDIATE"):
            for item in items:
                key = (item.device, item.epoch)
                if key not in streams:
                    streams[key] = self._ledger.stream(*key)
                outcomes.append(self._keep(item, streams[key], received_at))
                streams[key].passed(item.first, item.last)
            self._ledger.save(streams.values())
            if any(outcome.kept is Kept.REFUSED for outcome in outcomes):
                oldest = "(SELECT max(id) FROM quarantine) - ?"
                self._db.execute(f"DELETE FROM quarantine WHERE id <= {oldest}", (QUARANTINE,))
            failpoint("collector.before-commit")
        return outcomes

    def _keep(self, item: Item, stream: Stream, received_at: float) -> Outcome:
        match item.payload:
            case Gone(reason=reason):
                new = self._ledger.record(stream, item.first, item.last, reason, received_at)
                return Outcome(Kept.NEW if new else Kept.DUPLICATE)
            case Poison(reason=reason):
                why = f"refused: {reason}"[:MAX_REASON]
                self._ledger.record(stream, item.first, item.last, why, received_at)
                return self._set_aside(item, reason[:MAX_REASON], stream, received_at)
            case event:
                return self._keep_event(item, event, stream, received_at)

    def _keep_event(self, item: Item, event: Event, stream: Stream, received_at: float) -> Outcome:
        digest = _digest(encode(event))
        if item.first < stream.end:  # something is known of this number
            query = "SELECT id, digest FROM events WHERE device = ? AND epoch = ? AND seq = ?"
            if stored := self._db.execute(query, (*stream.key, item.first)).fetchone():
                # an event of schema 1 has no digest, and a field that a later version adds changes all of them
                if digest == stored[1] or _content(event) == _content(*self._events("id = ?", stored[0])):
                    return Outcome(Kept.DUPLICATE)
                return self._set_aside(item, CONFLICT, stream, received_at)
            if not self._ledger.found(stream, item.first) and item.first < stream.pruned:
                return Outcome(Kept.DUPLICATE)  # it was here
        self._insert(event, digest, received_at)
        return Outcome(Kept.NEW)

    def _insert(self, event: Event, digest: bytes, received_at: float) -> None:
        header = event.header
        notices = json.dumps(header.notices, ensure_ascii=False) if header.notices else None
        ended = _ENDED.dump_json(header.ended).decode() if header.ended else None
        inserted = self._db.execute(
            f"INSERT INTO events (received_at, width, height, digest, notices, ended, {', '.join(_FIELDS)})"
            f" VALUES (?, ?, ?, ?, ?, ?{', ?' * len(_FIELDS)})",
            (received_at, *header.frame_size, digest, notices, ended, *(getattr(header, name) for name in _FIELDS)),
        )
        vectors = event.embeddings.astype("<f2")  # (n, d)
        self._db.executemany(
            "INSERT INTO people VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (inserted.lastrowid, number, *person.box, person.score, _answers(person), vector.tobytes(), crop)
                for number, (person, vector, crop) in enumerate(zip(header.people, vectors, event.crops, strict=True))
            ],
        )
        self._db.executemany(
            "INSERT INTO tracks VALUES (?, ?, ?, ?)",
            [
                (inserted.lastrowid, number, person.track, person.looks)
                for number, person in enumerate(header.people)
                if (person.track, person.looks) != (None, None)
            ],
        )

    def _set_aside(self, item: Item, reason: str, stream: Stream, received_at: float) -> Outcome:
        beginning = b"".join(part for frame in item.frames for part in (_length(frame), frame))[:QUARANTINE_BYTES]
        kept = self._db.execute(
            "INSERT INTO quarantine (device, epoch, seq, reason, received_at, size, digest, frames)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",  # sent again, it is there already
            (*stream.key, item.first, reason, received_at, sum(map(len, item.frames)), _digest(item.frames), beginning),
        )
        stream.refused += kept.rowcount
        return Outcome(Kept.REFUSED, reason)

    # --- what leaves --------------------------------------------------------------------------------------------------

    def prune(self, now: float, *, max_age_s: float | None = None, max_bytes: int | None = None) -> int:
        """Remove a little of the oldest that is over a bound; how many messages that were. 0: nothing is over it.

        Call it until it returns 0, with other work between: each step is one short transaction. now: seconds since
        1970, UTC. max_age_s: since it was received. max_bytes: of the file that are in use; what was freed is used
        again before the file grows.
        """
        with self._translated(), self._transaction("IMMEDIATE"):
            excess = self.size()[0] - max_bytes if max_bytes is not None else 0
            horizon = now - max_age_s if max_age_s is not None else float("-inf")
            count, freed, newest = 0, 0, 0
            ends: dict[tuple[str, int], int] = {}
            oldest = self._db.execute(
                "SELECT id, received_at, device, epoch, seq, (SELECT"
                " sum(length(answers) + length(embedding) + ifnull(length(crop), 0)) FROM people WHERE event = id)"
                " FROM events ORDER BY id LIMIT ?",
                (PRUNE_EVENTS,),
            )
            for key, received_at, device, epoch, seq, size in oldest:
                if freed >= excess and received_at >= horizon:
                    break
                count, freed, newest = count + 1, freed + (size or 0), key
                ends[device, epoch] = max(seq + 1, ends.get((device, epoch), 0))
            oldest.close()
            if excess > 0:  # the refused ones of the same time go too, and all when there are no others left
                until = "SELECT ifnull(max(received_at), 9e999) FROM events WHERE id <= ?"
                horizon = max(horizon, *self._db.execute(until, (newest,)).fetchone())
            streams = [self._ledger.stream(*key) for key in ends]
            for stream in streams:
                self._ledger.record(stream, 0, ends[stream.key] - 1, UNKNOWN, now)  # what is below was never here
                stream.pruned = max(stream.pruned, min(ends[stream.key], HIGHEST))
            self._ledger.save(streams)
            self._db.execute("DELETE FROM people WHERE event <= ?", (newest,))
            self._db.execute("DELETE FROM events WHERE id <= ?", (newest,))
            refused = self._db.execute(
                "DELETE FROM quarantine WHERE id IN"
                " (SELECT id FROM quarantine WHERE received_at < ? ORDER BY id LIMIT ?)",
                (horizon, PRUNE_EVENTS),
            )
            return count + refused.rowcount

    # --- what people say ----------------------------------------------------------------------------------------------

    def correct(self, corrections: Iterable[tuple[Place, str, str | None]], labelled_at: float) -> int:
        """Note, in one transaction, what is true of whom: place, category, option. labelled_at: seconds since 1970.

        None as the option takes back what was said. How many that were: who is not there any more is passed over.
        """
        with self._translated(), self._transaction("IMMEDIATE"):
            return sum(self.people.correct(*correction, labelled_at) for correction in corrections)

    # --- what is there ------------------------------------------------------------------------------------------------

    def headers(self) -> Iterator[Header]:
        """Every event's header, its people included, in the order of arrival, one at a time."""
        for _, header in self._headers("true ORDER BY id"):
            yield header

    def events(self) -> Iterator[Event]:
        """Every event as it was sent, in the order of arrival, one at a time."""
        yield from self._events("true ORDER BY id")

    def streams(self) -> list[tuple[str, int, int]]:
        """Device, epoch and end of every epoch, by device and in the order of arrival: all its numbers are below."""
        with self.snapshot():
            return [(*stream.key, stream.end) for stream in self._ledger.streams()]

    def entries(self, device: str, epoch: int, start: int, limit: int) -> list[Data | Gone]:
        """What stands under the numbers of this epoch from `start` on, without a hole, at most `limit` entries.

        Each event as it was sent, or the same in other bytes; Gone for every other number below the epoch's end.
        """
        with self.snapshot():
            stream = self._ledger.stream(device, epoch)
            where = "device = ? AND epoch = ? AND seq >= ? ORDER BY seq LIMIT ?"
            entries: list[Data | Gone] = [
                Data(event.header.seq, tuple(encode(event)))
                for event in self._events(where, device, epoch, start, limit)
            ]
            last = stream.end - 1 if len(entries) < limit else _first(entries[-1])
            entries += islice(self._ledger.missing(stream, start, last, removed=RETENTION), limit)
        return sorted(entries, key=_first)[:limit]

    def gaps(self) -> Iterator[Gap]:
        """What is missing, by device and epoch, in order: of each epoch below the highest number known of it."""
        for device, epoch, _ in self.streams():
            with self.snapshot():
                stream = self._ledger.stream(device, epoch)
                missing = list(self._ledger.missing(stream, 0, stream.end - 1))
            yield from (Gap(device, epoch, gone.first, gone.last, gone.reason) for gone in missing)

    def stats(self) -> list[DeviceStats]:
        """One for each device that anything is known of, by name."""
        counted = (
            "SELECT count(*), (SELECT count(*) FROM events JOIN people ON event = id WHERE device = :device),"
            " min(captured_at), max(captured_at), min(received_at), max(received_at) FROM events WHERE device = :device"
        )
        with self.snapshot():
            epochs, refused = Counter[str](), Counter[str]()
            for stream in self._ledger.streams():
                epochs[stream.device] += 1
                refused[stream.device] += stream.refused
            gone = {device: Counter[str]() for device in epochs}
            for gap in self.gaps():
                gone[gap.device][gap.reason] += gap.count
            stats = []
            for device in sorted(epochs):
                events, people, *times = self._db.execute(counted, {"device": device}).fetchone()
                captured, received = ((times[0], times[1]), (times[2], times[3])) if events else (None, None)
                why = dict(gone[device].most_common())
                stats.append(
                    DeviceStats(device, epochs[device], events, people, captured, received, why, refused[device])
                )
        return stats

    def size(self) -> tuple[int, int]:
        """Bytes of the file: those in use, and all."""
        with self._translated():
            (page,), (pages,), (free,) = (
                self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_size", "page_count", "freelist_count")
            )
        return (pages - free) * page, pages * page

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
        """Several readings that see the same events, whatever arrives meanwhile. Not for `add` and `prune`."""
        with self._translated():
            if self._db.in_transaction:  # within another snapshot
                yield
                return
            with self._transaction("DEFERRED"):
                yield

    def backup(self, to: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write a copy of the store as it is now, whatever arrives meanwhile; it is checked before it is named `to`.

        progress: called with the bytes that are copied, and all. Raises ConfigError where `to` exists, OSError.
        """
        part = to.with_name(f"{to.name}.part")
        _check_new(to, "choose another name")
        _check_new(part, "wait for the backup that writes it, or remove it if none does")
        part.touch(exist_ok=False)
        try:
            self._copy(part, progress)
            _check_new(to, "choose another name")
            part.rename(to)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(to.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a power cut does not take the name away
        finally:
            os.close(folder)

    def _copy(self, part: Path, progress: Callable[[int, int], None]) -> None:
        (page,) = self._db.execute("PRAGMA page_size").fetchone()
        with self.snapshot():
            # Reading has to begin before the copy does: then it is of one moment, and no writer makes it begin anew.
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            try:
                with closing(sqlite3.connect(part, isolation_level=None)) as copy:
                    self._db.backup(
                        copy,
                        pages=BACKUP_PAGES,
                        progress=lambda _, left, total: progress((total - left) * page, total * page),
                    )
                    copy.execute("PRAGMA journal_mode = DELETE")  # one file, to be read where nothing can be written
                    (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            except sqlite3.Error as error:
                raise StoreError(f"backup of {self.path} to {part}: {error}") from error
        if found != "ok":
            raise StoreError(f"backup of {self.path}: what was copied is damaged", got=found)

    def _headers(self, where: str, *values: str | float) -> Iterator[tuple[int, Header]]:
        """The row's number and the header of the events that `where` finds, in its order."""
        events = f"SELECT id, width, height, notices, ended, {', '.join(_FIELDS)} FROM events WHERE {where}"
        people = f"SELECT {PERSON} FROM people LEFT JOIN tracks USING (event, number) WHERE event = ? ORDER BY number"
        with self._translated():
            for key, width, height, notices, ended, *row in self._db.execute(events, values):
                fields = dict(zip(_FIELDS, row, strict=True))
                if notices is not None:
                    fields["notices"] = tuple(json.loads(notices))
                if ended is not None:
                    fields["ended"] = _ENDED.validate_json(ended)
                everyone = tuple(person_of(*person) for person in self._db.execute(people, (key,)))
                yield key, Header(frame_size=(width, height), people=everyone, **fields)

    def _events(self, where: str, *values: str | float) -> Iterator[Event]:
        query = "SELECT embedding, crop FROM people WHERE event = ? ORDER BY number"
        for key, header in self._headers(where, *values):
            with self._translated():
                blobs = self._db.execute(query, (key,)).fetchall()
            vectors = np.frombuffer(b"".join(vector for vector, _ in blobs), "<f2").astype(np.float16)
            yield Event(header, vectors.reshape(len(blobs), header.embedding_dim), tuple(crop for _, crop in blobs))

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
        except (sqlite3.Error, ValidationError, json.JSONDecodeError) as error:
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
    return ANSWERS.dump_json(person.answers, exclude_none=True).decode()


def _content(event: Event) -> tuple[Header, bytes, tuple[bytes | None, ...]]:
    """What makes two events equal."""
    return event.header, event.embeddings.tobytes(), event.crops


def _digest(frames: Sequence[bytes]) -> bytes:
    """As in collector/schema.py."""
    digest = blake2b(digest_size=16)
    for frame in frames:
        digest.update(_length(frame))
        digest.update(frame)
    return digest.digest()


def _first(entry: Data | Gone) -> int:
    return entry.seq if isinstance(entry, Data) else entry.first


def _check_new(path: Path, remedy: str) -> None:
    if os.path.lexists(path):
        raise ConfigError(f"backup: {path} exists already", remedy=remedy)


def _length(frame: bytes) -> bytes:
    return len(frame).to_bytes(8, "big")
