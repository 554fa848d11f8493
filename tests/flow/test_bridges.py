"""Collectors that stand before a JetStream, as processes: killed with boxes on the line, several for one fleet."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

from edge.events import encode
from edge.failpoints import POINTS
from edge.protocol import Data, Gone
from edge.publish import Sender
from tests.boxes import data, event, person
from tests.conftest import Deadline
from tests.fakes import ListSource
from tests.flow.test_collector import Running, run
from tests.flow.test_jetstream import Stored, of, silent, stored
from tests.nats_server import NatsServer

DEADLINE = 50.0  # s


# one of the points is a store's
COLLECTOR_POINTS = {point for point in POINTS if point.startswith("collector.")} - {"collector.before-commit"}


class Fleet:
    """Boxes, each with the real end of the protocol in a thread of its own; ended at the end of the `with`.

    addresses: of each box, the collectors that it turns to one after the other.
    """

    def __init__(self, events: int, addresses: dict[str, list[str]]) -> None:
        self.sent = {
            name: [event(seq, *[person()] * (seq % 3), device=name, epoch=1) for seq in range(events)]
            for name in addresses
        }
        self.sources = {name: ListSource([*map(data, sent)]) for name, sent in self.sent.items()}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._deliver, args=(name, tried)) for name, tried in addresses.items()
        ]

    def _deliver(self, name: str, addresses: list[str]) -> None:
        chance = random.Random(name)
        for address in cycle(addresses):
            if self.done(name):
                return
            with Sender(address, name, self.sources[name], None) as sender:
                sender.run(self._leaving(name, chance) if len(addresses) > 1 else partial(self.done, name))

    def _leaving(self, name: str, chance: random.Random) -> Callable[[], bool]:
        """Tells when a box that has another collector to go to has enough of this one."""
        left = len(self.sources[name].epochs[0]) - chance.randint(50, 400)
        until = time.monotonic() + 1
        return lambda: self.done(name) or time.monotonic() > until or len(self.sources[name].epochs[0]) < left

    def done(self, name: str) -> bool:
        return self._stop.is_set() or not self.sources[name].epochs[0]

    def delivered(self) -> int:
        """Events that were acknowledged."""
        return sum(len(self.sent[name]) - len(source.epochs[0]) for name, source in self.sources.items())

    def wait(self, events: int) -> None:
        end = time.monotonic() + DEADLINE
        while self.delivered() < events:
            assert time.monotonic() < end, f"{self.delivered()} of {events} delivered"
            time.sleep(0.005)

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self, found: list[Stored]) -> None:
        """What every box sent is in the stream, once and in order, and nothing else is."""
        for name, sent in self.sent.items():
            assert of(name, found) == [encode(one) for one in sent], name
        assert Counter(one.subject.split(".")[1] for one in found) == {"event": sum(map(len, self.sent.values()))}


class Bridge:
    """A collector before a JetStream, on one address for all its lives."""

    def __init__(self, folder: Path, url: str, point: str = "") -> None:
        self._folder, self._url = folder, url
        self._running = self._start("tcp://127.0.0.1:*", point)
        self.address = self._running.address

    def _start(self, bind: str, point: str = "") -> Running:
        return Running(self._folder / "none.db", "--sink", self._url, bind=bind, point=point).__enter__()

    def kill(self) -> None:
        self._running.__exit__()

    def start(self) -> None:
        self._running = self._start(self.address)

    def restart(self) -> None:
        self.kill()
        self.start()

    def died(self) -> int:
        """Waits until it ends by itself; its exit code."""
        code = self._running.process.wait(DEADLINE)
        self.kill()  # what it had to say is read
        return code

    def end(self) -> tuple[int, str, str]:
        return self._running.end()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(autouse=True)
def _in_time(deadline: Deadline) -> Iterator[None]:
    with deadline("a test", 2 * DEADLINE):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def bridge(server: NatsServer, tmp_path: Path) -> Iterator[Bridge]:
    with Bridge(tmp_path, server.url) as bridge:
        yield bridge


def test_what_a_box_sends_is_in_the_stream(server: NatsServer, bridge: Bridge) -> None:
    with Fleet(1000, {"box 1": [bridge.address]}) as fleet:
        gone = Gone(first=1000, last=1009, reason="spool full")
        fleet.sources["box 1"].epochs[0] += [gone, Data(1010, (b"no", b"event"))]
        fleet.wait(1000)
        while fleet.sources["box 1"].epochs[0]:
            time.sleep(0.01)
    code, last, err = bridge.end()
    found = stored(server.url)
    assert of("box 1", found) == [encode(one) for one in fleet.sent["box 1"]]
    assert [one.subject for one in found[1000:]] == ["lookout.gone.box%201", "lookout.refused.box%201"]
    assert Gone.model_validate_json(found[1000].payload) == gone
    assert code == 0
    assert f"in {server.url}" in last
    assert "set aside: event 1010 of box 1" in err


@pytest.mark.parametrize("kill", ["bridge", "nats", "both"])
def test_killed_in_the_middle_nothing_is_lost(server: NatsServer, bridge: Bridge, kill: str) -> None:
    with Fleet(1500, {"a": [bridge.address], "b": [bridge.address]}) as fleet:
        for share in (200, 1000, 2000):
            fleet.wait(share)
            if kill != "bridge":
                server.kill()
            if kill != "nats":
                bridge.kill()
            if kill != "bridge":
                server.start()
            if kill != "nats":
                bridge.start()
        fleet.wait(3000)
    fleet.check(stored(server.url))


@pytest.mark.parametrize("point", sorted(COLLECTOR_POINTS))
def test_killed_at_every_step_nothing_is_lost(server: NatsServer, tmp_path: Path, point: str) -> None:
    with Bridge(tmp_path, server.url, f"{point}:2") as bridge:
        names = ["a", "b", "c"]
        with Fleet(300, {name: [bridge.address] for name in names}) as fleet:
            assert bridge.died() == -signal.SIGKILL
            bridge.start()
            fleet.wait(900)
        fleet.check(stored(server.url))


def test_boxes_go_from_one_bridge_to_another(server: NatsServer, tmp_path: Path) -> None:
    with Bridge(tmp_path, server.url) as first, Bridge(tmp_path, server.url) as second:
        both = [first.address, second.address]
        with Fleet(4000, {"a": both, "b": both[::-1], "c": both}) as fleet:
            for share, trouble in (
                (2000, first.kill),
                (3000, first.start),
                (5000, server.restart),
                (8000, second.restart),
            ):
                fleet.wait(share)
                trouble()
            fleet.wait(12_000)
        counts = [int(one.end()[1].split()[1].replace(",", "")) for one in (first, second)]
        assert min(counts) > 0, "both had a part in it"
        fleet.check(stored(server.url))


def test_while_nats_is_away_nothing_is_acknowledged(server: NatsServer, bridge: Bridge) -> None:
    with Fleet(500, {"a": [bridge.address]}) as fleet:
        fleet.wait(100)
        server.kill()
        before = fleet.delivered()
        time.sleep(1)  # what was acknowledged before may still be on its way
        settled = fleet.delivered()
        assert settled - before <= 256
        time.sleep(1)
        assert fleet.delivered() == settled < 500
        server.start()
        fleet.wait(500)
    fleet.check(stored(server.url))


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("centre:4222", 78, "not an address of NATS: expected nats://HOST:PORT"),
        ("nats://me:secret@centre:99999", 78, "not an address of NATS: expected nats://HOST:PORT"),
        ("nats://me:secret@127.0.0.1:{nobody}", 74, "NATS at nats://127.0.0.1:{nobody}: "),
        ("nats://me:secret@no-such-host.invalid", 74, "NATS at nats://no-such-host.invalid:4222: "),
    ],
)
def test_no_nats_is_told_at_the_start(url: str, code: int, said: str) -> None:
    with silent() as nobody:
        port = nobody.getsockname()[1]
        done = run("run", "--bind", "tcp://127.0.0.1:*", "--sink", url.format(nobody=port))
    assert (done.returncode, done.stdout) == (code, "")
    assert said.format(nobody=port) in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
