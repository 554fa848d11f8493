"""What can be read of a damaged journal: its file page by page, without SQLite, which gives up where one is wrong.

Entries lie in the leaves of a tree (https://sqlite.org/fileformat2.html#b_tree_pages). A checksum tells which are as
they were written; so nothing here needs to be careful about what it takes for a number or a page.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edge.records import END, PAGE, DamagedError, Record, Run, checked, crc_of, gone_record
from edge.wal import read_log

LOST = "damaged on disk"
_LEAF = 13  # the first byte of a page that holds rows
_MOST = PAGE - 35  # bytes of a row that its leaf may hold; what is more is in a chain of pages of its own
_LEAST = (PAGE - 12) * 32 // 255 - 23
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)  # bytes of a column, by what kind it is


class _Pages:
    """The pages of a database: its file, and its log over it; a context manager. Raises OSError."""

    def __init__(self, path: Path) -> None:
        log = Path(f"{path}-wal")
        self._log = read_log(log.read_bytes() if log.exists() else b"")
        self._file = os.open(path, os.O_RDONLY)
        self.count = max(os.fstat(self._file).st_size // PAGE, self._log.size)

    def __getitem__(self, number: int) -> bytes:
        """From 1; zeros for one that is not there, or is in a bad sector."""
        if number in self._log.pages:
            return self._log.pages[number]
        page = b""
        if 0 < number <= self.count:
            with suppress(OSError):
                page = os.pread(self._file, PAGE, (number - 1) * PAGE)
        return page.ljust(PAGE, b"\0")

    def free(self) -> set[int]:
        """Those that hold what was deleted; none when the list of them is not whole."""
        number, count = struct.unpack_from(">2I", self[1], 32)
        found: list[int] = []
        while number and len(found) < count:
            following, length = struct.unpack_from(">2I", self[number])
            found += [number, *struct.unpack_from(f">{min(length, PAGE // 4 - 2)}I", self[number], 8)]
            number = following
        return set(found) if len(set(found)) == len(found) == count else set()

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._file)


def readable(path: Path) -> Iterator[Record]:
    """The entries of a damaged file that are as they were written, in order, and a Gone for what is lost between them.

    Where the list of free pages is lost, too, it may begin with what had been delivered. Nothing is changed. Raises
    OSError.
    """
    with _Pages(path) as pages:
        free, leaves, starts = pages.free(), [], []
        for number in range(2, pages.count + 1):
            for key, columns in _rows(pages, number) if number not in free else ():
                if len(columns) == 4 and columns[3] == crc_of(key, *columns[1:3]):
                    starts.append((key, *columns[1:3]))
                elif _entry(columns):
                    leaves.append((key, number))
                    break
        starts.sort()
        ends = [start for start, *_ in starts[1:]] + [END]
        runs = [Run(start, end, epoch, base) for (start, epoch, base), end in zip(starts, ends, strict=False)]
        yield from _in_place(
            ((key, _entry(row)) for _, number in sorted(leaves) for key, row in _rows(pages, number)), runs
        )


def _in_place(entries: Iterator[tuple[int, Record | None]], runs: Sequence[Run]) -> Iterator[Record]:
    """The entries whose ids are right, and what is lost between them."""
    bases = {run.epoch: run.base for run in runs}
    at, last, done = 0, None, set()  # where the next one should begin, the one before, and the epochs before its own
    for key, record in entries:
        if record is None or record.epoch in done:
            continue
        base, known = bases.setdefault(record.epoch, key - record.last), runs
        begins = base + record.first
        if last is None:
            at = begins
        elif record.body is None and begins < at <= key:
            begins, record = at, gone_record(record.epoch, at - base, record.last, record.queued, record.reason or "")
        if key != base + record.last or begins < at:
            continue
        if last is not None and record.epoch == last.epoch:
            known = [Run(at, begins, record.epoch, base)]
        elif last is not None:
            done.add(last.epoch)
            if record.epoch not in (run.epoch for run in runs):  # lost itself: its numbers begin at 0, where its ids do
                known = [run._replace(end=min(run.end, base)) for run in runs]
                known.append(Run(base, END, record.epoch, base))
        yield from _lost(known, at, begins, record.queued)
        yield record
        at, last = key + 1, record
    if last is not None and runs:
        yield from _lost(runs, at, runs[-1].start, last.queued)


def _lost(runs: Sequence[Run], at: int, end: int, queued: float) -> Iterator[Record]:
    """What was at the ids at <= id < end."""
    for run in runs:
        low, high = max(at, run.start), min(end, run.end)
        if low < high:
            yield gone_record(run.epoch, low - run.base, high - 1 - run.base, queued, LOST)


def _entry(columns: Sequence[Any]) -> Record | None:
    if len(columns) != 8 or not isinstance(columns[4], int | float):
        return None
    with suppress(DamagedError):
        return checked((*columns[1:4], float(columns[4]), *columns[5:]))  # SQLite stores 7.0 as 7
    return None


def _rows(pages: _Pages, number: int) -> Iterator[tuple[int, list[Any]]]:
    """(id, columns) of what may be the rows of a leaf."""
    page = pages[number]
    if page[0] == _LEAF:
        (count,) = struct.unpack_from(">H", page, 3)
        for place in range(8, min(8 + 2 * count, PAGE - 1), 2):
            with suppress(struct.error, IndexError, ValueError):
                yield _row(pages, page, *struct.unpack_from(">H", page, place))


def _row(pages: _Pages, page: bytes, at: int) -> tuple[int, list[Any]]:
    size, at = _number(page, at)
    key, at = _number(page, at)
    here = _LEAST + (size - _LEAST) % (PAGE - 4) if size > _MOST else size
    end = at + (here if here <= _MOST else _LEAST)
    row, seen = bytearray(page[at:end]), set[int]()
    while len(row) < size:
        (following,) = struct.unpack_from(">I", page, end)
        if following in seen or not 0 < following <= pages.count:
            raise ValueError("the rest of it is elsewhere")
        seen.add(following)
        page, end = pages[following], 0
        row += page[4 : 4 + size - len(row)]
    return key, list(_columns(bytes(row)))


def _columns(row: bytes) -> Iterator[Any]:
    end, head = _number(row, 0)
    at = end
    while head < end:
        kind, head = _number(row, head)
        size = _SIZES[kind] if kind < len(_SIZES) else (kind - 12) // 2
        part = row[at : at + size]
        at += size
        if kind in (0, 8, 9):
            yield (None, 0, 1)[kind % 7]
        elif kind < 7:
            yield int.from_bytes(part, "big", signed=True)
        elif kind == 7:
            yield struct.unpack(">d", part)[0]
        else:
            yield part.decode() if kind % 2 else part


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends: the highest bit of each tells whether another follows."""
    value = 0
    for byte in data[at : at + 8]:
        value, at = value << 7 | byte & 127, at + 1
        if byte < 128:
            return value, at
    value = value << 8 | data[at]
    return value - (value >> 63 << 64), at + 1
