"""What box and collector tell of themselves, at every stage of their lives, and as Prometheus reads it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from prometheus_client.registry import CollectorRegistry

from collector import health as collectors
from collector.sinks import Kept, Outcome
from collector.stats import MAX_DEVICES, Stats
from edge.bundle import open_bundle
from edge.capture import CameraState
from edge.config import LoadConfig, MotionConfig, PublishConfig, SpoolConfig
from edge.describe import Described, Describer, Timings
from edge.events import Event, Stamp
from edge.health import Subject
from edge.jetson import gpu_load
from edge.ladder import Heat, Ladder
from edge.metrics import Counts, Serving, Tally, Vitals
from edge.motion import MotionGate
from edge.publish import Publisher
from edge.push import Pusher
from edge.spool import Spool
from edge.values import Detections, Frame, Matches
from tests import fakes
from tests.spools import event as stored_event

NOWHERE = PublishConfig(address="ipc:///nonexistent/nobody", linger_ms=0)


@dataclass
class FakeDescriber:
    """As much of a Describer as tells of itself."""

    about: str = "ONNX Runtime 1.20.0 on the CPU"
    bank: str = "b" * 64
    engines: dict[str, str] = field(default_factory=dict)


def described(camera: str, people: int = 0, skipped: int = 0) -> Described:
    found = Detections(np.zeros((people, 4), np.float32), np.ones(people, np.float32))
    vectors = np.zeros((people, 4), np.float32)
    frame = Frame(camera, 0, 0.0, np.zeros((8, 8, 3), np.uint8))
    return Described(frame, found, vectors, Matches((), np.zeros((people, 0), np.float32)), skipped, "")


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name, label values …) -> value, by way of the text that Prometheus reads; the same in its other format."""
    text = generate_latest(registry).decode()
    found = {(one.name, *one.labels.values()): one.value for family in prometheus(text) for one in family.samples}
    other = generate_openmetrics(registry).decode()
    names = {one.name for family in openmetrics(other) for one in family.samples}
    assert {name for name, *_ in found} - names <= {"lookout_stage_seconds_created"}
    return found


@pytest.fixture
def vitals(bundle_folder: Path, tmp_path: Path) -> Vitals:
    return Vitals("box", open_bundle(bundle_folder), ["gate"], threading.Event(), tmp_path / "machine")


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    with Spool(SpoolConfig(path=tmp_path / "spool.db")) as spool, Publisher(NOWHERE, "box", spool) as publisher:
        yield publisher


def serve(vitals: Vitals, outlet: Publisher | Pusher, *states: CameraState, trouble: str | None = None) -> None:
    describer: Describer = FakeDescriber()  # type: ignore[assignment]
    gate = MotionGate(MotionConfig())
    gate.spared["gate"] = 5
    vitals.serving = Serving(describer, gate, outlet, lambda: states, lambda: trouble)


# ---- the box ----


def test_a_box_that_starts_is_alive_and_not_ready(vitals: Vitals) -> None:
    subject: Subject = vitals
    assert subject.live().good
    assert not subject.ready().good
    assert subject.ready().lines == ("the self-test has not passed yet",)
    status = json.loads(json.dumps(subject.status()))
    assert (status["device"], status["cameras"], status["outlet"]) == ("box", [], None)
    assert status["versions"]["runtime"] is None
    found = samples(subject.registry)
    assert found["lookout_ready",] == 0
    assert not [name for name, *_ in found if "camera" in name or "spool" in name]


def test_a_box_that_serves_is_ready_whatever_is_away(vitals: Vitals, publisher: Publisher) -> None:
    away = CameraState("gate", phase="away", error="rtsp://root:***@cam: cannot be opened")
    serve(vitals, publisher, away, CameraState("yard", phase="frozen"), CameraState("night", phase="off"))
    assert vitals.ready().good
    assert vitals.ready().lines == [
        "camera 'gate' is away: rtsp://root:***@cam: cannot be opened",
        "camera 'yard' is frozen",
        "the collector is away; 0 entries wait in the spool",
    ]
    assert vitals.live().good


def test_a_box_that_hangs_is_neither_alive_nor_ready(vitals: Vitals, publisher: Publisher) -> None:
    serve(vitals, publisher, trouble="the loop hangs in 'encode' for 61 s")
    for verdict in (vitals.live(), vitals.ready()):
        assert not verdict.good
        assert verdict.lines[0] == "the loop hangs in 'encode' for 61 s"


def test_a_box_that_ends_is_not_ready(bundle_folder: Path, publisher: Publisher) -> None:
    stopping = threading.Event()
    vitals = Vitals("box", open_bundle(bundle_folder), [], stopping)
    serve(vitals, publisher)
    assert vitals.ready().good
    stopping.set()
    assert (vitals.ready().good, vitals.ready().lines) == (False, ("it is shutting down",))
    assert vitals.live().good


def test_what_a_box_tells_is_what_was_counted(vitals: Vitals, publisher: Publisher) -> None:
    now = monotonic()
    drops = {"replaced": 3, "paced": 4}
    up = CameraState("gate", phase="up", frames=20, drops=drops, reconnects=2, frame_at=now - 60)
    serve(vitals, publisher, up, CameraState("yard", live=False, phase="ended", frames=5, frame_at=now))
    for one in (described("gate", people=2), described("gate", people=1, skipped=4), described("yard")):
        vitals.counts.note(one)
    publisher.send(lambda stamp: stored_event(0, stamp))
    timings = Timings(measured=vitals.measured)
    with timings.measure("detect", 4):
        pass
    found = samples(vitals.registry)
    wanted = {
        ("frames_captured_total", "gate"): 20,
        ("frames_captured_total", "yard"): 5,
        ("frames_described_total", "gate"): 2,
        ("frames_described_total", "yard"): 1,
        ("frames_dropped_total", "gate", "replaced"): 3,
        ("frames_dropped_total", "gate", "paced"): 4,
        ("frames_dropped_total", "gate", "still"): 5,
        ("persons_total", "gate"): 3,
        ("persons_total", "yard"): 0,
        ("crops_skipped_total", "gate"): 4,
        ("camera_reconnects_total", "gate"): 2,
        ("camera_up", "gate"): 1,
        ("camera_phase", "gate", "up"): 1,
        ("camera_phase", "yard", "ended"): 1,
        ("spool_entries",): 1,
        ("spool_in_memory",): 0,
        ("delivery_connected",): 0,
        ("events_acknowledged_total",): 0,
        ("stage_seconds_count", "detect"): 1,
        ("ready",): 1,
        ("throttled",): 0,
    }
    assert {key: found[(f"lookout_{key[0]}", *key[1:])] for key in wanted} == wanted
    assert 60 <= found["lookout_camera_frame_age_seconds", "gate"] < 100
    assert ("lookout_camera_up", "yard") not in found, "nobody expects a picture of a file that has ended"
    assert ("lookout_last_acknowledgement_age_seconds",) not in found, "there was none"
    assert ("lookout_ladder_level",) not in found
    assert found["lookout_spool_oldest_seconds",] >= 0
    status = json.loads(json.dumps(vitals.status()))
    assert status["cameras"][0]["drops"] == {**drops, "still": 5}
    assert status["cameras"][0]["people"] == 3
    assert status["outlet"]["spool"]["waiting"] == 1
    assert status["bank"] == "b" * 64
    (build,) = [key for key in found if key[0] == "lookout_build_info"]
    assert {"box", "b" * 12, "onnxruntime"} <= set(build)


def test_the_last_acknowledgement_ages(vitals: Vitals, publisher: Publisher) -> None:
    serve(vitals, publisher)
    publisher.delivery.acknowledged_at = monotonic() - 100
    assert 100 <= samples(vitals.registry)["lookout_last_acknowledgement_age_seconds",] < 200
    assert 100 <= vitals.status()["outlet"]["delivery"]["acknowledged_s_ago"] < 200


def test_the_spool_can_still_be_told_of_when_it_is_closed(vitals: Vitals, tmp_path: Path) -> None:
    with Spool(SpoolConfig(path=tmp_path / "spool.db")) as spool, Publisher(NOWHERE, "box", spool) as publisher:
        serve(vitals, publisher)
        publisher.send(lambda stamp: stored_event(0, stamp))
    assert samples(vitals.registry)["lookout_spool_entries",] == 1
    assert vitals.status()["outlet"]["spool"]["waiting"] == 1


def test_a_box_that_pushes_tells_of_its_queue(vitals: Vitals) -> None:
    with Pusher(replace_address("ipc:///nonexistent/nobody")) as pusher:
        serve(vitals, pusher)
        pusher.send(lambda stamp: stored_event(0, stamp))
        found = samples(vitals.registry)
    assert found["lookout_events_queued_total",] + found["lookout_events_dropped_total",] == 1
    assert vitals.status()["outlet"]["transport"] == "push"
    assert vitals.ready().good


def replace_address(address: str) -> PublishConfig:
    return PublishConfig(address=address, transport="push", linger_ms=0)


def test_what_a_machine_says_is_told(vitals: Vitals, publisher: Publisher, tmp_path: Path) -> None:
    thermal = tmp_path / "machine/sys/class/thermal"
    files = {
        thermal / "thermal_zone0/type": "cpu-thermal",
        thermal / "thermal_zone0/temp": "91500",
        thermal / "cooling_device3/type": "gpu-throttle-alert",
        thermal / "cooling_device3/cur_state": "1",
        tmp_path / "machine/sys/class/devfreq/17000000.gpu/device/load": "987",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    vitals.ladder, now = Ladder(LoadConfig(), max_crops=32, smaller=False), 0.0
    while vitals.ladder.level < 2:
        now += 5
        vitals.ladder.observe(now, 0.1, Heat())
    serve(vitals, publisher)
    found = samples(vitals.registry)
    assert found["lookout_temperature_celsius", "cpu-thermal"] == 91.5
    assert found["lookout_throttled",] == 1
    assert found["lookout_gpu_load_ratio",] == 0.987
    assert found["lookout_ladder_level",] == 2
    status = vitals.status()
    assert status["ladder"] == {"level": 2, "step": "2.5 frames per second"}
    assert (status["temperatures_c"], list(status["throttled"])) == ({"cpu-thermal": 91.5}, ["gpu"])


@pytest.mark.parametrize(
    ("file", "text", "load"),
    [
        ("sys/class/devfreq/17000000.gpu/device/load", "0", 0.0),
        ("sys/class/devfreq/17000000.ga10b/device/load", "1000", 1.0),
        ("sys/class/devfreq/57000000.gpu/device/load", "505", 0.505),
        ("sys/devices/platform/gpu.0/load", "12", 0.012),
        ("sys/class/devfreq/17000000.gpu/device/load", "1001", None),
        ("sys/class/devfreq/17000000.gpu/device/load", "busy", None),
        ("sys/class/devfreq/gpu-gpc-0/cur_freq", "1575000000", None),  # a Thor has no such file
        ("sys/class/devfreq/15480000.nvdec/device/load", "500", None),
    ],
)
def test_the_load_of_a_gpu(tmp_path: Path, file: str, text: str, load: float | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert gpu_load(tmp_path) == load


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=40)
@given(names=st.lists(NAMES, max_size=5, unique=True), reason=NAMES)
def test_any_name_comes_through(names: list[str], reason: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a camera, a drop or a device is called is the operator's, or comes from the wire."""
    folder = fakes.write_bundle(tmp_path_factory.mktemp("names") / "bundle")
    vitals = Vitals("box", open_bundle(folder), names, threading.Event(), folder)
    with Pusher(replace_address("ipc:///nonexistent/nobody")) as pusher:
        serve(vitals, pusher, *(CameraState(name, phase="up", frames=1, drops={reason: 2}) for name in names))
        found = samples(vitals.registry)
    for name in names:
        assert found["lookout_frames_captured_total", name] == 1
        assert found["lookout_persons_total", name] == 0
        assert found["lookout_frames_dropped_total", name, reason] == 2
    assert json.loads(json.dumps(vitals.status()))["cameras"] == [
        {**camera, "name": name} for name, camera in zip(names, vitals.status()["cameras"], strict=True)
    ]


def test_counts_of_nobody_one_and_many() -> None:
    counts = Counts()
    assert counts.total == Tally(0, 0, 0)
    for camera in ("a", "b", "a"):
        counts.note(described(camera, people=2, skipped=1))
    assert counts.total == Tally(3, 6, 3)
    assert counts.cameras["a"] == Tally(2, 4, 2)


# ---- the collector ----


class ListSink:
    """Keeps items in a list."""

    def __init__(self) -> None:
        self.items: list[object] = []

    def resume(self, device: str, epoch: int) -> int | None:
        return 7

    def add(self, items: object, received_at: float) -> list[Outcome]:
        self.items.append(items)
        return [Outcome(Kept.NEW)]

    def close(self) -> None:
        self.items.clear()


@pytest.fixture
def event() -> Event:
    return stored_event(0, Stamp(1, 0))


def test_a_collector_is_ready_once_its_loop_goes_round(tmp_path: Path) -> None:
    ending = False
    vitals = collectors.Vitals(Stats(), "tcp://127.0.0.1:5577", "x.db", tmp_path / "x.db", lambda: ending)
    subject: Subject = vitals
    assert (subject.live().good, subject.ready().lines) == (True, ("it is starting",))
    vitals.tick()
    assert vitals.ready().good
    vitals._ticked = monotonic() - collectors.STALLED - 1
    for verdict in (vitals.live(), vitals.ready()):
        assert not verdict.good
        assert verdict.lines[0] == "the loop stands still for 91 s"
    vitals.tick()
    ending = True
    assert (vitals.ready().good, vitals.live().good) == (False, True)


def test_what_a_collector_tells_is_what_it_counted(tmp_path: Path, event: Event) -> None:
    stats = Stats(duplicates=3, gone=4, refused=5, handshakes_refused=6, resets=7, boxes=2)
    stats.count(fakes.item(event), Outcome(Kept.NEW), monotonic() - 50)
    store = tmp_path / "x.db"
    store.write_bytes(b"x" * 100)
    Path(f"{store}-wal").write_bytes(b"x" * 11)
    vitals = collectors.Vitals(stats, "tcp://127.0.0.1:5577", str(store), store)
    vitals.tick()
    sink = ListSink()
    watched = vitals.watched(sink)
    assert watched.resume("box", 1) == 7
    assert watched.add([fakes.item(event)], 0.0) == [Outcome(Kept.NEW)]
    assert len(sink.items) == 1
    watched.close()
    assert not sink.items
    found = samples(vitals.registry)
    wanted = {
        "events_total": 1,
        "people_total": len(event.header.people),
        "duplicates_total": 3,
        "gone_total": 4,
        "refused_total": 5,
        "handshakes_refused_total": 6,
        "resets_total": 7,
        "boxes": 2,
        "store_bytes": 111,
        "commit_seconds_count": 1,
        "ready": 1,
    }
    assert {name: found[f"lookout_collector_{name}",] for name in wanted} == wanted
    assert 50 <= found["lookout_collector_last_event_age_seconds", event.header.device] < 100
    assert found["lookout_collector_disk_free_bytes",] > 0
    status = json.loads(json.dumps(vitals.status()))
    assert 50 <= status["last_event_s_ago"][event.header.device] < 100
    assert (status["boxes"], status["store_bytes"]) == (2, 111)


def test_a_stream_elsewhere_has_no_size(tmp_path: Path) -> None:
    vitals = collectors.Vitals(Stats(), "tcp://127.0.0.1:5577", "nats://127.0.0.1", None)
    vitals.tick()
    assert vitals.ready().good
    assert ("lookout_collector_store_bytes",) not in samples(vitals.registry)
    assert vitals.status()["store_bytes"] is None


def test_boxes_without_end_do_not_fill_the_memory(event: Event) -> None:
    stats = Stats()
    for number in range(MAX_DEVICES + 3):
        header = event.header.model_copy(update={"device": f"box-{number}"})
        stats.count(fakes.item(replace(event, header=header)), Outcome(Kept.NEW), float(number))
    assert len(stats.devices) == MAX_DEVICES
    assert "box-2" not in stats.devices
    assert stats.devices["box-3"] == 3.0
