"""What people ask of a store, as they ask it: gaps, stats and backup, on terminals and in pipes; and a store killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from collector.sinks import Item, Kept, Poison
from collector.store import Store
from edge.events import Event, Header, Person
from edge.protocol import Gone
from tests.fakes import item
from tests.flow.conftest import ROOT, command, starter

DEADLINE = 60.0  # seconds


def event(seq: int, device: str = "box", epoch: int = 7, people: int = 2, notices: tuple[str, ...] = ()) -> Event:
    header = Header(
        device=device, epoch=epoch, seq=seq, camera="door", frame=seq, captured_at=1.7e9 + seq, frame_size=(640, 480),
        bundle="b", bank="c", embedding_dim=16, people=(Person(box=(1, 2, 3, 4), score=0.5, answers=()),) * people,
        notices=notices,
    )  # fmt: skip
    return Event(header, np.eye(16, dtype=np.float16)[:people], (None,) * people)


def gone(first: int, last: int, reason: str, device: str = "box") -> Item:
    return Item(device, 7, first, last, Gone(first=first, last=last, reason=reason))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with two devices, one of them hostile."""
    evil = "north\x1b[2J"
    with Store(tmp_path / "store.db", create=True) as store:
        store.add(
            [
                *(item(event(seq, notices=("the disk is full",))) for seq in range(3)),
                gone(3, 1002, "spool full"),
                Item("box", 7, 1003, 1003, Poison("header: no event"), (b"x",)),
                item(event(1005)),
                item(event(0, device=evil, people=1)),
                gone(1, 1, "too\nold\x1b[1m [red]", device=evil),
            ],
            received_at=1.7e9,
        )
    return tmp_path / "store.db"


GAPS = """\
box  epoch 7  3..1002  1000 missing  spool full
box  epoch 7  1003..1003  1 missing  refused: header: no event
box  epoch 7  1004..1004  1 missing  unknown
north?[2J  epoch 7  1..1  1 missing  too?old?[1m [red]
1,003 events are missing, in 4 gaps
"""


def test_gaps_are_a_line_each_or_json(path: Path, tmp_path: Path) -> None:
    assert command("collector", "gaps", path).stdout == GAPS
    lines = command("collector", "gaps", path, "--json").stdout.splitlines()
    assert json.loads(lines[0]) == {
        "device": "box", "epoch": 7, "first": 3, "last": 1002, "reason": "spool full", "count": 1000
    }  # fmt: skip
    assert json.loads(lines[3])["reason"] == "too\nold\x1b[1m [red]", "a program gets the truth"
    assert len(lines) == 4
    with Store(tmp_path / "whole.db", create=True) as store:
        store.add([item(event(0))], received_at=1.0)
    assert command("collector", "gaps", tmp_path / "whole.db").stdout == "no event is missing\n"
    assert command("collector", "gaps", tmp_path / "whole.db", "--json").stdout == ""


def test_stats_are_a_line_for_each_device_or_json(path: Path, tmp_path: Path) -> None:
    box, north, total = command("collector", "stats", path).stdout.splitlines()
    assert box == (
        "box: 4 events, 8 people in 1 epochs, captured 2023-11-14T22:13:20 to 2023-11-14T22:30:05,"
        " received 2023-11-14T22:13:20 to 2023-11-14T22:13:20,"
        " missing 1,000 spool full, 1 refused: header: no event, 1 unknown, refused 1"
    )
    assert north.startswith("north?[2J: 1 events, 1 people in 1 epochs, ")
    assert north.endswith(", missing 1 too?old?[1m [red], refused 0")
    assert total.startswith("2 devices, 5 events, 9 people, 1,003 missing, 1 refused; 0.")
    told = json.loads(command("collector", "stats", path, "--json").stdout)
    assert told["total"] == {"events": 5, "people": 9, "gone": 1003, "refused": 1}
    assert told["file"]["bytes"] == told["file"]["bytes_in_use"] == path.stat().st_size
    assert told["devices"][0] == {
        "device": "box", "epochs": 1, "events": 4, "people": 8, "captured": [1.7e9, 1.7e9 + 1005],
        "received": [1.7e9, 1.7e9], "gone": {"spool full": 1000, "refused: header: no event": 1, "unknown": 1},
        "refused": 1,
    }  # fmt: skip
    with Store(tmp_path / "empty.db", create=True):
        pass
    (line,) = command("collector", "stats", tmp_path / "empty.db").stdout.splitlines()
    assert line.startswith("0 devices, 0 events, 0 people, 0 missing, 0 refused; 0.")


def on_a_terminal(*words: object) -> str:
    """What a person sees who runs `collector …`."""
    ours, theirs = pty.openpty()
    program = [sys.executable, *starter("collector.cli"), *map(str, words)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT) as process:
        os.close(theirs)
        screen = b""
        try:
            while piece := os.read(ours, 1 << 16):
                screen += piece
        except OSError:  # Linux says so when the other side has closed
            pass
        assert process.wait(DEADLINE) == 0, screen
    os.close(ours)
    return screen.decode()


def test_on_a_terminal_they_are_tables(path: Path) -> None:
    gaps = on_a_terminal("gaps", path)
    for text in ("reason", "1,000", "spool full", "north?[2J", "too?old?[1m [red]", "1,003 events are missing"):
        assert text in gaps
    stats = on_a_terminal("stats", path)
    for text in ("captured, UTC", "2023-11-14T22:30:05", "1,000 spool full", "north?[2J", "2 devices, 5 events"):
        assert text in stats
    for screen in (gaps, stats):
        assert "\x1b[2J" not in screen
        assert "epoch 7" not in screen
    assert "checked" in on_a_terminal("backup", path, path.with_name("copy.db"))


def test_a_terminal_is_not_flooded(tmp_path: Path) -> None:
    with Store(tmp_path / "torn.db", create=True) as store:
        store.add([item(event(2 * seq + 1, people=0)) for seq in range(1200)], received_at=1.0)
    screen = on_a_terminal("gaps", tmp_path / "torn.db")
    assert "and 200 more, which --json tells" in screen
    assert "1,200 events are missing, in 1,200 gaps" in screen
    assert len(screen.splitlines()) < 1010
    assert len(command("collector", "gaps", tmp_path / "torn.db").stdout.splitlines()) == 1201


def test_notices_are_in_json_lines_and_not_in_csv(path: Path) -> None:
    first = command("collector", "export", path, "--format", "jsonl").stdout.splitlines()[0]
    assert json.loads(first)["notices"] == ["the disk is full"]
    table = command("collector", "export", path, "--format", "csv").stdout
    assert "notices" not in table
    assert "disk" not in table
    assert "2023-11-14T22:13:20.000+00:00" in table


def test_a_backup_is_a_store(path: Path, tmp_path: Path) -> None:
    done = command("collector", "backup", path, tmp_path / "copy.db")
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'copy.db'}: 0.2 MB, checked\n", "")
    assert command("collector", "gaps", tmp_path / "copy.db").stdout == GAPS
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "store.db"]


@pytest.mark.parametrize("name", ["store.db", "store.db-wal", "taken"])
def test_a_backup_overwrites_nothing(path: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "store.db-wal").touch()
    before = path.read_bytes()
    done = command("collector", "backup", path, tmp_path / name, code=78)
    assert done.stderr == f"error: backup: {tmp_path / name} exists already; choose another name\n"
    assert (path.read_bytes(), (tmp_path / "taken").read_text()) == (before, "mine")


def test_a_backup_where_no_folder_is_is_one_line(path: Path, tmp_path: Path) -> None:
    done = command("collector", "backup", path, tmp_path / "nowhere" / "x.db", code=74)
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("words", [("gaps",), ("stats", "--json"), ("backup", "to.db")])
def test_what_is_no_store_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "notes.txt").write_text("no database\n" * 100)
    name, *rest = words
    for file, says in (("notes.txt", "no lookout store"), ("missing.db", "expected an existing file")):
        done = command("collector", name, tmp_path / file, *rest, code=78)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        assert says in done.stderr


# --- killed -----------------------------------------------------------------------------------------------------------

WRITER = """if True:
    import sys
    from pathlib import Path
    from collector.store import Store
    from tests.fakes import item
    from tests.flow.test_store_commands import BATCH, event
    with Store(Path(sys.argv[1]), create=True) as store:
        start = store.resume("box", 7)
        while True:
            store.add([item(event(seq)) for seq in range(start, start + BATCH)], received_at=1.0)
            start += BATCH
            print(start, flush=True)
"""
BATCH = 16


@contextmanager
def writing(path: Path) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_was_committed_survives_a_kill_and_no_half_of_a_batch(tmp_path: Path) -> None:
    path, told = tmp_path / "store.db", 0
    for batches in (1, 2, 5, 11):
        with writing(path) as writer:
            assert writer.stdout is not None
            for _ in range(batches):
                told = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            left = [int(line) for line in writer.stdout.read().splitlines()]
        told = max([told, *left])
        with Store(path) as store:
            stored = [header.seq for header in store.headers()]
            assert stored == list(range(len(stored)))
            assert store.resume("box", 7) == len(stored)
            assert len(stored) in (told, told + BATCH), "all that was told, and at most the batch that was being told"
            assert list(store.gaps()) == []
            again = store.add([item(event(seq)) for seq in range(len(stored))], received_at=2.0)
            assert {outcome.kept for outcome in again} == {Kept.DUPLICATE}


def test_a_backup_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with writing(path) as writer:
        assert writer.stdout is not None
        told = int(writer.stdout.readline())
        command("collector", "backup", path, tmp_path / "copy.db")
        command("collector", "stats", path)
    with Store(tmp_path / "copy.db") as copy:
        stored = [header.seq for header in copy.headers()]
    assert stored == list(range(len(stored)))
    assert len(stored) >= told
