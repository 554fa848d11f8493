"""The collector as people run it: its own process, real sockets, real signals, a store that others read."""

import csv
import io
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import Thread, Timer

import psutil
import pytest
import zmq
from click.testing import CliRunner, Result

from collector.cli import main
from collector.keyring import allow, deny, new_keyring
from collector.server import MAX_FRAMES, Server
from collector.sessions import EVENTS, MOST_EVENTS
from collector.stats import MAX_CAMERAS
from collector.store import Store
from edge.errors import ConfigError
from edge.events import MAX_CROP, Event, Header, encode
from edge.keys import KeyPair, new_key, read_key
from edge.protocol import Ack, Data, Denied, Gone, Hello, Ping, Pong, Refused, Reset, Welcome
from tests.boxes import Box, data, event, person
from tests.fakes import item
from tests.flow.conftest import ROOT, starter
from tests.nats_server import NatsServer

COLLECTOR = [sys.executable, *starter("collector.cli")]
DEADLINE = 30.0  # seconds
ANYWHERE = "tcp://127.0.0.1:*"


def key(event: Event) -> tuple[Header, bytes, tuple[bytes | None, ...]]:
    """What makes two events equal."""
    return event.header, event.embeddings.tobytes(), event.crops


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.02)


def count(store: Path) -> int:
    """How many events the file holds."""
    with closing(sqlite3.connect(store)) as database:
        return int(database.execute("SELECT count(*) FROM events").fetchone()[0])


class Running:
    """A collector process on a port of its own choice; killed at the end of the `with` if it still runs.

    store: where it keeps what comes, unless `words`, more of its command line, name another place. point: a fail point.
    """

    def __init__(self, store: Path, *words: object, bind: str = ANYWHERE, point: str = "") -> None:
        self.store = store
        command = [*COLLECTOR, "run", "--bind", bind, *map(str, words or ("--store", store))]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LOOKOUT_FAILPOINT": point},
        )

    def __enter__(self) -> "Running":
        timer = Timer(DEADLINE, self.process.kill)
        timer.start()
        first = self.process.stdout.readline()
        timer.cancel()
        timer.join()
        listening = re.fullmatch(r"listening on (\S+), storing in .*\n", first)
        assert listening, first or self.process.communicate()[1]
        self.address = listening[1]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def stored(self) -> int:
        return count(self.store)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, the last line of stdout, stderr."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str, str]:
        """The same, of one that ends by itself."""
        out, err = self.process.communicate(timeout=DEADLINE)
        assert "\x1b" not in out + err
        return self.process.returncode, out.splitlines()[-1] if out else "", err


def gaps(store: Path) -> list[tuple[int, int, str]]:
    with Store(store) as opened:
        return [(gap.first, gap.last, gap.reason) for gap in opened.gaps()]


def quarantine(store: Path) -> list[tuple[str, int, int, str]]:
    with closing(sqlite3.connect(store)) as database:
        return database.execute("SELECT device, epoch, seq, reason FROM quarantine ORDER BY id").fetchall()


def in_use(store: Path) -> int:
    """Bytes."""
    with Store(store) as opened:
        return opened.size()[0]


def in_this_process(*words: object) -> Result:
    """A command that is to end at once. `output` has both streams."""
    return CliRunner().invoke(main, list(map(str, words)))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*COLLECTOR, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
def collector(path):
    with Running(path) as running:
        yield running


@pytest.fixture
def box(collector):
    with Box(collector.address) as one:
        yield one


@pytest.fixture
def full(path):
    """Makes `path` a store of these events."""

    def fill(*events: Event) -> Path:
        with Store(path, create=True) as store:
            store.add(list(map(item, events)), received_at=1.0)
        return path

    return fill


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_what_boxes_send_is_stored_and_exported_equal(collector, path, box, tmp_path):
    events = [
        event(0),
        event(1, person(sex="woman", top="dark top")),
        event(2, *(person(crop=i % 2 == 0, größe="高い") for i in range(9))),
    ]
    assert box.greet(end=3).next == 0
    box.send(*events)
    box.acknowledged(3)
    assert collector.stored() == 3, "acknowledged is stored"
    assert run("export", path, "--format", "jsonl", "--out", tmp_path / "a.jsonl").returncode == 0  # while it runs
    assert collector.end() == (0, f"stored 3 events, 10 people, 0 duplicates, 0 refused in {path}", "")
    with Store(path) as store:
        assert list(map(key, store.events())) == list(map(key, events))
    lines = run("export", path, "--format", "jsonl").stdout
    assert [Header.model_validate_json(line) for line in lines.split("\n")[:-1]] == [one.header for one in events]
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == lines


def test_an_event_sent_again_is_a_duplicate(collector, path, box):
    events = [event(seq, person()) for seq in range(20)]
    box.greet()
    box.send(*events, *events)
    assert box.acknowledged(20)
    box.send(*events)
    box.acknowledged(20)
    with Box(collector.address) as other:
        assert other.greet().next == 20
    box.hear_all(0.1)
    assert collector.end() == (0, f"stored 20 events, 20 people, 40 duplicates, 0 refused in {path}", "")


GARBAGE = [
    [b""],
    [b"", b""],
    [b"\0" * 1000],
    [b"GET / HTTP/1.1\r\n\r\n", b""],
    [b"DATA"],
    [b"DATA", b"\0" * 7],
    [b"DATA", b"\xff" * 8],
    [b"HELLO"],
    [b"HELLO", b"{}"],
    [b"HELLO", b"[" * 10_000],
    [b"HELLO", b"\xff\xfe"],
    [b"HELLO", b'{"protocol":"lookout/1","device":"\x1b[2J","epoch":-1,"first":0,"end":0}'],
    [b"GONE", b'{"first":0,"last":9223372036854775807,"reason":""}'],
    [b"GONE", b'{"first":9,"last":3,"reason":""}'],
    [b"PING", b""],
    [b"ACK", b'{"epoch":7,"next":9}'],
    [b"\x1b[2J\x1b]0;evil\x07"],
    encode(event(0)),
    encode(event(0, person(crop=True))),
]


def test_garbage_changes_nothing(collector, path):
    good = [event(seq, person(), person()) for seq in range(12)]
    for i, one in enumerate(good):
        with Box(collector.address) as bad, Box(collector.address) as box:
            bad.say(*GARBAGE[i::12])
            assert isinstance(bad.hear(object), Reset | Denied), "it is told"
            assert box.greet(first=i).next == i
            box.send(one)
            box.acknowledged(i + 1)
            eventually(lambda bad=bad: not bad.hear_all(), "quiet")
    code, last, err = collector.end()
    said = re.fullmatch(r"stored 12 events, 24 people, 0 duplicates, (\d+) refused, \d+ resets in .*", last)
    assert code == 0
    assert said
    assert int(said[1]) == len(GARBAGE)
    assert re.match(r"refused bytes from 127\.0\.0\.1: .+ \(1 so far\)\n", err)
    assert len(err.splitlines()) < 20  # a flood of garbage is no flood of lines


def test_a_flood_of_garbage_is_answered_now_and_then(collector, path):
    with Box(collector.address) as bad, Box(collector.address) as box:
        bad.say(*([os.urandom(i % 50)] for i in range(20_000)))
        box.greet()
        box.send(event(0))
        box.acknowledged(1)
        bad.say(Hello(device="bad", epoch=7, first=0, end=0))
        told = 0
        while isinstance(bad.hear(Reset | Welcome), Reset):
            told += 1
        assert 1 <= told < 30
    code, last, err = collector.end()
    assert code == 0
    assert "20000 refused" in last
    assert len(err.splitlines()) < 30


def test_without_a_hello_there_is_nothing_but_reset(collector, path):
    for message in (Data(1, ()), Data(2**63 - 2, ()), Gone(first=1, last=2, reason="x"), [b"DATA", bytes(8)]):
        with Box(collector.address) as box:
            box.say(message)
            assert box.hear(Reset).reason == "a HELLO comes first"
    assert collector.end() == (0, f"stored 0 events, 0 people, 0 duplicates, 0 refused, 4 resets in {path}", "")


def test_a_gap_is_answered_by_reset_and_hello_mends_it(collector, box):
    box.greet()
    box.send(event(0), event(2), event(3))
    said = box.hear(object)
    reset = box.hear(Reset) if isinstance(said, Ack) else said  # said after, or before, the commit
    assert reset == Reset(reason="number 1 comes next, not 2")
    assert box.greet().next in (0, 1)
    box.send(event(0), event(1), event(2), event(3))
    box.acknowledged(4)
    assert collector.stored() == 4


def test_hello_twice_begins_again(collector, box):
    assert box.greet(end=5).next == 0
    box.send(event(0), event(1))
    box.acknowledged(2)
    for _ in range(2):
        assert box.greet(first=1, end=5).next == 2
    box.send(event(2))
    box.acknowledged(3)
    assert box.greet(epoch=8).next == 0
    box.send(event(0, epoch=8))
    box.acknowledged(1)
    assert collector.stored() == 4


def test_a_hello_replayed_by_another_changes_nothing(collector, box):
    box.greet(end=5)
    box.send(event(0))
    box.acknowledged(1)
    with Box(collector.address) as other:
        assert other.greet(end=5).next == 1
        other.say(Ping())
        other.hear(Pong)
        box.send(event(1))
        assert box.acknowledged(2)
        assert other.hear_all(0.1) == []
    assert collector.end()[1].startswith("stored 2 events, 0 people, 0 duplicates, 0 refused in")


def test_two_sessions_of_one_box_keep_each_event_once(collector, path, box):
    """As when the box gave up a connection that the collector still holds."""
    events = [event(seq, person()) for seq in range(100)]
    with Box(collector.address) as old:
        old.greet()
        box.greet()
        for start in range(0, 100, 10):
            old.send(*events[start : start + 10])
            box.send(*events[start : start + 10])
        old.acknowledged(100)
        box.acknowledged(100)
    assert collector.end() == (0, f"stored 100 events, 100 people, 100 duplicates, 0 refused in {path}", "")
    with Store(path) as store:
        assert [header.seq for header in store.headers()] == list(range(100))


def test_what_the_box_dropped_is_recorded(collector, path, box):
    assert box.greet(first=5, end=100).next == 5
    assert gaps(path) == [(0, 4, "not kept by the box")], "WELCOME comes after the commit"
    box.send(event(5))
    box.say(Gone(first=6, last=1005, reason="spool full"), data(event(1006)), Gone(first=3, last=9, reason="late"))
    box.acknowledged(1007)
    assert gaps(path) == [(0, 4, "not kept by the box"), (6, 1005, "spool full")]
    code, last, err = collector.end()
    assert (code, err) == (0, "")
    assert last == f"stored 2 events, 0 people, 1 duplicates, 0 refused, 1005 gone in {path}"


def test_another_event_under_a_number_is_set_aside(collector, path, box):
    with Box(collector.address) as other:
        box.greet()
        other.greet()
        box.send(event(0))
        box.acknowledged(1)
        other.send(event(0, frame=9), event(1))
        refused = other.hear(Refused)
        assert (refused.epoch, refused.seq, refused.reason) == (7, 0, "another event has this number")
        other.acknowledged(2)
    code, last, err = collector.end()
    assert (code, last) == (0, f"stored 2 events, 0 people, 0 duplicates, 1 refused in {path}")
    assert err == "set aside: event 0 of box: another event has this number (1 so far)\n"
    with Store(path) as store:
        assert [header.frame for header in store.headers()] == [0, 1]
    assert quarantine(path) == [("box", 7, 0, "another event has this number")]


POISON = {
    "nothing": (),
    "no JSON": (b"no JSON", b""),
    "deep JSON": (b"[" * 100_000, b""),
    "another schema": (encode(event(0))[0].replace(b"event/1", b"event/2"), b""),
    "embeddings": (*encode(event(0, person()))[:1], b"\0"),
    "another device": tuple(encode(event(0, device="other"))),
    "another epoch": tuple(encode(event(0, epoch=8))),
    "another number": tuple(encode(event(9))),
}


def test_every_poison_is_set_aside_and_acknowledged(collector, path, box):
    box.greet()
    reasons = []
    for seq, (kind, frames) in enumerate(POISON.items()):
        box.say(Data(2 * seq, frames), data(event(2 * seq + 1)))
        refused = box.hear(Refused)
        assert refused.seq == 2 * seq, kind
        while box.hear(Ack).next < 2 * seq + 2:
            pass
        reasons.append(refused.reason)
    with Box(collector.address) as again:
        assert again.greet().next == 2 * len(POISON), "none is asked for again"
    assert quarantine(path) == [("box", 7, 2 * seq, reason) for seq, reason in enumerate(reasons)]
    assert gaps(path) == [(2 * seq, 2 * seq, f"refused: {reason}") for seq, reason in enumerate(reasons)]
    assert collector.stored() == len(POISON)


def test_a_window_full_of_poison_is_acknowledged(collector, path, box):
    """Each one is a REFUSED of its own, and none of them may take the place of the ACK."""
    count = box.greet().window.events
    box.say(*(Data(seq, ()) for seq in range(count)))
    said = box.hear_all(1.0)
    assert [one.seq for one in said if isinstance(one, Refused)] == list(range(count))
    assert isinstance(said[-1], Ack)
    assert said[-1].next == count


def test_ping_is_answered_at_once(collector, box):
    box.greet()
    for _ in range(20):
        start = time.monotonic()
        box.say(Ping())
        box.hear(Pong)
    assert time.monotonic() - start < 1


def test_one_event_alone_does_not_wait_for_others(collector, box):
    box.greet()
    taken = []
    for seq in range(30):
        start = time.monotonic()
        box.send(event(seq))
        box.acknowledged(seq + 1)
        taken.append(time.monotonic() - start)
    assert sorted(taken)[15] < 0.04, "less than a batch may last"


# --- many -------------------------------------------------------------------------------------------------------------


def test_the_window_shrinks_as_boxes_come(collector):
    with ExitStack() as stack:
        boxes = [stack.enter_context(Box(collector.address)) for _ in range(100)]
        for number, one in enumerate(boxes[:3]):
            assert one.greet(device=f"box-{number}").window.events == MOST_EVENTS
        for number, one in enumerate(boxes[3:], 3):
            assert one.greet(device=f"box-{number}").window.events == min(EVENTS // (number + 1), MOST_EVENTS)
        boxes[0].send(event(0, device="box-0"))
        assert boxes[0].acknowledged(1).window.events == EVENTS // 100


def test_many_boxes_at_once(collector, path):
    def deliver(number: int) -> None:
        with Box(collector.address) as one:
            device = f"box-{number}"
            one.deliver([event(seq, person(), device=device) for seq in range(100)], device=device)

    threads = [Thread(target=deliver, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collector.end() == (0, f"stored 2000 events, 2000 people, 0 duplicates, 0 refused in {path}", "")
    assert gaps(path) == []


@contextmanager
def flooding(address: str):
    """A box in a process of its own that ignores its window."""
    program = """if True:
        import sys
        from tests.boxes import Box, event
        with Box(sys.argv[1], sndhwm=1000) as box:
            box.greet(device="flood")
            print("begun", flush=True)
            for seq in range(10**9):
                box.send(event(seq, device="flood"))
                box.hear_all()"""
    command = [sys.executable, "-c", program, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def test_a_box_that_floods_does_not_starve_another(collector, box):
    with flooding(collector.address):
        eventually(lambda: collector.stored() > 500, "the flood")
        box.greet()
        for seq in range(10):
            start = time.monotonic()
            box.send(event(seq))
            box.acknowledged(seq + 1)
            assert time.monotonic() - start < 2
        flood = collector.stored()
        eventually(lambda: collector.stored() > flood + 500, "more of the flood")


def test_boxes_that_never_fall_silent_do_not_hold_up_the_end(collector):
    with flooding(collector.address):
        eventually(lambda: collector.stored() > 500, "the flood")
        start = time.monotonic()
        assert collector.end()[0] == 0
        assert time.monotonic() - start < 5, "a second, and what a busy machine adds"


def test_a_flood_of_hellos_holds_nobody_up(collector, path, box):
    """Each of which tells of one more number that is gone."""
    box.greet()
    with Box(collector.address) as greeter:
        greeter.say(*(Hello(device="other", epoch=1, first=first, end=first) for first in range(3000)))
        for seq in range(5):
            start = time.monotonic()
            box.send(event(seq))
            box.acknowledged(seq + 1)
            assert time.monotonic() - start < 2
        eventually(lambda: gaps(path) == [(0, 2998, "not kept by the box")], "the last of them")
        assert greeter.hear_all(0.2)[-1].next == 2999


def test_a_message_of_endless_frames_is_cut_and_refused(collector, path, box):
    box.greet()
    box.socket.send_multipart([b"DATA", bytes(8)], zmq.SNDMORE)
    for _ in range(2 * MAX_FRAMES):
        box.socket.send(b"x", zmq.SNDMORE)
    box.say([b"x"], data(event(1)))
    assert box.hear(Refused).seq == 0
    box.acknowledged(2)
    with closing(sqlite3.connect(path)) as database:
        ((seq, size),) = database.execute("SELECT seq, size FROM quarantine").fetchall()
    assert seq == 0
    assert MAX_FRAMES - 3 <= size <= MAX_FRAMES, "bytes, and frames: the others were not kept"


def test_a_store_that_is_locked_is_waited_for(collector, path, box):
    box.greet()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        box.send(event(0))
        assert not box.socket.poll(700), "not kept, not acknowledged"
        other.execute("ROLLBACK")
    box.acknowledged(1)
    assert collector.stored() == 1


def test_connections_that_come_to_nothing_are_counted_and_cost_nothing(collector, box):
    """More than libzmq's monitor has room for: where nobody read it, nothing would move any more."""
    host, port = collector.address.removeprefix("tcp://").split(":")
    for _ in range(3000):
        socket.create_connection((host, int(port)), timeout=DEADLINE).close()
    box.deliver([event(0)])
    code, last, err = collector.end()
    assert code == 0
    assert int(re.search(r"(\d+) handshakes refused", last)[1]) > 2000
    assert "a connection was not let in: it hung up before it had said who it is (1 so far)\n" in err
    assert len(err.splitlines()) < 20


def test_a_plain_push_socket_is_not_let_in(collector):
    with zmq.Context() as context, context.socket(zmq.PUSH) as old:
        old.linger = 0
        monitor = old.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        old.connect(collector.address)
        assert monitor.poll(int(DEADLINE * 1000)), "still connected"
        old.disable_monitor()
        monitor.close()
    assert collector.end()[1].startswith("stored 0 events, 0 people, 0 duplicates, 0 refused")


def test_a_message_too_long_costs_its_sender_the_connection(collector, path):
    process = psutil.Process(collector.process.pid)
    before = process.memory_info().rss
    with Box(collector.address) as hostile:
        monitor = hostile.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        hostile.say([b"DATA", bytes(8), bytes(8 * MAX_CROP)])
        assert monitor.poll(int(DEADLINE * 1000)), "still connected"
        hostile.socket.disable_monitor()
        monitor.close()
        assert process.memory_info().rss < before + 2 * MAX_CROP
    with Box(collector.address) as box:
        box.deliver([event(0, person())])
    assert collector.end() == (0, f"stored 1 events, 1 people, 0 duplicates, 0 refused in {path}", "")


# --- its ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_box_is_told_what_it_kept(collector, path, box, number):
    window = box.greet().window.events
    box.send(*(event(seq, person(sex="man")) for seq in range(window)))
    kept = box.hear(Ack).next
    collector.process.send_signal(number)
    while collector.process.poll() is None:
        kept = max([kept, *(ack.next for ack in box.hear_all(0.01))])
    code, last, err = collector.ended()
    stored = collector.stored()
    assert 0 < kept <= stored
    assert (code, err) == (0, "")
    assert last == f"stored {stored} events, {stored} people, 0 duplicates, 0 refused in {path}"
    with Running(path) as again, Box(again.address) as later:  # an ACK may be lost with the connection it is on
        assert later.greet(end=window).next == stored


def test_a_killed_collector_leaves_a_readable_store(path):
    events = [event(seq, person(), person(crop=True)) for seq in range(3000)]
    acknowledged = 0
    with Running(path) as running, Box(running.address) as box:
        window = box.greet().window.events
        sent = 0
        while acknowledged < 500:
            box.send(*events[sent : acknowledged + window])
            sent = max(sent, acknowledged + window)
            acknowledged = box.hear(Ack).next
        running.process.kill()
        running.process.wait()
        acknowledged = max([acknowledged, *(ack.next for ack in box.hear_all(0.2))])
    with Store(path) as store:
        left = list(map(key, store.events()))
    assert left == list(map(key, events[: len(left)]))
    assert len(left) >= acknowledged, "what was acknowledged is there"
    with Running(path) as again, Box(again.address) as box:
        box.deliver(events)
        code, last, _ = again.end()
    assert code == 0
    assert last.startswith(f"stored {3000 - len(left)} events")
    assert "0 duplicates" in last
    with Store(path) as store:
        assert list(map(key, store.events())) == list(map(key, events))


@pytest.mark.parametrize(
    ("point", "stored", "told"),
    [
        ("collector.after-hello", {0}, {0}),
        ("collector.before-keep", {0}, {0}),
        ("collector.before-commit", {0}, {0}),  # within the store's transaction
        ("collector.after-commit", {1, 2, 3}, {0}),
        ("collector.after-ack", {1, 2, 3}, {0, 1, 2, 3}),  # it may die before the ACK has left
    ],
)
def test_at_every_step_it_may_die(path, point, stored, told):
    events = [event(seq) for seq in range(3)]
    with Running(path, point=point) as running, Box(running.address) as box:
        box.say(Hello(device="box", epoch=7, first=0, end=3), *map(data, events))
        assert running.ended()[0] == -signal.SIGKILL
        acknowledged = [said.next for said in box.hear_all(0.2) if isinstance(said, Ack)]
    assert count(path) in stored
    assert max(acknowledged, default=0) in told
    assert count(path) >= max(acknowledged, default=0)
    with Running(path) as again, Box(again.address) as box:
        box.deliver(events)
        assert again.stored() == 3


# --- mistakes ---------------------------------------------------------------------------------------------------------


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert result.returncode == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for text in says:
        assert text in result.stderr


def test_an_address_in_use_is_one_line(collector, tmp_path):
    result = run("run", "--bind", collector.address, "--store", tmp_path / "other.db")
    assert_one_line(result, 78, collector.address, "Address already in use")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "127.0.0.1:5577",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://192.0.2.1:5577",
        "udp://127.0.0.1:5577",
        "inproc://here",
        "ipc:///nowhere/at/all",
        "tcp://\udcff:5577",
    ],
)
def test_an_address_that_cannot_be(address):
    for insecure in (True, False):
        with pytest.raises(ConfigError, match=f"^cannot listen on '{re.escape(address)}'"):
            Server(address, insecure=insecure)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*", "tcp://collector.example:5577"])
def test_other_machines_are_not_listened_to_in_the_clear(address):
    with pytest.raises(ConfigError, match=f"'{re.escape(address)}' without keys"):
        Server(address)


def test_what_was_wrong_with_the_address_is_one_line(path):
    result = run("run", "--bind", "tcp://0.0.0.0:*", "--store", path)
    assert_one_line(result, 78, "'tcp://0.0.0.0:*' without keys", "collector keys new", "--keys", "--insecure")
    result = run("run", "--insecure", "--bind", os.fsdecode(b"tcp://\xff:5577"), "--store", path)
    assert_one_line(result, 78, "cannot listen on 'tcp://\\udcff:5577'")


def test_unless_it_is_said_to_be_insecure(path):
    with Running(path, "--insecure", "--store", path, bind="tcp://0.0.0.0:*") as running:
        with Box(running.address.replace("0.0.0.0", "127.0.0.1")) as box:
            box.deliver([event(0)])
        assert running.end()[0] == 0


def test_it_listens_on_a_file_too(path, tmp_path):
    with Running(path, bind=f"ipc://{tmp_path}/socket") as running, Box(running.address) as box:
        box.deliver([event(0)])
        box.say([b"nonsense"])
        box.hear(Reset)
        assert "refused bytes from localhost:" in running.end()[2]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--store", "x.db", "--sink", "nats://127.0.0.1:1"),
        ("--sink", "nats://127.0.0.1:1", "--keep-days", "1"),
        ("--sink", "nats://127.0.0.1:1", "--keep-bytes", "1000000000"),
        ("--store", "x.db", "--keep-bytes", "1000"),
        ("--store", "x.db", "--keep-days", "0"),
    ],
)
def test_options_that_do_not_go_together(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_this_process("run", *words).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_none_is_one_line(tmp_path):
    text, newer = tmp_path / "notes.txt", tmp_path / "newer.db"
    text.write_text("no database\n" * 100)
    with Store(newer, create=True) as store:
        store._db.execute("PRAGMA user_version = 99")
    runs = ("run", "--bind", ANYWHERE, "--store")
    assert_one_line(run(*runs, newer), 78, str(newer), "newer lookout")
    assert_one_line(run(*runs, tmp_path / "nowhere" / "x.db"), 78, "nowhere")
    assert "Traceback" in run("--debug", *runs, text).stderr
    for path, says in ((tmp_path, ""), (text, "not a database"), (newer, "newer lookout"), (tmp_path / "no.db", "")):
        done = in_this_process("export", "--format", "csv", path)
        assert done.exit_code == 78
        assert done.output.startswith("error: ")
        assert done.output.count("\n") == 1
        assert str(path) in done.output
        assert says in done.output


def test_a_full_disk_is_one_line_and_nothing_is_acknowledged_that_is_not_kept(collector, path, box):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    window = box.greet().window.events
    box.send(event(0))
    box.acknowledged(1)
    resource.prlimit(collector.process.pid, resource.RLIMIT_FSIZE, (500_000, 500_000))  # bytes a file may have
    events = [event(0), *(event(seq, *(person(top="x" * 200) for _ in range(5))) for seq in range(1, 2000))]
    acknowledged = sent = 1
    box.socket.sndtimeo = 100  # ms
    while collector.process.poll() is None:
        with suppress(zmq.Again):  # it has ended
            box.send(*events[sent : acknowledged + window])
        sent = max(sent, acknowledged + window)
        acknowledged = max([acknowledged, *(ack.next for ack in box.hear_all(0.05))])
    code, _, err = collector.ended()
    acknowledged = max([acknowledged, *(ack.next for ack in box.hear_all(0.2))])
    assert code == 74
    assert err.startswith(f"error: store {path}: ")
    assert err.count("\n") == 1
    kept = collector.stored()
    assert acknowledged <= kept < 2000
    with Running(path) as again, Box(again.address) as other:
        assert other.greet().next == kept, "with room, it goes on"


def test_quiet_says_only_the_last_line(path, tmp_path):
    address = f"ipc://{tmp_path}/socket"
    command = [*COLLECTOR, "run", "--quiet", "--bind", address, "--store", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        eventually((tmp_path / "socket").exists, "the collector")
        with Box(address) as box:
            box.deliver([event(0)])
        process.terminate()
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert out == f"stored 1 events, 0 people, 0 duplicates, 0 refused in {path}\n"


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ring(tmp_path):
    """A folder of keys, and the public key of the collector."""
    return tmp_path / "keys", new_keyring(tmp_path / "keys")


@pytest.fixture
def guarded(path, ring):
    """A collector that wants keys."""
    with Running(path, "--store", path, "--keys", ring[0]) as running:
        yield running


def a_key(folder: Path, name: str) -> KeyPair:
    new_key(folder / name)
    return read_key(folder / name)


def test_a_box_with_a_key_writes_under_its_own_name_only(guarded, path, ring, tmp_path):
    folder, public = ring
    key = a_key(tmp_path, "box.key")
    allow(folder, "box", key.public)  # a running collector takes it up
    with Box(guarded.address, key, public) as box:
        box.deliver([event(0)])
        box.say(Hello(device="other", epoch=7, first=0, end=1))
        assert box.hear(Denied).reason == "this key may not write as 'other'"
        box.send(event(0, device="other"))
        box.hear(Reset)
    code, last, err = guarded.end()
    assert (code, last) == (0, f"stored 1 events, 0 people, 0 duplicates, 1 refused, 1 resets in {path}")
    assert "refused bytes from 127.0.0.1: this key may not write as 'other' (1 so far)" in err


def test_a_key_that_is_taken_away_writes_nothing_from_then_on(guarded, path, ring, tmp_path):
    folder, public = ring
    key = a_key(tmp_path, "box.key")
    allow(folder, "box", key.public)
    with Box(guarded.address, key, public) as box:
        box.deliver([event(0)])
        deny(folder, "box")
        box.send(event(1))
        assert box.hear(Denied).reason == "this key is not allowed here"
        box.send(*(event(seq) for seq in range(1, 500)))
        box.say(Hello(device="box", epoch=7, first=0, end=9))
        assert len(box.hear_all(0.3)) < 2
    assert guarded.stored() == 1
    assert "stored 1 events" in guarded.end()[1]


def test_without_the_right_key_nobody_comes_in(guarded, path, ring, tmp_path):
    folder, public = ring
    stranger, other = a_key(tmp_path, "stranger.key"), a_key(tmp_path, "other.key")
    for key, collector_key in ((stranger, public), (stranger, other.public), (None, "")):
        with Box(guarded.address, key, collector_key) as box:
            monitor = box.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            box.say(Hello(device="box", epoch=7, first=0, end=9))
            assert monitor.poll(int(DEADLINE * 1000)), "it waits"
            assert box.hear_all() == []
            box.socket.disable_monitor()
            monitor.close()
    key = a_key(tmp_path, "box.key")
    allow(folder, "*", key.public)
    with Box(guarded.address, key, public) as box:
        box.deliver([event(0, device="any")], device="any")
    code, last, err = guarded.end()
    assert (code, last) == (
        0,
        f"stored 1 events, 0 people, 0 duplicates, 0 refused, 3 handshakes refused in {path}",
    )
    assert f"the key {stranger.public[:8]}… is not allowed" in err
    assert "a connection was not let in: " in err
    for secret in (stranger.secret, key.secret):
        assert secret not in err


def test_a_box_that_reads_nothing_holds_nobody_up_and_fills_no_memory(guarded, ring, tmp_path):
    folder, public = ring
    ours, theirs = a_key(tmp_path, "box.key"), a_key(tmp_path, "deaf.key")
    allow(folder, "box", ours.public)
    allow(folder, "deaf", theirs.public)
    denied = Hello(device="\U0001f600" * 200, epoch=7, first=0, end=0)  # the answer is as long: 25 MB of them
    process = psutil.Process(guarded.process.pid)
    with Box(guarded.address, theirs, public, rcvhwm=1, sndhwm=1000) as deaf, Box(guarded.address, ours, public) as box:
        deaf.greet(device="deaf")
        box.greet()
        for seq in range(20):
            deaf.say(*([denied] * 1500))
            box.send(event(seq))
            box.acknowledged(seq + 1)
            if seq == 0:
                before = process.memory_info().rss
        assert process.memory_info().rss < before + (10 << 20)
    assert guarded.end()[0] == 0


def test_many_boxes_shake_hands_at_once(guarded, ring, tmp_path):
    """As after a restart of the collector: none of them waits for long."""
    folder, public = ring
    key = a_key(tmp_path, "box.key")
    allow(folder, "*", key.public)
    start = time.monotonic()
    with ExitStack() as stack:
        boxes = [stack.enter_context(Box(guarded.address, key, public)) for _ in range(100)]
        for number, one in enumerate(boxes):
            one.say(Hello(device=f"box-{number}", epoch=7, first=0, end=9))
        for one in boxes:
            one.hear(Welcome)
    assert time.monotonic() - start < 20


# --- what leaves ------------------------------------------------------------------------------------------------------


def test_what_is_too_old_leaves(full, path):
    full(*(event(seq, person()) for seq in range(1000)))  # received in 1970
    with Running(path, "--store", path, "--keep-days", 1) as running, Box(running.address) as box:
        eventually(lambda: running.stored() == 0, "the old ones to leave")
        assert box.greet().next == 1000
        box.send(event(1000, person()))
        box.acknowledged(1001)
        assert running.stored() == 1
        assert running.end()[0] == 0
    assert gaps(path) == [], "what was kept long enough is not missing"


def test_what_is_too_much_leaves(full, path):
    full(*(event(seq, *(person(top="x" * 500) for _ in range(20))) for seq in range(300)))
    with Store(path) as store:
        assert store.size()[0] > 3 << 20
    with Running(path, "--store", path, "--keep-bytes", 2 << 20) as running:
        eventually(lambda: in_use(path) <= 2 << 20, "the oldest to leave")
        time.sleep(0.5)
        assert running.end()[0] == 0
    with Store(path) as store:
        left = [header.seq for header in store.headers()]
    assert 50 < len(left) < 300
    assert left == list(range(300 - len(left), 300))


def test_into_jetstream(tmp_path):
    pytest.importorskip("nats")
    with NatsServer(tmp_path / "nats") as server:
        with Running(tmp_path / "none.db", "--sink", server.url) as running, Box(running.address) as box:
            events = [event(seq, person()) for seq in range(300)]
            box.deliver(events)
            box.greet(end=300)
            box.send(*events[:20])
            box.acknowledged(20)
            server.kill()
            box.greet(first=300)
            box.send(event(300))
            assert not box.socket.poll(300), "not kept, not acknowledged"
            code, last, err = running.end()
        assert code == 74
        assert "the boxes still have them" in err
        assert not (tmp_path / "none.db").exists()
        server.start()
        with Running(tmp_path / "none.db", "--sink", server.url) as running, Box(running.address) as box:
            box.greet(end=301)
            box.send(*events[:256])
            box.acknowledged(256)
            box.send(*events[256:], event(300))
            box.acknowledged(301)
            code, last, err = running.end()
        assert (code, last) == (0, f"stored 1 events, 0 people, 300 duplicates, 0 refused in {server.url}")


# --- what people see --------------------------------------------------------------------------------------------------


def test_the_table_on_a_terminal(path):
    ours, theirs = pty.openpty()
    command = [*COLLECTOR, "run", "--bind", ANYWHERE, "--store", str(path)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        screen = ""

        def shows(text: str) -> bool:
            nonlocal screen
            screen += os.read(ours, 1 << 16).decode(errors="replace")
            return text in screen

        timer = Timer(DEADLINE, process.kill)
        timer.start()
        eventually(lambda: shows("waiting for the first event"), "the table")
        with Box(re.search(r"tcp://[\d.:]+", screen)[0]) as box:
            box.greet(first=9, device="north\n")
            box.send(event(9, person(top="dark top", sleeves="long\x1b[2Jsleeves"), device="north\n"))
            eventually(lambda: shows("dark top"), "the person")
            eventually(lambda: shows("1 boxes connected"), "the box")
            eventually(lambda: shows("9 gone"), "what is missing")
        process.send_signal(signal.SIGINT)
        eventually(lambda: shows("stored 1 events"), "the last line")
        process.wait(DEADLINE)
        timer.cancel()
        timer.join()
    os.close(ours)
    assert process.returncode == 0
    assert "88 %" in screen
    assert "long?[2Jsleeves" in screen
    assert "north?" in screen
    assert "\x1b[2J" not in screen


def test_csv_is_a_row_per_person(full):
    path = full(
        event(0),
        event(1, person(sex="woman", top_colour="red"), person(sex="man")),
        event(2, person(bag='a "big", bag'), camera="dör"),
    )
    result = run("export", path, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.stderr == ""
    assert [(row["seq"], row["camera"], row["sex"], row["top colour"], row["bag"]) for row in rows] == [
        ("1", "door", "woman", "red", ""),
        ("1", "door", "man", "", ""),
        ("2", "dör", "", "", 'a "big", bag'),
    ]
    assert rows[0] == {
        "device": "box", "epoch": "7", "seq": "1", "camera": "door", "frame": "1",
        "captured_at": "1700000001.0", "captured_utc": "2023-11-14T22:13:21.000+00:00",
        "x1": "1.5", "y1": "2.0", "x2": "30.0", "y2": "40.25", "score": "0.5", "track": "", "clock": "",
        "sex": "woman", "sex probability": "0.875", "top colour": "red", "top colour probability": "0.875",
        "bag": "", "bag probability": "",
    }  # fmt: skip


def test_a_spreadsheet_runs_nothing_of_it(full):
    formulas = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        " =1",
        "a\r=1",
        "a\x85=1\0",
        "＝1",
        "=cmd|' /C calc'!A0",
    ]
    people = [person(**{"=category": formula}) for formula in formulas]
    path = full(event(0, *people, device="=device", camera="@camera"))
    text = subprocess.run(
        [*COLLECTOR, "export", path, "--format", "csv"], capture_output=True, check=True
    ).stdout.decode()
    assert len(text.splitlines()) == 1 + len(formulas)  # splitlines knows more line ends than csv
    for row in csv.reader(text.splitlines()):
        for cell in row:
            assert not cell.strip().startswith(tuple("=+-@＝＋－＠"))
    assert "'=cmd" in text
    assert (
        json.loads(run("export", path, "--format", "jsonl").stdout)["device"] == "=device"
    )  # a program gets the truth


def test_a_time_beyond_the_calendar_is_no_error(full):
    one = event(0, person())
    path = full(Event(one.header.model_copy(update={"captured_at": 1e300}), one.embeddings, one.crops))
    (row,) = csv.DictReader(io.StringIO(run("export", path, "--format", "csv").stdout))
    assert (row["captured_at"], row["captured_utc"]) == ("1e+300", "")


def test_a_reader_that_has_seen_enough_is_no_error(full):
    path = full(*(event(seq, person()) for seq in range(2000)))
    command = [*COLLECTOR, "export", str(path), "--format", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(DEADLINE)


def test_export_does_not_overwrite_the_store_it_reads(full):
    path = full(event(0))
    assert run("export", path, "--format", "csv", "--out", path).returncode == 2
    assert count(path) == 1


def test_an_output_that_cannot_be_written_is_one_line(full, tmp_path):
    assert_one_line(run("export", full(event(0)), "--format", "csv", "--out", tmp_path), 74, str(tmp_path))


def test_the_server_in_another_program(path):
    with Store(path, create=True) as store, Server(ANYWHERE) as server:
        with pytest.raises(ConfigError, match=re.escape(server.address)):
            Server(server.address)

        def deliver() -> None:
            for number in range(5):
                with Box(server.address) as box:
                    box.deliver([event(0, person(), device=f"box-{number}")], device=f"box-{number}")
            server.stop()

        done = Thread(target=deliver)
        done.start()
        ticks: list[int] = []
        server.run(store, lambda: ticks.append(server.stats.events))
        done.join()
        camera = server.stats.cameras["box-3", "door"]
        assert (server.stats.events, server.stats.boxes, ticks[-1]) == (5, 5, 5)
        assert (camera.events, camera.people, len(camera.newest)) == (1, 1, 1)
        assert camera.rate(camera.last_seen) > 0
        assert camera.rate(camera.last_seen + 100) == 0
    server.close()  # once more: nothing


def test_the_view_forgets_the_cameras_heard_longest_ago(path):
    names = [str(i) for i in range(MAX_CAMERAS)]
    events = [event(seq, camera=name) for seq, name in enumerate([*names, "0", "new", "newer"])]

    def deliver(server: Server) -> None:
        with Box(server.address) as box:
            box.deliver(events)
        server.stop()

    with Store(path, create=True) as store, Server(ANYWHERE) as server:
        done = Thread(target=deliver, args=(server,))
        done.start()
        server.run(store)
        done.join()
        cameras = server.stats.cameras
        assert server.stats.events == len(events)
        assert [camera for _, camera in cameras] == [*names[3:], "0", "new", "newer"]
        assert cameras["box", "0"].events == 2
