"""The loop: capture, describe, publish."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from edge import events
from edge.capture import Cameras
from edge.describe import Described, Describer
from edge.imaging import cut
from edge.motion import MotionGate
from edge.track import Ended
from edge.values import Floats, Frame

POLL = 0.2  # s; how soon the loop notices that it should stop


@dataclass
class Reporter:
    """What the events of one run have in common.

    device: the box's name. bundle, encoder: sha256 of the manifest and the image encoder. top_k: options per category.
    synchronised: whether the clock is right, None where nobody can tell.
    """

    device: str
    bundle: str
    encoder: str
    top_k: int
    crops: bool
    synchronised: Callable[[], bool | None] = lambda: None

    def event(self, stamp: events.Stamp, described: Described) -> events.Event:
        """The wire's form of one described frame, under the number of `stamp`."""
        frame, people = described.frame, described.people
        told = range(len(people)) if described.news is None else described.news.tolist()
        header = events.Header(
            device=self.device,
            epoch=stamp.epoch,
            seq=stamp.seq,
            camera=frame.camera,
            frame=frame.number,
            captured_at=round(frame.captured_at, 3),
            clock="unsynchronised" if self.synchronised() is False else None,
            frame_size=(frame.width, frame.height),
            bundle=self.bundle,
            bank=described.bank,
            encoder=self.encoder,
            embedding_dim=described.vectors.shape[1],
            people=tuple(self._person(described, i) for i in told),
            skipped=described.skipped,
            ended=tuple(_ended(one) for one in described.ended),
            notices=stamp.notices,
        )
        jpegs = [_jpeg(frame, people.boxes[i]) if self.crops else None for i in told]
        return events.Event(header, described.vectors[list(told)].astype(np.float16), tuple(jpegs))

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
        return events.Person(
            box=described.people.box(person),
            score=score,
            answers=answers,
            crop=self.crops,
            track=None if described.tracks is None else int(described.tracks[person]),
            looks=None if described.looks is None else int(described.looks[person]),
        )


def run(
    cameras: Cameras,
    gate: MotionGate,
    describer: Describer,
    reporter: Reporter,
    send: Callable[[Callable[[events.Stamp], events.Event]], None],
    on_described: Callable[[Described], None],
    turn: Callable[[], None],
    beat: Callable[[str], None],
    stop: threading.Event,
    max_frames: int | None = None,
) -> None:
    """Describe and `send` until every file has ended, `max_frames` frames are done, or `stop` is set.

    turn: called between two batches of frames, for whatever changes how they are described. beat: told of every stage
    as it begins, the wait for frames among them. Raises BackendError; whatever the cameras do is theirs to report.
    """
    left = max_frames
    describer.timings.begun = beat
    while not (stop.is_set() or cameras.done or left == 0):
        turn()
        beat("frames")
        frames = cameras.next(POLL)[:left]
        left = None if left is None else left - len(frames)
        for described in describer([one for one in frames if gate.wanted(one, describer.watches(one.camera))]):
            if described.told:
                with describer.timings.measure("publish", 1):
                    send(partial(reporter.event, described=described))
            on_described(described)
    for described in describer.finish():
        send(partial(reporter.event, described=described))


def _ended(track: Ended) -> events.Ended:
    """Its times rounded as `captured_at` is, so that they are those of its first and last event."""
    first, last = round(track.first_seen, 3), round(track.last_seen, 3)
    return events.Ended(track=track.track, frames=track.frames, first_seen=first, last_seen=last)


def _jpeg(frame: Frame, box: Floats) -> bytes:
    return cv2.imencode(".jpg", cut(frame.image, box))[1].tobytes()
