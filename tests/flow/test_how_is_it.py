"""A real box and a real collector tell over HTTP how they are, from before the self-test to the last event."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.dashboards import asked
from tests.flow.conftest import PICTURE, ROOT, command, starter

DEADLINE = 60.0  # s
SECRET = "geheim"
T = TypeVar("T")


def until(what: str, ask: Callable[[], T | None]) -> T:
    """What `ask` gives, once that is something."""
    end = time.monotonic() + DEADLINE
    while not (found := ask()):
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)
    return found


class Running:
    """A process that tells how it is at `address`, which is read from what it says on stderr."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.address = until("its address", lambda: re.search(r"health at http://(\S+:\d+)", log.read_text()))[1]

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body."""
        request = urllib.request.Request(
            f"http://{self.address}{path}", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def samples(self) -> dict[tuple[str, ...], float]:
        """(name, label values …) -> value."""
        families = text_string_to_metric_families(self.ask("/metrics")[1])
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    def said(self) -> str:
        """What it printed, once it has ended well."""
        out, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0, self.log.read_text()
        return out


@contextmanager
def running(log: Path, *words: object) -> Iterator[Running]:
    module = {"edge": "edge.cli", "collector": "collector.cli"}[str(words[0])]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, *starter(module), *map(str, words[1:])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Running(process, log)
        finally:
            process.kill()


@contextmanager
def collecting(folder: Path) -> Iterator[tuple[Running, str]]:
    """A collector that listens, and where boxes find it."""
    words = ("run", "--bind", "tcp://127.0.0.1:*", "--store", folder / "results.db", "--health", "127.0.0.1:0")
    with running(folder / "collector.log", "collector", *words) as collector:
        status = until("readiness", lambda: collector.ask("/readyz")[0] == 200) and collector.ask("/status")[1]
        yield collector, json.loads(status)["listening"]


def written(
    folder: Path, bundle: Path, cameras: dict[str, object], collector: str, health: str = "127.0.0.1:0"
) -> Path:
    path = folder / "edge.toml"
    tables = "".join(
        f"[[camera]]\nname = {json.dumps(name)}\nsource = {json.dumps(str(source))}\n"
        for name, source in cameras.items()
    )
    path.write_text(
        f'device = "box"\nbundle = "{bundle}"\n{tables}[health]\naddress = "{health}"\n'
        f'[publish]\naddress = "{collector}"\nlinger_ms = 50000\n'
    )
    return path


def test_a_box_from_its_start_to_its_end(mini: Path, tmp_path: Path) -> None:
    """Not ready before the self-test; then ready, though one camera is away, whose password nobody reads anywhere."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(500):
        (pictures / f"{i:03}.jpg").symlink_to(PICTURE)
    away = f"rtsp://root:{SECRET}@127.0.0.1:1/{SECRET}?token={SECRET}"
    with collecting(tmp_path) as (collector, address):
        chosen = written(tmp_path, mini, {"pictures": pictures, 'gate "3"\n\\': away}, address)
        with running(tmp_path / "edge.log", "edge", "run", "--config", chosen) as box:
            assert box.ask("/readyz") == (503, "not ok\nthe self-test has not passed yet\n")
            assert box.ask("/livez") == (200, "ok\n")
            until("readiness", lambda: box.ask("/readyz")[0] == 200)
            until("a camera that is away", lambda: 'camera \'gate "3"' in box.ask("/readyz")[1])
            until("an acknowledgement", lambda: box.samples().get(("lookout_events_acknowledged_total",), 0) > 3)
            found, status = box.samples(), json.loads(box.ask("/status")[1])
            names = {name for name, *_ in found} | {name for name, *_ in collector.samples()}
            pages = "".join(box.ask(page)[1] for page in ("/livez", "/readyz", "/status", "/metrics"))
            box.process.send_signal(signal.SIGTERM)
            box.said()
        until("events", lambda: collector.samples()["lookout_collector_events_total",] > 3)
        assert collector.samples()["lookout_collector_last_event_age_seconds", "box"] < DEADLINE
        collector.process.send_signal(signal.SIGTERM)
        collector.said()
    assert SECRET not in pages + box.log.read_text()
    assert found["lookout_camera_up", 'gate "3"\n\\'] == 0
    assert found["lookout_camera_phase", "pictures", "up"] == 1
    assert found["lookout_camera_frame_age_seconds", "pictures"] < DEADLINE
    assert found["lookout_delivery_connected",] == 1
    assert 0 <= found["lookout_last_acknowledgement_age_seconds",] < DEADLINE
    assert found["lookout_stage_seconds_count", "encode"] > 3
    assert [camera["phase"] for camera in status["cameras"]] == ["up", "away"]
    assert status["versions"]["runtime"].startswith("ONNX Runtime ")
    assert status["outlet"]["delivery"]["connected"] is True
    # what only some machines have, or only sometimes
    rare = {"temperature_celsius", "gpu_load_ratio", "clock_synchronised", "frames_dropped_total"}
    assert {name for expression in asked() for name in expression} - names <= {f"lookout_{name}" for name in rare}


def test_the_counters_are_what_the_summary_says(mini: Path, video: Path, tmp_path: Path) -> None:
    """While a collector that was stopped keeps the box from ending, it can be asked for its last figures."""
    with collecting(tmp_path) as (collector, address):
        collector.process.send_signal(signal.SIGSTOP)
        with running(
            tmp_path / "edge.log", "edge", "run", "--config", written(tmp_path, mini, {"pan": video}, address)
        ) as box:
            until("the end", lambda: box.ask("/readyz") == (503, "not ok\nit is shutting down\n"))
            found = box.samples()
            assert box.ask("/livez") == (200, "ok\n")
            collector.process.send_signal(signal.SIGCONT)
            said = box.said()
        kept = until(
            "all events", lambda: (now := collector.samples())["lookout_collector_events_total",] == 21 and now
        )
        collector.process.send_signal(signal.SIGTERM)
        collector.said()
    summary = re.search(r"^(\d+) frames in .*, (\d+) people( \((\d+) more)?", said, re.MULTILINE)
    assert summary, said
    frames, people, skipped = int(summary[1]), int(summary[2]), int(summary[4] or 0)
    assert frames == 20
    assert found["lookout_frames_captured_total", "pan"] == found["lookout_frames_described_total", "pan"] == frames
    assert found["lookout_persons_total", "pan"] == people
    assert found["lookout_crops_skipped_total", "pan"] == skipped
    assert found["lookout_spool_entries",] == 21
    assert found["lookout_spool_oldest_seconds",] > 0
    for stage in ("detect", "track", "crop", "encode", "match"):
        assert found["lookout_stage_seconds_count", stage] == 20
    assert kept["lookout_collector_people_total",] == people
    assert kept["lookout_collector_commit_seconds_count",] >= 1
    assert kept["lookout_collector_store_bytes",] > 0


@pytest.mark.parametrize("program", ["edge", "collector"])
def test_a_taken_port_is_said_at_the_start(mini: Path, video: Path, tmp_path: Path, program: str) -> None:
    with collecting(tmp_path) as (collector, address):
        taken = collector.address
        if program == "edge":
            words = ["edge", "run", "--config", written(tmp_path, mini, {"pan": video}, address, taken)]
        else:
            store = tmp_path / "other.db"
            words = ["collector", "run", "--bind", "tcp://127.0.0.1:*", "--store", store, "--health", taken]
        said = command(*words, code=78).stderr
    key = "health.address" if program == "edge" else "--health"
    assert said.splitlines()[-1].startswith(f"error: {key}: cannot listen on {taken}: Address already in use; ")
