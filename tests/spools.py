"""Spools under test: events that tell what they are, everything that comes out, and the files as a kill leaves them."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge.config import SpoolConfig
from edge.events import Event, Header, Stamp
from edge.link import last_of
from edge.protocol import Data, Gone
from edge.spool import Spool


def event(mark: int, stamp: Stamp, size: int = 0, captured_at: float = 1.7e9) -> Event:
    """The event `mark`. size: bytes of something that cannot be made smaller."""
    noise = np.random.default_rng(mark).bytes(size).hex() if size else ""
    header = Header(
        device="box",
        epoch=stamp.epoch,
        seq=stamp.seq,
        camera="door",
        frame=mark,
        captured_at=captured_at,
        frame_size=(64, 48),
        bundle=noise,
        bank="c" * 64,
        embedding_dim=4,
        people=(),
        notices=stamp.notices,
    )
    return Event(header, np.zeros((0, 4), np.float16), ())


def opened(path: Path, **config: object) -> Spool:
    return Spool(SpoolConfig.model_validate({"path": path, **config}))


def append(spool: Spool, mark: int, size: int = 0) -> Stamp:
    """Returns the stamp that the event was kept with."""
    stamps: list[Stamp] = []

    def build(stamp: Stamp) -> Event:
        stamps.append(stamp)
        return event(mark, stamp, size)

    spool.append(build)
    return stamps[-1]


Numbers = dict[tuple[int, int], "int | str"]  # (epoch, number) -> the mark of its event, or why it is gone


def drain(spool: Spool, events: int = 7, size: int = 1 << 16) -> Numbers:
    """Everything that is waiting, read and forgotten as the link does it."""
    out: Numbers = {}
    while spool.waiting():
        stream = spool.stream()
        at = stream.first
        while at < stream.end and (entries := spool.read(stream.epoch, at, events, size)):
            for entry in entries:
                assert (entry.seq if isinstance(entry, Data) else entry.first) == at, "a hole, or not in order"
                for number in range(at, last_of(entry) + 1):
                    assert (stream.epoch, number) not in out, "twice"
                    out[stream.epoch, number] = mark_of(stream.epoch, entry)
                at = last_of(entry) + 1
            spool.forget(stream.epoch, at)
    return out


def mark_of(epoch: int, entry: Data | Gone) -> int | str:
    if isinstance(entry, Gone):
        return entry.reason
    header = json.loads(entry.frames[0])
    assert (header["epoch"], header["seq"]) == (epoch, entry.seq), "another event's number"
    return int(header["frame"])


def quick_folder() -> Path:
    """A new one, in memory where the system has that, so that a hundred spools need no second of a real disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="spool-", dir=memory if memory.is_dir() else None))


def as_killed(path: Path, to: Path) -> Path:
    """A copy of the files as they are while somebody writes to them."""
    to.parent.mkdir(parents=True, exist_ok=True)
    for form in ("", "-wal"):
        if Path(f"{path}{form}").exists():
            shutil.copy(f"{path}{form}", f"{to}{form}")
    return to


def until(what: str, true: Callable[[], bool], seconds: float = 20.0, otherwise: Callable[[], object] = str) -> None:
    """Wait for the thread behind. otherwise: what to say when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"no {what} within {seconds} s: {otherwise()}"
        time.sleep(0.01)
