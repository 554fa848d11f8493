"""How right answers are, and how sure they may be: pure functions of probabilities, truth, and whose pictures they are.

Every person counts once, however many pictures of them there are: a picture's weight is one over their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.values import Floats

Truth = NDArray[np.intp]  # (n,) column of the right option
Reals = NDArray[np.float64]
Codes = NDArray[np.intp]  # (n,) a number per person

BINS = 10  # of equal weight, in the calibration errors
BIN_PEOPLE = 4  # at least, on average: of one person alone nobody can tell what chance does
DRAWS = 1000  # of people, in a bootstrap
COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))


def codes_of(people: Sequence[str]) -> Codes:
    """(n,) one number per different name, from 0."""
    return np.unique(np.array(people, dtype=object), return_inverse=True)[1].astype(np.intp)


def weights_of(people: Codes) -> Reals:
    """(n,) one over the number of pictures of the same person."""
    return np.asarray(1 / np.bincount(people)[people], np.float64) if len(people) else np.zeros(0)


def mean(values: NDArray[np.bool_] | NDArray[np.floating], weights: Reals) -> float:
    """Weighted; NaN of nothing."""
    total = weights.sum()
    return float(np.dot(values, weights) / total) if total else float("nan")


def right_within(probabilities: Floats, truth: Truth, k: int) -> NDArray[np.bool_]:
    """(n,) whether the right option is among the k most probable; of equals the first counts as more probable."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return np.asarray((best == truth[:, None]).any(axis=1))


def balanced(said: Truth, truth: Truth, weights: Reals) -> float:
    """Mean over the options that occur of how many of their pictures are recognised."""
    there, right = np.bincount(truth, weights), np.bincount(truth, weights * (said == truth))
    return float(np.mean(right[there > 0] / there[there > 0]))


def majority(truth: Truth, weights: Reals) -> float:
    """What always saying the most common option would get right."""
    return float(np.bincount(truth, weights).max() / weights.sum())


def confusion(said: Truth, truth: Truth, weights: Reals, options: int) -> Reals:
    """(K, K) weight of the pictures by right option (row) and answer (column)."""
    cells = np.bincount(truth * options + said, weights, minlength=options * options)
    return np.asarray(cells.reshape(options, options), np.float64)


def expected_calibration_error(sure: Floats, right: NDArray[np.bool_], weights: Reals) -> float:
    """Mean distance of confidence and accuracy over bins of equal weight (Guo et al. 2017).

    Of perfect probabilities it is not 0: with few pictures in a bin their accuracy is off by chance.
    """
    bins = _bins(sure, weights, BINS)
    return float(sum(abs(((sure[b] - right[b]) * weights[b]).sum()) for b in bins) / weights.sum())


def squared_calibration_error(sure: Floats, right: NDArray[np.bool_], weights: Reals, people: Codes) -> float:
    """Mean squared distance of confidence and accuracy over bins, less what chance alone adds to it.

    After Kumar, Liang, Ma 2019 ("Verified uncertainty calibration"), who subtract each bin's sampling variance; here it
    is that of a mean over people, whose pictures are not independent of each other. Of few people there are fewer bins.
    May fall below 0.
    """
    total = 0.0
    for b in _bins(sure, weights, min(BINS, max(len(np.unique(people)) // BIN_PEOPLE, 1))):
        share, gaps = weights[b].sum(), sure[b] - right[b]
        gap = mean(gaps, weights[b])
        sums = np.bincount(people[b], weights[b] * (gaps - gap))
        count = len(np.unique(people[b]))
        if count > 1:
            variance = float((sums**2).sum()) / share**2 * count / (count - 1)
        else:  # what it is where the probabilities are right
            variance = mean(sure[b] * (1 - sure[b]), weights[b])
        total += share * (gap**2 - variance)
    return float(total / weights.sum())


def _bins(sure: Floats, weights: Reals, count: int) -> list[NDArray[np.intp]]:
    order = np.argsort(sure, kind="stable")
    place = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    number = np.minimum((place * count).astype(int), count - 1)
    return [order[number == k] for k in np.unique(number)]


def coverage_curve(sure: Floats, right: NDArray[np.bool_], weights: Reals) -> list[float]:
    """For each of COVERAGES: the accuracy of that share of the answers that is surest."""
    order = np.argsort(-sure, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    ends = [int(np.searchsorted(share, coverage - 1e-9)) + 1 for coverage in COVERAGES]
    return [mean(right[order[:end]], weights[order[:end]]) for end in ends]


def threshold_for(sure: Floats, weights: Reals, coverage: float) -> float:
    """The confidence that this share of the answers reaches."""
    order = np.argsort(-sure, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    return float(sure[order[min(int(np.searchsorted(share, coverage - 1e-9)), len(order) - 1)]])


@dataclass(frozen=True)
class Interval:
    """95 % of the draws lie within."""

    low: float
    high: float


def bootstrap(people: Codes, figure: Callable[[NDArray[np.intp]], float], draws: int = DRAWS) -> Interval:
    """How far a figure of pictures may be off by chance: people are drawn again and again, with replacement.

    figure: of the pictures at these indices, some of them several times.
    """
    random = np.random.default_rng(0)
    order, sizes = np.argsort(people, kind="stable"), np.bincount(people)
    starts = np.cumsum(sizes) - sizes
    found = []
    for _ in range(draws):
        drawn = random.integers(0, len(sizes), len(sizes))
        lengths = sizes[drawn]
        first = np.cumsum(lengths) - lengths  # of each drawn person's pictures, among those drawn
        found.append(figure(order[np.repeat(starts[drawn] - first, lengths) + np.arange(lengths.sum())]))
    return Interval(*(float(edge) for edge in np.percentile(found, [2.5, 97.5])))
