"""PETS09-S2L1 without its people, and with one of them at a time: real pixels, real noise, and a true answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge.values import Floats, Image
from tests.mot import Identified
from tests.pets import frames_of

MARGIN = 12  # px about a true box that are the person's
NEAR, UNLIKE, BEYOND = 60, 20, 20  # px about it, and frames before and after, in which grey levels off are theirs, too


class EmptyScene:
    """The sequence in grey, and the same place with nobody in it.

    Where somebody is, the empty picture shows the same pixels of the nearest frame in which nobody was there, so that
    its noise, its compression and its light are the camera's own. The sequence itself never shows an empty place.
    """

    def __init__(self, video: Path, truth: Identified, last: int) -> None:
        self.truth = {number: truth[number] for number in range(1, last + 1)}
        grey = (cv2.cvtColor(frame.image, cv2.COLOR_BGR2GRAY) for _, frame in frames_of(video, 1, last))
        self.real = np.stack([np.asarray(image, np.uint8) for image in grey])  # (last, H, W)
        self.empty = self.real.copy()
        taken = np.zeros(self.real.shape, np.bool_)
        near, seen = taken.copy(), dict[int, list[tuple[int, Floats]]]()
        for number, (people, boxes) in self.truth.items():
            for person, box in zip(people.tolist(), boxes, strict=True):
                taken[(number - 1, *self._about(box, MARGIN))] = True
                near[(number - 1, *self._about(box, NEAR))] = True
                seen.setdefault(person, []).append((number - 1, box))
        for boxes_of in seen.values():
            (first, entered), (end, left) = boxes_of[0], boxes_of[-1]
            near[(slice(max(first - BEYOND, 0), first), *self._about(entered, NEAR))] = True
            near[(slice(end, end + BEYOND), *self._about(left, NEAR))] = True
        usual = np.median(self.real[::8], axis=0)
        for number in range(len(self.real)):
            taken[number] |= near[number] & (np.abs(self.real[number] - usual) > UNLIKE)
        self._fill(taken)

    def _fill(self, taken: NDArray[np.bool_]) -> None:
        for rows in np.array_split(np.arange(taken.shape[1]), 24):  # a strip at a time, for the memory
            strip, pixels = taken[:, rows], self.real[:, rows]
            times = np.arange(len(strip), dtype=np.int16)[:, None, None]
            before = np.maximum.accumulate(np.where(strip, -9999, times), axis=0)
            after = np.minimum.accumulate(np.where(strip, 19999, times)[::-1], axis=0)[::-1]
            nearest = np.where(times - before <= after - times, before, after)
            nearest = np.clip(nearest, 0, len(strip) - 1).astype(np.intp)  # where somebody always is: one picture
            self.empty[:, rows] = np.take_along_axis(pixels, nearest, axis=0)

    def _about(self, box: Floats, margin: int) -> tuple[slice, slice]:
        height, width = self.real.shape[1:]
        x1, y1 = np.maximum(np.floor(box[:2]).astype(int) - margin, 0)
        x2, y2 = np.ceil(box[2:]).astype(int) + margin
        return slice(int(y1), min(int(y2), height)), slice(int(x1), min(int(x2), width))

    def nobody(self) -> Iterator[Image]:
        """The empty pictures, there and back again without end."""
        order = [*range(len(self.empty)), *range(len(self.empty) - 2, 0, -1)]
        while True:
            for i in order:
                yield cv2.cvtColor(self.empty[i], cv2.COLOR_GRAY2BGR).astype(np.uint8)

    def alone(self, person: int) -> Iterator[tuple[int, Image]]:
        """One person crossing the empty place: frame number and picture of every frame that they are in."""
        for number, (people, boxes) in self.truth.items():
            if person in people:
                picture = self.empty[number - 1].copy()
                place = self._about(boxes[people == person][0], MARGIN)
                picture[place] = self.real[number - 1][place]
                yield number, cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR).astype(np.uint8)
