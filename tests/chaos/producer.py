"""A box without cameras: the real spool and publisher, fed with events that can be made again from their number k."""

from __future__ import annotations

import argparse
import logging
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import zmq

from edge.config import PublishConfig, SpoolConfig
from edge.events import Answer, Choice, Event, Header, Person, Stamp
from edge.keys import publish_keys, secure_client
from edge.publish import Publisher
from edge.spool import Spool

DEVICE = "box-1"
DIM = 64  # d of the embeddings, as the mini models have it
PEOPLE = 8  # at most
CATEGORIES = {"sleeve length": ("long", "short", "none"), "carries": ("nothing", "a bag", "a suitcase", "a child")}
CROPPED = 0.1  # of the people
CROP_BYTES = (200, 40_000)
POLL = 0.02  # s
END = "end"


def event_of(k: int, stamp: Stamp) -> Event:
    """The k-th event, the same each time it is made; only its number and its notices are the stamp's."""
    chance = random.Random(k)
    people: list[Person] = []
    crops: list[bytes | None] = []
    for _ in range(chance.randint(0, PEOPLE)):
        cropped = chance.random() < CROPPED
        answers = tuple(
            Answer(category=name, top=(Choice(option=chance.choice(options), probability=chance.random()),))
            for name, options in CATEGORIES.items()
        )
        box = (chance.uniform(0, 300), chance.uniform(0, 300), chance.uniform(300, 768), chance.uniform(300, 576))
        people.append(Person(box=box, score=chance.random(), answers=answers, crop=cropped))
        crops.append(b"\xff\xd8" + chance.randbytes(chance.randint(*CROP_BYTES)) if cropped else None)
    header = Header(
        device=DEVICE,
        epoch=stamp.epoch,
        seq=stamp.seq,
        camera=chance.choice(("door", "yard")),
        frame=k,
        captured_at=1.7e9 + k / 8,
        frame_size=(768, 576),
        bundle="b" * 64,
        bank="c" * 64,
        embedding_dim=DIM,
        people=tuple(people),
        skipped=chance.randint(0, 3),
        notices=stamp.notices,
    )
    rows = np.frombuffer(chance.randbytes(DIM * len(people)), np.uint8).reshape(-1, DIM) + np.float32(1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)  # (n, d)
    return Event(header, rows.astype(np.float16), tuple(crops))


class Record:
    """What was begun and what was done: "begin k" before an event is appended, "done k epoch seq" after it.

    Each line is one write of its own, so that a kill loses none. `next`: the first k not begun yet.
    """

    def __init__(self, path: Path) -> None:
        self.next = max((k for k, _ in read_record(path)), default=-1) + 1
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def append(self, k: int, send: Callable[[Callable[[Stamp], Event]], None]) -> None:
        """Make event k, have it sent, and write both down."""
        stamps: list[Stamp] = []

        def build(stamp: Stamp) -> Event:
            stamps.append(stamp)  # asked again, it is the last that counts
            return event_of(k, stamp)

        os.write(self._file, b"begin %d\n" % k)
        send(build)
        os.write(self._file, b"done %d %d %d\n" % (k, stamps[-1].epoch, stamps[-1].seq))
        self.next = k + 1


def read_record(path: Path) -> Iterator[tuple[int, tuple[int, int] | None]]:
    """Every line: k, and (epoch, seq) where it says "done"."""
    for line in path.read_text().splitlines() if path.exists() else ():
        match line.split():
            case ["begin", k]:
                yield int(k), None
            case ["done", k, epoch, seq]:
                yield int(k), (int(epoch), int(seq))
            case _:
                raise ValueError(f"{path}: {line!r}")


class Orders:
    """Lines on stdin: "END RATE" asks for every k below END, at RATE a second (0: as fast as it goes).

    "end" says that no more will be asked. over: SIGTERM came, or whoever gave the orders is gone.
    """

    def __init__(self) -> None:
        self.over = False
        self._text = b""
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, at: FrameType | None) -> None:
        self.over = True

    def next(self) -> str | None:
        """The next one, if it comes soon."""
        if b"\n" not in self._text and select.select([0], [], [], POLL)[0]:
            read = os.read(0, 4096)
            self.over = self.over or not read
            self._text += read
        line, newline, rest = self._text.partition(b"\n")
        if not newline:
            return None
        self._text = rest
        return line.decode()


def main() -> None:
    """Exit code 0 when all is delivered, or after SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.producer", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--fsync", required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--collector-key")
    asked = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    config = PublishConfig(address=asked.address, key=asked.key, collector_key=asked.collector_key)
    keys = publish_keys(config)
    orders, record = Orders(), Record(asked.record)
    with (
        Spool(SpoolConfig(path=asked.spool, fsync=asked.fsync)) as spool,
        Publisher(config, DEVICE, spool, partial(_secure, keys=keys) if keys else None) as publisher,
    ):
        last = False
        while not (orders.over or (last and not spool.waiting())):
            order = orders.next()
            if order == END:
                last = True
            elif order:
                end, rate = order.split()
                produce(record, publisher, int(end), float(rate), orders)


def _secure(socket: zmq.Socket[bytes], keys: tuple[object, str]) -> None:
    secure_client(socket, *keys)  # type: ignore[arg-type]


def produce(record: Record, publisher: Publisher, end: int, rate: float, orders: Orders) -> None:
    """Every k from the next one to below `end`."""
    due = time.monotonic()
    while record.next < end and not orders.over:
        record.append(record.next, publisher.send)
        due += 1 / rate if rate else 0.0
        time.sleep(max(due - time.monotonic(), 0.0))


if __name__ == "__main__":
    main()
