"""Events leave over a real socket; a full queue drops at once and counts; the end waits no longer than it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge.config import PublishConfig
from edge.errors import ConfigError
from edge.events import Event, Header, Stamp, decode
from edge.push import Pusher
from tests.conftest import Deadline
from tests.fakes import sha256


def event(stamp: Stamp) -> Event:
    """Of an empty street."""
    header = Header(
        device="box", epoch=stamp.epoch, seq=stamp.seq, camera="door", frame=stamp.seq, captured_at=0.5,
        frame_size=(8, 6), bundle=sha256(b"bundle"), bank=sha256(b"bank"), embedding_dim=4, people=(),
        notices=stamp.notices,
    )  # fmt: skip
    return Event(header, np.zeros((0, 4), np.float16), ())


@pytest.fixture
def collector() -> Iterator[zmq.Socket[bytes]]:
    """A PULL socket that gives up after 5 s, and is not bound yet."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger = 0
        socket.rcvtimeo = 5000
        yield socket


def received(collector: zmq.Socket[bytes], count: int) -> list[int]:
    """The numbers of the next events."""
    return [decode(collector.recv_multipart()).header.seq for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_collector_receives_every_event_in_order(
    count: int, collector: zmq.Socket[bytes], deadline: Deadline
) -> None:
    port = collector.bind_to_random_port("tcp://127.0.0.1")
    with deadline("publishing", 20), Pusher(PublishConfig(address=f"tcp://127.0.0.1:{port}")) as pusher:
        for _ in range(count):
            pusher.send(event)
        assert received(collector, count) == list(range(count))
        assert (pusher.queued, pusher.dropped) == (count, 0)


def test_an_ipv6_address_is_reached(collector: zmq.Socket[bytes], deadline: Deadline) -> None:
    collector.ipv6 = True
    try:
        port = collector.bind_to_random_port("tcp://[::1]")
    except zmq.ZMQError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with deadline("publishing", 20), Pusher(PublishConfig(address=f"tcp://[::1]:{port}")) as pusher:
        pusher.send(event)
        assert received(collector, 1) == [0]


@pytest.mark.parametrize("queue", [1, 7])
def test_with_no_collector_the_queue_fills_and_the_rest_is_dropped_at_once(
    queue: int, tmp_path: Path, deadline: Deadline, caplog: pytest.LogCaptureFixture
) -> None:
    config = PublishConfig(address=f"ipc://{tmp_path}/c", queue=queue, linger_ms=0)
    with deadline("sending to nobody", 10), Pusher(config) as pusher:
        for _ in range(queue):
            pusher.send(event)
        assert (pusher.queued, pusher.dropped) == (queue, 0)
        for _ in range(100):
            pusher.send(event)
        assert (pusher.queued, pusher.dropped) == (queue, 100)
    assert [record.message.partition(": ")[2][:17] for record in caplog.records] == ["the queue is full"], "said once"


def test_what_was_queued_arrives_when_the_collector_comes_and_what_was_dropped_does_not(
    tmp_path: Path, collector: zmq.Socket[bytes], deadline: Deadline
) -> None:
    config = PublishConfig(address=f"ipc://{tmp_path}/c", queue=3)
    with deadline("catching up", 20), Pusher(config) as pusher:
        for _ in range(5):
            pusher.send(event)
        collector.bind(config.address)
        assert received(collector, 3) == [0, 1, 2]
        last = 4
        while pusher.queued < 4:  # ZeroMQ learns a moment later that there is room again
            last += 1
            pusher.send(event)
        assert received(collector, 1) == [last], "those before were dropped"
        assert pusher.dropped == last - 3


def test_a_notice_leaves_with_the_next_event_that_is_queued(
    tmp_path: Path, collector: zmq.Socket[bytes], deadline: Deadline
) -> None:
    config = PublishConfig(address=f"ipc://{tmp_path}/c", queue=1)
    with deadline("saying", 20), Pusher(config) as pusher:
        for i in range(25):
            pusher.say(f"{i} " + "x" * 600)
        pusher.send(event)
        pusher.say("hot")
        pusher.send(event)  # the queue is full
        assert pusher.dropped == 1
        collector.bind(config.address)
        told = decode(collector.recv_multipart()).header.notices
        assert [int(one.split()[0]) for one in told] == list(range(5, 25)), "the newest twenty"
        assert {len(one) for one in told} == {500}
        while pusher.queued < 2:  # ZeroMQ learns a moment later that there is room again
            pusher.send(event)
        assert decode(collector.recv_multipart()).header.notices == ("hot",), "what was dropped said it to nobody"
        queued = pusher.queued
        while pusher.queued == queued:
            pusher.send(event)
        assert decode(collector.recv_multipart()).header.notices == (), "once"


def test_the_end_of_the_run_waits_for_the_queue_to_empty(
    tmp_path: Path, collector: zmq.Socket[bytes], deadline: Deadline
) -> None:
    config = PublishConfig(address=f"ipc://{tmp_path}/c", linger_ms=10_000)
    with deadline("the last events", 20):
        with Pusher(config) as pusher:
            for _ in range(5):
                pusher.send(event)
            collector.bind(config.address)
        assert received(collector, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("linger", [0, 300])
def test_but_not_longer_than_it_says(
    linger: int, tmp_path: Path, deadline: Deadline, caplog: pytest.LogCaptureFixture
) -> None:
    with deadline("closing", 10):
        pusher = Pusher(PublishConfig(address=f"ipc://{tmp_path}/c", linger_ms=linger))
        pusher.send(event)
        start = time.monotonic()
        pusher.close()
        waited = time.monotonic() - start
    assert waited >= 0.9 * linger / 1000
    assert waited < linger / 1000 + 3
    assert ("the rest is lost" in caplog.text) == bool(linger), "with 0 the owner chose not to wait"


def test_closing_twice_is_no_mistake(tmp_path: Path) -> None:
    with Pusher(PublishConfig(address=f"ipc://{tmp_path}/c")) as pusher:
        pusher.close()


@pytest.mark.parametrize("address", ["tcp://two words:1", "ipc://" + "x" * 300, "ipc://\0", "tcp://collector"])
def test_an_address_that_zeromq_cannot_use_names_the_key(address: str, deadline: Deadline) -> None:
    """Whatever the configuration lets pass; it may be stricter than ZeroMQ."""
    config = PublishConfig().model_copy(update={"address": address})
    with deadline("refusing", 10), pytest.raises(ConfigError, match=r"publish\.address: ") as caught:
        Pusher(config)
    assert len(str(caught.value).splitlines()) == 1
