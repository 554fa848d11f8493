"""The loop: capture, detect, crop, encode, match, publish, in this order."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from edge import events
from edge.boxes import area
from edge.bundle import PROMPTS, Bundle, PromptBank
from edge.capture import Cameras
from edge.config import CropConfig
from edge.crop import crops_of, cut
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import BundleError
from edge.match import match
from edge.values import Detections, Floats, Frame, Matches

log = logging.getLogger(__name__)

POLL = 0.2  # s; how soon the loop notices that it should stop


@dataclass(frozen=True, eq=False)
class Described:
    """A frame and its people in words: n people, vectors (n, d) float32 unit rows, n matches.

    skipped: people found but too small, or too many, to describe. bank: sha256 of the words used.
    """

    frame: Frame
    people: Detections
    vectors: Floats
    matches: Matches
    skipped: int
    bank: str


@dataclass
class Timings:
    """Milliseconds per frame of the latest 10,000 batches, by stage."""

    stages: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=10_000)))

    @contextmanager
    def measure(self, stage: str, frames: int) -> Iterator[None]:
        """Time the block, shared out over its frames."""
        start = time.perf_counter()
        yield
        self.stages[stage].append((time.perf_counter() - start) * 1000 / max(frames, 1))


class Words:
    """The prompt bank as it is on disk now: a new one is taken between frames; a bad one is refused, the old stays."""

    def __init__(self, bundle: Bundle, sensitive: Collection[str]) -> None:
        self._bundle, self._sensitive = bundle, sensitive
        self._seen: tuple[int, int, int] | None = None
        self._use(bundle.bank)

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
                if fresh.sha256 != self.bank.sha256:
                    log.info("new words from %s: bank %s", fresh.source, fresh.sha256[:12])
                self._use(fresh)
        except OSError as error:
            if self._seen is not None:
                log.warning("%s: %s; the words in use stay", self._bundle.file(PROMPTS), error.strerror)
            self._seen = None
        except BundleError as error:
            log.warning("%s; the words in use stay", error)


class Describer:
    """Frames to people in words: every stage between capture and publish."""

    def __init__(
        self, bundle: Bundle, detector: Detector, encoder: Encoder, crop: CropConfig, sensitive: Collection[str]
    ) -> None:
        self._facts = bundle.manifest.encoder
        self._words = Words(bundle, sensitive)
        self._detector, self._encoder, self._crop = detector, encoder, crop
        self.timings = Timings()

    def __call__(self, frames: Sequence[Frame]) -> list[Described]:
        """One Described per frame; the crops of all frames are encoded together. Raises BackendError."""
        if not frames:
            return []
        self._words.refresh()
        with self.timings.measure("detect", len(frames)):
            found = self._detector(frames)
            tall = [one[tall_enough(one, self._crop.min_height)] for one in found]
            people = [one[largest(one, self._crop.max_per_frame)] for one in tall]
        bank, each = self._words.permitted, list(zip(frames, people, strict=True))
        with self.timings.measure("crop", len(frames)):
            crops = {
                region: np.concatenate([crops_of(f, p, self._facts, bank.look, region) for f, p in each])
                for region in bank.regions
            }
        with self.timings.measure("encode", len(frames)):
            vectors = {region: self._encoder(own, bank.look.flip) for region, own in crops.items()}
        with self.timings.measure("match", len(frames)):
            ends = np.cumsum([0, *(len(one) for one in people)])
            own = [{region: part[start:end] for region, part in vectors.items()} for start, end in pairwise(ends)]
            matches = [match(one, bank, self._facts.logit_scale) for one in own]
        return [
            Described(frame, kept, mine["whole"], matched, len(one) - len(kept), self._words.bank.sha256)
            for frame, one, kept, mine, matched in zip(frames, found, people, own, matches, strict=True)
        ]


def tall_enough(people: Detections, min_height: int) -> NDArray[np.bool_]:
    """(n,) bool: the box is at least `min_height` px high."""
    return np.asarray(people.boxes[:, 3] - people.boxes[:, 1] >= min_height)


def largest(people: Detections, limit: int) -> NDArray[np.intp]:
    """The `limit` people with the largest boxes, as indices in the order they stand in."""
    return np.asarray(np.sort(np.argsort(-area(people.boxes), kind="stable")[:limit]), np.intp)


@dataclass(frozen=True)
class Reporter:
    """What the events of one run have in common. device: the box's name. top_k: options per category."""

    device: str
    bundle: str
    top_k: int
    crops: bool

    def event(self, stamp: events.Stamp, described: Described) -> events.Event:
        """The wire's form of one described frame, under the number of `stamp`."""
        frame, people = described.frame, described.people
        header = events.Header(
            device=self.device,
            epoch=stamp.epoch,
            seq=stamp.seq,
            camera=frame.camera,
            frame=frame.number,
            captured_at=round(frame.captured_at, 3),
            frame_size=(frame.width, frame.height),
            bundle=self.bundle,
            bank=described.bank,
            embedding_dim=described.vectors.shape[1],
            people=tuple(self._person(described, i) for i in range(len(people))),
            skipped=described.skipped,
            notices=stamp.notices,
        )
        jpegs = [_jpeg(frame, box) if self.crops else None for box in people.boxes]
        return events.Event(header, described.vectors.astype(np.float16), tuple(jpegs))

    def _person(self, described: Described, person: int) -> events.Person:
        answers = tuple(
            events.Answer(
                category=answer.category.name,
                top=tuple(
                    events.Choice(option=c.option, label=c.label, probability=round(c.probability, 4))
                    for c in answer.top
                ),
                unknown=answer.unknown or None,
                support=None if answer.support is None else round(answer.support, 4),
            )
            for answer in described.matches.answers(person, self.top_k)
        )
        score = round(float(described.people.scores[person]), 4)
        return events.Person(box=described.people.box(person), score=score, answers=answers, crop=self.crops)


def run(
    cameras: Cameras,
    describer: Describer,
    reporter: Reporter,
    send: Callable[[Callable[[events.Stamp], events.Event]], None],
    stop: threading.Event,
    on_described: Callable[[Described], None],
    max_frames: int | None = None,
) -> None:
    """Describe and `send` until every file has ended, `max_frames` frames are done, or `stop` is set.

    Raises BackendError; whatever the cameras do is theirs to report.
    """
    left = max_frames
    while not (stop.is_set() or cameras.done or left == 0):
        frames = cameras.next(POLL)[:left]
        if not frames:
            continue
        left = None if left is None else left - len(frames)
        for described in describer(frames):
            with describer.timings.measure("publish", 1):
                send(partial(reporter.event, described=described))
            on_described(described)


def _jpeg(frame: Frame, box: Floats) -> bytes:
    return cv2.imencode(".jpg", cut(frame.image, box))[1].tobytes()
