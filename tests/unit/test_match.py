"""Vectors against words: against plain loops in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge.bundle import PromptBank
from edge.match import match, softmax
from edge.values import Category
from tests.fakes import ENCODER_FACTS, bank, unit_rows

SCALE = ENCODER_FACTS.logit_scale


def softmax_by_hand(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=st.floats(-3e4, 3e4, width=32)))
def test_softmax_against_double_precision(logits: NDArray[np.float32]) -> None:
    before = logits.copy()
    shares = softmax(logits)
    assert shares.dtype == np.float32
    assert shares.shape == logits.shape
    wanted = np.array([softmax_by_hand(row) for row in logits.tolist()]).reshape(logits.shape)
    np.testing.assert_allclose(shares, wanted, rtol=2e-5, atol=1e-7)
    assert (shares <= 1).all()
    assert (logits == before).all()


@pytest.mark.parametrize("value", [0.0, 1e38, -1e38])
def test_softmax_of_equals_is_even(value: float) -> None:
    assert softmax(np.full((1, 4), value, np.float32)).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("options", [(2,), (2, 3), (5, 2, 9)])
def test_match_against_plain_loops(n: int, options: tuple[int, ...]) -> None:
    categories = tuple(
        Category(f"c{i}", "q", tuple(f"{i}.{j}" for j in range(count)), (None,) * count)
        for i, count in enumerate(options)
    )
    words, vectors = unit_rows(sum(options), 8, seed=1), unit_rows(n, 8, seed=2)
    matches = match({"whole": vectors}, PromptBank(categories, words, "t", "i", "s"), SCALE)
    assert matches.categories == categories
    assert matches.probabilities.shape == (n, sum(options))
    for person in range(n):
        start = 0
        for category, answer in zip(categories, matches.answers(person, 99), strict=True):
            rows = words[start : start + len(category.options)].astype(float).tolist()
            start += len(rows)
            one = vectors[person].astype(float).tolist()
            logits = [SCALE * math.fsum(a * b for a, b in zip(one, row, strict=True)) for row in rows]
            wanted = dict(zip(category.options, softmax_by_hand(logits), strict=True))
            got = {choice.option: choice.probability for choice in answer.top}
            assert got == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert sum(got.values()) == pytest.approx(1)


def test_a_vector_equal_to_a_word_is_that_word() -> None:
    words = PromptBank((Category("c", "q", ("x", "y"), (None, None)),), np.eye(2, dtype=np.float32), "t", "i", "s")
    matches = match({"whole": np.eye(2, dtype=np.float32)}, words, 100.0)
    assert [matches.answers(person, 1)[0].top[0].option for person in range(2)] == ["x", "y"]
    assert matches.probabilities.min() < 1e-30, "e to the minus 100"


@pytest.mark.parametrize("n", [0, 2])
def test_a_box_that_may_answer_nothing_answers_nothing(n: int) -> None:
    allowed = bank().permitted([])
    assert [category.name for category in allowed.categories] == ["sleeve length"]
    none = PromptBank((), np.zeros((0, 4), np.float32), "t", "i", "s")
    assert match({"whole": unit_rows(n, 4)}, none, SCALE).probabilities.shape == (n, 0)


def test_leaving_a_category_out_leaves_the_others_as_they_were() -> None:
    vectors = unit_rows(3, 4, seed=5)
    everything, allowed = (
        match({"whole": vectors}, bank(), SCALE),
        match({"whole": vectors}, bank().permitted([]), SCALE),
    )
    np.testing.assert_allclose(allowed.probabilities, everything.probabilities[:, :3], rtol=1e-4)
