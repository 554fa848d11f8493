"""`python -m tests.bench.nats`: what one collector puts into JetStream a second, and what an event takes there."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import nats
import numpy as np
from rich.console import Console
from rich.table import Table

from collector.messages import STREAM
from collector.nats import NatsSink
from collector.sinks import Item, Kept
from edge.events import Answer, Choice, Event, Header, Person, encode
from export.prompts import read_prompts
from tests.fakes import unit_rows
from tests.nats_server import NatsServer, executable

BATCH, BATCHES = 256, 60  # events per `add`, and how often
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
        console.print(
            f"in the stream {size / messages:,.0f} bytes an event; peak memory: this process {peak()} MB,"
            f" nats-server {high_water(server.pid) // 1024} MB"
        )


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


def event() -> Event:
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
        frame_size=(1920, 1080), bundle="0" * 64, bank="1" * 64, embedding_dim=DIM, people=(person,) * PEOPLE,
    )  # fmt: skip
    return Event(header, unit_rows(PEOPLE, DIM).astype(np.float16), (None,) * PEOPLE)


async def held(url: str) -> tuple[int, int]:
    """Messages in the stream, and bytes as it counts them."""
    client = await nats.connect(url)
    state = (await client.jetstream().stream_info(STREAM)).state
    await client.close()
    return state.messages, state.bytes


def peak() -> int:
    """MB that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def high_water(pid: int) -> int:
    """The same of another process, kB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
