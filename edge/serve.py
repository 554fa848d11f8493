"""A box at work: every part made from the configuration and the bundle, and held together while it serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edge import notify
from edge.backend import Session, Sessions, open_sessions
from edge.bank import Look
from edge.bundle import DETECTOR, GOLDEN, IMAGE, SMALLER, Bundle, DetectorFacts, Network, open_bundle
from edge.capture import Cameras, CameraState
from edge.clock import synchronised
from edge.config import DescribeConfig, EdgeConfig, RuntimeConfig, read_edge_config
from edge.describe import Described, Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import CaptureError, ConfigError
from edge.golden import Golden
from edge.health import Health
from edge.keys import KeyPair, publish_keys, secure_client
from edge.load import Load
from edge.metrics import Serving, Tally, Vitals
from edge.motion import MotionGate
from edge.pipeline import Reporter, run
from edge.publish import Publisher
from edge.push import Pusher
from edge.reload import Reloader
from edge.spool import Spool
from edge.values import Frame
from edge.watchdog import Watchdog
from edge.zones import Polygon

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What a box did, for the end of a run.

    stages: milliseconds per frame. failures: what ended a source before its time. zones: of the configuration in force
    at the end, by camera. delivery: what became of the events, in lines.
    """

    seen: Tally
    seconds: float
    stages: Mapping[str, Sequence[float]]
    tracks: int
    encoded: int
    cameras: Sequence[CameraState]
    failures: Sequence[CaptureError]
    zones: Mapping[str, Sequence[Polygon]]
    delivery: Sequence[str]


@dataclass(frozen=True)
class _Parts:
    """What a new configuration is given to. path: its file."""

    path: Path
    bundle: Bundle
    cameras: Cameras
    gate: MotionGate
    describer: Describer
    load: Load
    reporter: Reporter
    outlet: Publisher | Pusher

    def take(self, wanted: EdgeConfig, running: EdgeConfig) -> None:
        """Put it into force. Raises ConfigError and CaptureError, before anything has changed."""
        check_sensitive(f"{self.path}: match.sensitive", wanted.match.sensitive, self.bundle)
        self.cameras.replace(wanted.camera)
        self.gate.configure(wanted.motion, _apart(wanted))
        self.reporter.top_k = wanted.match.top_k
        sources = {camera.name: camera.source for camera in wanted.camera}
        changed = [camera.name for camera in running.camera if sources.get(camera.name) != camera.source]
        for left in self.describer.configure(wanted, _apart(wanted), _zones(wanted), changed):
            self.outlet.send(partial(self.reporter.event, described=left))
        self.load.configure(wanted.load, wanted.crop.max_per_frame)


def serve(
    path: Path,
    stop: threading.Event,
    reload: threading.Event,
    on_described: Callable[[Described], None] | None = None,
    max_frames: int | None = None,
) -> Served:
    """Describe the people before the cameras of a configuration and publish them.

    It ends when every file has ended, after `max_frames` frames, or once `stop` is set; `reload` has it read the
    configuration again. on_described: is given each described frame. Raises any LookoutError that keeps it from
    serving, or from going on.
    """
    config = read_edge_config(path)
    bundle = open_bundle(config.bundle)
    check_sensitive(f"{path}: match.sensitive", config.match.sensitive, bundle)
    keys = publish_keys(config.publish)
    vitals = Vitals(config.device, bundle, [camera.name for camera in config.camera], stop)
    with (
        Health(config.health.address, vitals),
        describing(bundle, config, config.runtime, _apart(config), _zones(config)) as describer,
        _outlet(config, keys) as outlet,
        Cameras(config.camera, decoder=config.runtime.decoder) as cameras,
        Watchdog(lambda: cameras.states) as watchdog,
    ):
        facts, gate = bundle.manifest, MotionGate(config.motion, _apart(config))
        top_k, crops = config.match.top_k, config.publish.crops
        reporter = Reporter(config.device, facts.seal(), facts.files[IMAGE], top_k, crops, synchronised)
        load = Load(config.load, config.crop.max_per_frame, cameras, describer, outlet.say)
        parts = _Parts(path, bundle, cameras, gate, describer, load, reporter, outlet)
        reloader = Reloader(path, config, reload, parts.take, outlet.say)
        describer.timings.measured = vitals.measured
        vitals.ladder = load.ladder
        vitals.serving = Serving(describer, gate, outlet, lambda: cameras.states, watchdog.trouble)

        def seen(described: Described) -> None:
            vitals.counts.note(described)
            if on_described is not None:
                on_described(described)

        def turn() -> None:
            if reload.is_set():
                notify.reloading()
                reloader.turn()
                notify.ready()
            load.turn(time.monotonic())

        log.info("%s: %d camera(s), bundle %s, %s", config.device, len(config.camera), bundle.path, describer.about)
        start = time.monotonic()
        notify.ready()
        run(cameras, gate, describer, reporter, outlet.send, seen, turn, watchdog.beat, stop, max_frames)
        stop.set()
        notify.stopping()
        seconds = time.monotonic() - start
    return Served(
        vitals.counts.total,
        seconds,
        describer.timings.stages,
        describer.tracks,
        describer.encoded,
        cameras.states,
        cameras.failures,
        _zones(reloader.running),
        outlet.summary(),
    )


def _apart(config: EdgeConfig) -> list[str]:
    """Cameras whose pictures have nothing to do with each other."""
    return [camera.name for camera in config.camera if Path(camera.source).is_dir()]


def _zones(config: EdgeConfig) -> dict[str, list[Polygon]]:
    return {camera.name: [zone.polygon for zone in camera.zone] for camera in config.camera}


def check_sensitive(where: str, names: Sequence[str], bundle: Bundle) -> None:
    """Raises ConfigError for a name that is no category: a slip there would silently answer less."""
    known = [category.name for category in bundle.bank.categories]
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: the bundle has no category {name!r}", expected=" or ".join(map(repr, known)))


@contextmanager
def describing(
    bundle: Bundle,
    config: DescribeConfig,
    runtime: RuntimeConfig,
    apart: Collection[str] = (),
    zones: Mapping[str, Sequence[Polygon]] | None = None,
) -> Iterator[Describer]:
    """Everything between capture and publish, after the self-test: a box that fails it does not serve."""
    with open_sessions(bundle, runtime.backend, threads=runtime.threads) as sessions:
        tested(bundle, sessions)
        facts = bundle.manifest
        finder = Detector(sessions.detector, facts.detector, config.detect, config.low, sessions.imaging)
        smaller = None
        if sessions.smaller is not None and facts.smaller is not None:
            smaller = Detector(sessions.smaller, facts.smaller, config.detect, config.low, sessions.imaging)
        encoder = Encoder(sessions.encoder, facts.encoder)
        describer = Describer(bundle, finder, encoder, config, apart, sessions.imaging, zones, smaller)
        describer.engines = sessions.engines
        yield describer


@contextmanager
def _outlet(config: EdgeConfig, keys: tuple[KeyPair, str] | None) -> Iterator[Publisher | Pusher]:
    """Where events go."""
    if config.publish.transport == "push":
        with Pusher(config.publish) as pusher:
            yield pusher
        return
    secure = None if keys is None else partial(secure_client, key=keys[0], collector_key=keys[1])
    with Spool(config.spool) as spool, Publisher(config.publish, config.device, spool, secure) as publisher:
        yield publisher


def tested(bundle: Bundle, sessions: Sessions) -> list[str]:
    """What the golden inputs gave, one line each. Raises BundleError where they gave something else."""
    golden, facts = Golden.read(bundle.file(GOLDEN)), bundle.manifest
    encoder, imaging = sessions.encoder, sessions.imaging

    def looked(network: Network, detector: Session, own: DetectorFacts) -> str:
        # by way of what makes their pictures on this machine: a golden picture fits as it is, and comes out the same
        frames = [Frame("golden", i, 0.0, image) for i, image in enumerate(golden.answers(network).frames)]
        said = golden.check_detector(detector, network, imaging.fit(frames, own), network)
        return f"{network} on {detector.about}: {said}"

    told = [looked(DETECTOR, sessions.detector, facts.detector)]
    if sessions.smaller is not None and facts.smaller is not None:
        told.append(looked(SMALLER, sessions.smaller, facts.smaller))
    whole = np.array([[0, 0, facts.encoder.size, facts.encoder.size]], np.float32)
    parts = [(Frame("golden", i, 0.0, image), whole) for i, image in enumerate(golden.crops)]
    crops = imaging.crop(parts, facts.encoder, Look(), "whole")
    said = golden.check_encoder(encoder, IMAGE, encoder.precision, crops)
    return [*told, f"{IMAGE} on {encoder.about}: {said}"]
