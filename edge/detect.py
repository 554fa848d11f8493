"""Frames to people: resize, run the detector, threshold, and one box per person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.backend import Imaging, Session
from edge.boxes import area
from edge.boxes import iou as overlap_of
from edge.bundle import DetectorFacts
from edge.config import DetectConfig, Overlap
from edge.errors import BundleError
from edge.failpoints import failpoint
from edge.imaging import HostImaging
from edge.placement import fitted
from edge.values import Detections, Floats, Frame

PERSON = "person"


class Detector:
    """Finds the people of each frame.

    low: also tells of boxes with a score above it that are no people by the configuration and overlap none; a tracker
    knows what to make of them. imaging: makes the net's pictures; without one, they are made on the CPU. Raises
    BundleError where the bundle keeps no class "person".
    """

    def __init__(
        self,
        session: Session,
        facts: DetectorFacts,
        config: DetectConfig,
        low: float | None = None,
        imaging: Imaging | None = None,
    ) -> None:
        if PERSON not in facts.classes:
            kept = ", ".join(facts.classes)
            raise BundleError(
                f"the detector keeps no class {PERSON!r}", got=kept, remedy="add it to `keep` in the recipe"
            )
        self._session, self._facts, self._config, self._low = session, facts, config, low
        self._imaging = imaging or HostImaging()
        self._column = facts.classes.index(PERSON)

    def configure(self, config: DetectConfig, low: float | None) -> None:
        """Go by this from the next frames on."""
        self._config, self._low = config, low

    def __call__(self, frames: Sequence[Frame]) -> list[Detections]:
        """One Detections per frame, of one call of the session. Raises BackendError."""
        if not frames:
            return []
        failpoint("box.detect")
        outputs = self._session.run({"image": self._imaging.fit(frames, self._facts)})
        return [
            self._people(frame, boxes, scores)
            for frame, boxes, scores in zip(frames, outputs["boxes"], outputs["scores"][..., self._column], strict=True)
        ]

    def _people(self, frame: Frame, boxes: Floats, scores: Floats) -> Detections:
        """boxes: (A, 4) in 0..1 of the net input. scores: (A,)."""
        threshold, iou = self._config.threshold, self._config.iou
        seen = scores > (threshold if self._low is None else min(self._low, threshold))
        placed, scores = unfit(boxes[seen], frame.width, frame.height, self._facts), scores[seen]
        likely = scores > threshold
        people = one_per_person(placed[likely], scores[likely], iou, self._config.overlap)
        if self._low is None:
            return people
        apart = ~likely & (overlap_of(placed[:, None], people.boxes[None]) <= iou).all(axis=1)
        rest = one_per_person(placed[apart], scores[apart], iou, self._config.overlap)
        return Detections(np.concatenate([people.boxes, rest.boxes]), np.concatenate([people.scores, rest.scores]))


def unfit(boxes: Floats, frame_width: int, frame_height: int, facts: DetectorFacts) -> Floats:
    """Boxes (n, 4) in 0..1 of the net input -> (n, 4) px of the frame, clipped to it. The inverse of `fitted`."""
    placed = np.array(boxes, np.float32)
    xs, ys = placed[:, 0::2], placed[:, 1::2]  # views
    if facts.resize == "letterbox":
        left, top, inner_w, inner_h = fitted(frame_width, frame_height, facts).targets[0].tolist()
        xs[:] = (xs * facts.width - left) / inner_w
        ys[:] = (ys * facts.height - top) / inner_h
    xs[:] = np.clip(xs * frame_width, 0, frame_width)
    ys[:] = np.clip(ys * frame_height, 0, frame_height)
    return placed


def one_per_person(boxes: Floats, scores: Floats, iou: float, overlap: Overlap) -> Detections:
    """One box per group of boxes that overlap by more than `iou`, best score first.

    boxes: (n, 4) px x1 y1 x2 y2. scores: (n,). The best box left starts a group and takes every box along whose IoU
    with it is greater than `iou`. nms (greedy non-maximum suppression) keeps the best box, merge the group's union.
    Boxes without area are nobody.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[area(boxes[order]) > 0]
    kept, scored = [], []
    while len(order):
        best = order[0]
        grouped = overlap_of(boxes[best], boxes[order]) > iou
        grouped[0] = True  # a box belongs to itself, whatever `iou` and rounding say
        group, order = order[grouped], order[~grouped]
        union = np.concatenate([boxes[group, :2].min(axis=0), boxes[group, 2:].max(axis=0)])
        kept.append(union if overlap == "merge" else boxes[best])
        scored.append(scores[best])
    return Detections(np.stack(kept), np.array(scored, np.float32)) if kept else Detections.empty()
