"""The main job end to end, with real processes, sockets, files: a box watches, a collector keeps."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import zmq

from edge.bundle import open_bundle
from edge.events import decode
from tests.flow.conftest import PICTURE, ROOT, command, starter

DEADLINE = 60  # s
NOWHERE = "tcp://127.0.0.1:1"  # where nobody listens


def config(folder: Path, bundle: Path, source: Path | str, more: str = "", address: str = NOWHERE) -> Path:
    path = folder / "edge.toml"
    path.write_text(
        f'device = "box"\nbundle = "{bundle}"\n[[camera]]\nname = "pan"\nsource = "{source}"\n'
        f'[health]\naddress = ""\n[publish]\naddress = "{address}"\n{more}'
    )
    return path


@contextmanager
def process(*words: object) -> Iterator[subprocess.Popen[str]]:
    module = {"edge": "edge.cli", "collector": "collector.cli"}[str(words[0])]
    with subprocess.Popen(
        [sys.executable, *starter(module), *map(str, words[1:])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def collecting(store: Path, bind: str = "tcp://127.0.0.1:*") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A collector that is ready, and its address."""
    with process("collector", "run", "--bind", bind, "--store", store) as collector:
        assert collector.stdout is not None
        line = collector.stdout.readline()
        listening = re.match(r"listening on (tcp://\S+:\d+),", line)
        assert listening, line or collector.communicate()[1]
        yield collector, listening[1]


def rows(store: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(store) as database:
        found = database.execute(query).fetchall()
    database.close()
    return found


def test_what_the_box_saw_the_store_has(mini: Path, video: Path, tmp_path: Path) -> None:
    store = tmp_path / "results.db"
    with collecting(store) as (collector, address):
        chosen = config(tmp_path, mini, video, "linger_ms = 20000\n[match]\ntop_k = 2\n", address)
        done = command("edge", "run", "--config", chosen, "--draw", tmp_path / "demo.png")
        collector.send_signal(signal.SIGTERM)
        said, _ = collector.communicate(timeout=DEADLINE)
        assert collector.returncode == 0
    assert "20 frames" in done.stdout
    assert "21 events delivered, 0 wait in the spool" in done.stdout, "one per frame, and the tracks' end"
    assert "stored 21 events" in said
    assert cv2.imread(str(tmp_path / "demo.png")) is not None

    lines = command("collector", "export", store, "--format", "jsonl").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["frame"] for event in events] == [*range(20), 19]
    assert [event["seq"] for event in events] == list(range(21))
    bundle = open_bundle(mini)
    *described, last = events
    tracks = {person["track"] for event in described for person in event["people"]}
    ended = [one for event in events for one in event["ended"]]
    assert {one["track"] for one in ended} == tracks, "each track is closed"
    assert len(ended) == len(tracks) < sum(len(event["people"]) for event in described) / 5
    assert last["people"] == []
    for event in described:
        assert (event["schema"], event["device"], event["camera"]) == ("lookout.event/1", "box", "pan")
        assert (event["bundle"], event["bank"]) == (bundle.manifest.seal(), bundle.bank.sha256)
        assert tuple(event["frame_size"]) == (768, 576)
        assert len(event["people"]) >= 3
        for person in event["people"]:
            assert len(person["answers"]) == 12, "gender is sensitive: answered only when asked for"
            assert all(len(answer["top"]) == 2 for answer in person["answers"])
            assert all(0 < answer["support"] <= 1 for answer in person["answers"])
            assert person["looks"] >= 1
            assert person["crop"] is False
    people = rows(store, "SELECT count(*), count(embedding), sum(crop IS NOT NULL) FROM people")
    assert people == [(sum(len(event["people"]) for event in events),) * 2 + (0,)]


def test_crops_leave_the_box_only_when_turned_on(mini: Path, video: Path, tmp_path: Path) -> None:
    store = tmp_path / "results.db"
    with collecting(store) as (collector, address):
        chosen = config(
            tmp_path, mini, video, 'linger_ms = 20000\ncrops = true\n[match]\nsensitive = ["gender"]\n', address
        )
        command("edge", "run", "--config", chosen, "--max-frames", 2)
        collector.send_signal(signal.SIGTERM)
        collector.communicate(timeout=DEADLINE)
    for box, crop, answers in rows(store, "SELECT x2 - x1, crop, answers FROM people"):
        assert isinstance(crop, bytes)
        picture = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR)
        assert abs(picture.shape[1] - box) <= 2
        assert "gender" in str(answers)


def test_events_travel_over_ipv6(mini: Path, video: Path, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with collecting(tmp_path / "results.db", "tcp://[::1]:*") as (collector, address):
        assert address.startswith("tcp://[::1]:")
        command("edge", "run", "--config", config(tmp_path, mini, video, "linger_ms = 20000\n", address))
        collector.send_signal(signal.SIGTERM)
        said, _ = collector.communicate(timeout=DEADLINE)
    assert "stored 21 events" in said


def test_a_camera_name_is_printed_as_it_is_written(mini: Path, video: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, mini, video, "linger_ms = 0\n")
    chosen.write_text(chosen.read_text().replace('"pan"', '"gate [/x] :dog:"'))
    done = command("edge", "run", "--config", chosen)
    assert "camera gate [/x] :dog:: 20 frames, 0 dropped\n" in done.stdout


def test_no_collector_costs_no_frame_and_no_event(mini: Path, video: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, mini, video, "linger_ms = 0\n")
    for run in (1, 2):
        done = command("edge", "run", "--config", chosen)
        assert "20 frames" in done.stdout
        assert f"0 events delivered, {21 * run} wait in the spool" in done.stdout
    store = tmp_path / "results.db"
    with collecting(store) as (collector, address):
        config(tmp_path, mini, video, "linger_ms = 20000\n", address)
        assert "63 events delivered, 0 wait" in command("edge", "run", "--config", chosen).stdout
        collector.send_signal(signal.SIGTERM)
        collector.communicate(timeout=DEADLINE)
    assert rows(store, "SELECT count(*), count(DISTINCT epoch), max(seq) FROM events") == [(63, 3, 20)]


def test_the_pictures_of_a_folder_have_nothing_to_do_with_each_other(mini: Path, tmp_path: Path) -> None:
    """The same picture twice: with people followed, the second would be described by the first's looks."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).symlink_to(PICTURE)
    store = tmp_path / "results.db"
    with collecting(store) as (collector, address):
        done = command("edge", "run", "--config", config(tmp_path, mini, folder, "linger_ms = 20000\n", address))
        collector.send_signal(signal.SIGTERM)
        collector.communicate(timeout=DEADLINE)
    assert "tracks" not in done.stdout
    events = [
        json.loads(line) for line in command("collector", "export", store, "--format", "jsonl").stdout.splitlines()
    ]
    assert [event["ended"] for event in events] == [[], []]
    first, second = (event["people"] for event in events)
    assert first == second
    assert len(first) >= 3
    assert all("track" not in person and "looks" not in person for person in first)


def test_a_killed_box_loses_nothing_that_it_had_seen(mini: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.jpg").symlink_to(PICTURE)
    store = tmp_path / "results.db"
    with collecting(store) as (collector, address):
        chosen = config(tmp_path, mini, folder, "linger_ms = 20000\n", address)
        with process("edge", "run", "--config", chosen) as box:
            end = time.monotonic() + DEADLINE
            while not rows(store, "SELECT count(*) FROM events")[0][0]:
                assert time.monotonic() < end, "nothing arrives"
                assert box.poll() is None
            box.kill()
            box.wait()
        (waiting,) = rows(tmp_path / "spool.db", "SELECT count(*) FROM entries")[0]
        command("edge", "run", "--config", chosen, "--max-frames", 1)
        collector.send_signal(signal.SIGTERM)
        collector.communicate(timeout=DEADLINE)
    (first, last), *others = rows(store, "SELECT min(seq), max(seq) + 1 - count(*) FROM events GROUP BY epoch")
    assert (first, last, others) == (0, 0, [(0, 0)]), "numbers without gaps, in two epochs"
    assert int(str(waiting)) >= 0
    assert command("collector", "gaps", store, "--json").stdout == ""


def test_push_is_for_others(mini: Path, video: Path, tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as other:
        other.linger, other.rcvtimeo = 0, 1000 * DEADLINE
        port = other.bind_to_random_port("tcp://127.0.0.1")
        more = 'linger_ms = 20000\ntransport = "push"\n'
        done = command("edge", "run", "--config", config(tmp_path, mini, video, more, f"tcp://127.0.0.1:{port}"))
        assert [decode(other.recv_multipart()).header.seq for _ in range(21)] == list(range(21))
    assert "21 events queued, 0 dropped" in done.stdout
    assert not (tmp_path / "spool.db").exists()


def test_another_machine_wants_keys(mini: Path, video: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, mini, video, "", "tcp://192.0.2.1:5577")
    for words in (("run", "--config", chosen), ("check", chosen)):
        assert "edge keys new" in command("edge", *words, code=78).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(mini: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.jpg").symlink_to(PICTURE)
    with process("edge", "run", "--config", config(tmp_path, mini, folder, "linger_ms = 0\n")) as box:
        assert box.stderr is not None
        assert next(line for line in box.stderr if "1 camera(s)" in line)
        box.send_signal(number)
        said, log = box.communicate(timeout=DEADLINE)
    assert box.returncode == 0, log
    described = re.search(r"^(\d+) frames in ", said, re.MULTILINE)
    assert described, said
    assert int(described[1]) < 300
    assert re.search(r"^0 events delivered, \d+ wait in the spool", said, re.MULTILINE)
    assert "Traceback" not in log


def test_running_box_takes_up_new_words_and_refuses_bad_ones(mini: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "mini"
    shutil.copytree(mini, bundle)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2000):
        (folder / f"{i:04}.jpg").symlink_to(PICTURE)
    words = tmp_path / "words.toml"
    words.write_text(
        '[[category]]\nname = "top"\nquestion = "top is"\noption = [\n'
        '{ name = "red", phrases = ["red top"] },\n{ name = "black", phrases = ["black top"] },\n]\n'
    )
    with process("edge", "run", "--config", config(tmp_path, bundle, folder, "linger_ms = 0\n")) as box:
        assert box.stderr is not None
        assert next(line for line in box.stderr if "1 camera(s)" in line)
        command("export", "prompts", words, "--bundle", bundle)
        new = next(line for line in box.stderr if "new words" in line)
        assert "words.toml" in new
        good = (bundle / "prompts.npz").read_bytes()
        (bundle / "part").write_bytes(good[:-10])
        (bundle / "part").replace(bundle / "prompts.npz")
        refused = next(line for line in box.stderr if "WARNING" in line)
        assert "damaged" in refused
        assert "the words in use stay" in refused
        assert box.poll() is None
        box.send_signal(signal.SIGTERM)
        box.communicate(timeout=DEADLINE)
        assert box.returncode == 0


def test_two_cameras_share_batches(mini: Path, video: Path, tmp_path: Path) -> None:
    more = f'[[camera]]\nname = "second"\nsource = "{video}"\n'
    chosen = config(tmp_path, mini, video)
    chosen.write_text(chosen.read_text().replace("[publish]", f"{more}[publish]\nlinger_ms = 0"))
    done = command("edge", "run", "--config", chosen)
    assert "40 frames" in done.stdout
    assert "camera second: 20 frames" in done.stdout


def test_video_that_breaks_off_is_told_and_its_frames_are_described(mini: Path, video: Path, tmp_path: Path) -> None:
    data = video.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    done = command("edge", "run", "--config", config(tmp_path, mini, tmp_path / "cut.avi", "linger_ms = 0\n"), code=66)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "cut.avi" in done.stderr.splitlines()[-1]
    assert "frames in" in done.stdout


def test_check_and_selftest(mini: Path, video: Path, tmp_path: Path) -> None:
    chosen = config(tmp_path, mini, video, '[match]\nsensitive = ["gender"]\n')
    said = command("edge", "check", chosen).stdout
    assert "answers: gender, " in said
    assert "detector: 416 x 416 px, 288 x 288 px while the box has too much to do" in said
    chosen.write_text(chosen.read_text().replace('"gender"', '"age"'))
    assert "no category 'age'" in command("edge", "check", chosen, code=78).stderr
    chosen.write_text(chosen.read_text().replace(str(video), "/nowhere.avi"))
    command("edge", "check", chosen, code=66)
    said = command("edge", "selftest", "--bundle", mini).stdout
    assert [line.split()[0] for line in said.splitlines()] == ["detector.onnx", "detector-smaller.onnx", "image.onnx"]
    assert said.count("smallest IoU 1.0000") == 2
    command("edge", "selftest", "--bundle", tmp_path, code=72)


def test_a_box_whose_golden_outputs_differ_does_not_serve(mini: Path, video: Path, tmp_path: Path) -> None:
    from edge.bundle import Manifest, sha256_of
    from edge.golden import Golden

    bundle = tmp_path / "mini"
    shutil.copytree(mini, bundle)
    golden = Golden.read(bundle / "golden.npz")
    assert golden.smaller is not None
    fewer = replace(golden.smaller, boxes=golden.smaller.boxes + np.float32(0.1))
    for altered, said in (
        (replace(golden, embeddings=-golden.embeddings), "image.onnx: embeddings differ"),
        (replace(golden, smaller=fewer), "detector-smaller.onnx: boxes differ"),
        (replace(golden, smaller=None), "nothing to hold detector-smaller.onnx against"),
    ):
        altered.write(bundle / "golden.npz")
        manifest = Manifest.read(bundle / "manifest.json")
        files = {**manifest.files, "golden.npz": sha256_of(bundle / "golden.npz")}
        (bundle / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_json())
        done = command("edge", "run", "--config", config(tmp_path, bundle, video), code=72)
        assert said in done.stderr
        assert "make export" in done.stderr


def test_schema_is_json_and_names_every_field() -> None:
    schema = json.loads(command("edge", "schema").stdout)
    assert {"schema", "device", "epoch", "seq", "people"} <= set(schema["properties"])


class TestDescribe:
    def test_says_it_as_the_paper_does(self, mini: Path) -> None:
        said = command("edge", "describe", PICTURE, "--bundle", mini, "--sensitive", "gender").stdout
        assert "  Category: sleeve length of this person is\n    long sleeves: " in said
        assert "  Category: gender of this person is\n" in said

    def test_json_top_k_and_sensitive(self, mini: Path) -> None:
        said = json.loads(command("edge", "describe", PICTURE, "--bundle", mini, "--json", "--top-k", 3).stdout)
        assert len(said["people"]) >= 5
        for person in said["people"]:
            assert "gender" not in person["answers"]
            assert len(person["answers"]["top colour"]) == 3
            for answers in person["answers"].values():
                assert sum(answers.values()) <= 1.001
                assert list(answers.values()) == sorted(answers.values(), reverse=True)

    def test_saves_crops_and_picture(self, mini: Path, tmp_path: Path) -> None:
        out = tmp_path / "new/crops"
        command("edge", "describe", PICTURE, "--bundle", mini, "--save-crops", out, "--draw", tmp_path / "a/d.png")
        assert len(list(out.glob("pets-650-person*.png"))) >= 5
        assert cv2.imread(str(tmp_path / "a/d.png")) is not None

    def test_one_bad_file_in_a_folder_is_reported_and_the_rest_described(self, mini: Path, tmp_path: Path) -> None:
        shutil.copy(PICTURE, tmp_path / "a.jpg")
        (tmp_path / "b.jpg").write_text("no picture at all")
        (tmp_path / "c.jpg").write_bytes(PICTURE.read_bytes()[:50_000])
        (tmp_path / "d.png").write_bytes(b"")
        cv2.imwrite(str(tmp_path / "e.png"), np.zeros((1, 1, 3), np.uint8))
        cv2.imwrite(str(tmp_path / "f.png"), np.full((40, 30), 40000, np.uint16))
        done = command("edge", "describe", tmp_path, "--bundle", mini, "--json", code=66)
        described = [Path(json.loads(line)["image"]).name for line in done.stdout.splitlines()]
        assert described == ["a.jpg", "e.png", "f.png"]
        errors = done.stderr.splitlines()
        assert [name for name in ("b.jpg", "c.jpg", "d.png") if any(name in line for line in errors)] == [
            "b.jpg",
            "c.jpg",
            "d.png",
        ]
        assert len(errors) == 4

    def test_equal_names_in_two_folders_do_not_meet(self, mini: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            shutil.copy(PICTURE, tmp_path / name / "1.jpg")
        folders, drawn = [tmp_path / "a", tmp_path / "b"], tmp_path / "d.png"
        command("edge", "describe", *folders, "--bundle", mini, "--save-crops", tmp_path / "c", "--draw", drawn)
        names = {path.name for path in (tmp_path / "c").iterdir()}
        assert {"001-1-person1.png", "002-1-person1.png"} <= names
        assert sorted(path.name for path in tmp_path.glob("d*.png")) == ["d-001-1.png", "d-002-1.png"]

    def test_the_picture_is_not_written_over_what_it_shows(self, mini: Path, tmp_path: Path) -> None:
        shutil.copy(PICTURE, tmp_path / "own.jpg")
        own = tmp_path / "own.jpg"
        command("edge", "describe", own, "--bundle", mini, "--draw", own, code=78)
        assert own.read_bytes() == PICTURE.read_bytes()

    def test_mistakes(self, mini: Path, tmp_path: Path) -> None:
        command("edge", "describe", PICTURE, tmp_path, "--bundle", mini, code=66)
        command("edge", "describe", tmp_path / "none.jpg", "--bundle", mini, code=66)
        command("edge", "describe", PICTURE, "--bundle", tmp_path / "none", code=72)
        command("edge", "describe", PICTURE, "--bundle", mini, "--draw", tmp_path / "x.txt", code=2)
