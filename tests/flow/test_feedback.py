"""What people do with stored people, as they do it: ask them something new, say what is true, export what was said."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from collector.labelling import KEYS
from collector.store import Store
from edge.bundle import Bundle, open_bundle
from edge.events import Event, Person
from export.labels import read_labels
from tests.fakes import item
from tests.flow.conftest import ROOT, command, starter
from tests.unit.test_labelling import person, seen

WORDS = ROOT / "prompts/person-mini.toml"
DEADLINE = 60.0  # seconds
CTRL_C, CTRL_D = "\x03", "\x04"


def looking_like(bundle: Bundle, *people: tuple[Person, str], seq: int) -> Event:
    """An event of this bundle in which each person's vector is that of an option."""
    facts = bundle.manifest
    options = [option for category in bundle.bank.categories for option in category.options]
    event = seen(seq, *(one for one, _ in people), bundle=facts.seal(), dim=facts.encoder.dim)
    rows = [options.index(option) for _, option in people]
    return Event(event.header, bundle.bank.vectors[rows].astype(np.float16), event.crops)


@pytest.fixture(scope="module")
def bundle(mini: Path) -> Bundle:
    return open_bundle(mini)


@pytest.fixture
def path(tmp_path: Path, bundle: Bundle) -> Path:
    """Somebody with long hair who stays for three events, two who pass by, and one of another encoder."""
    stays = [person(track=5, looks=looks, hair_length="long_hair bald", crop=looks == 3) for looks in (1, 3, 2)]
    passes = person(hair_length="bald", unknown=True, sleeve="sleeveless")
    with Store(tmp_path / "store.db", create=True) as store:
        events = [
            looking_like(bundle, (stays[0], "bald"), (passes, "bald"), seq=0),
            looking_like(bundle, (stays[1], "short hair"), seq=1),
            looking_like(bundle, (passes, "bald"), (stays[2], "long hair"), seq=2),
            seen(0, passes, bundle="another", epoch=6),
        ]
        for event in (events[3], *events[:3]):
            store.add([item(event)], received_at=1.0)
    return tmp_path / "store.db"


def hair(told: str) -> dict[str, int]:
    answer = json.loads(told)
    (category,) = (one for one in answer["categories"] if one["category"] == "hair length")
    assert answer["people"] == sum(option["people"] for option in category["options"]) + category["unknown"]
    return {option["option"]: option["people"] for option in category["options"]}


# --- ask --------------------------------------------------------------------------------------------------------------


def test_stored_people_are_asked_with_words_old_and_new(path: Path, mini: Path, tmp_path: Path) -> None:
    words = ("--prompts", WORDS, "--bundle", mini)
    done = command("collector", "ask", path, *words)
    assert done.stdout.splitlines()[:4] == [
        "3 people asked, 1 more of another encoder", "left out: gender: sensitive: --sensitive 'gender' asks it", "",
        "hair length",
    ]  # fmt: skip
    assert done.stderr == ""
    expected = {"short hair": 0, "long hair": 1, "bald": 2}
    assert hair(command("collector", "ask", path, *words, "--json").stdout) == expected, "a track's last event counts"
    own = command("collector", "ask", path, "--bundle", mini, "--json", "--sensitive", "gender").stdout
    assert hair(own) == expected
    assert json.loads(own)["left_out"] == []
    text = WORDS.read_text(encoding="utf-8").replace(
        'question = "sleeve length', 'region = "upper"\nquestion = "sleeve length'
    )
    text = text.replace('name = "hair length"', 'name = "curls"').replace('name = "bald"', 'name = "no curls"')
    (tmp_path / "new.toml").write_text(text, encoding="utf-8")
    done = command("collector", "ask", path, "--prompts", tmp_path / "new.toml", "--bundle", mini)
    assert "left out: sleeve length: looks at upper, of which no vector is stored" in done.stdout
    lines = done.stdout.split("\ncurls\n")[1].splitlines()
    assert lines[0].split() == ["short", "hair", "0", "0.0", "%"]
    (bald,) = (i for i, line in enumerate(lines) if line.startswith("  no curls"))
    assert lines[bald].split()[2:5] == ["2", "66.7", "%"]
    assert lines[bald + 1].endswith(" %  box/door  2023-11-14T22:13:22.000+00:00  box 1 2 30 40"), (
        "the newer of two equals"
    )


def test_nobody_can_be_asked_and_a_mistake_is_one_line(path: Path, mini: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "empty.db", create=True):
        pass
    assert command("collector", "ask", tmp_path / "empty.db", "--bundle", mini).stdout.startswith("0 people asked\n")
    with Store(tmp_path / "other.db", create=True) as store:
        store.add([item(seen(0, person()))], received_at=1.0)
    for store_path, words, code, says in (
        (tmp_path / "other.db", ("--bundle", mini), 78, "got 1 people of others; name the bundle that the boxes run"),
        (path, ("--bundle", mini, "--sensitive", "age"), 78, "--sensitive: the words have no category 'age'"),
        (path, ("--bundle", mini, "--prompts", tmp_path / "none.toml"), 78, "none.toml"),
        (path, ("--bundle", tmp_path), 72, "manifest.json"),
        (tmp_path / "none.db", ("--bundle", mini), 78, "expected an existing file"),
    ):
        done = command("collector", "ask", store_path, *words, code=code)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        assert says in done.stderr


# --- label ------------------------------------------------------------------------------------------------------------


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


def test_labels_go_out_and_come_in_and_are_a_set_for_the_export(
    path: Path, bundle: Bundle, mini: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    done = command("collector", "label", path, "--bundle", mini, "--out", out)
    assert done.stdout == f"{out}/labels.csv: 3 people, 1 with a picture, 1 more of another encoder\n"
    rows = table(out / "labels.csv")
    assert [(row["image"], row["person"], row["hair length guess"], row["top type guess"]) for row in rows] == [
        ("images/box-7-2-0.jpg", "images/box-7-2-0.jpg", "unknown", ""),
        ("images/box-7-1-0.jpg", "box/7/door/5", "long hair", ""),
        ("images/box-7-0-1.jpg", "images/box-7-0-1.jpg", "unknown", ""),
    ]
    asked = [category.name for category in bundle.bank.categories if category.name != "gender"]
    assert list(rows[0]) == ["image", "person", *asked, *(f"{name} guess" for name in asked)], "what the bundle asks"
    assert [file.name for file in (out / "images").iterdir()] == ["box-7-1-0.jpg"]
    rows[0]["hair length"], rows[1]["hair length"] = "bald", "long hair"
    with (out / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    labelled = read_labels(out, bundle.bank.categories, None)
    assert labelled.labels["hair length"] == ("bald", "long hair", None)
    assert labelled.encoder == bundle.manifest.seal()
    assert (labelled.people[1], labelled.skipped_categories) == ("box/7/door/5", ())
    done = command("collector", "label", path, "--bundle", mini, "--read", out / "labels.csv")
    assert done.stdout == f"{out}/labels.csv: 2 corrections of 2 people, 0 were known\n"
    command("collector", "label", path, "--bundle", mini, "--out", tmp_path / "again", "--device", "box", "--limit", 2)
    assert [row["hair length"] for row in table(tmp_path / "again/labels.csv")] == ["bald", "long hair"]
    rows[0] |= {"hair length": "-", "sleeve length": "sleeveless", "gender": "man"}
    with (out / "labels.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = command("collector", "label", path, "--bundle", mini, "--read", out / "labels.csv")
    assert done.stdout == f"{out}/labels.csv: 1 corrections of 1 people, 1 taken back, 1 were known\n"
    assert done.stderr == "ignored, no category of the bundle, or sensitive and not named: 'gender'\n"
    named = ("--bundle", mini, "--sensitive", "gender")
    done = command("collector", "label", path, *named, "--read", out / "labels.csv")
    assert (done.stdout.split(": ")[1], done.stderr) == ("1 corrections of 1 people, 2 were known\n", "")
    command("collector", "label", path, *named, "--out", tmp_path / "all", "--limit", 1)
    (row,) = table(tmp_path / "all/labels.csv")
    assert (row["gender"], row["hair length"], row["sleeve length"]) == ("man", "", "sleeveless")
    done = command("collector", "label", path, "--bundle", mini, "--sensitive", "age", "--out", tmp_path / "x", code=78)
    assert "--sensitive: the words have no category 'age'" in done.stderr
    rows[2]["hair length"] = "bold"
    with (out / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "note"])
        writer.writeheader()
        writer.writerows(rows)
    done = command("collector", "label", path, "--bundle", mini, "--read", out / "labels.csv", code=78)
    assert done.stderr == (
        f"error: {out}/labels.csv: line 4: hair length: no such option: got 'bold'; did you mean 'bald'?\n"
    )
    assert "exists already" in command("collector", "label", path, "--bundle", mini, "--out", out, code=78).stderr


def test_labels_of_nobody_and_options_that_do_not_go_together(path: Path, mini: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "empty.db", create=True):
        pass
    out = tmp_path / "set"
    done = command("collector", "label", tmp_path / "empty.db", "--bundle", mini, "--out", out)
    assert done.stdout == f"{out}/labels.csv: 0 people, 0 with a picture\n"
    done = command("collector", "label", tmp_path / "empty.db", "--bundle", mini, "--read", out / "labels.csv")
    assert done.stdout == f"{out}/labels.csv: 0 corrections of 0 people, 0 were known\n"
    done = command("collector", "label", path, "--bundle", mini, code=2)
    assert "no terminal to ask on: --out FOLDER or --read FILE is needed" in done.stderr
    command("collector", "label", path, "--bundle", mini, "--out", out, "--read", out / "labels.csv", code=2)
    done = command("collector", "label", path, "--bundle", mini, "--read", out / "labels.csv", "--device", "x", code=2)
    assert "--device and --limit are not for --read" in done.stderr


def typing(keys: list[str], *words: object, code: int = 0) -> str:
    """What a person sees who runs `collector …` and types these, one at each prompt."""
    ours, theirs = pty.openpty()
    program = [sys.executable, *starter("collector.cli"), *map(str, words)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT) as process:
        os.close(theirs)
        screen, left, typed = b"", list(keys), ""
        until = time.monotonic() + DEADLINE
        try:
            while time.monotonic() < until:
                if not select.select([ours], [], [], 1.0)[0]:
                    if typed == CTRL_C:  # what came just before the read began waits there for the next key
                        process.send_signal(signal.SIGINT)
                    continue
                if not (piece := os.read(ours, 1 << 16)):
                    break
                screen += piece
                if screen.endswith(b" ? ") and left:
                    if (typed := left.pop(0)) == CTRL_C:
                        process.send_signal(signal.SIGINT)  # the terminal would, were it the process's own
                    else:
                        os.write(ours, typed.encode())
        except OSError:  # Linux says so when the other side has closed
            pass
        if time.monotonic() >= until:
            process.kill()
        assert process.wait(DEADLINE) == code, screen
    os.close(ours)
    assert not left, screen
    return screen.decode()


def test_on_a_terminal_it_asks_one_after_the_other(path: Path, mini: Path, tmp_path: Path) -> None:
    rest = ["s\n"] * (len(open_bundle(mini).bank.categories) - 2)
    screen = typing(["2\n", *rest, "7\n", "\n", "q\n"], "label", path, "--bundle", mini)
    for text in (
        "no picture: box/door, 2023-11-14T22:13:22.000+00:00, box 1 2 30 40\r\n",
        "hair length: unknown; 1 bald 75 %, 2 short hair, 3 long hair ? 2",
        "sleeve length: 1 long sleeves, 2 short sleeves, 3 sleeveless ? s",
        "/box-7-1-0.jpg: box/door, 2023-11-14T22:13:21.000+00:00, box 1 2 30 40, track 5 of 3 looks\r\n",
        "hair length: 1 long hair 75 % (guess), 2 bald 38 %, 3 short hair ? 7",
        "2 answers",
    ):
        assert text in screen
    assert screen.count(KEYS) == 2, "at the beginning, and where a number is none"
    assert screen.count("hair length:") == 3
    command("collector", "label", path, "--bundle", mini, "--out", tmp_path / "set")
    assert [row["hair length"] for row in table(tmp_path / "set/labels.csv")] == ["short hair", "long hair", ""]
    assert [row["sleeve length"] for row in table(tmp_path / "set/labels.csv")] == ["", "", ""]


@pytest.mark.parametrize(("key", "code", "says"), [(CTRL_D, 0, "1 answers"), (CTRL_C, 130, "interrupted")])
def test_ctrl_d_quits_and_ctrl_c_interrupts_and_what_was_said_stays(
    path: Path, mini: Path, key: str, code: int, says: str
) -> None:
    screen = typing(["3\n", key], "label", path, "--bundle", mini, code=code)
    assert screen.splitlines()[-1] == says
    assert "Traceback" not in screen
    with Store(path) as store, store.snapshot():
        assert list(store.people.corrections().values()) == [{"hair length": "long hair"}]


# --- export -----------------------------------------------------------------------------------------------------------


def test_the_table_of_people_names_tracks_and_what_is_not_known(path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(command("collector", "export", path, "--format", "csv").stdout)))
    assert [(row["track"], row["hair length"], row["hair length probability"]) for row in rows] == [
        ("", "unknown", "0.75"), ("5", "long hair", "0.75"), ("", "unknown", "0.75"), ("5", "long hair", "0.75"),
        ("", "unknown", "0.75"), ("5", "long hair", "0.75"),
    ]  # fmt: skip
    first = json.loads(command("collector", "export", path, "--format", "jsonl").stdout.splitlines()[2])
    assert first["people"][0]["looks"] == 3
