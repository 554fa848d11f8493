"""`python -m tests.bench.nats`: what one collector puts into JetStream a second, and what an event takes there."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nats
import numpy as np
import psutil
import zmq
from rich.console import Console
from rich.table import Table

from collector.messages import STREAM
from collector.nats import NatsSink
from collector.sinks import Item, Kept
from edge import protocol
from edge.events import Answer, Choice, Event, Header, Person, encode
from edge.protocol import Ack, Hello, Welcome
from export.prompts import read_prompts
from tests.fakes import unit_rows
from tests.nats_server import NatsServer, executable

BATCH, BATCHES = 256, 60  # events per `add`, and how often
FLEETS = ((1, 6), (20, 6), (200, 6), (1000, 6), (200, 1))  # boxes before one collector, people in each of their events
SECONDS = 5.0  # that each is measured
PEOPLE, CATEGORIES, TOP, DIM = 6, 13, 3, 512
ROOT = Path(__file__).parents[2]
console = Console(width=110)


def main() -> None:
    program = executable()
    if isinstance(program, str):
        console.print(f"JetStream: skipped, {program}")
        return
    with tempfile.TemporaryDirectory() as folder, NatsServer(Path(folder), program=program) as server:
        conditions(program)
        with NatsSink(server.url) as sink:
            rates(sink)
        messages, size = asyncio.run(held(server.url))
        console.print(f"  in the stream {size / messages:,.0f} bytes an event, of which {messages:,} are there")
        bridge(server)


def conditions(program: Path) -> None:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"[bold]JetStream[/] {version}, its file storage in {tempfile.gettempdir()}")
    console.print(f"  {os.cpu_count()} cores, load {load}, Python {platform.python_version()}, server on this machine")
    size = sum(map(len, encode(event())))
    console.print(f"  {PEOPLE} people x {CATEGORIES} answers x top {TOP}, d = {DIM}, no crops: {size:,} bytes")


def rates(sink: NatsSink) -> None:
    """Each is one number per `add`: what it took to have its events acknowledged."""
    one = event()
    frames = tuple(encode(one))
    table = Table("events per add", "", "events/s: median", "5 %", "95 %", "MB/s", "ms per add")
    for count, times in ((BATCH, BATCHES), (1, 400)):
        for kept in (Kept.NEW, Kept.DUPLICATE):
            taken = []
            for start in range(0, count * times, count):
                batch = [Item("box-0001", count, seq, seq, one, frames) for seq in range(start, start + count)]
                began = time.perf_counter()
                outcomes = sink.add(batch, time.time())
                taken.append(time.perf_counter() - began)
                assert {outcome.kept for outcome in outcomes} == {kept}
            slow, middle, fast = np.percentile(count / np.array(taken), [5, 50, 95])
            rate = [f"{value:,.0f}" for value in (middle, slow, fast, middle * sum(map(len, frames)) / 1e6)]
            table.add_row(str(count), kept.value, *rate, f"{np.median(taken) * 1000:.2f}")
    console.print(table)


def event(people: int = PEOPLE) -> Event:
    """As large as a real box's: the words of the real prompts."""
    categories = read_prompts(ROOT / "prompts/person.toml").category
    answers = tuple(
        Answer(category=one.name, top=tuple(Choice(option=o.name, probability=0.3333) for o in one.option[:TOP]))
        for one in categories
    )
    assert len(answers) == CATEGORIES
    person = Person(box=(211.0625, 97.4375, 260.1875, 219.625), score=0.8711, answers=answers)
    header = Header(
        device="box-0001", epoch=2**61, seq=1_000_000, camera="front door", frame=1_000_000, captured_at=1700000000.123,
        frame_size=(1920, 1080), bundle="0" * 64, bank="1" * 64, embedding_dim=DIM, people=(person,) * people,
    )  # fmt: skip
    return Event(header, unit_rows(people, DIM).astype(np.float16), (None,) * people)


async def held(url: str) -> tuple[int, int]:
    """Messages in the stream, and bytes as it counts them."""
    client = await nats.connect(url)
    state = (await client.jetstream().stream_info(STREAM)).state
    await client.close()
    return state.messages, state.bytes


def bridge(server: NatsServer) -> None:
    """A whole collector as its own process, from boxes that send as fast as their windows let them."""
    table = Table("boxes", "people", "events/s", "MB/s", "CPU, ms per event", "window", "peak memory, MB")
    for boxes, people in FLEETS:
        words = [sys.executable, "-c", "from collector.cli import main; main()", "run", "--bind", "tcp://127.0.0.1:*"]
        process = subprocess.Popen([*words, "--sink", server.url], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "the collector ended"
        address = first.split()[2].rstrip(",")
        with zmq.Context() as context:
            senders = [Box(context, address, f"box-{boxes}-{people}-{number:04}", people) for number in range(boxes)]
            rate, cpu = delivered(senders, psutil.Process(process.pid))
            row = (f"{rate:,.0f}", f"{rate * senders[0].size / 1e6:.1f}", f"{1000 * cpu:.2f}")
            table.add_row(str(boxes), str(people), *row, str(senders[0].window), str(high_water(process.pid) // 1024))
            for sender in senders:
                sender.socket.close(0)
        process.kill()
        process.communicate()
    console.print(table)


class Box:
    """Sends one event under number after number."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str, people: int) -> None:
        one = event(people)
        header, self._vectors = encode(Event(one.header.model_copy(update={"device": name}), one.embeddings, one.crops))
        self._header = header.replace(b'"seq":1000000', b'"seq":%d')
        self.size = len(header) + len(self._vectors)
        self.sent = self.kept = self.window = 0
        self.socket = context.socket(zmq.DEALER)
        self.socket.sndhwm = 0
        self.socket.connect(address)
        self.socket.send_multipart(protocol.encode(Hello(device=name, epoch=one.header.epoch, first=0, end=0)))

    def say(self) -> None:
        """As much as there is room for."""
        while self.sent < self.kept + self.window:
            header = self._header % self.sent
            self.socket.send_multipart([b"DATA", self.sent.to_bytes(8, "big"), header, self._vectors], copy=False)
            self.sent += 1

    def hear(self) -> None:
        """What the collector says."""
        said = protocol.from_collector(self.socket.recv_multipart())
        assert isinstance(said, Welcome | Ack), said
        self.kept = said.next
        self.window = min(said.window.events, max(said.window.bytes // self.size, 1))


def delivered(senders: Sequence[Box], collector: psutil.Process) -> tuple[float, float]:
    """Events acknowledged per second once every box is in, and what each costs the collector, s of CPU."""
    poller, by_socket = zmq.Poller(), {sender.socket: sender for sender in senders}
    for sender in senders:
        sender.hear()
        poller.register(sender.socket, zmq.POLLIN)
    cpu, end = sum(collector.cpu_times()[:2]), time.perf_counter() + SECONDS
    for sender in senders:
        sender.say()
    while time.perf_counter() < end:
        for socket, _ in poller.poll(100):
            by_socket[socket].hear()
            by_socket[socket].say()
    kept = sum(sender.kept for sender in senders)
    return kept / SECONDS, (sum(collector.cpu_times()[:2]) - cpu) / kept


def high_water(pid: int) -> int:
    """The most memory that a process has had resident, kB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
