"""What is measured of a box, and how it says that it is: for people as JSON, for Prometheus as metrics."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from edge import jetson
from edge.bundle import IMAGE, Bundle
from edge.capture import CameraState
from edge.clock import synchronised
from edge.describe import Described, Describer
from edge.health import Verdict
from edge.ladder import Ladder
from edge.motion import MotionGate
from edge.publish import Publisher
from edge.push import Pusher

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # a stage per frame
UNEXPECTED = ("off", "ended")  # phases in which nobody expects a picture


@dataclass
class Tally:
    """Of one camera. frames: described. skipped: people found, but too small, or too many, to describe."""

    frames: int = 0
    people: int = 0
    skipped: int = 0


class Counts:
    """What was described since the start: the one count, for the summary of a run as for the metrics."""

    def __init__(self, cameras: Sequence[str] = ()) -> None:
        """cameras: those that are there from the beginning, with nothing yet."""
        self.cameras = {name: Tally() for name in cameras}

    def note(self, described: Described) -> None:
        """One more frame."""
        tally = self.cameras.setdefault(described.frame.camera, Tally())
        tally.frames += 1
        tally.people += len(described.people)
        tally.skipped += described.skipped

    @property
    def total(self) -> Tally:
        """Of all cameras."""
        each = list(self.cameras.values())
        return Tally(sum(one.frames for one in each), sum(one.people for one in each), sum(one.skipped for one in each))


@dataclass(frozen=True)
class Serving:
    """The parts of a box that has passed its self-test. trouble: what makes no progress, in a sentence, or None."""

    describer: Describer
    gate: MotionGate
    outlet: Publisher | Pusher
    states: Callable[[], Sequence[CameraState]]
    trouble: Callable[[], str | None] = lambda: None


class Vitals:
    """A box as edge.health.Subject has it.

    It can tell something from the beginning, and everything once it is `serving`. stopping: set when the box is about
    to end. root: of the machine's files, "/" or a made-up tree.
    """

    def __init__(
        self, device: str, bundle: Bundle, cameras: Sequence[str], stopping: threading.Event, root: Path = Path("/")
    ) -> None:
        self.counts = Counts(cameras)
        self.serving: Serving | None = None
        self.ladder: Ladder | None = None
        self.registry = CollectorRegistry()
        self._device, self._bundle, self._stopping, self._root = device, bundle, stopping, root
        self._began = time.monotonic()
        self._stages = Histogram(
            "lookout_stage_seconds",
            "Time that a stage took, per frame",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_Snapshot(self))

    def measured(self, stage: str, seconds: float) -> None:
        """A stage took so long, per frame: for edge.describe.Timings."""
        self._stages.labels(stage).observe(seconds)

    def live(self) -> Verdict:
        """Whether loop and cameras make progress, as far as the watchdog sees."""
        trouble = self.serving.trouble() if self.serving else None
        return Verdict(trouble is None, () if trouble is None else (trouble,))

    def ready(self) -> Verdict:
        """Whether people who appear now would be described, and told of sooner or later.

        Not before the self-test, while it ends, or while something hangs. A camera, the collector or the disk that is
        away does not make the box unready, as a new start would not bring it back; it is told all the same.
        """
        if self._stopping.is_set():
            return Verdict(False, ("it is shutting down",))
        if self.serving is None:
            return Verdict(False, ("the self-test has not passed yet",))
        live = self.live()
        return Verdict(live.good, [*live.lines, *self._remarks(self.serving)])

    def _remarks(self, parts: Serving) -> Iterator[str]:
        for state in parts.states():
            if state.phase != "up" and state.phase not in UNEXPECTED:
                yield f"camera {state.name!r} is {state.phase}" + (f": {state.error}" if state.error else "")
        if isinstance(parts.outlet, Publisher):
            spool = parts.outlet.health
            if not parts.outlet.delivery.connected:
                yield f"the collector is away; {spool.waiting} entries wait in the spool"
            if spool.in_memory:
                yield f"the spool is in memory, as the disk refuses: {spool.trouble}"

    def status(self) -> Mapping[str, Any]:
        """Everything, of what JSON holds; null is what is not known."""
        facts, parts = self._bundle.manifest, self.serving
        return {
            "device": self._device,
            "live": asdict(self.live()),
            "ready": asdict(self.ready()),
            "uptime_s": round(time.monotonic() - self._began, 1),
            "versions": {
                "lookout": version("lookout"),
                "python": platform.python_version(),
                "runtime": parts and parts.describer.about,
            },
            "engines": parts and dict(parts.describer.engines),
            "bundle": {"name": facts.name, "sha256": facts.seal()},
            "bank": self.bank,
            "encoder": facts.files[IMAGE],
            "cameras": [self._camera(parts, state) for state in parts.states()] if parts else [],
            "outlet": parts and _outlet(parts.outlet),
            "ladder": self.ladder and {"level": self.ladder.level, "step": self.ladder.name},
            "clock_synchronised": synchronised(),
            "temperatures_c": jetson.temperatures(self._root),
            "throttled": jetson.throttled(self._root),
            "gpu_load": jetson.gpu_load(self._root),
        }

    @property
    def bank(self) -> str:
        """sha256 of the words in use."""
        return self.serving.describer.bank if self.serving else self._bundle.bank.sha256

    def _camera(self, parts: Serving, state: CameraState) -> dict[str, Any]:
        age, tally = frame_age(state), self.counts.cameras.get(state.name, Tally())
        return {
            "name": state.name,
            "live": state.live,
            "phase": state.phase,
            "frame_age_s": None if age is None else round(age, 3),
            "frames": state.frames,
            "described": tally.frames,
            "people": tally.people,
            "skipped": tally.skipped,
            "drops": {**state.drops, **_still(parts.gate.spared[state.name])},
            "reconnects": state.reconnects,
            "error": state.error,
        }

    @property
    def build(self) -> dict[str, str]:
        """What runs here, for the labels of lookout_build_info."""
        about = self.serving.describer.about if self.serving else ""
        return {
            "device": self._device,
            "version": version("lookout"),
            "bundle": self._bundle.manifest.seal()[:12],
            "bank": self.bank[:12],
            "backend": "tensorrt" if about.startswith("TensorRT") else "onnxruntime" if about else "",
        }

    @property
    def root(self) -> Path:
        """Of the machine's files."""
        return self._root


def frame_age(state: CameraState) -> float | None:
    """Seconds since the latest picture of a camera; None: there was none."""
    return None if state.frame_at is None else max(time.monotonic() - state.frame_at, 0.0)


def acknowledged_ago(outlet: Publisher) -> float | None:
    """Seconds since the collector last said that it has something; None: never since the start."""
    at = outlet.delivery.acknowledged_at
    return None if at is None else max(time.monotonic() - at, 0.0)


def _outlet(outlet: Publisher | Pusher) -> dict[str, Any]:
    if isinstance(outlet, Pusher):
        return {"transport": "push", "queued": outlet.queued, "dropped": outlet.dropped}
    delivery = asdict(outlet.delivery)
    del delivery["acknowledged_at"]  # of a clock that only this process has
    ago = acknowledged_ago(outlet)
    return {
        "transport": "acknowledged",
        "spool": asdict(outlet.health),
        "delivery": {**delivery, "acknowledged_s_ago": None if ago is None else round(ago, 3)},
    }


class _Snapshot(Collector):
    """What others count, read when it is asked for."""

    def __init__(self, box: Vitals) -> None:
        self._box = box

    def collect(self) -> Iterator[Metric]:
        box = self._box
        yield InfoMetricFamily("lookout_build", "What runs here", box.build)
        yield _gauge("ready", "Whether the box can do its job, as /readyz says", float(box.ready().good))
        if box.serving is not None:
            yield from _of_cameras(box.serving.states(), box.counts, box.serving.gate.spared)
            outlet = box.serving.outlet
            yield from _pushed(outlet) if isinstance(outlet, Pusher) else _delivered(outlet)
        if box.ladder is not None:
            yield _gauge("ladder_level", "Steps that the box does less than it may; 0 is everything", box.ladder.level)
        yield from _of_machine(box.root)


def _of_cameras(states: Sequence[CameraState], counts: Counts, spared: Mapping[str, int]) -> Iterator[Metric]:
    def of_each(kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str, *more: str) -> Any:
        return kind(f"lookout_{name}", text, labels=["camera", *more])

    captured = of_each(CounterMetricFamily, "frames_captured", "Pictures that came from a camera")
    described = of_each(CounterMetricFamily, "frames_described", "Pictures that were looked at for people")
    dropped = of_each(CounterMetricFamily, "frames_dropped", "Pictures that were not, by reason", "reason")
    persons = of_each(CounterMetricFamily, "persons", "People described, once per picture that they are in")
    skipped = of_each(CounterMetricFamily, "crops_skipped", "People found, but too small, or too many, to describe")
    reconnects = of_each(CounterMetricFamily, "camera_reconnects", "Times that a camera came back")
    up = of_each(GaugeMetricFamily, "camera_up", "1: its pictures come; 0: they should. None: they need not now")
    phase = of_each(GaugeMetricFamily, "camera_phase", "1 for what the camera does now", "phase")
    age = of_each(GaugeMetricFamily, "camera_frame_age_seconds", "Time since its latest picture")
    for state in states:
        name = [state.name]
        captured.add_metric(name, state.frames)
        reconnects.add_metric(name, state.reconnects)
        phase.add_metric([state.name, state.phase], 1)
        for reason, count in {**state.drops, **_still(spared.get(state.name, 0))}.items():
            dropped.add_metric([state.name, reason], count)
        if state.phase not in UNEXPECTED:
            up.add_metric(name, float(state.phase == "up"))
        if (seconds := frame_age(state)) is not None:
            age.add_metric(name, seconds)
    for camera, tally in list(counts.cameras.items()):
        described.add_metric([camera], tally.frames)
        persons.add_metric([camera], tally.people)
        skipped.add_metric([camera], tally.skipped)
    yield from (captured, described, dropped, persons, skipped, reconnects, up, phase, age)


def _still(frames: int) -> dict[str, int]:
    """Frames in which nothing moved, as one more reason."""
    return {"still": frames} if frames else {}


def _delivered(outlet: Publisher) -> Iterator[Metric]:
    spool, done, ago = outlet.health, outlet.delivery, acknowledged_ago(outlet)
    yield _gauge("spool_entries", "Events, or notes of lost ones, that wait for the collector", spool.waiting)
    yield _gauge("spool_bytes", "Disk that they take", spool.size)
    yield _gauge("spool_oldest_seconds", "Time that the oldest has waited; 0: none waits", spool.oldest_s or 0.0)
    yield _gauge("spool_in_memory", "1: the disk refuses, and a kill would lose what waits", spool.in_memory)
    yield _counter(
        "spool_dropped", "Events that left the spool undelivered, as it was full or they were old", spool.dropped
    )
    yield _counter("events_acknowledged", "Events that the collector has", done.delivered)
    yield _counter("events_gone", "Lost events that the collector was told of", done.gone)
    yield _counter("events_refused", "Events that the collector set aside", done.refused)
    yield _gauge("delivery_connected", "1: the collector answers", done.connected)
    yield _counter(
        "delivery_failures", "Tries to reach the collector that failed, and connections that broke", done.failures
    )
    yield _counter("delivery_handshakes_refused", "Of these, in the handshake: mostly keys", done.handshakes_refused)
    if ago is not None:
        yield _gauge(
            "last_acknowledgement_age_seconds", "Time since the collector last said that it has something", ago
        )


def _pushed(outlet: Pusher) -> Iterator[Metric]:
    yield _counter("events_queued", "Events handed to ZeroMQ", outlet.queued)
    yield _counter("events_dropped", "Events that its full queue refused", outlet.dropped)


def _of_machine(root: Path) -> Iterator[Metric]:
    heat = GaugeMetricFamily("lookout_temperature_celsius", "Of a part of the machine", labels=["zone"])
    for zone, degrees in jetson.temperatures(root).items():
        heat.add_metric([zone], degrees)
    yield heat
    yield _gauge("throttled", "1: something is slowed down, as it is too hot", bool(jetson.throttled(root)))
    if (load := jetson.gpu_load(root)) is not None:
        yield _gauge("gpu_load_ratio", "How busy the GPU is, 0 to 1", load)
    if (right := synchronised()) is not None:
        yield _gauge("clock_synchronised", "1: the clock is right", right)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lookout_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lookout_{name}", text, value=float(value))
