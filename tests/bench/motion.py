"""`python -m tests.bench.motion`: whom the motion gate misses on PETS09-S2L1, and what it spares where nobody is."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from edge.backend import open_session
from edge.bundle import DETECTOR
from edge.config import DetectConfig, MotionConfig
from edge.detect import Detector
from edge.motion import SIZE, MotionGate
from edge.values import Frame, Image
from export.samples import find_sample
from export.weights import cache_folder
from tests.bench.tracking import bundle
from tests.empty_scene import EmptyScene
from tests.mot import FRAMES_A_SECOND, identities_from
from tests.pets import TRUTH

LAST = 795
CONFIG = MotionConfig(enabled=True)
EMPTY_S, ALONE_S = 300, 60  # seconds of nobody: measured, and before each person
# Not empty after all: a car at the right edge that somebody loads, and a walker far away. rows, columns in px
UNLABELLED = ((slice(20, 130), slice(690, 768)), (slice(40, 170), slice(0, 330)))
console = Console(width=150)


@dataclass(frozen=True)
class Missed:
    """frames: with somebody. still: of these, those in which it saw no motion; closed: nor in the hold_s before.

    late: seconds until the first in which it did.
    """

    frames: int
    still: int
    closed: int
    late: float


def main() -> int:
    if not TRUTH.exists():
        console.print(f"no true boxes at {TRUTH}: they are not part of this repository")
        return 1
    scene = EmptyScene(find_sample(cache=cache_folder()), identities_from(TRUTH), LAST)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, load {load}; share {CONFIG.share}, hold_s {CONFIG.hold_s}")
    console.print(cost(scene))
    table = Table("before", "frames/s", title=f"{EMPTY_S} s of nobody, after a minute")
    table.add_column("gate open", justify="right")
    for name in ("the place as it is", "without what nobody labelled"):
        for step in (1, 5, 10):
            table.add_row(name, f"{FRAMES_A_SECOND / step:.0f}", f"{nobody(scene, step):.1%}")
        for place in UNLABELLED:
            scene.empty[(slice(None), *place)] = scene.empty[(0, *place)]
    console.print(table)
    console.print(people(scene))
    return 0


def people(scene: EmptyScene) -> Table:
    persons = sorted({int(one) for ids, _ in scene.truth.values() for one in ids})
    table = Table("people", "frames/s", title=f"{len(persons)} people, each alone, after {ALONE_S} s of nobody")
    for column in ("frames with them", "no motion seen", "gate closed", "first seen after, at worst"):
        table.add_column(column, justify="right")
    names = {1: "as they are, 53 to 153 px of 576", 2: "half as large", 4: "a quarter as large"}
    for times, name in names.items():
        for step in (1, 5, 10) if times == 1 else (5,):
            found = [missed(scene, person, step, times) for person in persons]
            frames, worst = sum(one.frames for one in found), max(one.late for one in found)
            counts = sum(one.still for one in found), sum(one.closed for one in found)
            shares = [f"{count} ({count / frames:.2%})" for count in counts]
            table.add_row(name, f"{FRAMES_A_SECOND / step:.0f}", str(frames), *shares, f"{worst:.1f} s")
    return table


def missed(scene: EmptyScene, person: int, step: int, times: int) -> Missed:
    """One person after ALONE_S of nobody, `times` as far away, every `step`-th frame.

    As strict as can be: the gate holds for no time, so that it is open where it sees motion now, and nobody is watched.
    """
    gate = MotionGate(CONFIG.model_copy(update={"hold_s": 0.01}))
    alone = list(scene.alone(person))[::step]
    before = round(ALONE_S * FRAMES_A_SECOND)
    number, empty = alone[0][0] - before, next(scene.nobody())
    for picture in islice(scene.nobody(), 0, before, step):
        gate.wanted(frame(mosaic(picture, picture, times), number), False)
        number += step
    seen = [gate.wanted(frame(mosaic(picture, empty, times), at), False) for at, picture in alone]
    first = seen.index(True) if True in seen else len(seen)
    held = round(CONFIG.hold_s * FRAMES_A_SECOND / step)  # frames
    closed = sum(not any(seen[max(0, i - held) : i + 1]) for i in range(len(seen)))
    return Missed(len(seen), seen.count(False), closed, first * step / FRAMES_A_SECOND)


def mosaic(picture: Image, empty: Image, times: int) -> Image:
    """The picture among empty ones, `times` in a row and as many rows: as a camera of so many pixels would see it.

    At once in the size that the gate looks at, as it would make it.
    """
    size = SIZE[0] // times, SIZE[1] // times
    small, other = (np.asarray(cv2.resize(one, size, interpolation=cv2.INTER_AREA)) for one in (picture, empty))
    rows = [[small if row == column == 0 else other for column in range(times)] for row in range(times)]
    return np.vstack([np.hstack(row) for row in rows]).astype(np.uint8)


def frame(picture: Image, number: int) -> Frame:
    return Frame("pets", max(0, number), number / FRAMES_A_SECOND, picture)


def nobody(scene: EmptyScene, step: int) -> float:
    """The share of EMPTY_S in which the gate is open."""
    gate, pictures = MotionGate(CONFIG), islice(scene.nobody(), 0, round((EMPTY_S + 60) * FRAMES_A_SECOND), step)
    said = [gate.wanted(frame(picture, number * step), False) for number, picture in enumerate(pictures)]
    later = said[round(60 * FRAMES_A_SECOND / step) :]
    return sum(later) / len(later)


def cost(scene: EmptyScene) -> Table:
    """What a frame takes, with nobody there: the median over 100 of them."""
    frames = [frame(picture, number) for number, picture in enumerate(islice(scene.nobody(), 100))]
    gate = MotionGate(CONFIG)
    table = Table("per frame of 768 x 576 px", "median ms")
    with tempfile.TemporaryDirectory() as folder:
        mini = bundle(Path(folder))
        with open_session(mini.file(DETECTOR)) as session:
            detector = Detector(session, mini.manifest.detector, DetectConfig())
            stages: dict[str, Callable[[Frame], object]] = {
                "motion gate": lambda one: gate.wanted(one, False),
                "mini detector": lambda one: detector([one]),
            }
            for name, stage in stages.items():
                taken = []
                for one in frames:
                    began = time.perf_counter()
                    stage(one)
                    taken.append(time.perf_counter() - began)
                table.add_row(name, f"{1000 * float(np.median(taken)):.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
