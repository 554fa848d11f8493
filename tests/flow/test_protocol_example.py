"""The example collector of the protocol's documentation, as its own process: what it acknowledged it has, once."""

from __future__ import annotations

import ast
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
import zmq

from edge import events, protocol
from edge.config import PublishConfig, SpoolConfig
from edge.protocol import Ack, Data, Denied, FromBox, FromCollector, Gone, Hello, Ping, Pong, Refused, Reset, Welcome
from edge.publish import Publisher
from edge.spool import Spool
from tests.conftest import Deadline

EXAMPLE = Path(__file__).parents[2] / "docs/collector_example.py"
DEADLINE = 30.0  # seconds
ANYWHERE = "tcp://127.0.0.1:*"


def event(epoch: int, seq: int, device: str = "box", people: int = 1) -> Data:
    """A box's message with an event of as many people, each with a crop."""
    person = events.Person(box=(1.5, 2, 30, 40), score=0.5, answers=(), crop=True)
    header = events.Header(
        device=device, epoch=epoch, seq=seq, camera="door", frame=seq, captured_at=4.5, frame_size=(640, 480),
        bundle="b", bank="c", embedding_dim=8, people=(person,) * people,
    )  # fmt: skip
    made = events.Event(header, np.eye(8, dtype=np.float16)[:people], (b"\xff\xd8jpeg",) * people)
    return Data(seq, tuple(events.encode(made)))


class Example:
    """The example as a process, killed at the end of the `with`."""

    def __init__(self, path: Path, address: str = ANYWHERE) -> None:
        self.path, self.killed = path, False
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), address, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Example:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.kill()
        self.address = line.split()[-1]
        return self

    def kill(self) -> str:
        """As by kill -9; what it said on stderr."""
        self.killed = True
        self.process.kill()
        return self.process.communicate(timeout=DEADLINE)[1]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.killed:
            assert self.process.poll() is None, f"it ended by itself: {self.process.communicate()[1]}"
            assert self.kill() == ""

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.path)) as db:
            return db.execute(query).fetchall()


class Box:
    """A box's socket; what it hears comes within the deadline."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvtimeo = self._socket.sndtimeo = int(1000 * DEADLINE)
        self._socket.connect(address)

    def say(self, *messages: FromBox | list[bytes]) -> None:
        for message in messages:
            self._socket.send_multipart(message if isinstance(message, list) else protocol.encode(message))

    def hear(self) -> FromCollector:
        return protocol.from_collector(self._socket.recv_multipart())

    def acknowledged(self, number: int) -> None:
        """Hear Acks, and nothing but Acks, up to the one that covers all numbers below `number`."""
        below = 0
        while below < number:
            ack = self.hear()
            assert isinstance(ack, Ack), ack
            assert ack.next >= below
            below = ack.next
        assert below == number

    def greet(self, epoch: int, first: int, end: int, device: str = "box") -> Welcome:
        self.say(Hello(device=device, epoch=epoch, first=first, end=end))
        welcome = self.hear()
        assert isinstance(welcome, Welcome), welcome
        assert welcome.epoch == epoch
        return welcome

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.sqlite"


@pytest.fixture
def example(path: Path) -> Iterator[Example]:
    with Example(path) as running:
        yield running


@pytest.fixture
def box(example: Example) -> Iterator[Box]:
    with Box(example.address) as talking:
        yield talking


def test_it_needs_zeromq_and_the_standard_library_only() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"zmq"}


def test_events_arrive_once_and_in_order(box: Box, example: Example) -> None:
    welcome = box.greet(7, 0, 0)
    assert welcome.next == 0
    sent = [event(7, seq, people=seq % 3) for seq in range(welcome.window.events)]
    box.say(*sent)
    box.acknowledged(len(sent))
    box.say(*sent[-20:])  # as after a lost acknowledgement
    assert box.hear() == Ack(epoch=7, next=len(sent), window=welcome.window)
    rows = example.rows("SELECT device, epoch, seq, header, rest FROM events ORDER BY rowid")
    assert [row[:3] for row in rows] == [("box", 7, seq) for seq in range(len(sent))]
    assert [[header, *unpacked(rest)] for *_, header, rest in rows] == [list(data.frames) for data in sent]
    assert example.rows("SELECT * FROM gone UNION SELECT * FROM refused") == []


def unpacked(rest: object) -> list[bytes]:
    assert isinstance(rest, bytes)
    frames = []
    while rest:
        (size,) = struct.unpack_from(">I", rest)
        frames.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    return frames


def test_after_a_kill_it_goes_on_where_its_acknowledgements_ended(path: Path) -> None:
    total = 400
    sent = [event(7, seq) for seq in range(total)]
    held = 0  # what the box would still have in its spool
    for batch in (30, 100, 170, total):
        with Example(path) as example, Box(example.address) as box:
            welcome = box.greet(7, held, total)
            assert welcome.next >= held
            box.say(*sent[welcome.next : batch])
            while held < (batch - 20 if batch < total else total):  # some of it dies with the process
                ack = box.hear()
                assert isinstance(ack, Ack)
                held = ack.next
            example.kill()
    with closing(sqlite3.connect(path)) as db:
        assert [seq for (seq,) in db.execute("SELECT seq FROM events ORDER BY rowid")] == list(range(total))


def test_what_is_gone_is_recorded_with_its_reason(box: Box, example: Example) -> None:
    box.greet(7, 0, 100)
    box.say(event(7, 0), Gone(first=1, last=40, reason="spool full"), event(7, 41))
    box.acknowledged(42)
    box.say(Gone(first=1, last=40, reason="spool full"))  # again: a duplicate
    box.acknowledged(42)
    box.say(Gone(first=30, last=50, reason="too old"))  # partly known
    box.acknowledged(51)
    with Box(example.address) as other:
        assert other.greet(7, 60, 100).next == 60  # and 51..59 were never explained
        other.say(event(7, 60))
        other.acknowledged(61)
    assert example.rows("SELECT device, epoch, first, last, reason FROM gone") == [
        ("box", 7, 1, 40, "spool full"),
        ("box", 7, 42, 50, "too old"),
        ("box", 7, 51, 59, "not kept by the box"),
    ]
    assert example.rows("SELECT seq FROM events") == [(0,), (41,), (60,)]


def test_epochs_and_devices_do_not_mix(box: Box, example: Example) -> None:
    for device, epoch in (("box", 1), ("box", 2**62 + 1), ("häuschen", 1)):
        assert box.greet(epoch, 0, 3, device).next == 0
        box.say(*(event(epoch, seq, device) for seq in range(3)))
        box.acknowledged(3)
    assert box.greet(2**62 + 1, 0, 3).next == 3
    assert example.rows("SELECT device, epoch, count(*) FROM events GROUP BY 1, 2 ORDER BY 1, 2") == [
        ("box", 1, 3),
        ("box", 2**62 + 1, 3),
        ("häuschen", 1, 3),
    ]


@pytest.mark.parametrize(
    "frames",
    [(), (b"no JSON", b""), event(7, 9).frames, event(8, 0).frames, event(7, 0, "other").frames, (b"[" * 10**5, b"")],
    ids=["nothing", "no JSON", "another number", "another epoch", "another device", "deep JSON"],
)
def test_a_poison_is_set_aside_and_acknowledged(frames: tuple[bytes, ...], box: Box, example: Example) -> None:
    box.greet(7, 0, 2)
    box.say(Data(0, frames), event(7, 1))
    refused = box.hear()  # before the acknowledgement that covers it
    assert isinstance(refused, Refused)
    assert (refused.epoch, refused.seq) == (7, 0)
    box.acknowledged(2)
    assert example.rows("SELECT seq FROM events") == [(1,)]
    assert example.rows("SELECT device, epoch, seq, reason FROM refused") == [("box", 7, 0, refused.reason)]


HELLO = protocol.encode(Hello(device="box", epoch=7, first=0, end=9))[1]
NONSENSE: dict[str, list[bytes]] = {
    "nothing": [],
    "empty": [b""],
    "another language": [b"GET / HTTP/1.1\r\n\r\n"],
    "short number": [b"DATA", b"\0" * 7],
    "endless number": [b"DATA", b"\xff" * 8],
    "gap": protocol.encode(event(7, 3)),
    "gone beyond": protocol.encode(Gone(first=3, last=4, reason="x")),
    "gone to the end of numbers": [b"GONE", b'{"first":0,"last":9223372036854775807,"reason":""}'],
    "negative": [b"GONE", b'{"first":-1,"last":4,"reason":""}'],
    "no number": [b"GONE", b'{"first":0,"last":NaN,"reason":""}'],
    "deep JSON": [b"HELLO", b"[" * 10**5],
    "no UTF-8": [b"HELLO", b"\xff\xfe"],
    "no text": [b"HELLO"],
    "no fields": [b"HELLO", b"{}"],
    "huge": [b"HELLO", HELLO.replace(b"7", b"9" * 5000)],
    "half a character": [b"HELLO", HELLO.replace(b"box", b"\\ud800")],
    "a collector's word": [b"WELCOME", b"{}"],
}


@pytest.mark.parametrize("frames", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_answered_by_reset_and_hurts_nobody(frames: list[bytes], box: Box, example: Example) -> None:
    box.greet(7, 0, 9)
    box.say(event(7, 0))
    box.acknowledged(1)
    box.say(frames or [b"", b""])
    assert isinstance(box.hear(), Reset)
    box.say(Ping())
    assert isinstance(box.hear(), Reset)  # until it says who it is
    with Box(example.address) as other:
        assert other.greet(7, 0, 9).next == 1
        other.say(Ping(), event(7, 1))
        assert other.hear() == Pong()
        other.acknowledged(2)
    assert example.rows("SELECT seq FROM events") == [(0,), (1,)]
    assert example.rows("SELECT * FROM gone UNION SELECT * FROM refused") == []


def test_another_protocol_is_denied(box: Box) -> None:
    box.say([b"HELLO", HELLO.replace(b"lookout/1", b"lookout/9")])
    assert isinstance(box.hear(), Denied)


def test_data_before_hello_is_answered_by_reset(box: Box, example: Example) -> None:
    box.say(event(7, 0))
    assert isinstance(box.hear(), Reset)
    assert example.rows("SELECT * FROM events") == []


def test_a_real_box_delivers_to_it_through_kills(tmp_path: Path, path: Path, deadline: Deadline) -> None:
    total = 300
    with zmq.Context() as context, context.socket(zmq.REP) as probe:
        address = f"tcp://127.0.0.1:{probe.bind_to_random_port('tcp://127.0.0.1')}"  # free, once it is closed
    spool_of = SpoolConfig(path=tmp_path / "spool.db")
    named: list[tuple[int, int]] = []

    def build(stamp: events.Stamp) -> events.Event:
        named.append((stamp.epoch, stamp.seq))
        return events.decode(event(stamp.epoch, stamp.seq, people=stamp.seq % 3).frames)

    with deadline("delivering", 2 * DEADLINE):
        with Spool(spool_of) as spool:  # a first run, with nobody to talk to
            for _ in range(50):
                spool.append(build)
        config = PublishConfig(address=address, linger_ms=int(1000 * DEADLINE))
        with Spool(spool_of) as spool, Publisher(config, "box", spool) as publisher:
            for killed_at in (80, 160, 240):
                with Example(path, address) as example:
                    while spool.waiting() > 5 or len(named) < killed_at:
                        if len(named) < killed_at:
                            publisher.send(build)
                        time.sleep(0.001)
                    example.kill()
                publisher.send(build)
            with Example(path, address) as example:
                while len(named) < total:
                    publisher.send(build)
                publisher.close()  # waits until all of it is acknowledged
                assert not spool.waiting()
                stored = example.rows("SELECT epoch, seq FROM events ORDER BY rowid")
                assert example.rows("SELECT * FROM gone UNION SELECT * FROM refused") == []
    assert stored == named
