"""Identities over time: which person of this frame is which of the frames before.

Association after ByteTrack (Zhang et al., ECCV 2022, arXiv:2110.06864): people with a high score choose among all
tracks, then boxes with a low one among the tracks left over, and only a high score begins a track. Where a track is by
now says a Kalman filter of constant velocity over a box's centre and size, as in SORT (Bewley et al., ICIP
2016, arXiv:1602.00763), but in seconds rather than frames: people do not slow down when a camera drops frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import lap
import numpy as np
from numpy.typing import NDArray

from edge.boxes import iou
from edge.config import TrackConfig
from edge.values import Detections, Floats

Ids = NDArray[np.int64]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]
Doubles = NDArray[np.float64]

# Standard deviations, in heights of the person: near people move and jitter by more px than far ones.
_BOX = 0.05  # of a detector's box
_SPEED = 0.5  # of a track just begun, per second: people walk about 0.8 heights in one, or stand
_PUSH = 0.5  # of what a second adds to the speed

_LOW_IOU = 0.5  # a box of low score must lie well on its track: ByteTrack's number
_GATE = 9.4877  # of the filter's own boxes, 95 % are this near to what it expects: chi² with four degrees of freedom
_STEP = 0.1  # seconds from frame to frame as long as no clock has told

_TRACK = np.dtype(
    [
        ("id", np.int64),
        ("frames", np.int64),  # in how many it was seen
        ("first", np.float64),  # seconds, by the frames' own times
        ("last", np.float64),
        ("seen", np.float64),  # seconds, by the tracker's clock, which never goes back
        ("motion", np.float64, (2, 4)),  # px: centre x, y, width, height; px per second: how they change
        ("spread", np.float64, (2, 2)),  # px²: covariance of a value and its change, the same for all four
    ]
)


@dataclass(frozen=True)
class Ended:
    """A track that will not come back.

    frames: in how many it was seen. first_seen, last_seen: when the first was captured, and the latest, seconds.
    """

    track: int
    frames: int
    first_seen: float
    last_seen: float


@dataclass(frozen=True, eq=False)
class Tracks:
    """The people of one frame, and who they are.

    people: n of them, in the order of the frame's Detections. ids: (n,) int64 from 1, all different. ended: the tracks
    given up at this frame.
    """

    people: Detections
    ids: Ids
    ended: tuple[Ended, ...] = ()

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int64 or self.ids.shape != (len(self.people),):
            raise ValueError(f"Tracks.ids must be int64 ({len(self.people)},), got {self.ids.dtype} {self.ids.shape}")
        if len(set(self.ids.tolist())) < len(self.ids) or (self.ids < 1).any():
            raise ValueError(f"Tracks.ids must be different and at least 1, got {self.ids.tolist()}")

    def __len__(self) -> int:
        return len(self.ids)


class Tracker:
    """Follows the people of one camera.

    threshold: the score a person must exceed to begin a track. What it answers depends on nothing but the boxes and
    times it was given.
    """

    def __init__(self, config: TrackConfig, threshold: float) -> None:
        self._config, self._threshold = config, threshold
        self._tracks = np.zeros(0, _TRACK)  # (t,) those alive, oldest first
        self._next = 1
        self._now, self._step = 0.0, _STEP
        self._captured: float | None = None  # the frame before

    @property
    def following(self) -> int:
        """Tracks that are alive, those waited for among them."""
        return len(self._tracks)

    def configure(self, config: TrackConfig, threshold: float) -> None:
        """Go by these from the next frame on."""
        self._config, self._threshold = config, threshold

    def update(self, people: Detections, seconds: float) -> Tracks:
        """Who the people of a frame captured at `seconds` are, its boxes of low score among them.

        A box is left out when its score is too low to begin a track and it continues none.
        """
        config, before = self._config, self._now
        self._now += self._passed(seconds)
        waiting = self._now - self._tracks["seen"] <= config.lost_s
        late, tracks = self._tracks[~waiting], self._tracks[waiting]
        missed = tracks["seen"] < before  # in the frame before
        tracks["motion"][missed, 1, 2:] = 0  # hidden people go on walking, but what half hid them shrank their boxes
        tracks["motion"], tracks["spread"] = ahead(tracks["motion"], tracks["spread"], self._now - before)

        order = np.lexsort((*people.boxes.T, -people.scores))  # so that no answer depends on the order given
        boxes, scores = people.boxes[order], people.scores[order]
        high = scores > self._threshold
        low = (scores > config.low) & ~high
        # a second box on one person begins a track too: it must not take the box of the track that was there before
        settled = tracks["frames"] >= config.min_frames
        overlaps = iou(expected(tracks["motion"])[:, None], boxes[None])  # (t, n)
        likely = _GATE - distances(tracks["motion"], tracks["spread"], boxes)  # (t, n)
        row = np.full(len(boxes), -1)  # of the track that a box continues
        for may, which, worth in (
            (settled, high, np.where(overlaps >= config.match_iou, overlaps, 0)),
            (~settled, high, np.where(overlaps >= config.match_iou, overlaps, 0)),
            (~missed, high, likely),  # of a slow camera: people leave their boxes from frame to frame
            (~missed, low, np.where(overlaps >= _LOW_IOU, overlaps, 0)),
        ):
            free = may & ~np.isin(np.arange(len(tracks)), row)
            taken, by = pairs(worth, free, which & (row < 0))
            row[by] = taken

        old, new = row >= 0, high & (row < 0)
        seen = row[old]
        tracks["motion"][seen], tracks["spread"][seen] = corrected(
            tracks["motion"][seen], tracks["spread"][seen], boxes[old]
        )
        tracks["frames"][seen] += 1
        tracks["last"][seen], tracks["seen"][seen] = np.maximum(tracks["last"][seen], seconds), self._now
        begun = self._begun(boxes[new], seconds)
        lost = (tracks["seen"] < self._now) & ~settled
        self._tracks = np.concatenate([tracks[~lost], begun])

        ids = np.zeros(len(boxes), np.int64)  # 0: nobody
        ids[order[old]], ids[order[new]] = tracks["id"][seen], begun["id"]
        return Tracks(people[ids > 0], ids[ids > 0], _ended(late) + _ended(tracks[lost]))

    def finish(self) -> tuple[Ended, ...]:
        """Gives up every track: the source has ended."""
        tracks, self._tracks = self._tracks, np.zeros(0, _TRACK)
        return _ended(tracks)

    def _passed(self, seconds: float) -> float:
        """Seconds since the frame before. Where the clock went back or stood still: as many as between the last two."""
        passed = 0.0 if self._captured is None else seconds - self._captured
        self._captured = seconds
        if not passed > 0:
            return self._step
        if passed <= self._config.lost_s:  # else it was no step from frame to frame but a pause of the camera
            self._step = passed
        return passed

    def _begun(self, boxes: Floats, seconds: float) -> NDArray[np.void]:
        tracks = np.zeros(len(boxes), _TRACK)
        tracks["id"] = np.arange(self._next, self._next + len(boxes))
        tracks["frames"], tracks["first"], tracks["last"], tracks["seen"] = 1, seconds, seconds, self._now
        tracks["motion"], tracks["spread"] = standing(boxes)
        self._next += len(boxes)
        return tracks


def standing(boxes: Floats) -> tuple[Doubles, Doubles]:
    """The filter's state for boxes (t, 4) seen for the first time: motion (t, 2, 4) and its spread (t, 2, 2)."""
    values = _measured(boxes)
    motion = np.stack([values, np.zeros_like(values)], axis=1)
    spread = np.zeros((len(boxes), 2, 2))
    spread[:, 0, 0], spread[:, 1, 1] = _variance(motion, _BOX), _variance(motion, _SPEED)
    return motion, spread


def ahead(motion: Doubles, spread: Doubles, step: float) -> tuple[Doubles, Doubles]:
    """The state `step` seconds later.

    The four values are moved alike and know nothing of each other, so that one 2 x 2 covariance serves them all: the
    textbook's 8 x 8 matrices hold nothing else.
    """
    transition = np.array([[1, step], [0, 1]])
    noise = np.array([[step**3 / 3, step**2 / 2], [step**2 / 2, step]])  # of a white acceleration
    pushed = _variance(motion, _PUSH)[:, None, None] * noise
    return transition @ motion, transition @ spread @ transition.T + pushed


def corrected(motion: Doubles, spread: Doubles, boxes: Floats) -> tuple[Doubles, Doubles]:
    """The state after the boxes (t, 4) were seen, one per track."""
    gain = spread[:, :, 0] / (spread[:, 0, 0] + _variance(motion, _BOX))[:, None]  # (t, 2)
    surprise = _measured(boxes) - motion[:, 0]  # (t, 4)
    return motion + gain[:, :, None] * surprise[:, None], spread - gain[:, :, None] * spread[:, :1]


def expected(motion: Doubles) -> Floats:
    """The boxes (t, 4) float32, px x1 y1 x2 y2, that a state expects."""
    centre, half = motion[:, 0, :2], np.maximum(motion[:, 0, 2:], 0) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def distances(motion: Doubles, spread: Doubles, boxes: Floats) -> Doubles:
    """Squared Mahalanobis distances (t, n) of n boxes (n, 4) from what t states expect.

    Wojke et al. gate with them (ICIP 2017, arXiv:1703.07402).
    """
    surprise = _measured(boxes)[None] - motion[:, None, 0]  # (t, n, 4)
    far: Doubles = (surprise**2).sum(axis=2) / (spread[:, 0, 0] + _variance(motion, _BOX))[:, None]
    return far


def pairs(worth: Doubles | Floats, rows: Flags, columns: Flags) -> tuple[Rows, Rows]:
    """Numbers of the rows and columns of `worth` (t, n) that belong together.

    Of those allowed, each at most once, and only where it is worth more than nothing; so that the sum is the largest
    there is.
    """
    row, column = np.flatnonzero(rows), np.flatnonzero(columns)
    gain = np.maximum(worth[np.ix_(row, column)], 0)
    if not gain.size:
        return row[:0], column[:0]
    _, chosen, _ = lap.lapjv(gain.max() - gain.astype(np.float64), extend_cost=True)  # a column of each row, or -1
    i = np.flatnonzero(chosen >= 0)
    j = chosen[i]
    together = gain[i, j] > 0
    return row[i[together]], column[j[together]]


def _measured(boxes: Floats) -> Doubles:
    """Boxes (t, 4) x1 y1 x2 y2 -> (t, 4) centre x, y, width, height."""
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def _variance(motion: Doubles, heights: float) -> Doubles:
    """(t,) px². Nobody is lower than a px, or a tiny box would be beyond doubt."""
    deviation: Doubles = heights * np.maximum(motion[:, 0, 3], 1)
    return deviation**2


def _ended(tracks: NDArray[np.void]) -> tuple[Ended, ...]:
    return tuple(Ended(*one) for one in tracks[["id", "frames", "first", "last"]].tolist())
