"""Frames to people in words: detect, track, crop, encode, match, in this order."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge.backend import Imaging, Pictures
from edge.bank import PromptBank
from edge.boxes import area
from edge.bundle import PROMPTS, Bundle
from edge.config import DescribeConfig, TrackConfig
from edge.crop import qualities_of
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import BundleError
from edge.identities import Identities, Ids, Indices
from edge.imaging import HostImaging
from edge.match import match
from edge.track import Ended, Tracker
from edge.values import Detections, Floats, Frame, Matches, Region
from edge.zones import Polygon, inside

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Described:
    """A frame and its people in words: n people, vectors (n, d) float32 unit rows, n matches.

    skipped: people found but too small, or too many, to describe. bank: sha256 of the words used. tracks: (n,) int64,
    who they are, and looks: (n,) int64, how many crops the words rest on; None where nobody is followed. ended: tracks
    that ended. news: indices of the people to tell of, where repetition is not told; None: the whole frame is.
    """

    frame: Frame
    people: Detections
    vectors: Floats
    matches: Matches
    skipped: int
    bank: str
    tracks: Ids | None = None
    looks: Ids | None = None
    ended: tuple[Ended, ...] = ()
    news: Indices | None = None

    @property
    def told(self) -> bool:
        """Whether there is anything to publish."""
        return self.news is None or len(self.news) > 0 or len(self.ended) > 0


@dataclass
class Timings:
    """Milliseconds per frame of the latest 1,000 batches, by stage."""

    stages: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=1_000)))
    begun: Callable[[str], None] = lambda stage: None  # told of each stage as it begins
    measured: Callable[[str, float], None] = lambda stage, seconds: None  # and of what it took, per frame

    @contextmanager
    def measure(self, stage: str, frames: int) -> Iterator[None]:
        """Time the block, shared out over its frames."""
        self.begun(stage)
        start = time.perf_counter()
        yield
        taken = (time.perf_counter() - start) / max(frames, 1)
        self.stages[stage].append(taken * 1000)
        self.measured(stage, taken)


class Words:
    """The prompt bank as it is on disk now: a new one is taken between frames; a bad one is refused, the old stays."""

    def __init__(self, bundle: Bundle, sensitive: Collection[str]) -> None:
        self._bundle, self._sensitive = bundle, sensitive
        self._seen: tuple[int, int, int] | None = None
        self._use(bundle.bank)

    def permit(self, sensitive: Collection[str]) -> None:
        """From now on answer these of the categories marked as sensitive."""
        if tuple(sensitive) != tuple(self._sensitive):
            self._sensitive = sensitive
            self._use(self.bank)

    def _use(self, bank: PromptBank) -> None:
        self.bank, self.permitted = bank, bank.permitted(self._sensitive)

    def refresh(self) -> None:
        """Look at the disk."""
        try:
            status = self._bundle.file(PROMPTS).stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._seen = seen
                fresh = self._bundle.read_bank()
                if fresh.sha256 != self.bank.sha256:  # the same words written anew change nothing
                    log.info("new words from %s: bank %s", fresh.source, fresh.sha256[:12])
                    self._use(fresh)
        except OSError as error:
            if self._seen is not None:
                log.warning("%s: %s; the words in use stay", self._bundle.file(PROMPTS), error.strerror)
            self._seen = None
        except BundleError as error:
            log.warning("%s; the words in use stay", error)


@dataclass(frozen=True, eq=False)
class _View:
    """A frame whose people are found and not described yet.

    people: those tall enough. tracks: (n,) who they are. looked: (k,) indices of those to encode, whose crops have
    these qualities (n,). small: how many were not tall enough. Where nobody is followed, tracks and qualities are 0.
    """

    frame: Frame
    people: Detections
    tracks: Ids
    looked: Indices
    qualities: Floats
    small: int
    ended: tuple[Ended, ...]


class _Camera:
    """What outlasts a frame of one camera: its tracks, and what is known of them."""

    def __init__(self, config: TrackConfig, threshold: float) -> None:
        self.tracker = Tracker(config, threshold)
        self.identities = Identities(config.look_every)
        self.frames = 0  # that came this far: the camera's own number counts those dropped, too
        self.last: Frame | None = None

    def configure(self, config: TrackConfig, threshold: float) -> None:
        """Go by these rules; the numbers of tracks go on."""
        self.tracker.configure(config, threshold)
        self.identities.every = config.look_every

    def known(self, ended: Sequence[Ended]) -> tuple[Ended, ...]:
        """Those of the ended tracks that were ever described; they are forgotten."""
        described = set(self.identities.forget(one.track for one in ended))
        return tuple(one for one in ended if one.track in described)


class Describer:
    """Frames to people in words: every stage between capture and publish.

    detector: with track.low, where people are followed. apart: names of cameras whose pictures have nothing to do with
    each other, so that nobody is followed. imaging: the detector's, which knows the frames already; without one, the
    host's. zones: by camera, where people count; of a camera without any, everywhere. smaller: as detector, of the same
    network at a smaller size.
    """

    def __init__(
        self,
        bundle: Bundle,
        detector: Detector,
        encoder: Encoder,
        config: DescribeConfig,
        apart: Collection[str] = (),
        imaging: Imaging | None = None,
        zones: Mapping[str, Sequence[Polygon]] | None = None,
        smaller: Detector | None = None,
    ) -> None:
        self._facts = bundle.manifest.encoder
        self._words = Words(bundle, config.match.sensitive)
        self._detector, self._encoder, self._config = detector, encoder, config
        self._smaller, self._detecting = smaller, detector
        self._imaging = imaging or HostImaging()
        self._cameras: dict[str, _Camera] = {}
        self._apart = frozenset(apart)
        self._zones = zones or {}
        self._bank = self._words.permitted
        self._somebody: dict[str, bool] = {}  # by camera, whether somebody was there in the latest frame
        self._crops_allowed = config.crop.max_per_frame
        self.timings = Timings()
        self.encoded = 0  # crops
        self.engines: Mapping[str, str] = {}  # for people: network -> fingerprint of the engine that it runs on

    def __call__(self, frames: Sequence[Frame]) -> list[Described]:
        """One Described per frame; the crops of all frames are encoded together. Raises BackendError."""
        if not frames:
            return []
        self._words.refresh()
        if self._bank is not self._words.permitted:
            self._bank = self._words.permitted
            for camera in self._cameras.values():
                camera.identities.restart()
        with self.timings.measure("detect", len(frames)):
            found = self._detecting(frames)
        with self.timings.measure("track", len(frames)):
            views = [self._view(frame, one) for frame, one in zip(frames, found, strict=True)]
        with self.timings.measure("crop", len(frames)):
            crops = {region: self._crops(views, region) for region in self._bank.regions}
        with self.timings.measure("encode", len(frames)):
            vectors = {region: self._encoder(*own) for region, own in crops.items()}
            self.encoded += len(vectors["whole"])
        with self.timings.measure("match", len(frames)):
            ends = np.cumsum([0, *(len(view.looked) for view in views)])
            parts = [{region: part[a:b] for region, part in vectors.items()} for a, b in pairwise(ends)]
            return [self._described(view, own) for view, own in zip(views, parts, strict=True)]

    def configure(
        self,
        config: DescribeConfig,
        apart: Collection[str],
        zones: Mapping[str, Sequence[Polygon]],
        changed: Collection[str],
    ) -> list[Described]:
        """Go by this from the next frames on -> what is left to tell of the tracks that end with it.

        apart, zones: as in the constructor. changed: cameras that are no more, or look at something else by now; where
        the rules of tracking are new, the tracks of all end.
        """
        before, self._config = self._config, config
        rules = (before.track, before.detect.threshold) != (config.track, config.detect.threshold)
        left = self.finish(None if rules else changed)
        for camera in self._cameras.values():
            camera.configure(config.track, config.detect.threshold)
        self._apart, self._zones = frozenset(apart), zones
        for detector in (self._detector, *([self._smaller] if self._smaller else [])):
            detector.configure(config.detect, config.low)
        self._words.permit(config.match.sensitive)
        self.limit(config.crop.max_per_frame)
        return left

    def limit(self, max_crops: int) -> None:
        """Encode at most so many people of a frame from now on, but never more than crop.max_per_frame."""
        self._crops_allowed = min(max_crops, self._config.crop.max_per_frame)

    def use_smaller(self, on: bool) -> None:
        """Find people by the smaller detector from the next frames on, or again by the other one; tracks go on.

        Raises ValueError where there is no smaller one.
        """
        if on and self._smaller is None:
            raise ValueError("use_smaller must be False where the bundle has no smaller detector, got True")
        self._detecting = self._smaller if on and self._smaller is not None else self._detector

    @property
    def has_smaller(self) -> bool:
        """Whether there is a smaller detector to use."""
        return self._smaller is not None

    def watches(self, camera: str) -> bool:
        """Whether somebody is followed there, or was there in the latest frame."""
        return self._somebody.get(camera, False)

    @property
    def about(self) -> str:
        """What the networks run on, in words."""
        return self._encoder.about

    @property
    def bank(self) -> str:
        """sha256 of the words in use."""
        return self._words.bank.sha256

    @property
    def tracks(self) -> int:
        """How many were ever described."""
        return sum(camera.identities.met for camera in self._cameras.values())

    def finish(self, cameras: Collection[str] | None = None) -> list[Described]:
        """What is left to tell of cameras that end, or of all: the tracks that end with it, as of its last frame."""
        nobody = {region: np.zeros((0, self._facts.dim), np.float32) for region in self._bank.regions}
        left = []
        for camera in [one for name, one in self._cameras.items() if cameras is None or name in cameras]:
            ended = camera.known(camera.tracker.finish())
            if ended and camera.last is not None:
                matches, bank = match(nobody, self._bank, self._facts.logit_scale), self._words.bank.sha256
                people, ids = Detections.empty(), np.zeros(0, np.int64)
                news = np.zeros(0, np.intp)
                left.append(Described(camera.last, people, nobody["whole"], matches, 0, bank, ids, ids, ended, news))
        return left

    def _view(self, frame: Frame, found: Detections) -> _View:
        """Who is there, and who of them is to be encoded."""
        # before anything else: whoever is outside the zones is nobody, neither followed nor counted as skipped
        found = found[inside(self._zones.get(frame.camera, ()), found.boxes, frame.width, frame.height)]
        config, limit = self._config, self._crops_allowed
        if not self._followed(frame):
            found = found[found.scores > config.detect.threshold]
            people = found[tall_enough(found, config.crop.min_height)]
            looked = largest(people, limit)
            small = len(found) - len(people)
            self._somebody[frame.camera] = len(found) > 0
            return _View(frame, people, np.zeros(len(people), np.int64), looked, 0 * people.scores, small, ())
        camera = self._camera(frame.camera)
        camera.last, camera.frames = frame, camera.frames + 1
        tracks = camera.tracker.update(found, frame.captured_at)
        self._somebody[frame.camera] = camera.tracker.following > 0
        sure = tracks.people.scores > config.detect.threshold  # a box of low score says that a track goes on, no more
        tall = sure & tall_enough(tracks.people, config.crop.min_height)
        people, ids = tracks.people[tall], tracks.ids[tall]
        qualities = qualities_of(frame, people)
        due = camera.identities.due(ids, area(people.boxes), qualities, camera.frames)
        small = int(sure.sum() - tall.sum())
        return _View(frame, people, ids, due[:limit], qualities, small, camera.known(tracks.ended))

    def _followed(self, frame: Frame) -> bool:
        return self._config.track.enabled and frame.camera not in self._apart

    def _camera(self, name: str) -> _Camera:
        if name not in self._cameras:
            self._cameras[name] = _Camera(self._config.track, self._config.detect.threshold)
        return self._cameras[name]

    def _crops(self, views: Sequence[_View], region: Region) -> tuple[Pictures, Pictures | None]:
        """Of those looked at, and their mirror images where the words want them."""
        look, parts = self._bank.look, [(view.frame, view.people.boxes[view.looked]) for view in views]
        crops = self._imaging.crop(parts, self._facts, look, region)
        return crops, self._imaging.mirror(crops) if look.flip else None

    def _described(self, view: _View, vectors: Mapping[Region, Floats]) -> Described:
        """vectors: of those looked at."""
        frame, people, bank = view.frame, view.people, self._words.bank.sha256
        matches = match(vectors, self._bank, self._facts.logit_scale)
        if not self._followed(frame):
            skipped = view.small + len(people) - len(view.looked)
            return Described(frame, people[view.looked], vectors["whole"], matches, skipped, bank)
        camera, looked = self._camera(frame.camera), view.looked
        identities, sizes = camera.identities, area(people.boxes)
        identities.look(view.tracks[looked], sizes[looked], view.qualities[looked], camera.frames, vectors, matches)
        known = np.flatnonzero(identities.looks(view.tracks))
        tracks = view.tracks[known]
        means = identities.means(tracks, self._bank.regions, self._facts.dim)
        said = identities.supported(tracks, match(means, self._bank, self._facts.logit_scale))
        return Described(
            frame,
            people[known],
            means["whole"],
            said,
            view.small + len(people) - len(known),
            bank,
            tracks,
            identities.looks(tracks),
            view.ended,
            identities.news(tracks, said) if self._config.track.publish == "changes" else None,
        )


def tall_enough(people: Detections, min_height: int) -> NDArray[np.bool_]:
    """(n,) bool: the box is at least `min_height` px high."""
    return np.asarray(people.boxes[:, 3] - people.boxes[:, 1] >= min_height)


def largest(people: Detections, limit: int) -> NDArray[np.intp]:
    """The `limit` people with the largest boxes, as indices in the order they stand in."""
    return np.asarray(np.sort(np.argsort(-area(people.boxes), kind="stable")[:limit]), np.intp)
