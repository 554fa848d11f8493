"""Adapted vectors: the text's where labels say nothing, optimal by an independent computation, of bounded length."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from edge.bank import MAX_LENGTH, Fit, PromptBank
from edge.values import Floats
from export.adapt import FLOOR, PULL, Directions, adapted, directions_of, vectors_from
from export.calibrate import Calibration, calibrated
from tests.fakes import bank, unit_rows

Reals = NDArray[np.float64]
Truth = NDArray[np.intp]
SCALE = 10.0
DIM = 12
ALIKE = Directions(np.eye(DIM))
HOW = Fit("adapted", "people", "0" * 64, 3, 4, False)


def people(count: int, options: int, seed: int = 0, noise: float = 0.35) -> tuple[Floats, Floats, Truth]:
    """Text vectors, and crops around true centres that are not the text's: (K, d), (n, d), (n,)."""
    random = np.random.default_rng(seed)
    text = unit_rows(options, DIM, seed + 1)
    centres = 0.5 * text + 0.9 * unit_rows(options, DIM, seed + 2)
    truth = random.permutation(np.arange(count) % options)
    crops = centres[truth] + noise * random.normal(size=(count, DIM))
    return text, (crops / np.linalg.norm(crops, axis=1, keepdims=True)).astype(np.float32), truth


def loss(
    steps: Reals, text: Floats, crops: Floats, truth: Truth, weights: Reals, free: Directions, labelled: list[int]
) -> float:
    """What is minimised, person by person: surprise among the options as they occur, and the pull to the text."""
    vectors = text.astype(float)
    vectors[labelled] += steps @ free.matrix
    seen = [weights[truth == k].sum() for k in range(len(text))]
    prior = [math.log((one + 1) / (sum(seen) + len(text))) for one in seen]
    total = PULL * SCALE**2 / 2 * float((steps**2).sum())
    for crop, right, weight in zip(crops.astype(float), truth, weights, strict=True):
        scores = [SCALE * float(crop @ vector) + one for vector, one in zip(vectors, prior, strict=True)]
        top = max(scores)
        total -= weight * (scores[right] - top - math.log(math.fsum(math.exp(one - top) for one in scores)))
    return total


def steps_of(found: Floats, text: Floats, free: Directions, labelled: list[int]) -> Reals:
    return np.linalg.solve(free.matrix.T, (found - text)[labelled].astype(float).T).T


def recalls(vectors: Floats, crops: Floats, truth: Truth) -> list[float]:
    said = (crops @ vectors.T).argmax(axis=1)
    return [float((said[truth == k] == k).mean()) for k in np.unique(truth)]


# --- what labels cannot say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [[], [1], [2, 2, 2]])
def test_labels_of_one_option_or_none_leave_the_text(truth: list[int]) -> None:
    text, crops = unit_rows(3, DIM), unit_rows(len(truth), DIM, seed=1)
    free = directions_of(unit_rows(20, DIM, seed=2))
    found = vectors_from(text, crops, np.array(truth, np.intp), np.ones(len(truth)), free, SCALE)
    assert np.array_equal(found, text)


def test_an_option_without_labels_keeps_its_text() -> None:
    text, crops, truth = people(60, 4)
    kept = truth != 2
    found = vectors_from(text, crops[kept], truth[kept], np.ones(kept.sum()), directions_of(crops), SCALE)
    assert np.array_equal(found[2], text[2])
    assert (np.abs(found - text).max(axis=1)[[0, 1, 3]] > 0.01).all()


def test_inputs_are_not_modified() -> None:
    text, crops, truth = people(30, 3)
    before = [array.copy() for array in (text, crops, truth)]
    vectors_from(text, crops, truth, np.ones(30), directions_of(crops), SCALE)
    assert all(np.array_equal(a, b) for a, b in zip(before, (text, crops, truth), strict=True))


# --- optimal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 9, 60])
@pytest.mark.parametrize("options", [2, 4])
def test_nothing_near_is_better(count: int, options: int) -> None:
    random = np.random.default_rng(count)
    text, crops, truth = people(count, options)
    weights, free = random.choice([1, 0.5], count), directions_of(crops)
    labelled = sorted(set(truth.tolist()))
    found = vectors_from(text, crops, truth, weights, free, SCALE)
    given = (text, crops, truth, weights, free, labelled)
    steps = steps_of(found, text, free, labelled)
    best = loss(steps, *given)
    assert best < loss(np.zeros_like(steps), *given) + 1e-6
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            step = random.normal(size=steps.shape)
            assert loss(steps + size * step / np.linalg.norm(step), *given) > best - 1e-3


def test_another_minimiser_finds_the_same() -> None:
    text, crops, truth = people(40, 3)
    free, weights = directions_of(crops), np.ones(40)
    found = vectors_from(text, crops, truth, weights, free, SCALE)
    given = (text, crops, truth, weights, free, [0, 1, 2])
    other = minimize(lambda flat: loss(flat.reshape(3, DIM), *given), np.zeros(3 * DIM), method="BFGS", tol=1e-4).x
    vectors = text + other.reshape(3, DIM) @ free.matrix
    np.testing.assert_allclose(found, vectors, atol=3e-3)


# --- few labels and many ----------------------------------------------------------------------------------------------


def test_the_same_people_again_and_again_lead_further_from_the_text() -> None:
    text, crops, truth = people(24, 3)
    free, distances = directions_of(crops), []
    for weight in (0.01, 0.1, 1, 10, 100):
        found = vectors_from(text, crops, truth, np.full(24, weight), free, SCALE)
        distances.append(float(np.linalg.norm(found - text)))
    assert distances == sorted(distances)
    assert distances[0] < 0.03 < distances[2] < distances[4]


def test_more_labels_lead_further_from_the_text() -> None:
    text, crops, truth = people(2048, 2, noise=0.4)
    free = directions_of(crops)
    distances = [
        float(np.linalg.norm(vectors_from(text, crops[:n], truth[:n], np.ones(n), free, SCALE) - text))
        for n in (4, 16, 64, 256)
    ]
    assert distances == sorted(distances)


def test_many_labels_decide_as_a_regression_without_a_text() -> None:
    text, crops, truth = people(3000, 3, noise=0.3)
    found = vectors_from(text, crops, truth, np.ones(3000), directions_of(crops), SCALE)

    def plain(flat: Reals) -> tuple[float, Reals]:
        logits = crops @ flat.reshape(3, DIM).T
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        slopes = np.exp(logits) - np.eye(3)[truth]
        return float(-logits[np.arange(3000), truth].sum()), (slopes.T @ crops).ravel().astype(float)

    free = minimize(plain, np.zeros(3 * DIM), jac=True, method="L-BFGS-B").x.reshape(3, DIM)
    _, others, right = people(3000, 3, noise=0.3, seed=0)
    said, unpulled, words = ((others @ vectors.T).argmax(axis=1) for vectors in (found, free, text))
    assert (said == unpulled).mean() > 0.95
    assert (words == unpulled).mean() < 0.92, "the text alone decides otherwise"
    assert (said == right).mean() > (words == right).mean()


@pytest.mark.parametrize("times", [1, 10])
def test_a_common_option_does_not_outvote_a_rare_one(times: int) -> None:
    """400 labels of one option, each of them `times`, and 20 of the other."""
    text, crops, truth = people(1000, 2, noise=0.8)
    order = np.argsort(truth, kind="stable")
    taught = np.concatenate([*[order[:400]] * times, order[500:520]])
    found = vectors_from(text, crops[taught], truth[taught], np.ones(len(taught)), directions_of(crops), SCALE)
    common, rare = recalls(found, crops, truth)
    _, by_words = recalls(text, crops, truth)
    assert rare > by_words - 0.01
    assert common - rare < 0.15


# --- directions -------------------------------------------------------------------------------------------------------


SAME = np.tile(unit_rows(1, DIM), (50, 1))


@pytest.mark.parametrize(
    "vectors",
    [np.zeros((0, DIM), np.float32), unit_rows(1, DIM), SAME, SAME + 1e-7 * unit_rows(50, DIM, seed=1)],
    ids=["nobody", "one", "all the same", "the same but for rounding"],
)
def test_people_who_do_not_differ_say_nothing_of_directions(vectors: Floats) -> None:
    assert np.array_equal(directions_of(vectors).matrix, np.eye(DIM))


def test_directions_against_the_covariance() -> None:
    vectors = unit_rows(500, DIM) * np.linspace(0.2, 1, DIM, dtype=np.float32)
    matrix = directions_of(vectors).matrix
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    covariance = np.cov(vectors.T.astype(float), bias=True)
    floored = covariance / np.trace(covariance) * DIM + FLOOR * np.eye(DIM)
    ratio = matrix @ matrix @ floored  # a multiple of the identity: the square is the inverse, scaled
    np.testing.assert_allclose(ratio, np.eye(DIM) * ratio[0, 0], atol=1e-6)
    # a step moves answers as far as it would with every direction alike
    assert np.trace(matrix @ covariance @ matrix) == pytest.approx(np.trace(covariance))


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_in_which_nobody_differs_are_not_free(rank: int) -> None:
    vectors = np.zeros((40, DIM), np.float32)
    vectors[:, :rank] = unit_rows(40, max(rank, 2), seed=5)[:, :rank]
    matrix = directions_of(vectors).matrix
    assert np.isfinite(matrix).all()
    reach = np.sort(np.linalg.eigvalsh(matrix))
    assert reach[0] > 0
    assert reach[-1] / reach[0] < math.sqrt((DIM + FLOOR) / FLOOR) + 1e-6


NASTY = st.sampled_from(["spread", "same", "pairs", "one direction", "against the text"])


@given(NASTY, st.integers(0, 300), st.integers(2, 6), st.integers(0, 999), st.sampled_from([1.0, 100.0]))
def test_vectors_stay_short_enough_for_a_bank(kind: str, count: int, options: int, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    text, crops = unit_rows(options, DIM, seed), unit_rows(count, DIM, seed + 1)
    truth = random.integers(0, options, count)
    if count and kind == "same":
        crops[:] = crops[0]
    elif count and kind == "pairs":
        crops = crops[np.arange(count) % 2]
    elif kind == "one direction":
        crops[:, 1:] *= 1e-4
        crops /= np.linalg.norm(crops, axis=1, keepdims=True)
    elif kind == "against the text":
        crops = text[(truth + 1) % options]
    found = vectors_from(text, crops, truth, 1 / random.integers(1, 4, count), directions_of(crops), scale)
    assert (found.dtype, found.shape) == (np.float32, text.shape)
    assert (np.linalg.norm(found, axis=1) < MAX_LENGTH).all()


# --- the bank ---------------------------------------------------------------------------------------------------------


def test_other_categories_keep_their_words() -> None:
    before = bank()
    after = adapted(before, {"gender": 3 * before.vectors[3:]}, HOW)
    assert np.array_equal(after.vectors[:3], before.vectors[:3])
    assert np.array_equal(after.vectors[3:], 3 * before.vectors[3:])
    assert after.text is not None
    assert np.array_equal(after.text, before.vectors)
    assert (after.fits, after.words, after.categories) == ((HOW,), before.sha256, before.categories)
    assert np.array_equal(before.vectors, bank().vectors)


def test_a_bank_adapted_again_starts_from_its_words() -> None:
    words = bank()
    once = adapted(words, {"gender": 3 * words.vectors[3:]}, HOW)
    twice = adapted(once, {"sleeve length": 2 * words.vectors[:3]}, replace(HOW, people=7))
    assert twice.fits == (replace(HOW, people=7),)
    assert np.array_equal(twice.vectors, np.concatenate([2 * words.vectors[:3], words.vectors[3:]]))
    assert twice.words == words.sha256


def test_an_earlier_calibration_does_not_hold() -> None:
    words = bank()
    fit = replace(HOW, how="calibrated")
    sure = calibrated(words, {"gender": Calibration(2.0, (1.0, 0.0), 0.5)}, fit)
    after = adapted(sure, {"sleeve length": 2 * words.vectors[:3]}, HOW)
    assert after.categories == words.categories
    assert after.fits == (HOW,)
    assert after.words == words.sha256


def test_an_adapted_bank_reads_back(tmp_path: object) -> None:
    words = bank()
    after = adapted(words, {"gender": 3 * words.vectors[3:]}, HOW)
    path = tmp_path / "bank.npz"  # type: ignore[operator]
    path.write_bytes(after.to_bytes())
    again = PromptBank.read(path)
    assert (again.sha256, again.words, again.fits) == (after.sha256, words.sha256, (HOW,))
    assert np.array_equal(again.from_text, words.vectors)
