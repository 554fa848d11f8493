"""`python -m tests.bench.tracking`: how well people keep their identity on PETS09-S2L1, and what that takes."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from edge.backend import open_session
from edge.boxes import iou
from edge.bundle import DETECTOR, Bundle, open_bundle
from edge.config import DetectConfig, TrackConfig
from edge.detect import Detector
from edge.errors import LookoutError
from edge.track import Tracker
from edge.values import Detections
from export.build import build
from export.recipe import read_recipe
from export.samples import find_sample
from export.weights import cache_folder
from tests.mot import (
    FRAMES_A_SECOND,
    NEAREST,
    Identified,
    Scores,
    detected,
    identities_from,
    scores,
    strangers,
    tracked,
    within,
)
from tests.pets import TRUTH, frames_of

ROOT = Path(__file__).parents[2]
LAST, TRAINED = 795, 500  # frames: of the sequence, and of these the first that the mini detector was trained on
CONFIG, THRESHOLD = TrackConfig(), DetectConfig().threshold
# other detectors and other videos, read off arXiv:1602.00763 and 2110.06864, not measured here
PUBLISHED = (
    ("SORT, its paper", "MOT15 test, 11 videos", "33.4", "-", "1001", "11.7", "30.9"),
    ("ByteTrack, its paper", "MOT17 test, 7 videos", "80.3", "77.3", "2196", "53.2", "14.5"),
)
console = Console(width=150)


def main() -> int:
    if not TRUTH.exists():
        console.print(f"no true boxes at {TRUTH}: they are not part of this repository")
        return 1
    truth = identities_from(TRUTH)
    with tempfile.TemporaryDirectory() as folder:
        found = detections(bundle(Path(folder)))
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, load {load}, Python {platform.python_version()}, numpy {np.__version__}")
    console.print(table(truth, found))
    console.print(limits(truth, found), highlight=False)
    return 0


def bundle(folder: Path) -> Bundle:
    """engines/mini as it is, or a new one where it does not open."""
    try:
        return open_bundle(ROOT / "engines/mini")
    except LookoutError:
        return build(read_recipe(ROOT / "configs/models-mini.toml"), folder / "mini", lambda step, said: None)


def detections(mini: Bundle) -> dict[int, Detections]:
    """Boxes of every frame down to the lowest score that the tracker looks at."""
    video = find_sample(cache=cache_folder())
    with open_session(mini.file(DETECTOR)) as session:
        detector = Detector(session, mini.manifest.detector, DetectConfig(threshold=CONFIG.low))
        return {number: detector([frame])[0] for number, frame in frames_of(video, 1, LAST)}


def table(truth: Identified, found: Mapping[int, Detections]) -> Table:
    columns = ("precision", "recall", "MOTA", "IDF1", "switches", "MT", "ML", "people", "tracks", "ms/frame")
    title = f"identities at IoU {NEAREST}, in %; detector and defaults have seen frames 1-{TRAINED} before"
    result = Table("boxes", "frames", title=title)
    for column in columns:
        result.add_column(column, justify="right")
    for first, last in ((1, LAST), (TRAINED + 1, LAST)):
        which = f"{first}-{last} of PETS09-S2L1"
        people, boxes = within(truth, first, last), {n: one for n, one in found.items() if first <= n <= last}
        alone = scores(people, strangers(boxes, THRESHOLD))
        result.add_row("mini detector, untracked", which, f"{100 * alone.precision:.1f}", f"{100 * alone.recall:.1f}")
        for name, given in (("mini detector", boxes), ("the true ones", detected(people))):
            result.add_row(name, which, *row(scores(people, tracked(given, CONFIG, THRESHOLD))), f"{pace(given):.2f}")
        result.add_section()
    for name, data, mota, idf1, switches, most, lost in PUBLISHED:
        result.add_row(name, data, "", "", mota, idf1, switches, most, lost)
    return result


def row(of: Scores) -> list[str]:
    shares = [f"{100 * one:.1f}" for one in (of.precision, of.recall, of.mota, of.idf1)]
    kept = [f"{100 * one:.1f}" for one in (of.mostly_tracked, of.mostly_lost)]
    return [*shares, str(of.switches), *kept, str(of.people), str(of.tracks)]


def pace(found: Mapping[int, Detections]) -> float:
    """Median milliseconds of one `update`."""
    tracker, taken = Tracker(CONFIG, THRESHOLD), []
    for number, people in found.items():
        began = time.perf_counter()
        tracker.update(people, number / FRAMES_A_SECOND)
        taken.append(time.perf_counter() - began)
    return 1000 * float(np.median(taken))


def limits(truth: Identified, found: Mapping[int, Detections]) -> str:
    """What the tracker cannot mend: boxes that are nobody's, and people the detector does not see."""
    beside = wrong = missed = hidden = 0
    for number, (_, at) in truth.items():
        boxes = found[number].boxes[found[number].scores > THRESHOLD]
        overlaps = iou(at[:, None], boxes[None])  # (people, boxes)
        unseen = overlaps.max(axis=1, initial=0) < NEAREST
        others = iou(at[:, None], at[None]) * ~np.eye(len(at), dtype=bool)
        missed, hidden = missed + int(unseen.sum()), hidden + int((others[unseen].max(axis=1, initial=0) > 0.1).sum())
        best = overlaps.max(axis=0, initial=0)
        wrong, beside = wrong + int((best < NEAREST).sum()), beside + int((best[best < NEAREST] > 0.1).sum())
    return (
        f"Limits: the boxes. {missed} times a person has none, {hidden} of them before or behind another; {wrong}\n"
        f"boxes are on nobody, {beside} of them beside a person (IoU 0.1 to {NEAREST}). People who cross are told\n"
        "apart by motion alone. And this is one video with few people: the papers' are more and harder."
    )


if __name__ == "__main__":
    sys.exit(main())
