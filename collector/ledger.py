"""The numbers of every epoch: which are accounted for, which are missing, and why."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge.protocol import Gone

HIGHEST = 2**63 - 1  # number that SQLite knows
UNKNOWN = "unknown"
_EPOCH = "device = ? AND epoch = ?"


@dataclass
class Stream:
    """What is known of one epoch of a device; next, pruned and refused as in collector/schema.py."""

    device: str
    epoch: int
    next: int = 0
    pruned: int = 0
    refused: int = 0
    end: int = 0  # every number of which anything is known is below it

    @property
    def key(self) -> tuple[str, int]:
        """Its name."""
        return self.device, self.epoch

    def passed(self, first: int, last: int) -> None:
        """The numbers first..last are accounted for."""
        self.end = max(self.end, last + 1)
        if first <= self.next:  # beyond it is a hole, which stays one
            self.next = max(self.next, min(last + 1, HIGHEST))


class Ledger:
    """The tables `streams` and `gone` of a store's database. The caller keeps the transactions."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def stream(self, device: str, epoch: int) -> Stream:
        """What is known of this epoch, were it nothing."""
        key = (device, epoch)
        row = self._db.execute(f"SELECT next, pruned, refused FROM streams WHERE {_EPOCH}", key).fetchone()
        stream = Stream(*key, *(row or ()))
        (event,) = self._db.execute(f"SELECT max(seq) FROM events WHERE {_EPOCH}", key).fetchone()
        (gone,) = self._db.execute(f"SELECT max(last) FROM gone WHERE {_EPOCH}", key).fetchone()
        stream.end = max(stream.next, stream.pruned, *(number + 1 for number in (event, gone) if number is not None))
        return stream

    def streams(self) -> list[Stream]:
        """All epochs, by device and in the order in which their first events came."""
        # a collector of schema 1 that still runs beside this one writes events without a row in `streams`
        names = self._db.execute("SELECT device, epoch FROM streams UNION SELECT device, epoch FROM events").fetchall()
        arrival = f"SELECT id FROM events WHERE {_EPOCH} ORDER BY seq LIMIT 1"
        places = [(key[0], self._db.execute(arrival, key).fetchone() or (0,), key) for key in names]
        return [self.stream(*key) for *_, key in sorted(places)]

    def save(self, streams: Iterable[Stream]) -> None:
        """Write down what changed of them."""
        self._db.executemany(
            "INSERT INTO streams VALUES (?, ?, ?, ?, ?) ON CONFLICT (device, epoch) DO UPDATE"
            " SET next = excluded.next, pruned = excluded.pruned, refused = excluded.refused",
            [(*stream.key, stream.next, stream.pruned, stream.refused) for stream in streams],
        )

    def record(self, stream: Stream, first: int, last: int, reason: str, now: float) -> bool:
        """Note why the numbers first..last are missing: those of which nothing is known. False: there was none."""
        first = max(first, stream.next, stream.pruned)  # below them nothing is unknown
        unknown = [(start, end) for start, end, why in self._holes(stream, first, last) if why is None]
        for start, end in unknown:
            grown = self._db.execute(
                f"UPDATE gone SET last = ? WHERE {_EPOCH} AND last = ? AND reason = ?",
                (end, *stream.key, start - 1, reason),
            )
            if not grown.rowcount:
                self._db.execute("INSERT INTO gone VALUES (?, ?, ?, ?, ?, ?)", (*stream.key, start, end, reason, now))
        return bool(unknown)

    def found(self, stream: Stream, number: int) -> bool:
        """An event came that was recorded as missing: take it out. False: it was not."""
        for first, last, reason, at in self._gone(stream, number):
            if first > number:
                break
            self._db.execute(f"DELETE FROM gone WHERE {_EPOCH} AND last = ?", (*stream.key, last))
            left = [(*stream.key, *part, reason, at) for part in ((first, number - 1), (number + 1, last))]
            self._db.executemany(
                "INSERT INTO gone VALUES (?, ?, ?, ?, ?, ?)", [row for row in left if row[2] <= row[3]]
            )
            return True
        return False

    def missing(self, stream: Stream, first: int, last: int, *, removed: str = "") -> Iterator[Gone]:
        """The numbers of first..last under which there is no event, in order, and why.

        removed: the reason of those that were here and were removed; without it, they are left out.
        """
        for start, end, why in self._holes(stream, first, last):
            if why is None and start < stream.pruned:
                if removed:
                    yield Gone(first=start, last=min(end, stream.pruned - 1), reason=removed)
                start = stream.pruned
            if start <= end:
                yield Gone(first=start, last=end, reason=UNKNOWN if why is None else why)

    def _holes(self, stream: Stream, first: int, last: int) -> Iterator[tuple[int, int, str | None]]:
        """The numbers of first..last under which there is no event, in order, and why, if that was recorded."""
        for start, end in self._without_event(stream, first, last):
            for gone_first, gone_last, reason, _ in self._gone(stream, start):
                if gone_first > end:
                    break
                if gone_first > start:
                    yield start, gone_first - 1, None
                yield max(start, gone_first), min(end, gone_last), reason
                start = min(end, gone_last) + 1
            if start <= end:
                yield start, end, None

    def _gone(self, stream: Stream, number: int) -> Iterator[tuple[int, int, str, float]]:
        """What was recorded as missing, from `number` on: first, last, reason, when."""
        query = f"SELECT first, last, reason, recorded_at FROM gone WHERE {_EPOCH} AND last >= ? ORDER BY last"
        yield from self._db.execute(query, (*stream.key, number))

    def _without_event(self, stream: Stream, first: int, last: int) -> Iterator[tuple[int, int]]:
        span = (*stream.key, first, last)
        counted = f"SELECT count(*), min(seq), max(seq) FROM events WHERE {_EPOCH} AND seq BETWEEN ? AND ?"
        count, lowest, highest = self._db.execute(counted, span).fetchone()
        if not count:
            lowest, highest = last + 1, last
        if first < lowest:
            yield first, lowest - 1
        if count < highest - lowest + 1:  # else there is no hole between them, and counting is faster than looking
            expected = lowest
            numbers = f"SELECT seq FROM events WHERE {_EPOCH} AND seq BETWEEN ? AND ? ORDER BY seq"
            for (number,) in self._db.execute(numbers, span):
                if expected < number:
                    yield expected, number - 1
                expected = number + 1
        if highest < last:
            yield highest + 1, last
