"""Detections against PETS09-S2L1's true boxes: precision and recall of the box's own detector stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

from edge.boxes import iou
from edge.detect import Detector
from edge.values import Detections, Floats, Frame

TRUTH = Path(__file__).parents[2] / "shared/data/pets/gt.txt"


def truth_from(path: Path) -> dict[int, Floats]:
    """MOT's text format: frame from 1, id, left, top, width, height in px, … -> boxes (n, 4) x1 y1 x2 y2 by frame."""
    rows = np.loadtxt(path, delimiter=",", usecols=(0, 2, 3, 4, 5), dtype=np.float32, ndmin=2)
    rows[:, 3:] += rows[:, 1:3]
    return {int(number): rows[rows[:, 0] == number, 1:] for number in np.unique(rows[:, 0])}


def frames_of(video: Path, first: int, last: int) -> Iterable[tuple[int, Frame]]:
    """Frames `first` to `last`, counted from 1 as the truth does."""
    capture = cv2.VideoCapture(str(video))
    for number in range(1, last + 1):
        found, image = capture.read()
        assert found, f"{video} ends before frame {number}"
        if number >= first:
            yield number, Frame("pets", number - 1, 0.0, np.asarray(image, np.uint8))
    capture.release()


def precision_and_recall(
    detector: Detector, frames: Iterable[tuple[int, Frame]], truth: Mapping[int, Floats]
) -> tuple[float, float]:
    """A detection is right when its IoU with a true box, which no better one has taken, is at least 0.5."""
    right = found = wanted = 0
    for number, frame in frames:
        (people,) = detector([frame])
        boxes = truth.get(number, np.zeros((0, 4), np.float32))
        right += _right(people, boxes)
        found += len(people)
        wanted += len(boxes)
    return right / max(found, 1), right / max(wanted, 1)


def _right(people: Detections, truth: Floats) -> int:
    free = np.ones(len(truth), bool)
    for box in people.boxes:  # best score first
        overlaps = iou(box, truth) * free
        if len(truth) and overlaps.max() >= 0.5:
            free[overlaps.argmax()] = False
    return int((~free).sum())
