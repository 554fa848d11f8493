"""How right a bank's answers about a labelled set are, and how it would be if it looked, or was worded, otherwise."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from edge.bank import MAX_MARGIN, MIN_MARGIN, Fit, Look, PromptBank, SquareMode
from edge.bundle import Bundle
from edge.errors import ConfigError
from edge.match import match
from edge.values import Category, Floats, Region, columns_of
from export.labels import LabelledSet
from export.learn import Mask, Sample, came_from, sample_of
from export.looks import Seen, View
from export.metrics import (
    COVERAGES,
    Interval,
    balanced,
    bootstrap,
    codes_of,
    confusion,
    coverage_curve,
    expected_calibration_error,
    majority,
    mean,
    right_within,
    squared_calibration_error,
)
from export.prompts import embed_prompts

HEIGHTS = (0, 64, 128, 192)  # px; crops are told apart by height, from each to below the next
KEYS = ("square", "margin", "flip", "region", "phrases", "prompts", "bank")


@dataclass(frozen=True)
class Variant:
    """One bank, and how it looks. name: as the reader asked for it."""

    name: str
    bank: PromptBank


@dataclass(frozen=True)
class CategoryScore:
    """One category's answers. pictures, people: labelled ones. top3, top5: None where there are no more options.

    balanced: mean recall of the options that occur. majority: of always saying the most common one. ece: expected
    calibration error; calibration2: the squared one without what chance adds. coverage: accuracy of the surest share,
    per COVERAGES. known: share above the threshold; known_top1: their accuracy, None without any. confusion: (K, K),
    people by right option and answer. by_height: Top-1 from each of HEIGHTS on, None without pictures.
    """

    name: str
    options: tuple[str, ...]
    pictures: int
    people: int
    top1: float
    top1_interval: Interval
    top3: float | None
    top5: float | None
    balanced: float
    balanced_interval: Interval
    majority: float
    ece: float
    calibration2: float
    coverage: tuple[float, ...]
    known: float
    known_top1: float | None
    confusion: tuple[tuple[float, ...], ...]
    by_height: tuple[float | None, ...]


@dataclass(frozen=True)
class Score:
    """A variant's answers. ms: of cropping and encoding, per picture."""

    variant: str
    categories: tuple[CategoryScore, ...]
    ms: float

    def mean(self, figure: Callable[[CategoryScore], float | None]) -> float | None:
        """Over the categories that have one; None where none has."""
        found = [value for one in self.categories if (value := figure(one)) is not None]
        return float(np.mean(found)) if found else None

    @property
    def calibration(self) -> float:
        """Root of the mean squared calibration error of all categories; 0 where chance explains all of it."""
        return float(np.sqrt(max(float(np.mean([one.calibration2 for one in self.categories])), 0)))


def score(variant: Variant, labelled: LabelledSet, keep: Mask, seen: Seen, scale: float) -> Score:
    """keep: (n,) the pictures to judge by. scale: CLIP's logit scale. Raises ConfigError, CaptureError, BackendError.

    Categories without a label among them are left out; ConfigError where none is left.
    """
    bank = variant.bank.only(labelled.labels)
    views = views_of(bank)
    matches = match(seen.vectors(views), bank, scale)
    scores = [
        _category(category, sample, matches.probabilities[sample.rows][:, columns], seen.heights[sample.rows])
        for category, columns in columns_of(bank.categories)
        if len(sample := sample_of(labelled, category, keep))
    ]
    if not scores:
        raise ConfigError(f"{labelled.source}: {variant.name}: no picture to judge by has a label it asks for")
    return Score(variant.name, tuple(scores), seen.ms(views))


def views_of(bank: PromptBank) -> list[View]:
    """All that a bank looks at."""
    return [View(bank.look, region) for region in bank.regions]


def _category(category: Category, sample: Sample, shares: Floats, heights: NDArray[np.int64]) -> CategoryScore:
    """shares: (k, K) of the sample's pictures."""
    truth, weights, people = sample.truth, sample.weights, sample.people
    said, sure = shares.argmax(axis=1).astype(np.intp), shares.max(axis=1)
    right, known = said == truth, sure >= category.threshold
    count = len(category.options)

    def within(k: int) -> float | None:
        return mean(right_within(shares, truth, k), weights) if k < count else None

    places = np.digitize(heights, HEIGHTS[1:])
    groups = [places == number for number in range(len(HEIGHTS))] if heights.any() else []
    cells = confusion(said, truth, weights, count)
    return CategoryScore(
        name=category.name,
        options=category.options,
        pictures=len(sample),
        people=len(np.unique(people)),
        top1=mean(right, weights),
        top1_interval=bootstrap(people, lambda drawn: mean(right[drawn], weights[drawn])),
        top3=within(3),
        top5=within(5),
        balanced=balanced(said, truth, weights),
        balanced_interval=bootstrap(people, lambda drawn: balanced(said[drawn], truth[drawn], weights[drawn])),
        majority=majority(truth, weights),
        ece=expected_calibration_error(sure, right, weights),
        calibration2=squared_calibration_error(sure, right, weights, people),
        coverage=tuple(coverage_curve(sure, right, weights)),
        known=mean(known, weights),
        known_top1=mean(right[known], weights[known]) if known.any() else None,
        confusion=tuple(tuple(row) for row in cells.tolist()),
        by_height=tuple(mean(right[group], weights[group]) if group.any() else None for group in groups),
    )


def accuracy_at(coverage: float) -> Callable[[CategoryScore], float]:
    """The accuracy of the surest `coverage` of the answers, one of COVERAGES."""
    place = COVERAGES.index(coverage)
    return lambda one: one.coverage[place]


def variant_from(spec: str, bundle: Bundle) -> Variant:
    """What `--compare` asks for: KEY=VALUE, several with commas between; before them a name and a colon, if it has one.

    square, margin, flip and region (of every category) change the look; bank (an .npz) or prompts (a .toml, with
    phrases=first to take the first phrase alone) the words. Raises ConfigError.
    """
    fields: dict[str, str] = {}
    name, colon, key = spec.partition("=")[0].rpartition(":")
    asked = key + spec[len(name + colon + key) :]
    for part in asked.split(","):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in KEYS or not value:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ConfigError(
                f"--compare {spec}: {part.strip()!r}",
                expected="KEY=VALUE, KEY being one of " + ", ".join(KEYS),
                remedy=f"did you mean {near[0]}?" if near and near[0] != key else None,
            )
        if key in fields:
            raise ConfigError(f"--compare {spec}: {key} twice")
        fields[key] = value
    bank = _words(spec, fields, bundle)
    try:
        margin = float(fields.get("margin", bank.look.margin))
        if not MIN_MARGIN <= margin <= MAX_MARGIN:
            raise ValueError(f"margin is from {MIN_MARGIN} to {MAX_MARGIN}")
        look = Look(
            _one_of(fields.get("square", bank.look.square), get_args(SquareMode)),
            margin,
            {"yes": True, "no": False}[fields["flip"]] if "flip" in fields else bank.look.flip,
        )
        region = _one_of(fields.get("region"), get_args(Region))
    except KeyError as error:
        raise ConfigError(f"--compare {spec}: flip", expected="yes or no", got=error.args[0]) from error
    except ValueError as error:
        raise ConfigError(f"--compare {spec}: {error}") from error
    categories = bank.categories
    if region is not None:
        categories = tuple(replace(category, region=region) for category in categories)
    return Variant(name.strip() or asked.strip(), replace(bank, look=look, categories=categories))


def _one_of(value: Any, allowed: Sequence[str]) -> Any:
    if value is not None and value not in allowed:
        raise ValueError(f"expected {' or '.join(allowed)}, got {value}")
    return value


def _words(spec: str, fields: Mapping[str, str], bundle: Bundle) -> PromptBank:
    if "phrases" in fields and (fields["phrases"] != "first" or "prompts" not in fields):
        raise ConfigError(f"--compare {spec}: phrases", expected="phrases=first, beside prompts=FILE")
    if "bank" in fields and "prompts" in fields:
        raise ConfigError(f"--compare {spec}: bank and prompts", expected="one of them")
    if "bank" in fields:
        return bundle.checked_bank(Path(fields["bank"]))
    if "prompts" in fields:
        return embed_prompts(Path(fields["prompts"]), bundle, first_phrase="phrases" in fields)
    return bundle.bank


def best_regions(bank: PromptBank, labelled: LabelledSet, learn: Mask, seen: Seen, scale: float) -> PromptBank:
    """The bank with each category looking where it was most often right (balanced) on the people of `learn`."""
    regions: tuple[Region, ...] = get_args(Region)
    vectors = seen.vectors([View(bank.look, region) for region in regions])
    chosen = []
    for category, columns in columns_of(bank.categories):
        sample = sample_of(labelled, category, learn)
        right = {}
        for region in regions if len(sample) else ():
            said = (vectors[region][sample.rows] @ bank.vectors[columns].T).argmax(axis=1).astype(np.intp)
            right[region] = balanced(said, sample.truth, sample.weights)
        best: Region = max(right, key=lambda region: right[region]) if right else category.region
        chosen.append(replace(category, region=best))
    return replace(bank, categories=tuple(chosen))


def people_judged(labelled: LabelledSet, variants: Sequence[Variant], both_halves: bool) -> Mask:
    """(n,) the pictures to judge by: of everybody, or of those that no bank among the variants has learned from.

    both_halves: nothing is learned here either. Raises ConfigError where nobody is left.
    """
    fits = [fit for variant in variants for fit in variant.bank.fits]
    for variant in variants:
        if fit := learned_from_all(variant.bank, labelled):
            raise ConfigError(
                f"{labelled.source}: {variant.name}: the bank was {fit.how} on all of these people",
                remedy="judge it by others, or learn without --everyone",
            )
    keep = np.ones(len(labelled), bool) if both_halves and not fits else ~labelled.half()
    if not keep.any():
        raise ConfigError(
            f"{labelled.source}: too few people to judge by", expected="two or more", got=len(set(labelled.people))
        )
    return keep


def learned_from_all(bank: PromptBank, labelled: LabelledSet) -> Fit | None:
    """What the bank learned from all people of this set, so that nobody there can judge it."""
    return next((fit for fit in bank.fits if fit.everyone and came_from(fit, labelled)), None)


def people_of(labelled: LabelledSet, keep: Mask) -> int:
    """How many different ones."""
    return len(np.unique(codes_of([person for person, kept in zip(labelled.people, keep, strict=True) if kept])))
