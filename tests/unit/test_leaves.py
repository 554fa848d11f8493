"""Damaged files and logs: what comes out was written, what is missing is said, and as little as possible is missing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edge.journal import Journal, checkpoint
from edge.leaves import LOST, _in_place, readable
from edge.protocol import Data
from edge.records import END, PAGE, DamagedError, Record, Run, event_record, frames_of
from edge.wal import read_log
from tests.spools import as_killed, quick_folder

FRAME = PAGE + 24  # bytes of a page in the log
LOG_HEADER = 32


class Files(NamedTuple):
    """A spool's file and log, and what was in it: (epoch, number) in order."""

    file: bytes
    log: bytes
    events: list[tuple[int, int]]

    def write(self, path: Path) -> None:
        path.write_bytes(self.file)
        Path(f"{path}-wal").write_bytes(self.log)


def event(epoch: int, number: int) -> tuple[bytes, ...]:
    """Of 0 to 9000 bytes that cannot be made smaller: rows with and without pages of their own."""
    chance = random.Random(f"{epoch} {number}")
    return (b"%d %d" % (epoch, number), chance.randbytes(chance.choice((0, 200, 900, 4000, 9000))))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    folder = quick_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def files(folder: Path) -> tuple[Files, Files]:
    """Three epochs, of which the first is partly delivered: all in the file; and the most of it in the log."""
    path, events = folder / "whole.db", []
    with Journal(path) as journal:
        for _ in range(3):
            journal.begin()
            for number in range(40):
                events.append((journal.epoch, number))
                journal.append(event(journal.epoch, number), 1.0 * number)
                if len(events) == 50:
                    journal.forget(events[0][0], 8)
                    checkpoint(path)
        killed = Files(path.read_bytes(), Path(f"{path}-wal").read_bytes(), events[8:])
    return Files(path.read_bytes(), b"", events[8:]), killed


def check(records: list[Record], written: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """That they are right, in order, and what is missing between them is gone. Returns what was lost."""
    found: dict[tuple[int, int], Record] = {}
    for record in records:
        assert record.reason in (None, LOST)
        for number in range(record.first, record.last + 1):
            assert (record.epoch, number) in written, "never written"
            assert (record.epoch, number) not in found, "twice"
            found[record.epoch, number] = record
        if record.body is not None:
            assert frames_of(record.body) == event(record.epoch, record.last)
    assert list(found) == [one for one in written if one in found], "not in order"
    if found:
        between = written[written.index(next(iter(found))) : written.index(list(found)[-1]) + 1]
        assert list(found) == between, "a hole that nobody knows of"
    return [one for one in written if one not in found or found[one].body is None]


@pytest.mark.parametrize("known", [0, 1, 2])
def test_the_first_events_of_an_epoch_that_is_lost_itself_are_told(known: int) -> None:
    """The damage took where the second epoch begins, and its first two events. known: epochs of which that is there."""
    runs = [Run(1, 41, 7, 1), Run(41, END, 8, 41)]
    if known < 2:
        runs = [run._replace(end=END) for run in runs[:known]]
    entries = [(1 + number, event_record(7, number, 1.0, [b"x"])) for number in range(40)]
    entries += [(41 + number, event_record(8, number, 1.0, [b"x"])) for number in range(2, 5)]
    found = [(one.epoch, one.first, one.last, one.reason) for one in _in_place(iter(entries), runs)]
    assert found[40:] == [(8, 0, 1, LOST), *((8, number, number, None) for number in range(2, 5))]
    assert [one[:2] for one in found[:40]] == [(7, number) for number in range(40)]


def misplaced(before: bytes, after: bytes) -> bool:
    """Whether a page of the file was replaced by a copy of another: whole, and where it does not belong.

    What such a one hides cannot be told from what was delivered.
    """
    pages = {before[at : at + PAGE] for at in range(0, len(before), PAGE)}
    places = range(0, len(after), PAGE)
    return any(after[at : at + PAGE] != before[at : at + PAGE] and after[at : at + PAGE] in pages for at in places)


def changes(content: bytes, chance: random.Random) -> bytes:
    """Bits, bytes, a disk's block or a page of it changed."""
    data = bytearray(content)
    block = chance.randrange(0, len(data), 512)
    page = chance.randrange(0, len(data), PAGE)
    match chance.randrange(5):
        case 0:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            at = chance.randrange(len(data) - 4)
            data[at : at + 4] = chance.randbytes(4)
        case 2:
            data[block : block + 512] = bytes(len(data[block : block + 512]))
        case 3:
            data[page : page + PAGE] = chance.randbytes(len(data[page : page + PAGE]))
        case 4:
            other = chance.randrange(0, len(data), PAGE)
            data[page : page + PAGE] = data[other : other + PAGE].ljust(PAGE, b"\0")
    return bytes(data)


SEEDS = 120


@pytest.mark.parametrize("which", ["file", "log"])
def test_nearly_all_is_read_of_a_damaged_file(folder: Path, files: tuple[Files, Files], which: str) -> None:
    path = folder / "damaged.db"
    for seed in range(SEEDS):
        changed = damaged(files, which, random.Random(seed))
        changed.write(path)
        lost = check(list(readable(path)), changed.events)
        assert len(lost) <= 16, f"seed {seed}: a page holds no more than that"
        assert (path.read_bytes(), Path(f"{path}-wal").read_bytes()) == changed[:2]


@pytest.mark.parametrize("which", ["file", "log"])
def test_a_journal_gives_nothing_that_was_not_written(folder: Path, files: tuple[Files, Files], which: str) -> None:
    """Whatever is changed in its files; it says that it is damaged, at the latest where something is missing."""
    path = folder / "opened.db"
    for seed in range(SEEDS):
        chance = random.Random(seed)
        changed = damaged(files, which, chance, chance.randint(1, 3))
        changed.write(path)
        Path(f"{path}-shm").unlink(missing_ok=True)
        whole, found = drained(path)
        begin = changed.events.index(found[0]) if found else 0
        assert found == changed.events[begin:][: len(found)], f"seed {seed}: a hole"
        silent = which == "log" or misplaced(files[0].file, changed.file)
        assert not whole or silent or found == changed.events, f"seed {seed}: less, and it says nothing"


def damaged(files: tuple[Files, Files], which: str, chance: random.Random, times: int = 1) -> Files:
    """The file of what is all in the file, or the log of what is mostly in the log."""
    changed = files[which == "log"]
    for _ in range(times):
        changed = changed._replace(**{which: changes(getattr(changed, which), chance)})
    return changed


def drained(path: Path) -> tuple[bool, list[tuple[int, int]]]:
    """Whether it went to its end, and what came out, each of which is what was written."""
    found: list[tuple[int, int]] = []
    try:
        with Journal(path) as journal:
            while stream := journal.head():
                for entry in journal.read(stream.epoch, stream.first, 10**6, 10**9):
                    assert isinstance(entry, Data)
                    assert entry.frames == event(stream.epoch, entry.seq)
                    found.append((stream.epoch, entry.seq))
                journal.forget(stream.epoch, stream.end)
    except DamagedError:
        return False, found
    return True, found


def test_a_log_that_a_power_cut_tore_is_not_damaged(files: tuple[Files, Files]) -> None:
    """Behind where it was torn there may be anything: nothing, zeros, noise, frames of an older log."""
    log = files[1].log
    whole = read_log(log)
    assert not whole.damaged
    assert whole.size * PAGE >= len(files[1].file)
    older = bytearray(log)
    for at in range(LOG_HEADER, len(log) - FRAME + 1, FRAME):
        older[at + 8 : at + 16] = b"old salt"
    for seed in range(40):
        chance = random.Random(seed)
        torn = chance.randrange(LOG_HEADER, len(log))
        rest = len(log) - torn
        read = read_log(log[:torn] + chance.choice((b"", bytes(rest), chance.randbytes(rest), bytes(older[torn:]))))
        assert not read.damaged, f"seed {seed}"
        assert set(read.pages) <= set(whole.pages)


def test_a_log_whose_header_is_lost_is_read_all_the_same(files: tuple[Files, Files]) -> None:
    log = files[1].log
    for lost in (8, LOG_HEADER, LOG_HEADER + 24, LOG_HEADER + 5 * FRAME):
        read = read_log(bytes(lost) + log[lost:])
        assert read.damaged
        assert read.size == read_log(log).size
        assert read.pages.items() <= read_log(log).pages.items()


def test_an_empty_log_says_nothing() -> None:
    for content in (b"", bytes(20), bytes(LOG_HEADER), bytes(10_000), b"x" * 10_000):
        assert read_log(content) == ({}, 0, False)


def test_what_was_deleted_is_not_read_again(folder: Path) -> None:
    path = folder / "deleted.db"
    with Journal(path) as journal:
        journal.begin()
        for number in range(200):
            journal.append(event(journal.epoch, number), 1.0)
        journal.forget(journal.epoch, 100)
        journal.drop("spool full", 50)
        as_killed(path, folder / "deleted-killed.db")
    for one in (path, folder / "deleted-killed.db"):
        records = list(readable(one))
        assert records[0][:3] == (journal.epoch, 100, 149)
        assert records[0].reason == "spool full"
        assert [record.last for record in records[1:]] == list(range(150, 200))


def test_the_end_of_an_epoch_that_another_followed_is_known(folder: Path) -> None:
    """Though nothing of the one that followed can be read, or was written."""
    path = folder / "ended.db"
    with Journal(path) as journal:
        journal.begin()
        epoch = journal.epoch
        for number in range(40):
            journal.append(event(epoch, number), 1.0)
        journal.begin()
    content = path.read_bytes()
    page = content.rindex(b"x\x01", 0, len(content)) // PAGE  # where zlib begins last
    path.write_bytes(content[: page * PAGE] + bytes(PAGE) + content[(page + 1) * PAGE :])
    records = list(readable(path))
    assert sum(record.reason == LOST for record in records) > 0
    assert [number for record in records for number in range(record.first, record.last + 1)] == list(range(40))
    assert records[-1][:3] == (epoch, records[-1].first, 39)


def test_the_whole_first_page_may_be_lost(folder: Path, files: tuple[Files, Files]) -> None:
    """Then nobody knows which pages are free: what was delivered may come once more, and the collector knows it."""
    file, log, written = files[0]
    path = folder / "headless.db"
    for head in (bytes(PAGE), b"\xff" * PAGE):
        Files(head + file[PAGE:], log, written).write(path)
        found = {(record.epoch, record.last): record for record in readable(path)}
        assert [found[one].body is not None for one in written] == [True] * len(written)


def test_a_file_that_is_no_journal_holds_nothing(folder: Path) -> None:
    path = folder / "noise.db"
    for content in (b"", b"x", bytes(10 * PAGE), random.Random(1).randbytes(10 * PAGE), b"\x0d" * 20 * PAGE):
        path.write_bytes(content)
        assert list(readable(path)) == []


def test_a_log_that_ends_anywhere_is_read_as_far_as_it_goes(files: tuple[Files, Files]) -> None:
    """Within its header, too, whose length is then no multiple of anything."""
    log = files[1].log
    for length in (*range(200), *range(LOG_HEADER + FRAME - 30, LOG_HEADER + FRAME + 30)):
        read = read_log(log[:length])
        assert all(page in log[:length] for page in read.pages.values()), length
