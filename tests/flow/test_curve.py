"""Nobody gets in without a key that is allowed, and both ends can see why: real sockets, then real processes."""

from __future__ import annotations

import re
import socket as tcp
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from collector.keyring import KEY, Keyring, Zap, allow, deny, new_keyring, secure_server
from collector.server import Server
from collector.store import Store
from edge.config import PublishConfig, SpoolConfig
from edge.keys import KeyPair, new_key, read_key, secure_client
from edge.publish import Publisher
from edge.spool import Spool
from tests.boxes import Box, event
from tests.flow.test_collector import Running, eventually

DEADLINE = 20.0  # s
MAX = 1 << 20  # bytes; of one frame

OPEN = zmq.Event.HANDSHAKE_SUCCEEDED
AUTH = zmq.Event.HANDSHAKE_FAILED_AUTH
PROTOCOL = zmq.Event.HANDSHAKE_FAILED_PROTOCOL
NO_DETAIL = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
END = zmq.Event.DISCONNECTED
WATCHED = OPEN | AUTH | PROTOCOL | NO_DETAIL | END

CRYPTOGRAPHIC = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
MISMATCH = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH

Seen = list[tuple[zmq.Event, int]]


class End:
    """One end of the wire. seen: the event and value of each of its handshakes and disconnections."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> None:
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self._monitor = self.socket.get_monitor_socket(WATCHED)
        self.seen: Seen = []

    def look(self) -> Seen:
        while self._monitor.poll(0):
            message = recv_monitor_message(self._monitor)
            self.seen.append((zmq.Event(message["event"]), message["value"]))
        return self.seen

    def failures(self) -> Seen:
        return [(event, value) for event, value in self.look() if event not in (OPEN, END)]

    def ended(self) -> bool:
        return any(event == END for event, _ in self.look())

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()


class Collector(End):
    """The far end: a ROUTER and, with a folder, its Zap, both served by the test's own thread."""

    def __init__(self, stack: ExitStack, folder: Path | None, answering: bool = True) -> None:
        self.context = stack.enter_context(zmq.Context())
        super().__init__(self.context, zmq.ROUTER)
        stack.callback(self.close)
        self.heard: list[tuple[str | None, list[bytes]]] = []  # the User-Id, and the frames after the routing id
        self.routes: list[bytes] = []
        self.socket.maxmsgsize = MAX
        self.socket.sndhwm = 10
        self.zap = None
        if folder is not None:
            self.keyring = stack.enter_context(Keyring(folder))
            secure_server(self.socket, self.keyring)
            if answering:
                self.zap = stack.enter_context(Zap(self.context, self.keyring))
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)

    def serve(self, until: Callable[[], object], what: str) -> None:
        """As a server's loop does, until something holds."""
        end = time.monotonic() + DEADLINE
        while not until():
            assert time.monotonic() < end, f"still waiting for {what}"
            if self.zap is not None:
                self.keyring.refresh()
                self.zap.handle()
            if self.socket.poll(5):
                frames = self.socket.recv_multipart(copy=False)
                ids = {frame.get("User-Id") if self.zap else None for frame in frames}
                assert len(ids) == 1, "every frame carries it"
                self.heard.append((ids.pop(), [frame.bytes for frame in frames[1:]]))
                self.routes.append(frames[0].bytes)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_keyring(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def door(tmp_path: Path, folder: Path) -> KeyPair:
    """The key of a device named door."""
    allow(folder, "door", new_key(tmp_path / "door.key"))
    return read_key(tmp_path / "door.key")


@pytest.fixture
def collector(stack: ExitStack, folder: Path) -> Collector:
    return Collector(stack, folder)


@pytest.fixture
def box(stack: ExitStack) -> Callable[..., End]:
    """A box's end: one connection, one try. Without a key it does not encrypt."""
    context = stack.enter_context(zmq.Context())

    def made(
        address: str, key: KeyPair | None, collector_key: str = "", *, says: bytes = b"hello", rcvhwm: int = 1000
    ) -> End:
        end = End(context, zmq.DEALER)
        stack.callback(end.close)
        end.socket.reconnect_ivl = -1
        end.socket.rcvhwm = rcvhwm
        if rcvhwm < 1000:
            end.socket.rcvbuf = 4096
        if key is not None:
            secure_client(end.socket, key, collector_key)
        end.socket.connect(address)
        end.socket.send_multipart([says, b"second frame"])
        return end

    return made


def own_key(folder: Path) -> KeyPair:
    """The collector's."""
    return read_key(folder / KEY)


def another_key(tmp_path: Path) -> KeyPair:
    new_key(tmp_path / "another.key")
    return read_key(tmp_path / "another.key")


def test_an_allowed_key_comes_in_and_every_frame_says_whose_it_is(
    collector: Collector, door: KeyPair, box: Callable[..., End]
) -> None:
    one = box(collector.address, door, collector.keyring.public)
    collector.serve(lambda: collector.heard, "a message")
    assert collector.heard == [(door.public, [b"hello", b"second frame"])]
    assert collector.keyring.device_of(door.public) == "door"
    collector.socket.send_multipart([collector.routes[0], b"welcome"])
    assert one.socket.poll(5000)
    assert one.socket.recv_multipart() == [b"welcome"]
    assert one.look() == [(OPEN, 0)] == collector.look()
    assert collector.zap is not None
    assert collector.zap.refused == 0


# who fails: what the box and the collector may see, as edge/keys.py tells it
REFUSED: dict[str, tuple[Seen, Seen, int]] = {
    "a key that is not allowed": ([(AUTH, 400)], [(AUTH, 400)], 1),
    "the public half of an allowed key, with another secret": ([(NO_DETAIL, 32)], [(PROTOCOL, CRYPTOGRAPHIC)], 0),
    "another collector pinned": ([(NO_DETAIL, 32)], [(PROTOCOL, CRYPTOGRAPHIC)], 0),
    "a box that does not encrypt": (
        [(NO_DETAIL, 32), (PROTOCOL, MISMATCH)],
        [(NO_DETAIL, 32), (PROTOCOL, MISMATCH)],
        0,
    ),
}


@pytest.mark.parametrize("who", REFUSED)
def test_others_do_not_and_both_ends_can_tell(
    who: str,
    collector: Collector,
    door: KeyPair,
    box: Callable[..., End],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other, server = another_key(tmp_path), collector.keyring.public
    if who == "a key that is not allowed":
        stranger = box(collector.address, other, server, says=b"let me in")
    elif who == "the public half of an allowed key, with another secret":
        stranger = box(collector.address, KeyPair(door.public, other.secret), server, says=b"let me in")
    elif who == "another collector pinned":
        stranger = box(collector.address, door, other.public, says=b"let me in")
    else:
        stranger = box(collector.address, None, says=b"let me in")
    collector.serve(lambda: stranger.ended() and collector.ended(), "both ends of the refused connection")
    at_box, at_collector, denials = REFUSED[who]
    (box_saw,), (collector_saw,) = stranger.failures(), collector.failures()
    assert box_saw in at_box
    assert collector_saw in at_collector
    assert len(at_box) == 1 or (PROTOCOL, MISMATCH) in (box_saw, collector_saw), "one of them at least can tell"
    assert collector.zap is not None
    assert collector.zap.refused == denials
    assert f"the key {other.public[:8]}… is not allowed" in caplog.text if denials else not caplog.records
    for secret in (other.secret, door.secret, collector.keyring.secret):
        assert secret not in caplog.text

    box(collector.address, door, server)
    collector.serve(lambda: collector.heard, "the message of a box that is allowed")
    assert collector.heard == [(door.public, [b"hello", b"second frame"])], "the only one"


def test_a_collector_that_does_not_encrypt_hears_nothing_of_a_box_that_does(
    stack: ExitStack, door: KeyPair, box: Callable[..., End], tmp_path: Path
) -> None:
    plain = Collector(stack, None)
    one = box(plain.address, door, another_key(tmp_path).public)
    plain.serve(lambda: one.ended() and plain.ended(), "both ends of the connection")
    (box_saw,), (collector_saw,) = one.failures(), plain.failures()
    assert {box_saw, collector_saw} <= {(NO_DETAIL, 32), (PROTOCOL, MISMATCH)}
    assert (PROTOCOL, MISMATCH) in (box_saw, collector_saw)
    box(plain.address, None)
    plain.serve(lambda: plain.heard, "a message in the clear")
    assert plain.heard == [(None, [b"hello", b"second frame"])]


def test_a_key_that_is_taken_loses_its_rights_at_the_next_message(
    collector: Collector, folder: Path, door: KeyPair, box: Callable[..., End]
) -> None:
    one = box(collector.address, door, collector.keyring.public)
    collector.serve(lambda: len(collector.heard) == 1, "the first message")
    assert collector.keyring.device_of(door.public) == "door"
    deny(folder, "door")
    one.socket.send(b"still here")
    collector.serve(lambda: len(collector.heard) == 2, "the second message")
    user_id, frames = collector.heard[1]
    assert (user_id, frames) == (door.public, [b"still here"]), "libzmq itself keeps the connection"
    assert collector.keyring.device_of(user_id or "") is None
    again = box(collector.address, door, collector.keyring.public)
    collector.serve(again.ended, "the end of a new try")
    assert again.failures() == [(AUTH, 400)]


def test_a_key_that_is_allowed_while_the_collector_runs_comes_in_at_its_next_try(
    collector: Collector, folder: Path, box: Callable[..., End], tmp_path: Path
) -> None:
    key = another_key(tmp_path)
    first = box(collector.address, key, collector.keyring.public)
    collector.serve(first.ended, "the end of the first try")
    allow(folder, "gate", key.public)
    box(collector.address, key, collector.keyring.public)
    collector.serve(lambda: collector.heard, "a message")
    assert collector.keyring.device_of(collector.heard[0][0] or "") == "gate"


def test_a_device_changes_its_key_without_a_pause(
    collector: Collector, folder: Path, door: KeyPair, box: Callable[..., End], tmp_path: Path
) -> None:
    fresh = another_key(tmp_path)
    allow(folder, "door", fresh.public)
    for number, key in enumerate((door, fresh), 1):
        box(collector.address, key, collector.keyring.public)
        collector.serve(lambda number=number: len(collector.heard) == number, "a message")  # type: ignore[misc]
    assert [collector.keyring.device_of(user_id or "") for user_id, _ in collector.heard] == ["door", "door"]
    deny(folder, "door", door.public)
    collector.keyring.refresh()
    assert [collector.keyring.device_of(user_id or "") for user_id, _ in collector.heard] == [None, "door"]


def test_where_no_zap_answers_nobody_comes_in(
    stack: ExitStack, folder: Path, door: KeyPair, box: Callable[..., End]
) -> None:
    collector = Collector(stack, folder, answering=False)
    one = box(collector.address, door, collector.keyring.public)
    collector.serve(collector.failures, "a refusal")
    assert collector.failures()[0][0] == NO_DETAIL
    assert not collector.socket.poll(200)
    assert not one.look(), "it waits, as for a collector that is slow"


@pytest.mark.parametrize("more", [0, 1])
def test_the_longest_frame_is_as_long_with_encryption_as_without(
    collector: Collector, door: KeyPair, box: Callable[..., End], more: int
) -> None:
    one = box(collector.address, door, collector.keyring.public, says=b"x" * (MAX + more))
    collector.serve(lambda: collector.heard or one.ended(), "the message, or its end")
    assert [len(frames[0]) for _, frames in collector.heard] == ([] if more else [MAX])


def test_a_box_that_never_reads_holds_nobody_up_and_fills_no_memory(
    collector: Collector, folder: Path, door: KeyPair, box: Callable[..., End], tmp_path: Path
) -> None:
    gate = another_key(tmp_path)
    allow(folder, "gate", gate.public)
    slow = box(collector.address, gate, collector.keyring.public, rcvhwm=1)
    collector.serve(lambda: collector.heard, "the slow box")
    quick = box(collector.address, door, collector.keyring.public)
    collector.serve(lambda: len(collector.heard) == 2, "the quick box")
    to_slow, to_quick = collector.routes
    page, memory, start = bytes(64 << 10), psutil.Process().memory_info().rss, time.monotonic()
    for number in range(2000):  # 128 MB
        collector.socket.send_multipart([to_slow, page])
        if number % 100 == 0:
            collector.socket.send_multipart([to_quick, b"%d" % number])
            assert quick.socket.poll(5000), "the quick one is served meanwhile"
            assert quick.socket.recv() == b"%d" % number
    assert time.monotonic() - start < 5
    assert psutil.Process().memory_info().rss - memory < 40 << 20
    assert slow.look() == [(OPEN, 0)], "and the slow one is still there"
    assert slow.socket.recv() == page


def test_half_a_handshake_holds_nobody_up(
    collector: Collector, door: KeyPair, box: Callable[..., End], stack: ExitStack
) -> None:
    host, port = collector.address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(23, b"\0") + bytes(32)  # ZMTP 3.1
    for number in range(30):
        raw = stack.enter_context(tcp.create_connection((host, int(port)), timeout=5))
        raw.sendall(greeting[: 2 * number] if number < 29 else greeting + b"\x04\xff" + b"\xff" * 4)
    box(collector.address, door, collector.keyring.public)
    collector.serve(lambda: collector.heard, "a message")
    assert collector.heard == [(door.public, [b"hello", b"second frame"])]


# --- real processes: a collector with --keys, and the box's own publisher ---------------------------------------------


@pytest.fixture
def running(tmp_path: Path, folder: Path) -> Iterator[Running]:
    """A collector that wants keys."""
    store = tmp_path / "store.db"
    with Running(store, "--store", store, "--keys", folder) as running:
        yield running


@contextmanager
def publishing(
    folder: Path, address: str, key: KeyPair | None, collector_key: str = "", device: str = "door"
) -> Iterator[tuple[Publisher, Spool]]:
    """A box's spool and publisher, with one event more than before. They do not wait at the end."""
    secure = None if key is None else partial(secure_client, key=key, collector_key=collector_key)
    with (
        Spool(SpoolConfig(path=folder / f"{device}.spool")) as spool,
        Publisher(PublishConfig(address=address, linger_ms=0), device, spool, secure) as publisher,
    ):
        see(publisher, device)
        yield publisher, spool


def see(publisher: Publisher, device: str = "door") -> None:
    publisher.send(lambda stamp: event(stamp.seq, device=device, epoch=stamp.epoch))


@dataclass(frozen=True)
class Turned:
    """A box that is not let in: why, and what either end says of it and counts. handshake: as one that failed."""

    away: str
    box_says: tuple[str, ...]
    collector_says: str
    collector_counts: str
    handshake: bool = True


ONE_SIDED = ("the handshake failed: keys that do not match", "the handshake failed: it is encrypted on one side only")
TURNED = [
    Turned(
        "a key that is not allowed",
        ("the collector does not know this box's key",),
        r"refused 127\.0\.0\.1: the key \S{8}… is not allowed \(1 so far\)",
        r"0 refused, \d+ handshakes refused",
    ),
    Turned(
        "another collector pinned",
        ONE_SIDED[:1],
        "a connection was not let in: it is encrypted on one side only, or with keys that do not match",
        r"0 refused, \d+ handshakes refused",
    ),
    Turned("no encryption", ONE_SIDED, "a connection was not let in: ", r"0 refused, \d+ handshakes refused"),
    Turned(
        "another's name",
        ("it does not let this box in: this key may not write as 'gate'",),
        r"refused bytes from 127\.0\.0\.1: this key may not write as 'gate'",
        r"1 refused",
        handshake=False,
    ),
]


@pytest.mark.parametrize("turned", TURNED, ids=[turned.away for turned in TURNED])
def test_a_box_that_is_turned_away_keeps_its_event_and_both_ends_say_and_count_it(
    turned: Turned, running: Running, folder: Path, door: KeyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, device, (key, pinned) = another_key(tmp_path), "door", (door, own_key(folder).public)
    if turned.away == "a key that is not allowed":
        key = other
    elif turned.away == "another collector pinned":
        pinned = other.public
    elif turned.away == "another's name":
        device = "gate"
    plain = turned.away == "no encryption"
    with publishing(tmp_path, running.address, None if plain else key, pinned, device) as (publisher, spool):
        eventually(lambda: publisher.delivery.failures, "the first failure")
        if turned.handshake:
            eventually(lambda: publisher.delivery.handshakes_refused > 1, "a second try")
        assert spool.waiting() == 1
        assert (publisher.delivery.delivered, publisher.delivery.connections) == (0, 0)
        assert bool(publisher.delivery.handshakes_refused) is turned.handshake
    assert any(said in caplog.text for said in turned.box_says), caplog.text
    assert running.stored() == 0
    code, last, err = running.end()
    assert code == 0
    assert re.search(rf"stored 0 events, .* {turned.collector_counts} in ", last), last
    assert re.search(turned.collector_says, err), err
    for secret in (other.secret, door.secret, own_key(folder).secret):
        assert secret not in caplog.text + err


def test_a_box_whose_key_is_taken_while_it_sends_keeps_the_rest_until_it_may_again(
    running: Running, folder: Path, door: KeyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    public = own_key(folder).public
    with publishing(tmp_path, running.address, door, public) as (publisher, spool):
        eventually(lambda: publisher.delivery.delivered == 1, "the first event")
        deny(folder, "door")
        see(publisher)
        eventually(lambda: publisher.delivery.failures, "the end of the connection")
        assert "it does not let this box in: this key is not allowed here" in caplog.text
        assert (publisher.delivery.delivered, spool.waiting()) == (1, 1)
    assert running.stored() == 1
    with publishing(tmp_path, running.address, door, public) as (publisher, spool):
        eventually(lambda: publisher.delivery.handshakes_refused, "a refused handshake")
        assert "the collector does not know this box's key" in caplog.text
        assert spool.waiting() == 2
        allow(folder, "door", door.public)
        eventually(lambda: not spool.waiting(), "both events, without a restart of either end")
    assert running.stored() == 3
    _, last, err = running.end()
    assert re.search(r"stored 3 events, 0 people, 0 duplicates, 1 refused, \d+ handshakes refused in ", last), last
    assert "refused bytes from 127.0.0.1: this key is not allowed here" in err
    assert f"the key {door.public[:8]}… is not allowed" in err


def test_a_box_that_encrypts_says_nothing_to_a_collector_that_does_not(
    tmp_path: Path, door: KeyPair, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(tmp_path / "store.db") as plain:
        with publishing(tmp_path, plain.address, door, another_key(tmp_path).public) as (publisher, spool):
            eventually(lambda: publisher.delivery.handshakes_refused > 1, "a second try")
            assert spool.waiting() == 1
        code, last, err = plain.end()
    assert any(said in caplog.text for said in ONE_SIDED)
    assert re.search(r"stored 0 events, .* 0 refused, \d+ handshakes refused in ", last), last
    assert "a connection was not let in: " in err
    assert code == 0


def test_handshakes_that_nobody_looks_at_do_not_stop_the_others(tmp_path: Path, folder: Path, door: KeyPair) -> None:
    """libzmq's thread waits where a monitor is full, and with it every connection: here a busy server does not look."""
    plain = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)  # a greeting of ZMTP 3.1
    with Keyring(folder) as keyring, Server("tcp://127.0.0.1:*", keyring) as server:
        host, port = server.address.removeprefix("tcp://").split(":")
        for _ in range(3000):
            with tcp.create_connection((host, int(port)), timeout=5) as raw:
                raw.sendall(plain)
                while raw.recv(100):
                    pass

        def serve() -> None:
            with Store(tmp_path / "store.db", create=True) as store:
                server.run(store)

        thread = Thread(target=serve)
        thread.start()
        try:
            with Box(server.address, door, keyring.public) as one:
                one.greet(device="door")
        finally:
            server.stop()
            thread.join(DEADLINE)
        assert server.stats.handshakes_refused == 3000
