"""A store sent on: to a second collector, which has it all once, and as JSON lines; real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from collector.cli import main
from collector.keyring import allow, new_keyring
from collector.replay import GIVE_UP, StoreSource, _Watch, send
from collector.sinks import Item, Poison
from collector.store import RETENTION, Store
from edge.errors import WireError
from edge.events import Event, Header, encode
from edge.keys import new_key, read_key, secure_client
from edge.link import Stream
from edge.protocol import Gone
from tests.boxes import event, person
from tests.fakes import item
from tests.flow.conftest import ROOT, command, starter

DEADLINE = 60.0  # s
EVENTS = [
    *(event(seq, person(crop=seq % 2 == 0, sex="woman"), device="north") for seq in range(40)),
    *(event(seq, device="north") for seq in range(1040, 1060)),
    *(event(seq, person(), device="north", epoch=8) for seq in range(300)),
    *(event(seq, person(top="dark"), device="süd\x1b[2J") for seq in range(3, 30)),
]
NUMBERS = 1060 + 300 + 30


def store(path: Path, *more: Item) -> Path:
    """Two devices, three epochs, and everything that can be missing."""
    items = [
        *map(item, EVENTS),
        Item("north", 7, 40, 999, Gone(first=40, last=999, reason="spool full")),
        Item("north", 7, 1000, 1000, Poison("header: no event"), (b"x",)),
        *more,
    ]
    with Store(path, create=True) as made:
        made.add(items, received_at=1.0)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return store(tmp_path / "first.db")


def key(event: Event) -> tuple[str, int, int, tuple[bytes, ...]]:
    header = event.header
    return header.device, header.epoch, header.seq, tuple(encode(event))


def content(path: Path) -> list[tuple[str, int, int, tuple[bytes, ...]]]:
    with Store(path) as opened:
        return sorted(map(key, opened.events()))


def count(path: Path) -> int:
    """How many events the file holds."""
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM events").fetchone()[0])


def in_this_process(path: Path, *words: object) -> Result:
    """A replay that is to end at once. `output` has both streams."""
    return CliRunner().invoke(main, ["replay", str(path), *map(str, words)])


def gaps(path: Path) -> list[tuple[str, int, int, int, str]]:
    with Store(path) as opened:
        return [(gap.device, gap.epoch, gap.first, gap.last, gap.reason) for gap in opened.gaps()]


@contextmanager
def collecting(path: Path, *words: object) -> Iterator[str]:
    """A collector that ends well; its address."""
    program = [sys.executable, *starter("collector.cli"), "run", "--bind", "tcp://127.0.0.1:*", "--store", path, *words]
    with subprocess.Popen(list(map(str, program)), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            listening = re.match(r"listening on (\S+),", line)
            assert listening, line
            yield listening[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_another_collector_has_it_all_and_a_second_replay_sends_nothing(path: Path, tmp_path: Path) -> None:
    second, before = tmp_path / "second.db", path.read_bytes()
    with collecting(second) as address:
        done = command("collector", "replay", path, "--to", address)
        gone = NUMBERS - len(EVENTS)
        assert done.stderr == ""
        assert done.stdout == (
            f"{address}: sent {len(EVENTS)} events, 0 of them refused, and {gone} missing numbers;"
            " 0 were there already\n"
        )
        assert content(second) == content(path) == sorted(map(key, EVENTS))
        assert gaps(second) == gaps(path)
        done = command("collector", "replay", path, "--to", address)
        assert done.stdout == (
            f"{address}: sent 0 events, 0 of them refused, and 0 missing numbers; {NUMBERS} were there already\n"
        )
        assert path.read_bytes() == before, "it only reads"
        with Store(path) as opened:
            opened.add([item(event(300, device="north", epoch=8))], received_at=2.0)
        done = command("collector", "replay", path, "--to", address)
        assert f"sent 1 events, 0 of them refused, and 0 missing numbers; {NUMBERS} were" in done.stdout
    assert content(second) == content(path)


def test_what_both_have_of_a_box_becomes_one(path: Path, tmp_path: Path) -> None:
    """The box sent its first events to one collector and the others to another."""
    other = tmp_path / "other.db"
    with Store(other, create=True) as opened:
        opened.add([item(event(seq, person(), device="north", epoch=8)) for seq in range(100, 400)], received_at=1.0)
    with collecting(other) as address:
        command("collector", "replay", path, "--to", address)
    with Store(other) as opened:
        there = [header.seq for header in opened.headers() if header.epoch == 8]
    assert sorted(there) == list(range(400))
    assert [gap for gap in gaps(other) if gap[1] == 8] == []


def test_another_event_under_a_number_is_refused_and_told(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with Store(other, create=True) as opened:
        opened.add([item(event(5, device="north", frame=99))], received_at=1.0)
    with collecting(other) as address:
        done = command("collector", "replay", path, "--to", address)
    assert f"sent {len(EVENTS)} events, 1 of them refused" in done.stdout
    assert "refused event 5 of epoch 7: another event has this number" in done.stderr
    with Store(other) as opened:
        assert next(header.frame for header in opened.headers() if (header.epoch, header.seq) == (7, 5)) == 99


def test_what_retention_removed_is_told_as_that(path: Path, tmp_path: Path) -> None:
    with Store(path) as opened:
        opened.add([item(event(30, device="süd\x1b[2J"))], received_at=100.0)
        while opened.prune(101.0, max_age_s=50.0):
            pass
    with collecting(tmp_path / "second.db") as address:
        command("collector", "replay", path, "--to", address)
    assert len(content(tmp_path / "second.db")) == 1
    assert ("north", 8, 0, 299, RETENTION) in gaps(tmp_path / "second.db")
    assert ("north", 7, 40, 999, "spool full") in gaps(tmp_path / "second.db")


def test_a_replay_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    first, second = tmp_path / "first.db", tmp_path / "second.db"
    events = [event(seq, person(crop=True), person()) for seq in range(2000)]
    with Store(first, create=True) as made:
        made.add(list(map(item, events)), received_at=1.0)
    with collecting(second) as address:
        program = [sys.executable, *starter("collector.cli"), "replay", str(first), "--to", address]
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            end = time.monotonic() + DEADLINE
            while count(second) < 100:
                assert time.monotonic() < end
            process.kill()
        before = count(second)
        assert before < 2000, "it was too fast for this test"
        done = command("collector", "replay", first, "--to", address)
        said = re.search(r"sent (\d+) events, .* (\d+) were there already", done.stdout)
        assert said
        assert int(said[1]) + int(said[2]) == 2000
        assert int(said[2]) >= before
    assert content(second) == sorted(map(key, events))


def test_with_keys(path: Path, tmp_path: Path) -> None:
    key, theirs = tmp_path / "our.key", tmp_path / "theirs"
    public = new_keyring(theirs)
    allow(theirs, "*", new_key(key))
    with collecting(tmp_path / "second.db", "--keys", theirs) as address:
        done = command("collector", "replay", path, "--to", address, "--key", key, "--collector-key", public)
    assert f"sent {len(EVENTS)} events" in done.stdout
    assert content(tmp_path / "second.db") == content(path)


def test_a_key_that_may_write_under_one_name_only_gives_up(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    public = new_keyring(theirs)
    ours = new_key(tmp_path / "our.key")
    allow(theirs, "north", ours)
    secure = partial(secure_client, key=read_key(tmp_path / "our.key"), collector_key=public)
    with (
        collecting(tmp_path / "second.db", "--keys", theirs) as address,
        Store(path) as opened,
        pytest.raises(WireError) as caught,
    ):
        send(opened, address, secure, lambda device, count: None, give_up=2.0)
    assert caught.value.exit_code == 76
    assert str(caught.value) == (
        f"{address}: nothing was acknowledged for 2 s, after 360 events and 1000 missing numbers;"
        " mend what was said before and run it again: it goes on from where it stands"
    )
    assert "this key may not write as" in caplog.text
    assert {device for device, *_ in content(tmp_path / "second.db")} == {"north"}


def test_nobody_there_for_a_minute_is_given_up(path: Path) -> None:
    with Store(path) as opened, pytest.raises(WireError, match="for 1 s, after 0 events and 0 missing numbers;"):
        send(opened, "tcp://127.0.0.1:1", None, lambda device, count: None, give_up=1.0)
    assert GIVE_UP == 60.0


def test_patience_begins_anew_whenever_something_arrives(path: Path) -> None:
    arrived: list[tuple[str, int]] = []
    with Store(path) as opened:
        source = StoreSource(opened, "north", [Stream(7, 0, 1060), Stream(8, 0, 300)])
        watch = _Watch(source, "north", lambda device, count: arrived.append((device, count)), GIVE_UP)
        for epoch, end in ((7, 10), (7, 1060), (8, 299)):
            watch._moved_at -= 2 * GIVE_UP
            source.forget(epoch, end)
            assert not watch(), "it has just arrived"
            assert not watch()
        assert arrived == [("north", 10), ("north", 1050), ("north", 299)]
        watch._moved_at -= 2 * GIVE_UP
        assert watch()
        assert not source.over, "given up"
        source.forget(8, 300)
        assert watch()
        assert source.over


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_json_lines_hold_every_number_once(path: Path, tmp_path: Path) -> None:
    done = command("collector", "replay", path, "--out", tmp_path / "all.jsonl")
    assert (done.stdout, done.stderr) == ("", "")
    text = (tmp_path / "all.jsonl").read_text(encoding="utf-8")
    assert text == command("collector", "replay", path, "--out", "-").stdout
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    headers = [Header.model_validate(line) for line in lines if line["schema"] == "lookout.event/1"]
    missing = [line for line in lines if line["schema"] == "lookout.gone/1"]
    assert len(headers) + len(missing) == len(lines)
    assert sorted((one.device, one.epoch, one.seq) for one in headers) == sorted(
        entry[:3] for entry in map(key, EVENTS)
    )
    assert missing[0] == {
        "schema": "lookout.gone/1", "device": "north", "epoch": 7, "first": 40, "last": 999, "reason": "spool full"
    }  # fmt: skip
    told = [tuple(line[name] for name in ("device", "epoch", "first", "last", "reason")) for line in missing]
    assert told == gaps(path)
    expected = 0
    for line in lines:
        first, last = (line["seq"], line["seq"]) if "seq" in line else (line["first"], line["last"])
        assert first in (expected, 0), "in order, and nothing left out"
        expected = last + 1


def test_an_empty_store(tmp_path: Path) -> None:
    with Store(tmp_path / "empty.db", create=True):
        pass
    assert in_this_process(tmp_path / "empty.db", "--out", "-").output == ""
    assert "sent 0 events" in in_this_process(tmp_path / "empty.db", "--to", "tcp://127.0.0.1:1").output


def test_it_does_not_overwrite_the_store_it_reads(path: Path) -> None:
    before = path.read_bytes()
    done = in_this_process(path, "--out", path)
    assert done.exit_code == 2
    assert "--out is the store itself" in done.output
    assert path.read_bytes() == before


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--out", "-", "--to", "tcp://127.0.0.1:1"),
        ("--out", "-", "--insecure"),
        ("--to", "tcp://127.0.0.1:1", "--key", "our.key"),
        ("--to", "tcp://127.0.0.1:1", "--collector-key", "x" * 40),
    ],
)
def test_options_that_do_not_go_together(path: Path, words: tuple[str, ...]) -> None:
    assert in_this_process(path, *words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "tcp://192.0.2.1:5577"), "there are no keys; give --key and --collector-key"),
        (("--to", "ipc://"), "cannot send to 'ipc://': expected tcp://host:port"),
        (("--insecure", "--to", "nonsense"), "cannot send to 'nonsense': expected tcp://host:port"),
        (("--insecure", "--to", "tcp://127.0.0.1"), "cannot send to 'tcp://127.0.0.1': expected"),
        (("--to", "tcp://127.0.0.1:1", "--key", "nowhere.key", "--collector-key", "x" * 40), "nowhere.key"),
        (("--to", "tcp://127.0.0.1:1", "--key", "our.key", "--collector-key", "x" * 41), "--collector-key: not a"),
    ],
)
def test_a_mistake_is_one_line(path: Path, words: tuple[str, ...], says: str) -> None:
    done = in_this_process(path, *words)
    assert done.exit_code == 78
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1
    assert says in done.output


def test_bytes_that_are_no_text_are_no_address(path: Path) -> None:
    done = command("collector", "replay", path, "--insecure", "--to", os.fsdecode(b"tcp://\xff:1"), code=78)
    assert done.stderr.startswith("error: cannot send to 'tcp://\\udcff:1'")
    assert done.stderr.count("\n") == 1


def test_progress_on_a_terminal(path: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    program = [sys.executable, *starter("collector.cli"), "replay", str(path), "--to", "tcp://127.0.0.1:1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT) as process:
        screen, end = "", time.monotonic() + DEADLINE

        def read_until(*texts: str) -> None:
            nonlocal screen
            while not all(text in screen for text in texts):
                assert time.monotonic() < end, screen
                if select.select([ours], [], [], 0.1)[0]:
                    screen += os.read(ours, 1 << 16).decode()

        read_until(f"0/{NUMBERS}", "nobody listens there")
        process.send_signal(signal.SIGINT)
        read_until("interrupted")
        assert process.wait(DEADLINE) == 130
    os.close(ours)
    os.close(theirs)  # only now: Linux may lose what is still on its way through a terminal that nobody holds
    assert "\x1b[2J" not in screen
