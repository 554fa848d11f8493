"""What labels teach a bank: whom it learns from, what it leaves alone, and what each label was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bank import PromptBank
from edge.errors import ConfigError
from edge.values import Category, Floats, Region
from export.adapt import directions_of, vectors_from
from export.calibrate import calibration_from, uncalibrated
from export.labels import LabelledSet
from export.learn import LABELS_PER_OPTION, CurvePoint, adapt, calibrate, curve, sample_of
from export.metrics import balanced, codes_of, weights_of
from tests.fakes import unit_rows

DIM, SCALE = 16, 20.0
BAG = Category("bag", "q", ("big", "small", "none"), (None,) * 3)
HAT = Category("hat", "q", ("hat", "no hat"), (None,) * 2, region="head")
BANK = PromptBank((BAG, HAT), unit_rows(5, DIM, seed=7), "t", "i", "words.toml")


def quiet(said: str) -> None:
    """Nobody listens."""


def a_set(people: Sequence[str], **labels: Sequence[str | None]) -> LabelledSet:
    images = tuple(f"{i}.png" for i in range(len(people)))
    return LabelledSet(Path("the set"), images, tuple(people), {k: tuple(v) for k, v in labels.items()}, "5" * 64)


def crowd(
    count: int, pictures: int = 2, seed: int = 0, noise: float = 0.3, words: float = 0.7
) -> tuple[LabelledSet, dict[Region, Floats]]:
    """People whose vectors lie around centres near the words', with labels of both categories."""
    random = np.random.default_rng(seed)
    centres = words * BANK.vectors + 0.7 * unit_rows(5, DIM, seed=11)
    bags, hats = random.integers(0, 3, count), random.integers(0, 2, count)
    who = np.repeat(np.arange(count), pictures)

    def around(numbers: np.ndarray) -> Floats:
        rows = centres[numbers[who]] + noise * random.normal(size=(len(who), DIM))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    labelled = a_set(
        [f"person {i}" for i in who],
        bag=[BAG.options[bags[i]] for i in who],
        hat=[HAT.options[hats[i]] for i in who],
    )
    return labelled, {"whole": around(bags), "head": around(3 + hats)}


def everyone(labelled: LabelledSet) -> np.ndarray:
    return np.ones(len(labelled), bool)


# --- whose pictures ---------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=40))
def test_halves_never_share_a_person(people: list[str]) -> None:
    labelled = a_set(people, bag=["big"] * len(people))
    half = labelled.half()
    learners, judges = set(np.array(people)[half]), set(np.array(people)[~half])
    assert not learners & judges
    assert learners | judges == set(people)
    taught, judged = sample_of(labelled, BAG, half), sample_of(labelled, BAG, ~half)
    assert sorted([*taught.rows, *judged.rows]) == list(range(len(people)))


def test_a_sample_is_of_the_labelled_pictures_that_were_asked_for() -> None:
    labelled = a_set("abbca", bag=["big", "none", None, "small", "none"])
    sample = sample_of(labelled, BAG, np.array([True, True, True, False, True]))
    assert (sample.rows.tolist(), sample.truth.tolist()) == ([0, 1, 4], [0, 2, 2])
    assert sample.weights.tolist() == [0.5, 1, 0.5]
    assert len(sample_of(labelled, HAT, np.ones(5, bool))) == 0


def test_a_label_that_other_words_have_not_is_refused() -> None:
    other = replace(BAG, options=("large", "smal", "none"))
    with pytest.raises(ConfigError, match=r"the set: bag: .*got 'small'; did you mean 'smal'\?"):
        sample_of(a_set("ab", bag=["none", "small"]), other, np.ones(2, bool))


# --- calibrate --------------------------------------------------------------------------------------------------------


def test_each_category_is_calibrated_on_its_own_region_and_labels() -> None:
    labelled, vectors = crowd(60)
    half = labelled.half()
    found = calibrate(BANK, labelled, half, vectors, SCALE, 0.7, quiet)
    for category, columns, region in ((BAG, slice(0, 3), "whole"), (HAT, slice(3, 5), "head")):
        sample = sample_of(labelled, category, half)
        logits = SCALE * (vectors[region][sample.rows] @ BANK.vectors[columns].T)
        wanted = calibration_from(logits, sample.truth, sample.weights, 0.7)
        got = next(one for one in found.categories if one.name == category.name)
        assert (got.temperature, got.bias, got.threshold) == (wanted.temperature, wanted.bias, wanted.threshold)
    (fit,) = found.fits
    people = set(np.array(labelled.people)[half])
    assert (fit.how, fit.labels, fit.sha256, fit.everyone) == ("calibrated", "the set", "5" * 64, False)
    assert (fit.people, fit.crops) == (len(people), half.sum())


def test_an_adapted_bank_is_calibrated_on_people_who_did_not_adapt_it() -> None:
    """As many directions as people: adapted vectors know each of them, and nothing of others."""
    random = np.random.default_rng(0)
    count = 24
    labelled = a_set(
        [str(i) for i in range(count)],
        bag=[BAG.options[i] for i in random.integers(0, 3, count)],
        hat=[HAT.options[i] for i in random.integers(0, 2, count)],
    )
    vectors: dict[Region, Floats] = {"whole": unit_rows(count, DIM, 1), "head": unit_rows(count, DIM, 2)}
    keep = everyone(labelled)
    plain = replace(BANK, text=BANK.vectors)
    sample = sample_of(labelled, BAG, keep)
    strong = np.full(count, 1000.0)  # so that they know every one of them
    known = vectors_from(
        BANK.vectors[:3], vectors["whole"], sample.truth, strong, directions_of(vectors["whole"]), SCALE
    )
    assert ((vectors["whole"] @ known.T).argmax(axis=1) == sample.truth).mean() > 0.8
    by_heart = replace(plain, vectors=np.concatenate([known, BANK.vectors[3:]]))

    taught_by_these = replace(by_heart, fits=adapt(BANK, labelled, keep, vectors, SCALE, quiet).fits, words_sha256="w")
    said: list[str] = []
    fair = calibrate(taught_by_these, labelled, keep, vectors, SCALE, 0.8, said.append).categories[0]
    taken_in = calibrate(by_heart, labelled, keep, vectors, SCALE, 0.8, quiet).categories[0]
    assert said == ["the set adapted this bank: each person is judged by vectors adapted without them"]
    assert fair.temperature > 2 * taken_in.temperature
    more = replace(labelled, sha256="6" * 64)
    assert calibrate(taught_by_these, more, keep, vectors, SCALE, 0.8, quiet).categories[0] == fair, "it has its name"
    others = replace(more, source=Path("others"))
    as_others = calibrate(taught_by_these, others, keep, vectors, SCALE, 0.8, quiet).categories[0]
    assert as_others.temperature == taken_in.temperature, "other people may judge it as it is"


def test_nobody_is_judged_by_vectors_that_their_other_pictures_adapted() -> None:
    """Pictures of one person are alike; a split by picture would take the answers from their siblings."""
    labelled, vectors = crowd(12, pictures=6, noise=0.05, words=0.0)
    keep = everyone(labelled)
    bank = adapt(BANK, labelled, keep, vectors, SCALE, quiet)
    together = calibrate(bank, labelled, keep, vectors, SCALE, 0.8, quiet)
    alone = calibrate(bank, labelled, keep[:] & (np.arange(72) % 6 == 0), vectors, SCALE, 0.8, quiet)
    for one, other in zip(together.categories, alone.categories, strict=True):
        assert one.temperature == pytest.approx(other.temperature, rel=0.25)


def test_an_earlier_calibration_does_not_lean_on_the_next() -> None:
    labelled, vectors = crowd(60)
    once = calibrate(BANK, labelled, labelled.half(), vectors, SCALE, 0.7, quiet)
    twice = calibrate(once, labelled, labelled.half(), vectors, SCALE, 0.7, quiet)
    assert twice.to_bytes() == once.to_bytes()
    assert uncalibrated(twice).to_bytes() == BANK.to_bytes()


FEW: list[tuple[Mapping[str, list[str | None]], str]] = [
    ({"bag": [None] * 4}, "bag: nothing learned: labels of 0 options, 0 people; two of each are needed"),
    (
        {"bag": ["big", "big", "big", None]},
        "bag: nothing learned: labels of 1 options, 2 people; two of each are needed",
    ),
    (
        {"bag": ["big", "none", None, None]},
        "bag: nothing learned: labels of 2 options, 1 people; two of each are needed",
    ),
]


@pytest.mark.parametrize(("labels", "said"), FEW)
def test_too_few_labels_are_told_and_the_words_left(labels: Mapping[str, list[str | None]], said: str) -> None:
    hats = ["hat", "no hat", "hat", "no hat"]
    labelled = a_set(["a", "a", "b", "b"], **labels, hat=hats)
    vectors: dict[Region, Floats] = {"whole": unit_rows(4, DIM, 1), "head": unit_rows(4, DIM, 2)}
    for learn in (
        lambda note: calibrate(BANK, labelled, everyone(labelled), vectors, SCALE, 0.8, note),
        lambda note: adapt(BANK, labelled, everyone(labelled), vectors, SCALE, note),
    ):
        notes: list[str] = []
        found = learn(notes.append)
        assert notes == [said]
        assert found.categories[0] == BAG
        assert np.array_equal(found.vectors[:3], BANK.vectors[:3])
        assert found.categories[1] != HAT or not np.array_equal(found.vectors[3:], BANK.vectors[3:])
        assert found.fits[0].everyone
    with pytest.raises(ConfigError, match=r"the set: nothing to learn from.*two options and two people; label more"):
        calibrate(BANK, replace(labelled, labels=dict(labels)), everyone(labelled), vectors, SCALE, 0.8, quiet)
    with pytest.raises(ConfigError, match="nothing to learn from"):
        adapt(BANK, replace(labelled, labels=dict(labels)), everyone(labelled), vectors, SCALE, quiet)


# --- adapt ------------------------------------------------------------------------------------------------------------


def test_adapted_vectors_know_more_of_others_than_the_words() -> None:
    labelled, vectors = crowd(400, noise=0.35, words=0.4)
    half = labelled.half()
    found = adapt(BANK, labelled, half, vectors, SCALE, quiet)
    for category, columns in ((BAG, slice(0, 3)), (HAT, slice(3, 5))):
        judges = sample_of(labelled, category, ~half)

        def right(bank: PromptBank, judges=judges, category=category, columns=columns) -> float:  # type: ignore[no-untyped-def]
            said = (vectors[category.region][judges.rows] @ bank.vectors[columns].T).argmax(axis=1)
            return balanced(said, judges.truth, judges.weights)

        assert right(found) > right(BANK) + 0.03
    assert found.categories == BANK.categories
    assert np.array_equal(found.from_text, BANK.vectors)


def test_adapting_looks_at_the_learning_half_alone() -> None:
    labelled, vectors = crowd(60)
    half = labelled.half()
    other = {region: np.where(half[:, None], rows, -rows).astype(np.float32) for region, rows in vectors.items()}
    names = {"bag": tuple(name if on else "none" for name, on in zip(labelled.labels["bag"], half, strict=True))}
    changed = replace(labelled, labels={**labelled.labels, **names})
    wanted = adapt(BANK, labelled, half, vectors, SCALE, quiet)
    assert np.array_equal(adapt(BANK, changed, half, other, SCALE, quiet).vectors, wanted.vectors)


def test_an_option_without_labels_is_told_and_keeps_its_words() -> None:
    labelled, vectors = crowd(60)
    bags = tuple(None if name == "small" else name for name in labelled.labels["bag"])
    labelled, said = replace(labelled, labels={"bag": bags}), []
    found = adapt(BANK, labelled, everyone(labelled), vectors, SCALE, said.append)
    assert "bag: no label says small: the words alone do" in said
    assert np.array_equal(found.vectors[1], BANK.vectors[1])
    assert not np.array_equal(found.vectors[[0, 2]], BANK.vectors[[0, 2]])


# --- the curve --------------------------------------------------------------------------------------------------------


def by_words(labelled: LabelledSet, vectors: Mapping[Region, Floats], category: Category, columns: slice) -> float:
    judges = sample_of(labelled, category, ~labelled.half())
    said = (vectors[category.region][judges.rows] @ BANK.vectors[columns].T).argmax(axis=1)
    return balanced(said, judges.truth, judges.weights)


def test_the_curve_begins_at_the_words_and_ends_at_the_adapted_bank() -> None:
    labelled, vectors = crowd(150)
    half, steps = labelled.half(), []
    points = curve(BANK, labelled, half, vectors, SCALE, lambda: steps.append(1))
    assert [point.labels for point in points] == [*LABELS_PER_OPTION, None]
    assert len(steps) == 2 * len(points)
    first, last = points[0], points[-1]
    plain = {"bag": by_words(labelled, vectors, BAG, slice(0, 3)), "hat": by_words(labelled, vectors, HAT, slice(3, 5))}
    assert first.by_category == pytest.approx(plain, abs=1e-6)
    assert first.mean == pytest.approx(sum(plain.values()) / 2, abs=1e-6)
    assert (first.gain, first.gain_interval.low, first.gain_interval.high) == (0, 0, 0)
    full = adapt(BANK, labelled, half, vectors, SCALE, quiet)
    judges = sample_of(labelled, BAG, ~half)
    said = (vectors["whole"][judges.rows] @ full.vectors[:3].T).argmax(axis=1)
    assert last.by_category["bag"] == pytest.approx(balanced(said, judges.truth, judges.weights), abs=1e-6)
    for point in points:
        assert point.gain == pytest.approx(point.mean - first.mean, abs=1e-6)
        assert point.interval.low <= point.mean <= point.interval.high
        assert 0 <= point.interval.low <= point.interval.high <= 1
    assert last.gain > 0
    assert points == curve(BANK, labelled, half, vectors, SCALE)


def test_a_label_is_worth_a_person_however_many_pictures_there_are() -> None:
    """Learners of an option are all one vector, so that which of them is drawn cannot matter: only how many."""
    labelled, noisy = crowd(200, pictures=1, noise=0.5, words=0.2)
    _, clear = crowd(200, pictures=1, noise=0.0, words=0.2)
    half = labelled.half()
    vectors: dict[Region, Floats] = {name: np.where(half[:, None], clear[name], noisy[name]) for name in noisy}
    again = np.repeat(np.arange(200), 4)
    labels = {name: [options[i] for i in again] for name, options in labelled.labels.items()}
    more = a_set([labelled.people[i] for i in again], **labels)
    wanted = curve(BANK, labelled, half, vectors, SCALE)
    found = curve(BANK, more, more.half(), {name: rows[again] for name, rows in vectors.items()}, SCALE)
    assert [p.mean for p in found] == pytest.approx([p.mean for p in wanted], abs=1e-6)
    assert len({round(p.mean, 6) for p in wanted}) > 3


def test_what_few_labels_say_of_a_category_is_not_what_earlier_ones_said() -> None:
    labelled, vectors = crowd(60)
    once = calibrate(BANK, labelled, labelled.half(), vectors, SCALE, 0.7, quiet)
    less = replace(labelled, labels={"hat": labelled.labels["hat"]})
    found = calibrate(once, less, labelled.half(), vectors, SCALE, 0.7, quiet)
    assert found.categories[0] == BAG, "the only fit that the bank tells of did not make it"
    assert found.categories[1] == once.categories[1]
    moved = adapt(BANK, labelled, labelled.half(), vectors, SCALE, quiet)
    assert np.array_equal(adapt(moved, less, labelled.half(), vectors, SCALE, quiet).vectors[:3], BANK.vectors[:3])


@pytest.mark.parametrize("people", [["a"], ["a", "b"], list("abcdef")])
def test_a_curve_of_hardly_anybody_has_no_number_that_is_none(people: list[str]) -> None:
    labelled = a_set(people, bag=[BAG.options[i % 2] for i in range(len(people))])
    vectors: dict[Region, Floats] = {"whole": unit_rows(len(people), DIM), "head": unit_rows(len(people), DIM)}
    for learn in (labelled.half(), np.arange(len(people)) % 4 < 2, everyone(labelled)):
        points = curve(BANK, labelled, learn, vectors, SCALE)
        assert all(np.isfinite(figures(point)).all() for point in points)
    assert not curve(BANK, labelled, everyone(labelled), vectors, SCALE), "nobody is left to judge"


def figures(point: CurvePoint) -> list[float]:
    ends = (point.interval, point.gain_interval)
    return [point.mean, point.gain, *point.by_category.values(), *(x for end in ends for x in (end.low, end.high))]


def test_people_weigh_alike_in_the_curve() -> None:
    labelled, vectors = crowd(40, pictures=1)
    judges = np.flatnonzero(~labelled.half())
    again = np.concatenate([np.arange(40), np.repeat(judges[:1], 9)])
    images = tuple(f"{i}.png" for i in range(len(again)))
    people = tuple(labelled.people[i] for i in again)
    labels = {name: tuple(options[i] for i in again) for name, options in labelled.labels.items()}
    more = LabelledSet(labelled.source, images, people, labels, labelled.sha256)
    taken = {region: rows[again] for region, rows in vectors.items()}
    wanted = curve(BANK, labelled, labelled.half(), vectors, SCALE)
    found = curve(BANK, more, more.half(), taken, SCALE)
    assert [p.by_category for p in found] == [pytest.approx(p.by_category, abs=1e-6) for p in wanted]
    assert weights_of(codes_of(people)).sum() == pytest.approx(40)
