"""The sink in NATS against a real nats-server that is killed, frozen, filled, and meant for others."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import nats
import numpy as np
import pytest
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, StorageType, StreamConfig

from collector.messages import STREAM, device, message_of, token, unpack
from collector.nats import GRACE, NatsSink
from collector.sinks import Item, Kept, Outcome, Poison
from collector.store import Store
from edge.errors import ConfigError, StoreError
from edge.events import Event, Header, Person, encode
from edge.protocol import Gone
from tests.conftest import Deadline
from tests.nats_server import NatsServer

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0  # s
NEW, DUPLICATE = Outcome(Kept.NEW), Outcome(Kept.DUPLICATE)
Result = TypeVar("Result")


def event(seq: int, name: str = "box", jpeg: int = 0) -> Event:
    """jpeg: bytes of its one crop."""
    people = (Person(box=(1, 2, 3, 4), score=0.5, answers=(), crop=True),) if jpeg else ()
    header = Header(
        device=name, epoch=7, seq=seq, camera="door", frame=seq, captured_at=1.7e9 + seq, frame_size=(640, 480),
        bundle="b", bank="c", embedding_dim=64, people=people,
    )  # fmt: skip
    crop = b"\xff\xd8".ljust(jpeg, b"j")
    return Event(header, np.eye(64, dtype=np.float16)[: len(people)], (crop,) if people else ())


def item(seq: int, name: str = "box", jpeg: int = 0) -> Item:
    one = event(seq, name, jpeg)
    return Item(name, 7, seq, seq, one, tuple(encode(one)))


def items(count: int, start: int = 0, name: str = "box") -> list[Item]:
    return [item(seq, name) for seq in range(start, start + count)]


@dataclass(frozen=True)
class Stored:
    """A message as a consumer gets it."""

    subject: str
    headers: dict[str, str]
    payload: bytes


def asked(url: str, ask: Callable[[JetStreamContext], Awaitable[Result]]) -> Result:
    """What the owner of the stream does or sees, with a client of their own."""

    async def talk() -> Result:
        client = await nats.connect(url)
        try:
            return await ask(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(talk())


def stored(url: str) -> list[Stored]:
    """Everything in the stream, in its order."""

    async def read(jetstream: JetStreamContext) -> list[Stored]:
        left = (await jetstream.stream_info(STREAM)).state.messages
        reader = await jetstream.pull_subscribe(">", stream=STREAM)
        found: list[Stored] = []
        while len(found) < left:
            for message in await reader.fetch(min(256, left - len(found)), timeout=DEADLINE):
                found.append(Stored(message.subject, message.headers or {}, message.data))
                await message.ack()
        return found

    return asked(url, read)


def of(name: str, found: Sequence[Stored]) -> list[list[bytes]]:
    """The frames of one device's events, in the stream's order."""
    return [unpack(one.payload) for one in found if one.subject == f"lookout.event.{token(name)}"]


def frames(sent: Sequence[Item]) -> list[list[bytes]]:
    return [list(one.frames) for one in sent]


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _in_time(deadline: Deadline) -> Iterator[None]:
    """An `add` that never returns is a failure, and no hanging run."""
    with deadline("a test", 60):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def sink(server: NatsServer) -> Iterator[NatsSink]:
    with NatsSink(server.url, patience=2.0) as sink:
        yield sink


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    """A thread for an `add` that does not return by itself."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def waits(added: Future[list[Outcome]], caplog: pytest.LogCaptureFixture) -> None:
    """`add` has met trouble, said so, and does not return."""
    eventually(lambda: "trying again" in caplog.text, "a line in the log")
    assert not added.done()


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_events_come_out_equal_and_in_order(server: NatsServer, sink: NatsSink) -> None:
    boxes = {name: items(300, name=name) for name in ("a", "b", "c")}
    mixed = [one for three in zip(*boxes.values(), strict=True) for one in three]
    for start in range(0, len(mixed), 256):
        batch = mixed[start : start + 256]
        assert sink.add(batch, 1.0) == [NEW] * len(batch)
    found = stored(server.url)
    assert len(found) == 900
    for name, sent in boxes.items():
        assert of(name, found) == frames(sent)


def test_a_message_is_the_documented_one(server: NatsServer, sink: NatsSink) -> None:
    sent = [
        item(5, "box 1"),
        Item("box 1", 7, 6, 9, Gone(first=6, last=9, reason="spool full")),
        Item("box 1", 7, 10, 10, Poison("no event"), (b"\xff", b"")),
    ]
    assert sink.add(sent, 1.0) == [NEW, NEW, Outcome(Kept.REFUSED, "no event")]
    for one, message in zip(stored(server.url), sent, strict=True):
        expected = message_of(message, 1 << 20)
        assert one == Stored(expected.subject, expected.headers, expected.payload)


@pytest.mark.parametrize(
    "name", [".", "a b.c*>", "box\r\nHPUB x 0 0", "%2E", "箱" * 200, "🎥" * 200, " box ", "$JS.API"]
)
def test_any_name_of_a_box(server: NatsServer, sink: NatsSink, name: str) -> None:
    sent = [item(0, name), Item(name, 7, 1, 1, Poison("é" * 500), (b"?",))]
    assert sink.add(sent, 1.0) == [NEW, Outcome(Kept.REFUSED, "é" * 500)]
    event, refused = stored(server.url)
    assert unpack(event.payload) == list(sent[0].frames)
    assert device(event.headers["Lookout-Device"]) == device(refused.headers["Lookout-Device"]) == name


def test_nothing_to_add(sink: NatsSink) -> None:
    assert sink.add([], 1.0) == []
    assert sink.resume("box", 7) is None


# --- once -------------------------------------------------------------------------------------------------------------


def test_what_is_sent_again_is_there_once(server: NatsServer, sink: NatsSink) -> None:
    sent = [*items(20), Item("box", 7, 20, 22, Gone(first=20, last=22, reason="too old"))]
    assert sink.add(sent + sent[:3], 1.0) == [NEW] * 21 + [DUPLICATE] * 3
    assert sink.add([*sent, *items(1, 23)], 1.0) == [DUPLICATE] * 21 + [NEW]
    with NatsSink(server.url) as other:  # another collector of the fleet
        assert other.add(sent, 1.0) == [DUPLICATE] * 21
    server.restart()
    assert sink.add(sent, 1.0) == [DUPLICATE] * 21
    assert len(stored(server.url)) == 22


def test_refused_is_refused_again(server: NatsServer, sink: NatsSink) -> None:
    poison = Item("box", 7, 0, 0, Poison("no event"), (b"?",))
    assert sink.add([poison], 1.0) == sink.add([poison], 1.0) == [Outcome(Kept.REFUSED, "no event")]
    assert sink.add(items(1), 1.0) == [NEW]  # its number is still free
    assert [one.subject for one in stored(server.url)] == ["lookout.refused.box", "lookout.event.box"]


# --- too large --------------------------------------------------------------------------------------------------------


def test_what_the_server_does_not_take_is_refused_to_the_byte(tmp_path: Path) -> None:
    fits = item(0, jpeg=3000)
    limit = message_of(fits, 1 << 20).size
    with NatsServer(tmp_path / "nats", f"max_payload: {limit}") as server, NatsSink(server.url) as sink:
        first, second, third = sink.add([fits, item(1, jpeg=3001), item(2)], 1.0)
        assert (first, third) == (NEW, NEW)
        assert second == Outcome(
            Kept.REFUSED,
            f"{limit + 1} bytes, and NATS takes {limit}: raise max_payload in the server's configuration",
        )
        _, refused, _ = stored(server.url)
    assert refused.subject == "lookout.refused.box"
    assert refused.headers["Lookout-Reason"] == second.reason
    assert unpack(refused.payload) == list(item(1, jpeg=3001).frames[:2])  # its words and vectors, not its picture


def test_what_the_stream_does_not_take_is_refused_to_the_byte(server: NatsServer) -> None:
    fits = item(0, jpeg=3000)
    limit = message_of(fits, 1 << 20).size
    asked(server.url, lambda js: js.add_stream(name=STREAM, subjects=["lookout.>"], max_msg_size=limit))
    with NatsSink(server.url) as sink:
        first, second = sink.add([fits, item(1, jpeg=3001)], 1.0)
    assert first == NEW
    assert second.reason.endswith(f"NATS takes {limit}: raise max_msg_size of the stream LOOKOUT")


# --- the stream and its owner -----------------------------------------------------------------------------------------


def test_a_new_stream_is_on_file_and_without_bounds(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        NatsSink(server.url).close()
    config = asked(server.url, lambda js: js.stream_info(STREAM)).config
    assert (config.subjects, config.storage, config.duplicate_window) == (["lookout.>"], StorageType.FILE, 600)
    assert (config.max_age, config.max_bytes, config.max_msgs) == (0, -1, -1)
    assert caplog.messages == [f"NATS at {server.url}: made the stream LOOKOUT, which has no bounds yet"]


def test_a_stream_that_is_there_stays_as_it_is(server: NatsServer) -> None:
    made = StreamConfig(
        name=STREAM, subjects=["other", "lookout.*.>"], storage=StorageType.MEMORY, max_age=3600, duplicate_window=60
    )
    before = asked(server.url, lambda js: js.add_stream(made)).config
    with NatsSink(server.url) as sink:
        assert sink.add(items(1), 1.0) == [NEW]
    assert asked(server.url, lambda js: js.stream_info(STREAM)).config == before


@pytest.mark.parametrize(
    ("subjects", "no_ack", "said"),
    [
        (["lookout.event.*", "lookout.gone.*"], False, r"does not capture lookout\.refused\.\*: got lookout\.event"),
        (["other"], False, r"does not capture lookout\.event\.\*: got other; let it capture lookout\.>"),
        (["lookout.>"], True, "acknowledges nothing"),
    ],
)
def test_a_stream_that_will_not_do(server: NatsServer, subjects: list[str], no_ack: bool, said: str) -> None:
    asked(server.url, lambda js: js.add_stream(name=STREAM, subjects=subjects, no_ack=no_ack))
    with pytest.raises(ConfigError, match=said):
        NatsSink(server.url)


def test_another_stream_has_our_subjects(server: NatsServer) -> None:
    asked(server.url, lambda js: js.add_stream(name="OTHER", subjects=["lookout.>"]))
    with pytest.raises(StoreError, match="subjects overlap with an existing stream"):
        NatsSink(server.url)


def test_a_stream_that_goes_away_is_made_again(
    server: NatsServer, sink: NatsSink, caplog: pytest.LogCaptureFixture
) -> None:
    assert sink.add(items(2), 1.0) == [NEW] * 2
    asked(server.url, lambda js: js.delete_stream(STREAM))
    assert sink.add(items(2), 1.0) == [NEW] * 2
    assert "no response from stream; trying again" in caplog.text
    assert len(stored(server.url)) == 2


def test_a_full_stream_is_waited_for(
    server: NatsServer, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    bounded = StreamConfig(name=STREAM, subjects=["lookout.>"], max_msgs=3, discard=DiscardPolicy.NEW)
    asked(server.url, lambda js: js.add_stream(bounded))
    with NatsSink(server.url) as sink:
        added = elsewhere.submit(sink.add, items(5), 1.0)
        waits(added, caplog)
        assert "maximum messages exceeded" in caplog.text
        asked(server.url, lambda js: js.update_stream(bounded, max_msgs=100))
        assert sorted(one.kept.value for one in added.result(DEADLINE)) == ["duplicate"] * 3 + ["new"] * 2
    assert of("box", stored(server.url)) == frames(items(5))


def test_who_else_answers_is_not_believed(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    """A subscriber of the subjects may answer what it gets, and be the only one: its answers keep nothing."""
    ready, done = threading.Event(), threading.Event()

    async def answer() -> None:
        client = await nats.connect(server.url)

        async def respond(message: nats.aio.msg.Msg) -> None:
            for words in (b"", b"[]", b"null", b"hello", b'{"stream": "OTHER", "seq": 1}', b'{"error": 1}'):
                await message.respond(words)

        await client.subscribe("lookout.>", cb=respond)
        await client.flush()
        ready.set()
        while not done.is_set():
            await asyncio.sleep(0.01)
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(answer()))
    thread.start()
    assert ready.wait(DEADLINE)
    try:
        with NatsSink(server.url, patience=0.5) as sink:
            asked(server.url, lambda js: js.delete_stream(STREAM))
            assert sink.add(items(3), 1.0) == [NEW] * 3
    finally:
        done.set()
        thread.join()
    assert "it does not answer; trying again" in caplog.text
    assert of("box", stored(server.url)) == frames(items(3))


# --- NATS is away -----------------------------------------------------------------------------------------------------


def test_while_nats_is_away_add_waits(
    server: NatsServer, sink: NatsSink, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    assert sink.add(items(10), 1.0) == [NEW] * 10
    server.kill()
    caplog.clear()
    added = elsewhere.submit(sink.add, items(20), 1.0)
    waits(added, caplog)
    assert not futures.wait([added], timeout=1).done  # meanwhile it tries several times
    server.start()
    assert added.result(DEADLINE) == [DUPLICATE] * 10 + [NEW] * 10
    assert sink.add(items(1, 20), 1.0) == [NEW]
    assert of("box", stored(server.url)) == frames(items(21))
    away, back = caplog.messages  # however often it tried
    assert away.startswith(f"NATS at {server.url}: ")
    assert back.startswith(f"NATS at {server.url} is back after ")


def test_nats_killed_again_and_again_loses_nothing(server: NatsServer, sink: NatsSink) -> None:
    kills, stop = 0, threading.Event()

    def killer() -> None:
        nonlocal kills
        while not stop.wait(0.3):
            server.restart()
            kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    end, sent, known = time.monotonic() + DEADLINE, list[Item](), 0
    try:
        while kills < 4 or not known:  # until some batch was cut in two
            assert time.monotonic() < end, f"{kills} kills, {known} duplicates"
            batch = items(256, len(sent))
            known += sink.add(batch, 1.0).count(DUPLICATE)
            sent += batch
    finally:
        stop.set()
        thread.join()
    assert of("box", stored(server.url)) == frames(sent)


def test_a_frozen_nats_is_noticed(
    server: NatsServer, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Half-open: it takes connections and bytes, and says nothing."""
    with NatsSink(server.url, patience=0.5) as sink:
        server.signal(signal.SIGSTOP)
        sent = [item(seq, jpeg=100_000) for seq in range(100)]  # more than fits into the sockets' buffers
        added = elsewhere.submit(sink.add, sent, 1.0)
        waits(added, caplog)
        assert "it does not answer" in caplog.text
        server.signal(signal.SIGCONT)
        assert len(added.result(DEADLINE)) == 100
    assert of("box", stored(server.url)) == frames(sent)


def test_told_to_stop_it_waits_no_longer(
    server: NatsServer, sink: NatsSink, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    added = elsewhere.submit(sink.add, items(3), 1.0)
    waits(added, caplog)
    start = time.monotonic()
    sink.cancel()
    with pytest.raises(StoreError, match=r"3 messages were not kept here, and the boxes still have them") as caught:
        added.result(DEADLINE)
    assert time.monotonic() - start < GRACE + 1
    assert caught.value.exit_code == 74
    with pytest.raises(StoreError):  # what had arrived before the stop: tried once
        sink.add(items(1), 1.0)


def test_told_to_stop_while_nats_is_frozen(
    server: NatsServer, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with NatsSink(server.url) as sink:
        server.signal(signal.SIGSTOP)
        added = elsewhere.submit(sink.add, [item(seq, jpeg=100_000) for seq in range(100)], 1.0)
        start = time.monotonic()
        sink.cancel()
        with pytest.raises(StoreError, match="no answer in time"):
            added.result(DEADLINE)
        assert time.monotonic() - start < GRACE + 1


def test_told_to_stop_it_still_keeps_what_nats_takes(server: NatsServer, sink: NatsSink) -> None:
    sink.cancel()
    assert sink.add(items(200), 1.0) == [NEW] * 200
    sink.cancel()
    server.restart()  # a connection lost at the end is made once more
    assert sink.add(items(201), 1.0) == [DUPLICATE] * 200 + [NEW]


def test_closed_while_it_waits(
    server: NatsServer, elsewhere: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    sink = NatsSink(server.url)
    server.kill()
    added = elsewhere.submit(sink.add, items(3), 1.0)
    waits(added, caplog)
    sink.close()
    with pytest.raises(StoreError, match="closed while in use"):
        added.result(DEADLINE)
    sink.close()  # does no harm
    sink.cancel()


# --- the door ---------------------------------------------------------------------------------------------------------


def silent() -> socket.socket:
    """Bound, not listening: an address where nobody is."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    return place


def test_no_server_at_the_start() -> None:
    with silent() as nobody, pytest.raises(StoreError) as caught:
        NatsSink(f"nats://me:secret@127.0.0.1:{nobody.getsockname()[1]}")
    assert re.fullmatch(r"NATS at nats://127\.0\.0\.1:\d+: .*Connect call failed.*", str(caught.value))
    assert "secret" not in str(caught.value)


def test_the_first_server_that_answers_will_do(server: NatsServer) -> None:
    with silent() as nobody:
        url = f"nats://127.0.0.1:{nobody.getsockname()[1]},{server.url}"
        with NatsSink(url) as sink:
            assert sink.add(items(1), 1.0) == [NEW]


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {\r\n", b"INFO {}\r\nINFO", b"\0" * 5000]
)
def test_what_answers_is_no_nats(greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            for _ in range(2):
                with suppress(OSError), other.accept()[0] as peer:
                    peer.sendall(greeting)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(StoreError, match=r"NATS at nats://127\.0\.0\.1"):
            NatsSink(f"nats://127.0.0.1:{other.getsockname()[1]}", patience=2.0)


def test_jetstream_is_off(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "nats", "jetstream: false") as server, pytest.raises(StoreError) as caught:
        NatsSink(server.url)
    assert str(caught.value) == (
        f"NATS at {server.url}: JetStream is not switched on; start nats-server with --jetstream"
    )


@pytest.mark.parametrize(
    ("settings", "right", "wrong"),
    [
        ('authorization: {user: "me", password: "p@ss,wörd"}', "me:p%40ss%2Cw%C3%B6rd", "me:secret"),
        ('authorization: {token: "a token"}', "a%20token", "secret"),
    ],
)
def test_who_may_come_in(
    tmp_path: Path, settings: str, right: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    with NatsServer(tmp_path / "nats", settings) as server:
        place = server.url.removeprefix("nats://")
        for login in ("", f"{wrong}@"):
            with pytest.raises(
                StoreError, match=r"NATS at nats://127\.0\.0\.1:\d+: .*Authorization Violation"
            ) as caught:
                NatsSink(f"nats://{login}{place}")
            assert "secret" not in str(caught.value)
        with NatsSink(f"nats://{right}@{place}") as sink:
            assert sink.add(items(1), 1.0) == [NEW]
            server.restart()
            assert sink.add(items(2), 1.0) == [DUPLICATE, NEW]
    assert right not in caplog.text


def test_who_may_not_publish(tmp_path: Path) -> None:
    rights = 'publish: {allow: ["$JS.API.>"]}, subscribe: {allow: ["_INBOX.>"]}'
    settings = f'authorization: {{users: [{{user: "me", password: "secret", permissions: {{{rights}}}}}]}}'
    with (
        NatsServer(tmp_path / "nats", settings) as server,
        NatsSink(server.url.replace("//", "//me:secret@"), patience=0.5) as sink,
    ):
        sink.cancel()
        with pytest.raises(StoreError, match=r'(?i)permissions violation for publish to "lookout\.event\.box"'):
            sink.add(items(1), 1.0)


def test_tls_is_not_given_up(server: NatsServer) -> None:
    """A server, or somebody on the way, that offers none is told nothing."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            with other.accept()[0] as peer:
                peer.sendall(b'INFO {"server_id":"x","version":"2.9.10","max_payload":1048576,"headers":true}\r\n')
                heard.append(peer.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(StoreError, match="secure connection not available"):
            NatsSink(f"tls://me:secret@127.0.0.1:{other.getsockname()[1]}")
        thread.join(DEADLINE)
    assert heard == [b""]
    with pytest.raises(StoreError, match="secure connection not available"):
        NatsSink(server.url.replace("nats:", "tls:"))


def test_a_certificate_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=nats"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "pem")]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes certificates")
    settings = f'tls: {{cert_file: "{tmp_path / "pem"}", key_file: "{tmp_path / "key"}"}}'
    with NatsServer(tmp_path / "nats", settings) as server:
        url = server.url.replace("nats:", "tls:")
        with pytest.raises(StoreError, match=r"(?i)certificate verify failed"):
            NatsSink(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
        with NatsSink(url) as sink:
            assert sink.add(items(1), 1.0) == [NEW]
            server.restart()
            assert sink.add(items(2), 1.0) == [DUPLICATE, NEW]


# --- a consumer -------------------------------------------------------------------------------------------------------


class Consumer:
    """The documentation's example as a process, killed at the end of the `with`."""

    def __init__(self, url: str, path: Path) -> None:
        words = [sys.executable, str(ROOT / "docs/fleet_consumer.py"), url, str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def __enter__(self) -> Consumer:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"reading LOOKOUT\n", self.process.communicate()[1].decode()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_store_fed_from_the_stream_has_everything_once(server: NatsServer, tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    sent = [one for start in range(0, 900, 100) for name in ("box 1", "box.2") for one in items(100, start, name)]
    others = [
        Item("box 1", 7, 900, 909, Gone(first=900, last=909, reason="spool full")),
        Item("box 1", 7, 910, 910, Poison("header: no JSON"), (b"?", b"")),
        Item("box 1", 7, 911, 911, event(911, "box 1"), (b"{}", b"")),  # no event, though the sink was told it is one
    ]
    # JetStream forgets at once what it has seen, and does not wait long for a consumer that was killed
    asked(server.url, lambda js: js.add_stream(name=STREAM, subjects=["lookout.>"], duplicate_window=0.1))
    reader = ConsumerConfig(durable_name="store", ack_policy=AckPolicy.EXPLICIT, ack_wait=1)
    asked(server.url, lambda js: js.add_consumer(STREAM, reader))
    with NatsSink(server.url) as sink:
        sink.add([*sent, *others], 1.0)
        for events in (1, 500, 1300):
            with Consumer(server.url, path):
                eventually(partial(holds, path, events), f"{events} events")
        eventually(lambda: sink.add(sent[:1], 1.0) == [NEW], "the end of the duplicate window")
        sink.add([*sent, *others], 1.0)
    with Consumer(server.url, path):
        eventually(lambda: unread(server.url) == 0, "the end of the stream")
    assert len(stored(server.url)) > 2 * len(sent)
    with Store(path) as store:
        found = sorted(store.events(), key=lambda event: (event.header.device, event.header.seq))
        assert [encode(one) for one in found] == [
            list(one.frames) for one in sorted(sent, key=lambda item: (item.device, item.first))
        ]
        gaps = [(gap.device, gap.first, gap.last, gap.reason.split(":")[0]) for gap in store.gaps()]
        assert gaps == [
            ("box 1", 900, 909, "spool full"),
            ("box 1", 910, 910, "refused"),
            ("box 1", 911, 911, "refused"),
        ]
        assert [one.refused for one in store.stats()] == [2, 0]


def test_the_documented_configuration_gives_the_rights_that_are_needed(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```text\n# /etc/nats-server\.conf\n(.*?)```", (ROOT / "docs/fleet.md").read_text(), re.DOTALL
    )
    settings = [line for line in block.splitlines() if not line.startswith(("listen:", "http:", "jetstream:"))]
    assert len(settings) == len(block.splitlines()) - 3  # those have places of their own here
    with NatsServer(tmp_path / "nats", *settings) as server:
        bridge, consumer = (server.url.replace("//", f"//{name}:%E2%80%A6@") for name in ("bridge", "consumer"))
        with NatsSink(bridge) as sink:
            assert sink.add(items(3), 1.0) == [NEW] * 3
            server.restart()
            assert sink.add([*items(3), item(3, jpeg=2 << 20)], 1.0) == [DUPLICATE] * 3 + [NEW]
        with Consumer(consumer.replace("%E2%80%A6", "…"), tmp_path / "fleet.db"):
            eventually(partial(holds, tmp_path / "fleet.db", 4), "the events")


def holds(path: Path, events: int) -> bool:
    """Whether a store that another process fills has as many."""
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM events").fetchone()[0]) >= events


def unread(url: str) -> int:
    """Messages that the consumer was not given, or has not acknowledged."""
    info = asked(url, lambda js: js.consumer_info(STREAM, "store"))
    return (info.num_pending or 0) + (info.num_ack_pending or 0)
