"""What is known of each track of one camera: when to look at it again, and what the looks at it said together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge.values import Floats, Matches, Region, columns_of

GROWN = 1.5  # times the largest area so far: closer to the camera there is more to see
BETTER = 1.5  # times the best quality so far
_NEW, _BETTER, _LATE, _NOT_YET = range(4)  # why somebody is looked at, the most pressing first

Indices = NDArray[np.intp]
Ids = NDArray[np.int64]


@dataclass
class _Known:
    """One track. frame: of the last look. Sums over the looks, weighted by quality, in float64: they may be many."""

    vectors: dict[Region, NDArray[np.float64]]  # (d,)
    votes: NDArray[np.float64]  # (m,)
    weight: float = 0.0
    looks: int = 0
    frame: int = 0
    area: float = 0.0
    quality: float = 0.0
    told: tuple[str | None, ...] | None = None  # the best option of each category, None where unknown


class Identities:
    """The tracks of one camera, by their numbers.

    every: frames after which a track is looked at again though nothing about it is better. met: how many tracks were
    ever looked at.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._known: dict[int, _Known] = {}
        self._ever: set[int] = set()  # looked at, also before a restart: their end is still to be told
        self.met = 0

    def due(self, ids: Ids, areas: Floats, qualities: Floats, frame: int) -> Indices:
        """Who is worth a look, the most pressing first: (k,) indices into the (n,) arrays.

        Those never looked at come first, then those that have grown or are clearly better to see, then those last
        looked at long ago; within each the largest. areas: px². qualities: see `edge.crop.qualities_of`.
        """
        ranks = np.array(
            [self._rank(*one, frame) for one in zip(ids.tolist(), areas.tolist(), qualities.tolist(), strict=True)], int
        )
        order = np.lexsort((-areas, ranks))
        return np.asarray(order[ranks[order] < _NOT_YET], np.intp)

    def _rank(self, track: int, area: float, quality: float, frame: int) -> int:
        known = self._known.get(track)
        if known is None:
            return _NEW
        if area > GROWN * known.area or quality > BETTER * known.quality:
            return _BETTER
        return _LATE if frame - known.frame >= self.every else _NOT_YET

    def look(
        self,
        ids: Ids,
        areas: Floats,
        qualities: Floats,
        frame: int,
        vectors: Mapping[Region, Floats],
        matches: Matches,
    ) -> None:
        """Add one look at each of k tracks. vectors: by region, (k, d). matches: what each look says by itself."""
        votes = _votes(matches)
        for i, track in enumerate(ids.tolist()):
            if track not in self._known:
                sums = {region: np.zeros(own.shape[1]) for region, own in vectors.items()}
                self._known[track] = _Known(sums, np.zeros(votes.shape[1]))
                self.met += track not in self._ever
                self._ever.add(track)
            known = self._known[track]
            weight = max(float(qualities[i]), 1e-6)  # a bad look is better than none
            known.looks, known.frame, known.weight = known.looks + 1, frame, known.weight + weight
            known.area, known.quality = max(known.area, float(areas[i])), max(known.quality, weight)
            for region, own in vectors.items():
                known.vectors[region] += weight * own[i]
            known.votes += weight * votes[i]

    def looks(self, ids: Ids) -> NDArray[np.int64]:
        """(n,) how often each was looked at."""
        return np.array([self._known[i].looks if i in self._known else 0 for i in ids.tolist()], np.int64)

    def means(self, ids: Ids, regions: Sequence[Region], dim: int) -> dict[Region, Floats]:
        """Of n tracks that were looked at, by region: the mean of their vectors, weighted by quality, (n, d) unit rows.

        What is said of a track is what its mean vector says, which is also what leaves the box: so a question asked
        later, or a threshold fitted to stored vectors, finds what the box found.
        """
        known = [self._known[track] for track in ids.tolist()]
        sums = {region: np.array([one.vectors[region] for one in known]).reshape(len(known), dim) for region in regions}
        return {
            region: (own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)).astype(np.float32)
            for region, own in sums.items()
        }

    def supported(self, ids: Ids, matches: Matches) -> Matches:
        """The matches of n tracks with their support: the share of the looks, by quality, that said the best option."""
        known = [self._known[track] for track in ids.tolist()]
        votes = np.array([one.votes / one.weight for one in known], np.float32).reshape(matches.probabilities.shape)
        support = np.zeros((len(known), len(matches.categories)), np.float32)
        for number, (_, columns) in enumerate(columns_of(matches.categories)):
            best = matches.probabilities[:, columns].argmax(axis=1)
            support[:, number] = np.minimum(votes[np.arange(len(known)), columns.start + best], 1)
        return replace(matches, support=support)

    def news(self, ids: Ids, matches: Matches) -> Indices:
        """Whose answers are not those told last time; from now on they are told. (k,) indices into `ids`."""
        changed = []
        for i, track in enumerate(ids.tolist()):
            told = tuple(None if one.unknown else one.top[0].option for one in matches.answers(i, 1))
            if told != self._known[track].told:
                self._known[track].told = told
                changed.append(i)
        return np.array(changed, np.intp)

    def forget(self, tracks: Iterable[int]) -> list[int]:
        """These have ended; which of them had ever been looked at."""
        looked = [track for track in tracks if track in self._ever]
        self._ever.difference_update(looked)
        for track in looked:
            self._known.pop(track, None)
        return looked

    def restart(self) -> None:
        """The words changed: nothing that was said in the old ones counts, and everybody is looked at again."""
        self._known.clear()


def _votes(matches: Matches) -> Floats:
    """(n, m) float32: 1 for the best option of each category, else 0."""
    votes = np.zeros_like(matches.probabilities)
    for _, columns in columns_of(matches.categories):
        best = matches.probabilities[:, columns].argmax(axis=1)
        votes[np.arange(len(votes)), columns.start + best] = 1
    return votes
