"""`python -m tests.bench.looks`: how many crops of people who are followed are encoded, and what is lost by it.

What was said of a track at its end is compared with what all of its frames say: the option that most of them, each
encoded and looked at by itself, have as their best.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from edge.backend import Session, open_session
from edge.bundle import DETECTOR, IMAGE, Bundle
from edge.config import DescribeConfig, MatchConfig, TrackConfig
from edge.describe import Described, Describer, tall_enough
from edge.detect import Detector
from edge.encode import Encoder
from edge.imaging import HostImaging
from edge.match import match
from edge.track import Tracker
from edge.values import Category, Detections, Frame, Matches, columns_of
from export.samples import find_sample
from export.weights import cache_folder
from tests.bench.tracking import LAST, bundle
from tests.mot import FRAMES_A_SECOND
from tests.pets import frames_of

CONFIG = DescribeConfig()
EVERY = (5, 6, 7, 8, 10, 12, 15, 20)  # frames; the values of look_every that are compared
SHOWN = {5, CONFIG.track.look_every, 20}  # those of them whose agreement is told category by category
SHORT, LONG = 3, 10  # frames that a track has at least
RATIO, AGREEMENT = 5, 0.97  # the targets
console = Console(width=150)


@dataclass(frozen=True)
class Pair:
    """A track's answer to one category: whether it is that of most of its frames, and how large a share they are."""

    track: int
    category: str
    frames: int
    agrees: bool
    majority: float


class Remembered(Detector):
    """A detector that has seen all frames before."""

    def __init__(self, found: Mapping[int, Detections]) -> None:
        self._found = found

    def __call__(self, frames: Sequence[Frame]) -> list[Detections]:
        return [self._found[frame.number] for frame in frames]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        mini = bundle(Path(name))
        video = find_sample(cache=cache_folder())
        frames = [replace(frame, captured_at=n / FRAMES_A_SECOND) for n, frame in frames_of(video, 1, LAST)]
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        console.print(
            f"{os.cpu_count()} cores, load {load}, Python {platform.python_version()}, numpy {np.__version__}"
        )
        with open_session(mini.file(DETECTOR)) as session:
            detector = Detector(session, mini.manifest.detector, CONFIG.detect, CONFIG.track.low)
            found = {frame.number: detector([frame])[0] for frame in frames}
        with open_session(mini.file(IMAGE)) as session:
            votes, encoded = everybody(mini, session, frames, found)
            result = Table(
                *("look_every", "crops/frame", "of", "ratio"),
                title=f"PETS09-S2L1, {len(frames)} frames, mini bundle; answers of tracks against most of their frames",
            )
            for least in (SHORT, LONG):
                for column in (f"agree, tracks of {least}+ frames", "median majority, where not"):
                    result.add_column(column, justify="right")
            rows = []
            for every in EVERY:
                crops, said = described(mini, session, frames, found, every)
                pairs = compared(said, votes, mini.bank.categories)
                ratio = encoded / crops
                cells = [f"{crops / len(frames):.2f}", f"{encoded / len(frames):.2f}", f"{ratio:.1f}"]
                for least in (SHORT, LONG):
                    cells += row([pair for pair in pairs if pair.frames >= least])
                default = " (default)" if every == CONFIG.track.look_every else ""
                result.add_row(f"{every}{default}", *cells)
                tracks = len({pair.track for pair in pairs if pair.frames >= SHORT})
                if every in SHOWN:
                    rows.append((every, pairs))
        console.print(result)
        console.print(by_category(rows))
        console.print(
            f"Targets: a ratio of at least {RATIO}, an agreement of at least {AGREEMENT:.0%}.\n"
            f"All is from {tracks} tracks of one video, whose answers depend on each other: which frames happen to be\n"
            "looked at moves a row by about a point.",
            highlight=False,
        )
    return 0


def everybody(
    mini: Bundle, session: Session, frames: Sequence[Frame], found: Mapping[int, Detections]
) -> tuple[dict[int, NDArray[np.int64]], int]:
    """Each track's votes (m,): how many of its frames have each option as their category's best; and all crops.

    The track's frames are those in which its score is above the threshold.
    """
    tracker = Tracker(CONFIG.track, CONFIG.detect.threshold)
    encoder, facts, bank = Encoder(session, mini.manifest.encoder), mini.manifest.encoder, mini.bank
    imaging = HostImaging()
    votes: dict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros(len(bank.vectors), np.int64))
    encoded = 0
    for frame in frames:
        tracks = tracker.update(found[frame.number], frame.captured_at)
        seen = tall_enough(tracks.people, CONFIG.crop.min_height) & (tracks.people.scores > CONFIG.detect.threshold)
        people = tracks.people[seen]
        crops = {region: imaging.crop([(frame, people.boxes)], facts, bank.look, region) for region in bank.regions}
        vectors = {
            region: encoder(own, imaging.mirror(own) if bank.look.flip else None) for region, own in crops.items()
        }
        encoded += len(people)
        matches = match(vectors, bank, facts.logit_scale)
        for i, track in enumerate(tracks.ids[seen].tolist()):
            votes[track][best(matches, i)] += 1
    return dict(votes), encoded


def best(matches: Matches, person: int) -> list[int]:
    """The column of each category's best option."""
    row = matches.probabilities[person]
    return [columns.start + int(row[columns].argmax()) for _, columns in columns_of(matches.categories)]


def described(
    mini: Bundle, session: Session, frames: Sequence[Frame], found: Mapping[int, Detections], every: int
) -> tuple[int, dict[int, list[int]]]:
    """Crops encoded, and of each track the columns of the best options as they were told last."""
    config = DescribeConfig(
        track=TrackConfig(look_every=every),
        match=MatchConfig(sensitive=tuple(category.name for category in mini.bank.categories)),
    )
    describer = Describer(mini, Remembered(found), Encoder(session, mini.manifest.encoder), config)
    said: dict[int, list[int]] = {}
    for frame in frames:
        (one,) = describer([frame])
        for i, track in enumerate(tracks_of(one)):
            said[track] = best(one.matches, i)
    return describer.encoded, said


def tracks_of(one: Described) -> list[int]:
    assert one.tracks is not None, "people are followed"
    return list(one.tracks.tolist())


def compared(
    said: Mapping[int, Sequence[int]], votes: Mapping[int, NDArray[np.int64]], categories: Sequence[Category]
) -> list[Pair]:
    """Every track and category. An answer agrees where no other has more votes."""
    pairs = []
    for track, columns in said.items():
        for (category, options), column in zip(columns_of(categories), columns, strict=True):
            own = votes[track][options]
            agrees = bool(own[column - options.start] == own.max())
            pairs.append(Pair(track, category.name, int(own.sum()), agrees, float(own.max() / own.sum())))
    return pairs


def row(pairs: Sequence[Pair]) -> list[str]:
    """Share of the pairs that agree, and the others' median majority."""
    wrong = [pair.majority for pair in pairs if not pair.agrees]
    agree = sum(pair.agrees for pair in pairs)
    return [f"{agree / len(pairs):.1%} of {len(pairs)}", f"{np.median(wrong):.0%}" if wrong else "-"]


def by_name(pairs: Sequence[Pair]) -> dict[str, float]:
    """Each category's share of pairs that agree."""
    every, agree = Counter(pair.category for pair in pairs), Counter(pair.category for pair in pairs if pair.agrees)
    return {name: agree[name] / count for name, count in every.items()}


def by_category(rows: Sequence[tuple[int, Sequence[Pair]]]) -> Table:
    table = Table("category", title="agreement by category")
    columns = []
    for every, pairs in rows:
        for least in (SHORT, LONG):
            table.add_column(f"every {every}, {least}+ frames", justify="right")
            columns.append(by_name([pair for pair in pairs if pair.frames >= least]))
    for name in columns[0]:
        table.add_row(name, *(f"{shares[name]:.1%}" for shares in columns))
    table.add_section()
    table.add_row("mean", *(f"{np.mean(list(shares.values())):.1%}" for shares in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
