"""Fuzz target: a spool's file after bytes of it changed. What is read from it was written, or the error says so.

The bytes say which pages are torn, overwritten, zeroed or swapped, in the database or its write-ahead log.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.fuzz.fuzzing import Choices, fuzz, instrumented

with instrumented():
    from edge.config import SpoolConfig
    from edge.errors import ConfigError
    from edge.events import Event, Header, Stamp, encode
    from edge.journal import Journal
    from edge.leaves import readable
    from edge.link import last_of
    from edge.protocol import Data, Gone
    from edge.records import DamagedError, DiskRefusedError, frames_of
    from edge.spool import Spool

PAGE = 4096  # bytes
EVENTS = 40  # of each epoch
DROPPED = 3  # of the first one
FOLDER = Path(tempfile.mkdtemp(prefix="spool-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
FILE, LOG = FOLDER / "spool.db", FOLDER / "spool.db-wal"


def frames(epoch: int, seq: int) -> tuple[bytes, ...]:
    """Of an event that no other event's bytes can pass for."""
    return (b"header %d of %d" % (seq, epoch), bytes((7 * seq + epoch + i * i) % 256 for i in range(400)))


def written() -> tuple[list[int], list[tuple[bytes, bytes]]]:
    """The epochs, and file and log: once as a kill leaves them, and once all in the file."""
    epochs: list[int] = []
    files = []
    with Journal(FILE) as journal:
        for _ in range(2):
            journal.begin()
            epochs.append(journal.epoch)
            for seq in range(EVENTS):
                journal.append(frames(journal.epoch, seq), queued=seq)
        journal.drop("spool full", count=DROPPED)
        files.append((FILE.read_bytes(), LOG.read_bytes()))
    files.append((FILE.read_bytes(), b""))
    return epochs, files


EPOCHS, FILES = written()


def damaged(content: bytes, choices: Choices) -> bytes:
    """Some places of it changed."""
    data = bytearray(content)
    for _ in range(1 + choices.below(4)):
        if not data:
            break
        at = int.from_bytes(choices.take(3), "big") % len(data)
        page = at // PAGE * PAGE
        match choices.below(8):
            case 0:
                del data[at:]
            case 1:
                data[page : page + PAGE] = bytes(len(data[page : page + PAGE]))
            case 2:
                other = choices.below(1 + len(data) // PAGE) * PAGE
                data[page : page + PAGE] = data[other : other + PAGE]
            case 3:
                data[at] ^= 1 << choices.below(8)
            case 4:
                data[at % 100] = choices.below(256)  # SQLite's header
            case 5:
                data[page + choices.below(64) : page + 64] = choices.take(8)
            case _:
                new = choices.take(1 + choices.below(16))
                data[at : at + len(new)] = new
    return bytes(data)


def target(data: bytes) -> None:
    choices = Choices(data)
    way = choices.below(64)  # a few take longer than others, and stand for fewer numbers
    file, log = choices.pick(FILES)
    if log and choices.below(2):
        log = damaged(log, choices)
    else:
        file = damaged(file, choices)
    for path in FOLDER.iterdir():
        path.unlink()
    FILE.write_bytes(file)
    if log:
        LOG.write_bytes(log)
    if way > 40:
        with suppress(ConfigError), Spool(SpoolConfig(path=FILE, fsync="never")) as spool:
            deliver(spool)
        return
    with suppress(ConfigError, DiskRefusedError, DamagedError), Journal(FILE) as journal:
        read(journal)
        write(journal)
    if way == 0:
        for record in readable(FILE):
            gone = Gone(first=record.first, last=record.last, reason=record.reason or "")
            check(record.epoch, gone if record.body is None else Data(record.last, frames_of(record.body)))


def read(journal: Journal) -> None:
    journal.waiting(), journal.size(), journal.newest
    while (stream := journal.head()) is not None:
        assert stream.epoch in EPOCHS
        assert 0 <= stream.first < stream.end
        at = stream.first
        while at < stream.end and (entries := journal.read(stream.epoch, at, 7, 3000)):
            for entry in entries:
                check(stream.epoch, entry)
                assert first_of(entry) == at, "a hole"
                at = last_of(entry) + 1
        journal.forget(stream.epoch, stream.end)


def deliver(spool: Spool) -> None:
    """As a link does, until nothing is left: the box works, whatever became of its file."""
    made: dict[int, Event] = {}  # by epoch

    def build(stamp: Stamp) -> Event:
        header = Header(
            device="box", epoch=stamp.epoch, seq=stamp.seq, camera="door", frame=0, captured_at=0.0, frame_size=(8, 6),
            bundle="b", bank="c", embedding_dim=4, people=(), notices=stamp.notices,
        )  # fmt: skip
        made[stamp.epoch] = Event(header, np.zeros((0, 4), np.float16), ())
        return made[stamp.epoch]

    spool.append(build)
    while (stream := spool.stream()).first < stream.end:
        at = stream.first
        for entry in spool.read(stream.epoch, at, 7, 3000):
            assert first_of(entry) == at, "a hole"
            at = last_of(entry) + 1
            if stream.epoch in made:
                assert entry == Data(0, tuple(encode(made[stream.epoch])))
            else:
                check(stream.epoch, entry)
        spool.forget(stream.epoch, at)
        assert spool.stream() != stream, "no progress"
    assert spool.waiting() == 0


def write(journal: Journal) -> None:
    journal.begin()
    journal.append([b"new"], queued=1.0)
    assert journal.read(journal.epoch, 0, 9, 9000) == [Data(0, (b"new",))]
    journal.drop("too old", older_than=30.0)
    journal.waiting(), journal.size(), journal.newest


def first_of(entry: Data | Gone) -> int:
    return entry.seq if isinstance(entry, Data) else entry.first


def check(epoch: int, entry: Data | Gone) -> None:
    if epoch in EPOCHS:
        assert last_of(entry) < EVENTS
        if isinstance(entry, Data):
            assert entry.frames == frames(epoch, entry.seq), "not what was written"
        elif entry.reason == "spool full":
            assert (entry.last, epoch) == (DROPPED - 1, EPOCHS[0]), "a gap that was none"
        else:
            assert entry.reason in ("too old", "damaged on disk"), "a reason that nobody gave"
    else:
        assert entry == Data(0, (b"new",))


def seeds() -> list[bytes]:
    where = [bytes((0, high, 128)) for high in range(0, 255, 60)]
    return [
        bytes((way, which, log, 0)) + at + bytes((kind, 5, 9, 77))
        for way in (1, 41)
        for which, log in ((0, 0), (0, 1), (1, 0))
        for kind in range(8)
        for at in where
    ]


if __name__ == "__main__":
    fuzz(target, seeds())
