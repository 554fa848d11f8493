"""`python -m tests.bench.delivery`: what the way from a box's spool to a store takes, with its conditions.

Real files, real sockets, the collector a process of its own. `--day 432000` fills the spool with 24 hours at 5 events
a second and drains it while new ones come; it takes half an hour and some gigabytes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event as Flag
from threading import Thread

import numpy as np
import psutil
import zmq
from rich.console import Console
from rich.table import Table

from collector.keyring import allow, new_keyring
from edge import protocol
from edge.config import Fsync, PublishConfig, SpoolConfig
from edge.events import Answer, Choice, Event, Header, Person, Stamp, encode
from edge.keys import new_key, read_key, secure_client
from edge.link import Link
from edge.protocol import Data
from edge.publish import Publisher
from edge.spool import Spool
from tests.fakes import ListSource, unit_rows

PEOPLE, CATEGORIES, TOP = 6, 13, 3
RATE, DAY = 5, 24 * 3600  # events a second, and the seconds they are kept
SEVERAL = 200  # different events, so that what deflates well does not do so because it is always the same
console = Console(width=110)


class Street:
    """Events like a box's, several hundred different ones in turn. dim: of the embeddings."""

    def __init__(self, dim: int) -> None:
        chance = np.random.default_rng(dim)
        self._people = [tuple(_person(chance) for _ in range(PEOPLE)) for _ in range(SEVERAL)]
        self._vectors = [unit_rows(PEOPLE, dim, seed).astype(np.float16) for seed in range(SEVERAL)]
        self._dim = dim

    def __call__(self, stamp: Stamp) -> Event:
        header = Header(
            device="bench", epoch=stamp.epoch, seq=stamp.seq, camera="entrance", frame=stamp.seq,
            captured_at=time.time(), frame_size=(768, 576), bundle="b" * 64, bank="c" * 64, embedding_dim=self._dim,
            people=self._people[stamp.seq % SEVERAL], notices=stamp.notices,
        )  # fmt: skip
        return Event(header, self._vectors[stamp.seq % SEVERAL], (None,) * PEOPLE)


def _person(chance: np.random.Generator) -> Person:
    def answer(category: int) -> Answer:
        shares = np.sort(chance.dirichlet(np.ones(TOP + 1))[:TOP])[::-1]
        names = chance.permutation(11)[:TOP]
        top = tuple(
            Choice(option=f"option {n} of {category}", probability=round(float(p), 4))
            for n, p in zip(names, shares, strict=True)
        )
        return Answer(category=f"category number {category}", top=top)

    x1, y1, x2, y2 = (round(float(edge), 1) for edge in chance.uniform(0, 700, 4))
    answers = tuple(answer(category) for category in range(CATEGORIES))
    return Person(box=(x1, y1, x2, y2), score=round(float(chance.uniform(0.5, 1)), 4), answers=answers)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--day", type=int, metavar="EVENTS", help=f"also spool so many ({RATE * DAY} are a day) and drain"
    )
    chosen = options.parse_args()
    conditions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        appends(folder)
        one_box(folder)
        for count in (1, 200):
            boxes(folder, count)
        if chosen.day:
            day(folder, chosen.day)


def conditions() -> None:
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"[bold]delivery[/] {os.cpu_count()} cores, load {load}, Python {platform.python_version()}")
    for dim in (128, 512):
        size = sum(map(len, encode(Street(dim)(Stamp(2**61, 0)))))
        console.print(f"  {PEOPLE} people x {CATEGORIES} answers x top {TOP}, d = {dim}: {size:,} bytes an event")


def appends(folder: Path) -> None:
    table = Table("fsync", "appends/s", "p50 ms", "p99 ms", "max ms", "bytes of disk", title="spool, d = 512")
    street = Street(512)
    policies: tuple[Fsync, ...] = ("event", "interval", "never")
    for policy in policies:
        with Spool(SpoolConfig(path=folder / f"{policy}.db", fsync=policy)) as spool:
            taken = []
            for _ in range(3000):
                start = time.perf_counter()
                spool.append(street)
                taken.append(time.perf_counter() - start)
            size = spool.health.size / len(taken)
        middle, high, most = (1000 * float(np.quantile(taken, q)) for q in (0.5, 0.99, 1))
        table.add_row(
            policy, f"{1 / np.mean(taken):,.0f}", f"{middle:.2f}", f"{high:.2f}", f"{most:.1f}", f"{size:,.0f}"
        )
    console.print(table)


@contextmanager
def collecting(store: Path, *more: object) -> Iterator[tuple[psutil.Process, str]]:
    """A real collector, and its address."""
    words = ["run", "--bind", "tcp://127.0.0.1:*", "--store", store, *more]
    command = [sys.executable, "-c", "from collector.cli import main; main()", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"tcp://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, "the collector did not start"
        drain = Thread(target=process.stdout.read, daemon=True)
        drain.start()
        try:
            yield psutil.Process(process.pid), found[0]
        finally:
            process.terminate()
            process.wait()
            drain.join()


def one_box(folder: Path, count: int = 5000) -> None:
    """Fill a spool, then drain it; beside it the same bytes through PUSH and PULL, which keep nothing."""
    street = Street(512)
    table = Table("one box", "events/s", "of PUSH/PULL", title=f"{count} events, spool to store, d = 512")
    plain = push_pull([encode(street(Stamp(1, number))) for number in range(SEVERAL)], count)
    keys = folder / "keys"
    public = new_keyring(keys)
    allow(keys, "bench", new_key(folder / "box.key"))
    curve = partial(secure_client, key=read_key(folder / "box.key"), collector_key=public)
    for name, more, secure in (("in the clear", (), None), ("CURVE", ("--keys", keys), curve)):
        path = folder / f"{len(more)}.db"
        with Spool(SpoolConfig(path=folder / f"spool-{len(more)}.db")) as spool:
            for _ in range(count):
                spool.append(street)
            with collecting(path, *more) as (_, address):
                start = time.perf_counter()
                config = PublishConfig(address=address, linger_ms=600_000)
                with Publisher(config, "bench", spool, secure):
                    pass  # closing waits until all is acknowledged
                rate = count / (time.perf_counter() - start)
        table.add_row(name, f"{rate:,.0f}", f"{rate / plain:.1%}")
    table.add_row("PUSH/PULL, nothing kept", f"{plain:,.0f}", "")
    console.print(table)


def push_pull(messages: Sequence[list[bytes]], count: int) -> float:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
        start = time.perf_counter()
        sender = Thread(target=lambda: [push.send_multipart(messages[i % len(messages)]) for i in range(count)])
        sender.start()
        for _ in range(count):
            pull.recv_multipart()
        sender.join()
        return count / (time.perf_counter() - start)


def boxes(folder: Path, count: int, events: int = 6000) -> None:
    """Many boxes in this process, without disks, before one collector with its store."""
    street, each = Street(128), events // count  # as a ListSource has them, in epoch 1
    frames = [tuple(encode(street(Stamp(1, number)))[1:]) for number in range(SEVERAL)]

    def entry(device: str, number: int) -> Data:
        header = street(Stamp(1, number)).header.model_copy(update={"device": device})
        return Data(number, (header.model_dump_json(by_alias=True).encode(), *frames[number % SEVERAL]))

    names = [f"box-{i:03}" for i in range(count)]
    sources = [ListSource([entry(name, number) for number in range(each)]) for name in names]
    with collecting(folder / f"boxes-{count}.db") as (process, address), zmq.Context() as context:
        poller, links, sockets = zmq.Poller(), [], []
        for name, source in zip(names, sources, strict=True):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(address)
            poller.register(socket, zmq.POLLIN)
            link = Link(name, source, time.monotonic())
            link.connected(time.monotonic())
            links.append(link)
            sockets.append(socket)
        start, memory, looked, half = time.perf_counter(), [process.memory_info().rss], 0.0, [0] * count
        while (done := sum(link.delivery.delivered for link in links)) < each * count:
            if done >= each * count // 2 and not any(half):
                half = [link.delivery.delivered for link in links]
            for link, socket in zip(links, sockets, strict=True):
                for message in link.say(time.monotonic()):
                    socket.send_multipart(protocol.encode(message))
            ready = dict(poller.poll(100))
            for link, socket in zip(links, sockets, strict=True):
                if socket in ready:
                    link.heard(socket.recv_multipart(), time.monotonic())
            if time.perf_counter() - looked > 0.2:
                looked = time.perf_counter()
                memory.append(process.memory_info().rss)
        seconds = time.perf_counter() - start
        for socket in sockets:
            socket.close()
    mb = [one / 2**20 for one in memory]
    console.print(
        f"[bold]{count} boxes[/], one collector: {each * count / seconds:,.0f} events/s, d = 128; at half time a box"
        f" had {min(half)} to {max(half)} of {each}; collector's memory {mb[0]:.0f} MB at first, {np.median(mb):.0f} as"
        f" median, {max(mb):.0f} most, {mb[-1]:.0f} at the end"
    )


def day(folder: Path, count: int) -> None:
    """A day without a collector, then one: how long until the box is level with its camera again."""
    street, config = Street(512), SpoolConfig(path=folder / "day.db")
    start = time.perf_counter()
    with Spool(config) as spool:
        for number in range(count):
            spool.append(street)
            if number % 20_000 == 0:
                console.print(f"  {number:,} of {count:,} spooled, {spool.health.size / 2**30:.2f} GiB")
        size, dropped = spool.health.size, spool.health.dropped
    spent = time.perf_counter() - start
    console.print(
        f"[bold]away for {count / RATE / 3600:.1f} h at {RATE}/s[/]: {count:,} events in {spent:.0f} s,"
        f" {size / count:,.0f} bytes each, {size / 2**30:.2f} GiB of {config.max_bytes / 2**30:.0f}; {dropped:,} left"
    )
    opening = time.perf_counter()
    with Spool(config) as spool, collecting(folder / "day-store.db") as (process, address):
        console.print(f"  opened in {1000 * (time.perf_counter() - opening):.0f} ms")
        stop, added = Flag(), [0]
        with Publisher(PublishConfig(address=address, linger_ms=0), "bench", spool) as publisher:

            def produce() -> None:
                while not stop.wait(1 / RATE):
                    publisher.send(street)
                    added[0] += 1

            camera = Thread(target=produce)
            camera.start()
            start, memory, own = time.perf_counter(), [], []
            while (left := spool.waiting()) > 2 * RATE:
                memory.append(process.memory_info().rss)
                own.append(psutil.Process().memory_info().rss)
                if len(memory) % 30 == 0:
                    console.print(f"  {left:,} left after {time.perf_counter() - start:.0f} s")
                time.sleep(1)
            seconds = time.perf_counter() - start
            stop.set()
            camera.join()
        rate = publisher.delivery.delivered / seconds
    ends = [f"{np.median(one[: len(one) // 10 + 1]) / 2**20:.0f} to {one[-1] / 2**20:.0f} MB" for one in (own, memory)]
    console.print(
        f"  drained at {rate:,.0f} events/s = {rate / RATE:.0f} times as fast as they came, {added[0]} new ones among"
        f" them; memory of the box {ends[0]}, of the collector {ends[1]}"
    )


if __name__ == "__main__":
    main()
