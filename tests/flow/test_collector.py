"""The collector as people run it: its own process, real sockets, real signals, a store that others read."""

import csv
import io
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Thread, Timer

import numpy as np
import psutil
import pytest
import zmq

from collector.server import MAX_CAMERAS, Server
from collector.store import Store
from edge.errors import ConfigError
from edge.events import MAX_CROP, Answer, Choice, Event, Header, Person, encode
from tests.flow.conftest import starter

COLLECTOR = [sys.executable, *starter("collector.cli")]
DEADLINE = 30.0  # seconds
ANYWHERE = "tcp://127.0.0.1:*"


def person(crop: bool = False, **options: str) -> Person:
    answers = tuple(
        Answer(category=name.replace("_", " "), top=(Choice(option=option, probability=0.875),))
        for name, option in options.items()
    )
    return Person(box=(1.5, 2, 30, 40.25), score=0.5, answers=answers, crop=crop)


def event(seq: int, *people: Person, device: str = "box", camera: str = "door") -> Event:
    header = Header(
        device=device, epoch=7, seq=seq, camera=camera, frame=seq, captured_at=1.7e9 + seq, frame_size=(640, 480),
        bundle="b", bank="c", embedding_dim=64, people=people,
    )  # fmt: skip
    crops = tuple(b"\xff\xd8jpeg %d" % seq if person.crop else None for person in people)
    return Event(header, np.eye(64, dtype=np.float16)[: len(people)], crops)


def key(event: Event) -> tuple[Header, bytes, tuple[bytes | None, ...]]:
    """What makes two events equal."""
    return event.header, event.embeddings.tobytes(), event.crops


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.02)


def send(address: str, *messages: list[bytes]) -> None:
    """Push `messages` from one socket; returns when all have left this process."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = int(DEADLINE * 1000)
        socket.sndtimeo = int(DEADLINE * 1000)
        socket.connect(address)
        for frames in messages:
            socket.send_multipart(frames)


def count(store: Path) -> int:
    """How many events the file holds."""
    with closing(sqlite3.connect(store)) as database:
        return int(database.execute("SELECT count(*) FROM events").fetchone()[0])


class Running:
    """A collector process on a port of its own choice; killed at the end of the `with` if it still runs."""

    def __init__(self, store: Path) -> None:
        self.store = store
        command = [*COLLECTOR, "run", "--bind", ANYWHERE, "--store", str(store)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Running":
        timer = Timer(DEADLINE, self.process.kill)
        timer.start()
        first = self.process.stdout.readline()
        timer.cancel()
        timer.join()
        self.address = re.fullmatch(r"listening on (tcp://127\.0\.0\.1:\d+), storing in .*\n", first)[1]
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
        out, err = self.process.communicate(timeout=DEADLINE)
        assert "\x1b" not in out + err
        return self.process.returncode, out.splitlines()[-1] if out else "", err


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
def full(path):
    """Makes `path` a store of these events."""

    def fill(*events: Event) -> Path:
        with Store(path, create=True) as store:
            store.add(events, received_at=1.0)
        return path

    return fill


def test_what_boxes_send_is_stored_and_exported_equal(collector, path, tmp_path):
    events = [
        event(0),
        event(1, person(sex="woman", top="dark top")),
        event(2, *(person(crop=i % 2 == 0, größe="高い") for i in range(9))),
    ]
    send(collector.address, *map(encode, events))
    eventually(lambda: collector.stored() == 3, "the events")
    assert run("export", path, "--format", "jsonl", "--out", tmp_path / "a.jsonl").returncode == 0  # while it runs
    assert collector.end() == (0, f"stored 3 events, 10 people, 0 duplicates, 0 refused in {path}", "")
    with Store(path) as store:
        assert list(map(key, store.events())) == list(map(key, events))
    lines = run("export", path, "--format", "jsonl").stdout
    assert [Header.model_validate_json(line) for line in lines.split("\n")[:-1]] == [one.header for one in events]
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == lines


def test_an_event_sent_again_is_a_duplicate(collector, path):
    messages = [encode(event(seq, person())) for seq in range(20)]
    send(collector.address, *messages, *messages)
    send(collector.address, *messages)
    eventually(lambda: collector.stored() == 20, "the events")
    assert collector.end() == (0, f"stored 20 events, 20 people, 40 duplicates, 0 refused in {path}", "")


def test_garbage_changes_nothing(collector, path):
    good = [encode(event(seq, person(), person())) for seq in range(12)]
    header, embeddings = good[0]
    garbage = [
        [b""],
        [b"", b""],
        [b"\0" * 1000],
        [b"GET / HTTP/1.1\r\n\r\n", b""],
        [header],
        [header, b""],
        [header, embeddings[:-1]],
        [header, embeddings, b"\xff\xd8jpeg"],
        [header, bytes(len(embeddings))],
        [header.replace(b"box", b"\xff\xfe"), embeddings],
        [header.replace(b'"frame":0', b'"frame":99999999999999999999'), embeddings],
        [b'{"\\u001b[2J\\u001b]0;evil\\u0007":1}', b""],
        *([os.urandom(50) for _ in range(i)] for i in range(1, 9)),
    ]
    for i, frames in enumerate(good):
        send(collector.address, *garbage[i::12], frames)
    eventually(lambda: collector.stored() == 12, "the good ones")
    code, last, err = collector.end()
    assert (code, last) == (0, f"stored 12 events, 24 people, 0 duplicates, 20 refused in {path}")
    assert re.match(r"refused bytes from 127\.0\.0\.1: .+ \(1 so far\)\n", err)
    assert len(err.splitlines()) < 20  # a flood of garbage is no flood of lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_had_been_sent(collector, path, number):
    send(collector.address, *(encode(event(seq, person(sex="man"))) for seq in range(600)))
    assert collector.end(number) == (0, f"stored 600 events, 600 people, 0 duplicates, 0 refused in {path}", "")


def test_senders_that_never_fall_silent_do_not_hold_up_the_end(collector):
    program = """if True:
        import sys, zmq
        socket = zmq.Context().socket(zmq.PUSH)
        socket.connect(sys.argv[1])
        while True: socket.send(b"garbage")"""
    sending = subprocess.Popen([sys.executable, "-c", program, collector.address])
    try:
        eventually(lambda: psutil.Process(collector.process.pid).cpu_times().user > 1, "work")
        assert collector.end()[0] == 0
    finally:
        sending.kill()
        sending.wait()


def test_a_killed_collector_leaves_a_readable_store(collector, path):
    events = [event(seq, person(), person(crop=True)) for seq in range(3000)]
    sender = Thread(target=send, args=(collector.address, *map(encode, events)))
    sender.start()
    eventually(lambda: collector.stored() > 0, "a first batch")
    collector.process.kill()
    collector.process.wait()
    with zmq.Context() as context, context.socket(zmq.PULL) as rest:  # takes what the sender still holds
        rest.bind(collector.address)
        while sender.is_alive():
            if rest.poll(20):
                rest.recv_multipart()
    sender.join()
    with Store(path) as store:
        left = list(map(key, store.events()))
    assert left == list(map(key, events[: len(left)]))
    with Running(path) as again:
        send(again.address, *map(encode, events))
        eventually(lambda: again.stored() == len(events), "the rest")
        code, last, _ = again.end()
    assert code == 0
    assert f"{len(left)} duplicates" in last
    with Store(path) as store:
        assert list(map(key, store.events())) == list(map(key, events))


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
    "address", ["", "nonsense", "127.0.0.1:5577", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "tcp://192.0.2.1:5577"]
)
def test_an_address_that_cannot_be_is_one_line(path, address):
    assert_one_line(run("run", "--bind", address, "--store", path), 78, f"cannot listen on '{address}'")


@pytest.mark.parametrize("command", [("run", "--bind", ANYWHERE, "--store"), ("export", "--format", "csv")])
def test_a_store_that_is_none_is_one_line(tmp_path, command):
    text, newer = tmp_path / "notes.txt", tmp_path / "newer.db"
    text.write_text("no database\n" * 100)
    with Store(newer, create=True) as store:
        store._db.execute("PRAGMA user_version = 2")
    assert_one_line(run(*command, tmp_path), 78, str(tmp_path))
    assert_one_line(run(*command, text), 78, str(text), "not a database")
    assert_one_line(run(*command, newer), 78, str(newer), "newer lookout")
    assert_one_line(run(*command, tmp_path / "nowhere" / "x.db"), 78, "nowhere")
    assert "Traceback" in run("--debug", *command, text).stderr


def test_a_full_disk_is_one_line_and_keeps_what_was_committed(collector, path):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit")
    send(collector.address, encode(event(0, person())))
    eventually(lambda: collector.stored() == 1, "the first event")
    resource.prlimit(collector.process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))  # bytes a file may have
    big = Event(event(1, person(crop=True)).header, np.eye(64, dtype=np.float16)[:1], (b"\xff\xd8" + bytes(10**6),))
    send(collector.address, encode(big))
    _, err = collector.process.communicate(timeout=DEADLINE)
    assert collector.process.returncode == 74
    assert err.startswith(f"error: store {path}: ")
    assert err.count("\n") == 1
    assert collector.stored() == 1


def test_a_message_too_long_costs_its_sender_the_connection(collector, path):
    process = psutil.Process(collector.process.pid)
    before = process.memory_info().rss
    with zmq.Context() as context, context.socket(zmq.PUSH) as hostile:
        hostile.linger = 0
        monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        hostile.connect(collector.address)
        hostile.send(bytes(8 * MAX_CROP))
        assert monitor.poll(int(DEADLINE * 1000)), "still connected"
        hostile.disable_monitor()
        monitor.close()
        assert process.memory_info().rss < before + 2 * MAX_CROP
        send(collector.address, encode(event(0, person())))
    eventually(lambda: collector.stored() == 1, "the good one")
    assert collector.end() == (0, f"stored 1 events, 1 people, 0 duplicates, 0 refused in {path}", "")


def test_quiet_says_only_the_last_line(path):
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    command = [*COLLECTOR, "run", "--quiet", "--bind", address, "--store", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        send(address, encode(event(0)))  # returns when the collector is there
        process.terminate()
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert out == f"stored 1 events, 0 people, 0 duplicates, 0 refused in {path}\n"


def test_the_table_on_a_terminal(path):
    ours, theirs = pty.openpty()
    command = [*COLLECTOR, "run", "--bind", ANYWHERE, "--store", str(path)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
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
        address = re.search(r"tcp://[\d.:]+", screen)[0]
        send(address, encode(event(0, person(top="dark top", sleeves="long\x1b[2Jsleeves"), device="north\n")))
        eventually(lambda: shows("dark top"), "the person")
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
        "x1": "1.5", "y1": "2.0", "x2": "30.0", "y2": "40.25", "score": "0.5",
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
        boxes = [Thread(target=send, args=(server.address, encode(event(i, person())))) for i in range(5)]
        for box in boxes:
            box.start()
        done = Thread(target=lambda: ([box.join() for box in boxes], server.stop()))
        done.start()
        ticks: list[int] = []
        server.run(store, lambda: ticks.append(server.stats.events))
        done.join()
        camera = server.stats.cameras["box", "door"]
        assert (server.stats.events, camera.events, camera.people, ticks[-1]) == (5, 5, 5, 5)
        assert len(camera.newest) == 1
        assert camera.rate(camera.last_seen) > 0
        assert camera.rate(camera.last_seen + 100) == 0


def test_the_view_forgets_the_cameras_heard_longest_ago(path):
    names = [str(i) for i in range(MAX_CAMERAS)]
    with Store(path, create=True) as store, Server(ANYWHERE) as server:
        messages = [encode(event(seq, camera=name)) for seq, name in enumerate([*names, "0", "new", "newer"])]
        box = Thread(target=lambda: (send(server.address, *messages), server.stop()))
        box.start()
        server.run(store)
        box.join()
        cameras = server.stats.cameras
        assert server.stats.events == len(messages)
        assert [camera for _, camera in cameras] == [*names[3:], "0", "new", "newer"]
        assert cameras["box", "0"].events == 2
