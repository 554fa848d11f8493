"""Figures of right and sure answers: against plain loops, and against what is known of chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.metrics import (
    BINS,
    COVERAGES,
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
    threshold_for,
    weights_of,
)

SHARES = st.integers(0, 4).map(lambda eighths: eighths / 8)  # few values, so that ties are common
ROWS = st.integers(2, 5).flatmap(
    lambda options: st.lists(
        st.tuples(
            st.lists(SHARES, min_size=options, max_size=options), st.integers(0, options - 1), st.sampled_from("abcd")
        ),
        min_size=1,
        max_size=20,
    )
)
ANSWERS = st.lists(st.tuples(SHARES, st.booleans(), st.sampled_from("abcdefgh")), min_size=1, max_size=30)


def arrays(rows: list) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    shares, truth, people = zip(*rows, strict=True)
    codes = codes_of(people)
    return np.array(shares, np.float32), np.array(truth, np.intp), codes, weights_of(codes)


def weights_by_hand(people: list[str]) -> list[float]:
    return [1 / people.count(person) for person in people]


def sampled(
    people: int, seed: int, pictures: int = 1, above: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.intp]]:
    """Confidences in 0.5..1, answers that are right as often as they say less `above`, and whose they are."""
    random = np.random.default_rng(seed)
    who = np.repeat(np.arange(people), pictures)
    sure = random.uniform(0.5, 1, people)[who].astype(np.float32)
    return sure, random.random(people)[who] < sure - above, who


# --- whose pictures ---------------------------------------------------------------------------------------------------


def test_nobody_has_no_weight() -> None:
    codes = codes_of([])
    assert (codes.shape, codes.dtype) == ((0,), np.intp)
    assert weights_of(codes).shape == (0,)
    assert math.isnan(mean(np.zeros(0), np.zeros(0)))


@given(st.lists(st.text(max_size=3), min_size=1, max_size=20))
def test_a_person_counts_once(people: list[str]) -> None:
    codes = codes_of(people)
    assert sorted(set(codes.tolist())) == list(range(len(set(people))))
    assert all((codes[i] == codes[j]) == (a == b) for i, a in enumerate(people) for j, b in enumerate(people))
    weights = weights_of(codes)
    np.testing.assert_allclose(weights, weights_by_hand(people))
    assert weights.sum() == pytest.approx(len(set(people)))


# --- how right --------------------------------------------------------------------------------------------------------


@given(ROWS, st.integers(1, 5))
def test_right_within_against_plain_loops(rows: list, k: int) -> None:
    shares, truth, _, _ = arrays(rows)
    wanted = []
    for row, right, _ in rows:
        before = sum(share > row[right] or (share == row[right] and i < right) for i, share in enumerate(row))
        wanted.append(before < k)
    assert right_within(shares, truth, k).tolist() == wanted


def test_right_within_of_nobody() -> None:
    assert right_within(np.zeros((0, 3), np.float32), np.zeros(0, np.intp), 2).tolist() == []


@given(ROWS)
def test_answers_against_plain_loops(rows: list) -> None:
    shares, truth, _, weights = arrays(rows)
    said, options = shares.argmax(axis=1), shares.shape[1]
    by_hand = weights_by_hand([person for _, _, person in rows])
    cells = [[0.0] * options for _ in range(options)]
    for (row, right, _), weight in zip(rows, by_hand, strict=True):
        cells[right][row.index(max(row))] += weight
    np.testing.assert_allclose(confusion(said, truth, weights, options), cells)
    recalls = [cells[k][k] / sum(cells[k]) for k in range(options) if sum(cells[k])]
    assert balanced(said, truth, weights) == pytest.approx(sum(recalls) / len(recalls))
    assert majority(truth, weights) == pytest.approx(max(map(sum, cells)) / sum(by_hand))
    assert mean(said == truth, weights) == pytest.approx(sum(cells[k][k] for k in range(options)) / sum(by_hand))


def test_guessing_the_commonest_is_no_balanced_accuracy() -> None:
    truth, said = np.array([0] * 9 + [1]), np.zeros(10, np.intp)
    weights = np.ones(10)
    assert majority(truth, weights) == pytest.approx(0.9)
    assert balanced(said, truth, weights) == pytest.approx(0.5)


@given(ROWS, st.integers(2, 4), st.integers(0, 19))
def test_more_pictures_of_a_person_change_nothing(rows: list, times: int, which: int) -> None:
    person = rows[which % len(rows)][2]
    more = [row for row in rows for _ in range(times if row[2] == person else 1)]

    def figures(given: list) -> list[float]:
        shares, truth, _, weights = arrays(given)
        said, sure = shares.argmax(axis=1), shares.max(axis=1)
        return [
            mean(right_within(shares, truth, 1), weights),
            mean(right_within(shares, truth, 2), weights),
            balanced(said, truth, weights),
            majority(truth, weights),
            *confusion(said, truth, weights, shares.shape[1]).ravel(),
            threshold_for(sure, weights, 0.999),
            coverage_curve(sure, said == truth, weights)[-1],
        ]

    assert figures(more) == pytest.approx(figures(rows))


# --- how sure ---------------------------------------------------------------------------------------------------------


@given(ANSWERS)
def test_surest_answers_against_plain_loops(rows: list) -> None:
    sure, right, _, weights = arrays(rows)
    by_hand = weights_by_hand([person for _, _, person in rows])
    order = sorted(range(len(rows)), key=lambda i: (-rows[i][0], i))
    found = coverage_curve(sure, right, weights)
    for coverage, accuracy in zip(COVERAGES, found, strict=True):
        share, taken, hits = 0.0, 0.0, 0.0
        for i in order:
            taken, hits = taken + by_hand[i], hits + by_hand[i] * rows[i][1]
            share = taken / sum(by_hand)
            if share >= coverage - 1e-9:
                break
        assert accuracy == pytest.approx(hits / taken)
        assert threshold_for(sure, weights, coverage) == rows[i][0]


@given(ANSWERS, st.sampled_from(COVERAGES))
def test_a_threshold_lets_through_what_was_asked_and_no_more_than_ties(rows: list, coverage: float) -> None:
    sure, _, _, weights = arrays(rows)
    threshold = threshold_for(sure, weights, coverage)
    assert weights[sure >= threshold].sum() / weights.sum() >= coverage - 1e-9
    assert weights[sure > threshold].sum() / weights.sum() < coverage


def ece_by_hand(sure: list[float], right: list[bool]) -> float:
    """Of people with one picture each, as many as fill the bins evenly."""
    order, size, total = sorted(range(len(sure)), key=lambda i: sure[i]), len(sure) // BINS, 0.0
    for start in range(0, len(sure), size):
        members = order[start : start + size]
        confidence = sum(sure[i] for i in members) / size
        accuracy = sum(right[i] for i in members) / size
        total += abs(confidence - accuracy) * size / len(sure)
    return total


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_calibration_error_against_plain_loops(size: int) -> None:
    sure, right, _ = sampled(BINS * size, seed=size)
    found = expected_calibration_error(sure, right, np.ones(len(sure)))
    assert found == pytest.approx(ece_by_hand(sure.tolist(), right.tolist()), abs=1e-6)


def test_calibration_error_of_one() -> None:
    sure, weights, people = np.array([0.7], np.float32), np.ones(1), np.zeros(1, np.intp)
    assert expected_calibration_error(sure, np.array([True]), weights) == pytest.approx(0.3)
    assert expected_calibration_error(sure, np.array([False]), weights) == pytest.approx(0.7)
    # right 7 times in 10, it is 0 on average, though one draw says little
    squared = [squared_calibration_error(sure, np.array([right]), weights, people) for right in (True, False)]
    assert 0.7 * squared[0] + 0.3 * squared[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("people", "pictures"), [(2, 1), (5, 3), (10, 1), (15, 1), (50, 1), (60, 3), (400, 2)])
def test_chance_is_no_error_of_right_probabilities(people: int, pictures: int) -> None:
    squared, plain = [], []
    for seed in range(400):
        sure, right, who = sampled(people, seed, pictures)
        weights = weights_of(who)
        squared.append(squared_calibration_error(sure, right, weights, who))
        plain.append(expected_calibration_error(sure, right, weights))
    standard_error = np.std(squared) / len(squared) ** 0.5
    assert abs(np.mean(squared)) < 4 * standard_error
    assert np.mean(plain) > 0.02, "what a plain calibration error takes for one"


@pytest.mark.parametrize("above", [0.1, 0.2, 0.4])
def test_error_of_overconfident_answers_is_their_gap(above: float) -> None:
    found = []
    for seed in range(100):
        sure, right, who = sampled(300, seed, 1, above)
        found.append(squared_calibration_error(sure, right, weights_of(who), who))
    assert np.mean(found) == pytest.approx(above**2, abs=4 * np.std(found) / 10)


# --- how far off by chance --------------------------------------------------------------------------------------------


def test_bootstrap_is_the_same_each_time() -> None:
    _, right, who = sampled(40, seed=3, pictures=2)
    first, second = (bootstrap(who, lambda drawn: float(right[drawn].mean())) for _ in range(2))
    assert first == second
    assert first.low < right.mean() < first.high


def test_bootstrap_of_one_person_knows_no_spread() -> None:
    found = bootstrap(np.zeros(3, np.intp), lambda drawn: float(drawn.sum()), draws=20)
    assert (found.low, found.high) == (3, 3)


def test_bootstrap_draws_people_with_all_their_pictures() -> None:
    who = codes_of(["anna", "bert", "anna", "carl", "anna"])
    draws = []
    bootstrap(who, lambda drawn: float(draws.append(drawn.tolist()) or 0), draws=200)
    seen = set()
    for drawn in draws:
        times = np.bincount(drawn, minlength=5)
        assert times[0] == times[2] == times[4]
        assert times[0] + times[1] + times[3] == 3
        seen.add((times[0], times[1], times[3]))
    assert len(seen) == 10, "every way to draw three of three"


def test_bootstrap_covers_the_truth() -> None:
    """A mean over 60 people with three pictures each, whose answers are alike: 95 % intervals hold it 95 % of times."""
    share, people, within, times = 0.7, 60, 0, 300
    who = np.repeat(np.arange(people), 3)
    for seed in range(times):
        right = np.repeat(np.random.default_rng(seed).random(people) < share, 3)
        interval = bootstrap(who, lambda drawn, right=right: float(right[drawn].mean()), draws=200)
        within += interval.low <= share <= interval.high
    assert 0.90 <= within / times <= 0.98, "drawing pictures instead of people would give 73 %"
