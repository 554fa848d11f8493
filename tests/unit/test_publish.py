"""Spool and link over a real socket: events arrive, the end waits no longer than it says, nobody there costs none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge.config import PublishConfig, SpoolConfig
from edge.errors import ConfigError
from edge.events import Event, Header, Stamp, decode
from edge.link import Stream
from edge.protocol import (
    MAX_CONTROL,
    Ack,
    Data,
    FromBox,
    FromCollector,
    Hello,
    Ping,
    Reset,
    Welcome,
    Window,
    encode,
    from_box,
)
from edge.publish import Publisher
from edge.spool import Spool
from tests.conftest import Deadline

WINDOW = Window(events=8, bytes=1 << 20)


def event(stamp: Stamp) -> Event:
    """Of an empty street."""
    header = Header(
        device="box", epoch=stamp.epoch, seq=stamp.seq, camera="door", frame=stamp.seq, captured_at=0.5,
        frame_size=(8, 6), bundle="b", bank="c", embedding_dim=4, people=(),
    )  # fmt: skip
    return Event(header, np.zeros((0, 4), np.float16), ())


class Collector:
    """A ROUTER whose every word the test says; it gives up after 20 s."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger, self._socket.rcvtimeo = 0, 20_000
        self._socket.ipv6 = "[" in address
        self._socket.bind(address)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._peer = b""

    def hear(self) -> FromBox:
        """The next message that is no Ping."""
        while True:
            self._peer, *frames = self._socket.recv_multipart()
            if not isinstance(message := from_box(frames), Ping):
                return message

    def say(self, message: FromCollector) -> None:
        self._socket.send_multipart([self._peer, *encode(message)])

    def say_bytes(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._peer, *frames])

    def greet(self, next_: int = 0) -> Hello:
        hello = self.hear()
        assert isinstance(hello, Hello)
        self.say(Welcome(epoch=hello.epoch, next=max(next_, hello.first), window=WINDOW))
        return hello

    def take(self, hello: Hello, count: int) -> list[int]:
        """The numbers of the next events, each acknowledged."""
        numbers = []
        for _ in range(count):
            message = self.hear()
            assert isinstance(message, Data)
            numbers.append(decode(message.frames).header.seq)
            self.say(Ack(epoch=hello.epoch, next=numbers[-1] + 1, window=WINDOW))
        return numbers

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(SpoolConfig(path=tmp_path / "spool.db")) as opened:
        yield opened


@pytest.mark.parametrize("count", [0, 1, 50])
def test_events_arrive_in_order_and_leave_the_spool(
    count: int, collector: Collector, spool: Spool, deadline: Deadline
) -> None:
    config = PublishConfig(address=collector.address, linger_ms=20_000)
    with deadline("publishing", 20), Publisher(config, "box", spool) as publisher:
        for _ in range(count):
            publisher.send(event)
        hello = collector.greet()
        assert hello.device == "box"
        assert collector.take(hello, count) == list(range(count))
    assert (publisher.delivery.delivered, spool.waiting()) == (count, 0)
    assert publisher.summary() == [f"{count} events delivered, 0 wait in the spool for the next run"]


def test_an_ipv6_address_is_reached(spool: Spool, deadline: Deadline) -> None:
    try:
        collector = Collector("tcp://[::1]:*")
    except zmq.ZMQError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with deadline("publishing", 20), Publisher(PublishConfig(address=collector.address), "box", spool) as publisher:
        publisher.send(event)
        assert collector.take(collector.greet(), 1) == [0]
    collector.close()


@pytest.mark.parametrize("linger", [0, 300])
def test_the_end_waits_no_longer_than_it_says_and_what_is_left_stays(
    linger: int, spool: Spool, tmp_path: Path, deadline: Deadline
) -> None:
    config = PublishConfig(address=f"ipc://{tmp_path}/nobody", linger_ms=linger)
    with deadline("giving up", 20), Publisher(config, "box", spool) as publisher:
        publisher.send(event)
        start = time.monotonic()
        publisher.close()
        assert time.monotonic() - start >= linger / 1000
    assert spool.waiting() == 1
    assert publisher.summary()[0] == "0 events delivered, 1 wait in the spool for the next run"
    assert linger == 0 or publisher.summary()[1].startswith("0 connections to the collector, and ")


def test_a_collector_that_comes_late_goes_away_and_returns_gets_all_of_it(
    spool: Spool, tmp_path: Path, deadline: Deadline
) -> None:
    address = f"ipc://{tmp_path}/collector"
    with deadline("all of it", 60), Publisher(PublishConfig(address=address, linger_ms=20_000), "box", spool) as box:
        for _ in range(10):
            box.send(event)
        first = Collector(address)
        assert first.take(first.greet(), 4) == [0, 1, 2, 3]
        first.close()
        box.send(event)
        second = Collector(address)
        assert second.take(second.greet(next_=4), 7) == list(range(4, 11))
    second.close()  # not before the box has heard its last word: without that it would wait for all of its linger
    assert spool.waiting() == 0


def test_it_begins_again_when_it_is_asked_to(collector: Collector, spool: Spool, deadline: Deadline) -> None:
    with deadline("beginning again", 30), Publisher(PublishConfig(address=collector.address), "box", spool) as box:
        box.send(event)
        collector.greet()
        assert isinstance(collector.hear(), Data)
        collector.say(Reset(reason="lost the thread"))
        assert collector.take(collector.greet(), 1) == [0]


def test_an_answer_that_never_ends_costs_the_connection_and_no_memory(
    collector: Collector, spool: Spool, deadline: Deadline
) -> None:
    with deadline("hanging up", 30), Publisher(PublishConfig(address=collector.address), "box", spool) as box:
        box.send(event)
        collector.greet()
        assert isinstance(collector.hear(), Data)
        collector.say_bytes(b"ACK", bytes(MAX_CONTROL + 1))
        assert collector.take(collector.greet(), 1) == [0]
    assert box.delivery.failures == 1


def send_for_ever(publisher: Publisher) -> None:
    while True:
        publisher.send(event)


class Broken(Spool):
    """A spool with a fault of ours in it."""

    def stream(self) -> Stream:
        raise RuntimeError("a fault")


def test_a_fault_of_the_sending_thread_is_not_kept_quiet(
    tmp_path: Path, collector: Collector, deadline: Deadline
) -> None:
    config = PublishConfig(address=collector.address, linger_ms=0)
    with (
        deadline("the fault", 20),
        Broken(SpoolConfig(path=tmp_path / "broken.db")) as spool,
        Publisher(config, "box", spool) as publisher,
        pytest.raises(RuntimeError, match="a fault"),
    ):
        send_for_ever(publisher)


@pytest.mark.parametrize("address", ["tcp://two words:1", "ipc://" + "x" * 300, "ipc://\0", "tcp://collector"])
def test_an_address_that_zeromq_cannot_use_names_the_key(address: str, spool: Spool, deadline: Deadline) -> None:
    """Whatever the configuration lets pass; it may be stricter than ZeroMQ."""
    config = PublishConfig().model_copy(update={"address": address})
    with deadline("refusing", 10), pytest.raises(ConfigError, match=r"publish\.address: ") as caught:
        Publisher(config, "box", spool)
    assert len(str(caught.value).splitlines()) == 1
