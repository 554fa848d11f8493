"""Identities against the true ones: MOTA, IDF1 and their kin at IoU 0.5, counted by motmetrics.

CLEAR MOT is Bernardin and Stiefelhagen's (EURASIP JIVP 2008), IDF1 Ristani et al.'s (ECCV workshops 2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import motmetrics
import numpy as np
from numpy.typing import NDArray

from edge.boxes import iou
from edge.config import TrackConfig
from edge.track import Tracker
from edge.values import Detections, Floats

NEAREST = 0.5  # IoU of a box with the person it is said to be
FRAMES_A_SECOND = 10.0  # of the sample video; the scene was filmed at about 7

Identified = Mapping[int, tuple[NDArray[np.int64], Floats]]  # frame -> ids (n,), boxes (n, 4) px x1 y1 x2 y2


@dataclass(frozen=True)
class Scores:
    """mota, idf1, precision, recall, mostly_tracked, mostly_lost: shares, of people the last two.

    people: true identities. tracks: identities given out. switches: how often a person's changed.
    """

    mota: float
    idf1: float
    switches: int
    precision: float
    recall: float
    mostly_tracked: float
    mostly_lost: float
    people: int
    tracks: int


def identities_from(path: Path) -> Identified:
    """MOT's text format: frame from 1, id, left, top, width, height in px, …"""
    rows = np.loadtxt(path, delimiter=",", usecols=range(6), ndmin=2)
    rows[:, 4:] += rows[:, 2:4]
    frames = {int(number): rows[rows[:, 0] == number] for number in np.unique(rows[:, 0])}
    return {number: (rows[:, 1].astype(np.int64), rows[:, 2:].astype(np.float32)) for number, rows in frames.items()}


def within(frames: Identified, first: int, last: int) -> Identified:
    return {number: people for number, people in frames.items() if first <= number <= last}


def detected(frames: Identified) -> dict[int, Detections]:
    """The true boxes, as a detector that makes no mistake would give them."""
    return {number: Detections(boxes, np.ones(len(boxes), np.float32)) for number, (_, boxes) in frames.items()}


def tracked(found: Mapping[int, Detections], config: TrackConfig, threshold: float) -> Identified:
    """The people of frames in order, as one Tracker names them."""
    tracker = Tracker(config, threshold)
    answers = {number: tracker.update(people, number / FRAMES_A_SECOND) for number, people in sorted(found.items())}
    return {number: (tracks.ids, tracks.people.boxes) for number, tracks in answers.items()}


def strangers(found: Mapping[int, Detections], threshold: float) -> Identified:
    """Boxes with a score above `threshold`, each as somebody never seen before: the detector by itself."""
    answers, following = {}, 1
    for number, people in found.items():
        boxes = people.boxes[people.scores > threshold]
        answers[number] = np.arange(following, following + len(boxes)), boxes
        following += len(boxes)
    return answers


def scores(truth: Identified, tracks: Identified) -> Scores:
    """How well `tracks` name the people of `truth`, over the frames of both."""
    counted = motmetrics.MOTAccumulator()
    nobody = (np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    for number in sorted({*truth, *tracks}):
        (people, at), (ids, boxes) = truth.get(number, nobody), tracks.get(number, nobody)
        distance = 1 - iou(at[:, None], boxes[None]).astype(np.float64)
        distance[distance > 1 - NEAREST] = np.nan  # motmetrics: cannot be the same
        counted.update(people, ids, distance, frameid=number)
    names = ("mota", "idf1", "num_switches", "precision", "recall", "mostly_tracked", "mostly_lost")
    row = motmetrics.metrics.create().compute(counted, metrics=[*names, "num_unique_objects"]).iloc[0]
    people = int(row.num_unique_objects)
    return Scores(
        mota=float(row.mota),
        idf1=float(row.idf1),
        switches=int(row.num_switches),
        precision=float(row.precision),
        recall=float(row.recall),
        mostly_tracked=float(row.mostly_tracked) / people,
        mostly_lost=float(row.mostly_lost) / people,
        people=people,
        tracks=len(_all(ids for ids, _ in tracks.values())),
    )


def _all(ids: Iterable[NDArray[np.int64]]) -> set[int]:
    return {one for some in ids for one in some.tolist()}
