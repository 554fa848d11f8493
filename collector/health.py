"""How a collector is, for edge/health.py to tell over HTTP."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from collector.sinks import Item, Outcome, Sink
from collector.stats import Stats
from edge.health import Verdict

STALLED = 90.0  # s without a round of the loop: longer than another program may hold the store
LITTLE = 1 << 30  # bytes free on the store's disk that are worth a word: a full one ends the collector
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)  # of a commit


class Watched:
    """A Sink that is another, with a clock beside it."""

    def __init__(self, sink: Sink, commits: Histogram) -> None:
        self._sink, self._commits = sink, commits

    def resume(self, device: str, epoch: int) -> int | None:
        return self._sink.resume(device, epoch)

    def add(self, items: Sequence[Item], received_at: float) -> list[Outcome]:
        with self._commits.time():
            return self._sink.add(items, received_at)

    def close(self) -> None:
        self._sink.close()


class Vitals:
    """A collector as edge.health.Subject has it.

    stats: the server's, of which another thread reads single numbers, and copies of what is no number. address: where
    boxes connect. where: what keeps the events, for people; store: its file, if it is one. stopping: whether it ends.
    """

    def __init__(
        self, stats: Stats, address: str, where: str, store: Path | None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.registry = CollectorRegistry()
        self.stats = stats
        self._address, self._where, self._store, self._stopping = address, where, store, stopping
        self._began = monotonic()
        self._ticked: float | None = None
        self._commits = Histogram(
            "lookout_collector_commit_seconds",
            "Time until a batch of events was kept for good",
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_Snapshot(self))

    def watched(self, sink: Sink) -> Watched:
        """The sink, with its commits measured."""
        return Watched(sink, self._commits)

    def tick(self) -> None:
        """The loop goes on; several times a second."""
        self._ticked = monotonic()

    def live(self) -> Verdict:
        """Whether the loop goes on."""
        since = monotonic() - (self._began if self._ticked is None else self._ticked)
        return Verdict(True) if since < STALLED else Verdict(False, (f"the loop stands still for {since:.0f} s",))

    def ready(self) -> Verdict:
        """Whether what boxes send now would be kept. No box being there does not make it unready."""
        if self._stopping():
            return Verdict(False, ("it is shutting down",))
        if self._ticked is None:
            return Verdict(False, ("it is starting",))
        live, (_, free) = self.live(), self.disk()
        little = free is not None and free < LITTLE
        remarks = [f"only {(free or 0) >> 20} MiB are free on the disk of {self._where}"] if little else []
        return Verdict(live.good, [*live.lines, *remarks])

    def status(self) -> Mapping[str, Any]:
        """Everything, of what JSON holds; null is what is not known."""
        size, free = self.disk()
        stats = self.stats
        return {
            "live": asdict(self.live()),
            "ready": asdict(self.ready()),
            "uptime_s": round(monotonic() - self._began, 1),
            "versions": self.versions,
            "listening": self._address,
            "storing_in": self._where,
            "store_bytes": size,
            "disk_free_bytes": free,
            "boxes": stats.boxes,
            "events": stats.events,
            "people": stats.people,
            "duplicates": stats.duplicates,
            "refused": stats.refused,
            "gone": stats.gone,
            "resets": stats.resets,
            "handshakes_refused": stats.handshakes_refused,
            "last_event_s_ago": {device: round(age, 3) for device, age in self.silences().items()},
        }

    @property
    def versions(self) -> dict[str, str]:
        return {"lookout": version("lookout"), "python": platform.python_version()}

    def silences(self) -> dict[str, float]:
        """Seconds since the latest event of each box that sent one since the start."""
        now = monotonic()
        return {device: max(now - at, 0.0) for device, at in dict(self.stats.devices).items()}  # a copy is one step

    def disk(self) -> tuple[int | None, int | None]:
        """Bytes that the store takes, and that are free beside it; None: it is no file, or cannot be asked."""
        if self._store is None:
            return None, None
        size, free = 0, None
        for form in ("", "-wal", "-shm"):
            with suppress(OSError):
                size += Path(f"{self._store}{form}").stat().st_size
        with suppress(OSError):
            free = shutil.disk_usage(self._store.absolute().parent).free
        return size, free


class _Snapshot(Collector):
    """What the server counts, read when it is asked for."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals

    def collect(self) -> Iterator[Metric]:
        vitals, stats = self._vitals, self._vitals.stats
        yield InfoMetricFamily("lookout_collector_build", "What runs here", {"version": vitals.versions["lookout"]})
        yield _gauge("ready", "Whether events are kept, as /readyz says", float(vitals.ready().good))
        yield _counter("events", "Events that came and were new", stats.events)
        yield _counter("people", "People in them", stats.people)
        yield _counter("duplicates", "Events that were there already", stats.duplicates)
        yield _counter("refused", "Messages that are none, or may not be, and events set aside", stats.refused)
        yield _counter("gone", "Events that boxes had to drop, as they told", stats.gone)
        yield _counter("resets", "Times that a box was asked to begin again", stats.resets)
        yield _counter("handshakes_refused", "Connections that encryption did not let in", stats.handshakes_refused)
        yield _gauge("boxes", "Boxes that are connected", stats.boxes)
        silence = GaugeMetricFamily(
            "lookout_collector_last_event_age_seconds", "Time since the latest event of a box", labels=["device"]
        )
        for device, age in vitals.silences().items():
            silence.add_metric([device], age)
        yield silence
        size, free = vitals.disk()
        if size is not None:
            yield _gauge("store_bytes", "Disk that the store takes", size)
        if free is not None:
            yield _gauge("disk_free_bytes", "What is free beside it", free)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lookout_collector_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lookout_collector_{name}", text, value=float(value))
