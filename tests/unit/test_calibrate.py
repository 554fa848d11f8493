"""Calibration: optimal by an independent computation, right where the answer is known, finite whatever comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bank import Fit, PromptBank
from edge.match import match
from edge.values import Category
from export.calibrate import PULL, Calibration, calibrated, calibration_from, uncalibrated
from tests.fakes import ENCODER_FACTS, bank, unit_rows

Reals = NDArray[np.float64]
HOW = Fit("calibrated", "people", "0" * 64, 3, 4, False)
LEARNED = Fit("adapted", "people", "0" * 64, 3, 4, False)
MILD = Calibration(2.0, (0.5, -0.5), 0.6)


def loss(logits: Reals, truth: Sequence[int], weights: Sequence[float], log_sharpness: float, bias: Reals) -> float:
    """What is minimised, person by person: surprise, and the pull to "no change"."""
    total = PULL / 2 * (log_sharpness**2 + sum(one**2 for one in bias))
    for row, right, weight in zip(logits.astype(float), truth, weights, strict=True):
        scores = [math.exp(log_sharpness) * logit + one for logit, one in zip(row, bias, strict=True)]
        top = max(scores)
        total -= weight * (scores[right] - top - math.log(math.fsum(math.exp(one - top) for one in scores)))
    return total


def sampled(
    count: int, options: int, temperature: float, bias: Sequence[float], seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Logits, and labels drawn from their softmax at this temperature and bias."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (count, options)).astype(np.float32)
    powers = np.exp(logits / temperature + np.array(bias))
    edges = np.cumsum(powers / powers.sum(axis=1, keepdims=True), axis=1)
    return logits, np.minimum((random.random((count, 1)) > edges).sum(axis=1), options - 1)


def log_sharpness_of(found: Calibration) -> float:
    return -math.log(found.temperature)


CASES = [
    (1, 2, 1.0), (2, 2, 3.0), (30, 2, 0.3), (30, 5, 2.0), (200, 3, 4.0), (200, 11, 0.7),
]  # fmt: skip


@pytest.mark.parametrize(("count", "options", "temperature"), CASES)
def test_nothing_near_is_better(count: int, options: int, temperature: float) -> None:
    random = np.random.default_rng(count)
    logits, truth = sampled(count, options, temperature, random.normal(0, 1, options))
    weights = random.choice([1, 0.5, 0.25], count)
    found = calibration_from(logits, truth, weights, 0.8)
    bias = np.array(found.bias)
    best = loss(logits, truth, weights, log_sharpness_of(found), bias)
    assert best <= loss(logits, truth, weights, 0, np.zeros(options)) + 1e-9
    for size in (0.3, 0.03, 0.01):
        for _ in range(20):
            step = random.normal(size=1 + options)
            step *= size / np.linalg.norm(step)
            near = loss(logits, truth, weights, log_sharpness_of(found) + step[0], bias + step[1:])
            assert near > best - 1e-5


def test_plain_descent_arrives_at_the_same() -> None:
    """Gradients by finite differences, steps until nothing moves."""
    logits, truth = sampled(60, 3, 2.5, [1, 0, -1])
    weights = np.ones(60)
    found = calibration_from(logits, truth, weights, 0.8)
    values = np.zeros(4)
    for _ in range(400):
        slope = np.zeros(4)
        for i in range(4):
            step = np.eye(4)[i] * 1e-5
            ahead, behind = (loss(logits, truth, weights, v[0], v[1:]) for v in (values + step, values - step))
            slope[i] = (ahead - behind) / 2e-5
        values -= 0.02 * slope
    assert np.linalg.norm(slope) < 1e-3
    np.testing.assert_allclose([log_sharpness_of(found), *found.bias], values, atol=2e-3)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("bias", [(0.0, 0.0, 0.0), (1.5, 0.0, -1.5)])
def test_what_made_the_labels_is_found(temperature: float, bias: tuple[float, ...]) -> None:
    logits, truth = sampled(20000, 3, temperature, bias)
    found = calibration_from(logits, truth, np.ones(len(truth)), 0.8)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    np.testing.assert_allclose(found.bias, bias, atol=0.1)


def test_few_people_change_little() -> None:
    """One evident mistake among three people is no reason to believe nothing."""
    logits = np.array([[2, 0], [3, 0], [2, 0]], np.float32)
    found = calibration_from(logits, np.array([0, 0, 1]), np.ones(3), 1.0)
    assert 0.5 < found.temperature < 2.5
    assert max(map(abs, found.bias)) < 0.5


def test_an_option_nobody_has_becomes_rare_and_stays_possible() -> None:
    logits, truth = sampled(300, 2, 1, [0, 0])
    three = np.concatenate([logits, np.zeros((300, 1), np.float32)], axis=1)
    found = calibration_from(three, truth, np.ones(300), 0.8)
    assert -10 < found.bias[2] < min(found.bias[:2]) - 1


@pytest.mark.parametrize("right", [0, 1])
def test_one_picture(right: int) -> None:
    found = calibration_from(np.array([[1, 0]], np.float32), np.array([right]), np.ones(1), 0.8)
    assert (found.bias[right] > 0, found.bias[1 - right] < 0) == (True, True)
    shares = np.exp(np.array([1, 0]) / found.temperature + found.bias)
    assert found.threshold == pytest.approx((shares / shares.sum()).max(), rel=1e-3)


@pytest.mark.parametrize("height", [1e2, 1e4])
@pytest.mark.parametrize("wrong", [0, 1, 10, 20])
def test_logits_of_any_height_stay_finite(height: float, wrong: int) -> None:
    logits = np.tile(np.array([[height, -height]], np.float32), (20, 1))
    logits[::2] *= -1
    truth = logits.argmax(axis=1)
    truth[:wrong] = 1 - truth[:wrong]
    found = calibration_from(logits, truth, np.ones(20), 0.8)
    assert 0 < found.temperature < math.inf
    assert all(map(math.isfinite, found.bias))
    assert 0 <= found.threshold <= 1
    best = loss(logits, truth, np.ones(20), log_sharpness_of(found), np.array(found.bias))
    for log_sharpness in np.linspace(-14, 3, 69):
        assert best < loss(logits, truth, np.ones(20), float(log_sharpness), np.zeros(2)) + 0.05


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.5, 0.8, 1.0]), st.integers(1, 40))
def test_as_many_are_answered_on_the_box_as_was_asked(seed: int, coverage: float, people: int) -> None:
    """Who is exactly at the threshold gets an answer, though the box computes in single precision."""
    words, crops = unit_rows(3, 16, seed), unit_rows(people, 16, seed + 1)
    random = np.random.default_rng(seed)
    category = Category("c", "q", ("a", "b", "c"), (None,) * 3)
    plain, scale = PromptBank((category,), words, "t", "i", "s"), ENCODER_FACTS.logit_scale
    weights = random.choice([1, 0.5], people)
    found = calibration_from(scale * crops @ words.T, random.integers(0, 3, people), weights, coverage)
    matches = match({"whole": crops}, calibrated(plain, {"c": found}, HOW), scale)
    known = np.array([not matches.answers(person, 1)[0].unknown for person in range(people)])
    assert weights[known].sum() / weights.sum() >= coverage - 1e-6
    sure = matches.probabilities.max(axis=1)
    assert weights[sure > found.threshold * 1.001].sum() / weights.sum() < coverage


def test_the_box_answers_as_fitted() -> None:
    plain = bank()
    found = Calibration(2.5, (0.3, -0.2, 0.1), 0.5)
    crops = unit_rows(6, ENCODER_FACTS.dim, seed=4)
    matches = match({"whole": crops}, calibrated(plain, {"sleeve length": found}, HOW), 10.0)
    for row, crop in zip(matches.probabilities, crops.astype(float), strict=True):
        scores = [10 * float(crop @ word) / 2.5 + one for word, one in zip(plain.vectors, found.bias, strict=False)]
        powers = [math.exp(score) for score in scores]
        assert row[:3].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-4)


# --- the bank ---------------------------------------------------------------------------------------------------------


def test_other_categories_are_left_as_they_were() -> None:
    before = bank()
    after = calibrated(before, {"gender": MILD}, HOW)
    assert after.categories[0] == before.categories[0]
    gender = after.categories[1]
    assert (gender.temperature, gender.bias, gender.threshold) == (2.0, (0.5, -0.5), 0.6)
    assert replace(gender, temperature=1.0, bias=(), threshold=0.0) == before.categories[1]
    assert np.array_equal(after.vectors, before.vectors)
    assert (after.fits, after.words_sha256, before.fits) == ((HOW,), before.sha256, ())


def test_what_was_adapted_stays_and_what_was_calibrated_is_replaced() -> None:
    words = bank()
    moved = replace(words, vectors=2 * words.vectors, text=words.vectors, fits=(LEARNED,), words_sha256=words.sha256)
    once = calibrated(moved, {"gender": MILD}, HOW)
    twice = calibrated(once, {"gender": replace(MILD, temperature=3.0)}, replace(HOW, people=9))
    assert once.fits == (LEARNED, HOW)
    assert twice.fits == (LEARNED, replace(HOW, people=9))
    assert twice.categories[1].temperature == 3.0
    assert twice.words == once.words == words.sha256
    assert uncalibrated(twice).fits == (LEARNED,)
    assert uncalibrated(twice).to_bytes() == moved.to_bytes()


def test_uncalibrated_is_the_way_back() -> None:
    before = bank()
    there = calibrated(before, {"gender": MILD, "sleeve length": replace(MILD, bias=(1.0, 0.0, 0.0))}, HOW)
    assert there.sha256 != before.sha256
    assert uncalibrated(there).to_bytes() == before.to_bytes()
    assert uncalibrated(before).to_bytes() == before.to_bytes()
