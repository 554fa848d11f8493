"""What labels teach a bank: calibrated and adapted banks from a labelled set, and how much each label was worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.bank import Fit, PromptBank
from edge.errors import ConfigError
from edge.values import Category, Floats, Region, columns_of
from export.adapt import Directions, adapted, directions_of, vectors_from
from export.calibrate import Calibration, calibrated, calibration_from, uncalibrated
from export.label_map import check_option
from export.labels import LabelledSet
from export.metrics import Codes, Interval, Reals, Truth, bootstrap, codes_of, weights_of

LABELS_PER_OPTION = (0, 1, 2, 4, 8, 16, 32, 64)
REPEATS = 5  # draws of the few labels, whose luck is averaged
CURVE_DRAWS = 200  # of people, in an interval
FOLDS = 5  # of people, where a bank is calibrated on those who adapted it

Mask = NDArray[np.bool_]
Vectors = Mapping[Region, Floats]  # by region, (n, d)
Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """The pictures of a labelled set that have a label of one category. rows: (k,) their places in the set."""

    rows: NDArray[np.intp]
    truth: Truth
    people: Codes
    weights: Reals

    def __len__(self) -> int:
        return len(self.rows)


def sample_of(labelled: LabelledSet, category: Category, keep: Mask) -> Sample:
    """keep: (n,) the pictures to take, where they are labelled. Raises ConfigError for a label unknown to the bank."""
    names = labelled.labels.get(category.name, (None,) * len(labelled))
    places = {option: number for number, option in enumerate(category.options)}
    for name in dict.fromkeys(names):
        if name is not None:  # the labels were read for the bundle's words; these may be others
            check_option(f"{labelled.source}: {category.name}: a label that these words have not", name, tuple(places))
    truth = np.array([-1 if name is None else places[name] for name in names], np.intp)
    rows = np.flatnonzero((truth >= 0) & keep)
    people = codes_of([labelled.people[row] for row in rows])
    return Sample(rows, truth[rows], people, weights_of(people))


def calibrate(
    bank: PromptBank, labelled: LabelledSet, keep: Mask, vectors: Vectors, scale: float, coverage: float, note: Note
) -> PromptBank:
    """The bank with temperature, bias and threshold of every category that enough is known of.

    keep: (n,) the pictures to fit on. vectors: of all n. scale: CLIP's logit scale. note: is told what was left out.
    A bank that these labels adapted knows their people too well: each is judged by vectors adapted without them. Raises
    ConfigError where no category has labels of two options.
    """
    plain, found = uncalibrated(bank), dict[str, Calibration]()
    again = next((fit for fit in bank.fits if fit.how == "adapted" and came_from(fit, labelled)), None)
    if again:
        note(f"{again.labels} adapted this bank: each person is judged by vectors adapted without them")
    for category, columns in columns_of(plain.categories):
        sample = sample_of(labelled, category, keep)
        if too_few(category, sample, note):
            continue
        crops = vectors[category.region][sample.rows]
        if again:
            text, free = plain.from_text[columns], directions_of(vectors[category.region][keep])
            logits = _without_each(text, crops, sample, free, scale)
        else:
            logits = scale * (crops @ plain.vectors[columns].T)
        found[category.name] = calibration_from(logits, sample.truth, sample.weights, coverage)
    return calibrated(plain, found, _fit("calibrated", labelled, keep, found))


def adapt(
    bank: PromptBank, labelled: LabelledSet, keep: Mask, vectors: Vectors, scale: float, note: Note
) -> PromptBank:
    """The bank with vectors that learned from the labels, starting from the text's. Arguments as of `calibrate`."""
    found = dict[str, Floats]()
    for category, columns in columns_of(bank.categories):
        sample = sample_of(labelled, category, keep)
        if too_few(category, sample, note):
            continue
        own = vectors[category.region]
        free = directions_of(own[keep])
        text, crops = bank.from_text[columns], own[sample.rows]
        found[category.name] = vectors_from(text, crops, sample.truth, sample.weights, free, scale)
        if missing := [name for i, name in enumerate(category.options) if i not in sample.truth]:
            note(f"{category.name}: no label says {', '.join(missing)}: the words alone do")
    return adapted(bank, found, _fit("adapted", labelled, keep, found))


def came_from(fit: Fit, labelled: LabelledSet) -> bool:
    """Whether a bank learned from this set, or from one of its name, which has gained or changed labels since."""
    return labelled.sha256 == fit.sha256 or labelled.source.name == fit.labels


def too_few(category: Category, sample: Sample, note: Note) -> bool:
    """Whether nothing can be learned of a category."""
    options, people = len(np.unique(sample.truth)), len(np.unique(sample.people))
    if options >= 2 and people >= 2:
        return False
    note(f"{category.name}: nothing learned: labels of {options} options, {people} people; two of each are needed")
    return True


def _fit(how: Literal["calibrated", "adapted"], labelled: LabelledSet, keep: Mask, found: Mapping[str, object]) -> Fit:
    if not found:
        raise ConfigError(
            f"{labelled.source}: nothing to learn from",
            expected="a category with labels of two options and two people",
            remedy="label more people",
        )
    people = {person for person, kept in zip(labelled.people, keep, strict=True) if kept}
    return Fit(how, labelled.source.name, labelled.sha256, len(people), int(keep.sum()), bool(keep.all()))


def _without_each(text: Floats, crops: Floats, sample: Sample, free: Directions, scale: float) -> Floats:
    """(k, K) logits of each person by vectors that were adapted to the others."""
    logits = np.zeros((len(sample), len(text)), np.float32)
    fold = np.random.default_rng(0).permutation(int(sample.people.max()) + 1)[sample.people] % FOLDS
    for number in range(FOLDS):
        out, own = fold != number, fold == number
        learned = vectors_from(text, crops[out], sample.truth[out], sample.weights[out], free, scale)
        logits[own] = scale * (crops[own] @ learned.T)
    return logits


@dataclass(frozen=True)
class CurvePoint:
    """Balanced accuracy after so many labels per option (None: all there are), where an option has as many.

    by_category: the mean of REPEATS draws of the labels. mean: over the categories. gain: what was won against no
    labels. The intervals are a bootstrap's, 95 %.
    """

    labels: int | None
    by_category: dict[str, float]
    mean: float
    interval: Interval
    gain: float
    gain_interval: Interval


def curve(
    bank: PromptBank,
    labelled: LabelledSet,
    learn: Mask,
    vectors: Vectors,
    scale: float,
    step: Callable[[], None] = lambda: None,
) -> list[CurvePoint]:
    """How good a bank adapted with few or many labels is.

    learn: (n,) the pictures to draw labels from; the others judge. A drawn label is one picture of one person. step: is
    called after each of the points times categories. No point where no category has labels of two options on both
    sides.
    """
    counts: Sequence[int | None] = (*LABELS_PER_OPTION, None)
    hits: dict[str, list[Floats]] = {}  # per point, (k,) share of the draws that were right
    samples: dict[str, Sample] = {}
    for category, columns in columns_of(bank.categories):
        sample, judges = sample_of(labelled, category, learn), sample_of(labelled, category, ~learn)
        if too_few(category, sample, lambda said: None) or len(np.unique(judges.truth)) < 2:
            continue
        own = vectors[category.region]
        text, free = bank.from_text[columns], directions_of(own[learn])
        samples[category.name], hits[category.name] = judges, []
        for count in counts:
            right = []
            for seed in range(REPEATS if count else 1):
                drawn = _drawn(sample, count, seed)
                weights = weights_of(sample.people[drawn])
                learned = vectors_from(text, own[sample.rows[drawn]], sample.truth[drawn], weights, free, scale)
                right.append((own[judges.rows] @ learned.T).argmax(axis=1) == judges.truth)
            hits[category.name].append(np.mean(right, axis=0, dtype=np.float32))
            step()
    if not samples:
        return []
    rows = np.unique(np.concatenate([sample.rows for sample in samples.values()]))
    people = codes_of([labelled.people[row] for row in rows])
    return [_point(count, number, hits, samples, rows, people) for number, count in enumerate(counts)]


def _point(
    labels: int | None,
    number: int,
    hits: Mapping[str, Sequence[Floats]],
    samples: Mapping[str, Sample],
    rows: NDArray[np.intp],
    people: Codes,
) -> CurvePoint:
    """rows, people: (r,) pictures in any of the samples, and who is on them: a person is drawn in every category."""
    by_category = {name: _recall(samples[name], hits[name][number]) for name in hits}

    def figure(drawn: NDArray[np.intp], against: int | None) -> float:
        times = np.bincount(rows[drawn], minlength=int(rows[-1]) + 1)
        gains = []
        for name, sample in samples.items():
            again = replace(sample, weights=sample.weights * times[sample.rows])
            gained = hits[name][number] - (0 if against is None else hits[name][against])
            gains.append(_recall(again, gained))
        return float(np.nanmean(gains))

    return CurvePoint(
        labels,
        by_category,
        float(np.mean(list(by_category.values()))),
        bootstrap(people, lambda drawn: figure(drawn, None), CURVE_DRAWS),
        figure(np.arange(len(rows)), 0),
        bootstrap(people, lambda drawn: figure(drawn, 0), CURVE_DRAWS),
    )


def _recall(sample: Sample, hits: Floats) -> float:
    """Balanced accuracy. hits: (k,) how far each answer is right, 0..1."""
    there = np.bincount(sample.truth, sample.weights)
    right = np.bincount(sample.truth, sample.weights * hits)
    return float(np.mean(right[there > 0] / there[there > 0])) if there.sum() else float("nan")


def _drawn(sample: Sample, count: int | None, seed: int) -> NDArray[np.intp]:
    """Indices into the sample: `count` pictures of each option, of different people as far as there are."""
    if count is None:
        return np.arange(len(sample))
    order = np.random.default_rng(seed).permutation(len(sample))
    _, first = np.unique(sample.people[order], return_index=True)  # one picture of each person comes first
    order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
    truth = sample.truth[order]
    return np.concatenate([order[truth == option][:count] for option in np.unique(truth)]).astype(np.intp)
