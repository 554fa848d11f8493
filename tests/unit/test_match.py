"""Vectors against words: against plain loops in double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge.bank import PromptBank
from edge.match import match, softmax
from edge.values import Category, Region
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


REGIONS: tuple[Region, ...] = ("whole", "head", "upper", "lower", "feet")


@st.composite
def calibrated(draw: st.DrawFn) -> list[Category]:
    """Categories that look at any region, with any temperature, bias and threshold."""
    categories = []
    for number in range(draw(st.integers(1, 4))):
        count = draw(st.integers(2, 5))
        bias = tuple(draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))) if draw(st.booleans()) else ()
        categories.append(
            Category(
                f"c{number}",
                "q",
                tuple(f"{number}.{j}" for j in range(count)),
                (None,) * count,
                region=draw(st.sampled_from(REGIONS)),
                temperature=draw(st.sampled_from([0.25, 1.0, 3.0, 50.0])),
                bias=bias,
                threshold=draw(st.floats(0, 1)),
            )
        )
    return categories


@given(calibrated(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_calibrated_categories_against_plain_loops(categories: list[Category], n: int, seed: int) -> None:
    """Each from its region's vectors: the logits over the temperature, plus the bias; unknown below the threshold."""
    words = unit_rows(sum(len(one.options) for one in categories), 8, seed)
    vectors = {region: unit_rows(n, 8, (seed + i) % 2**32) for i, region in enumerate(REGIONS)}
    before = {region: rows.copy() for region, rows in vectors.items()}
    matches = match(vectors, PromptBank(tuple(categories), words, "t", "i", "s"), 20.0)
    assert len(matches) == n
    assert matches.support is None
    for person in range(n):
        start = 0
        for category, answer in zip(categories, matches.answers(person, 99), strict=True):
            one = vectors[category.region][person].astype(float).tolist()
            logits = []
            for i in range(len(category.options)):
                word = words[start + i].astype(float).tolist()
                logit = 20.0 * math.fsum(a * b for a, b in zip(one, word, strict=True)) / category.temperature
                logits.append(logit + (category.bias[i] if category.bias else 0))
            start += len(category.options)
            wanted = softmax_by_hand(logits)
            got = {choice.option: choice.probability for choice in answer.top}
            assert got == pytest.approx(dict(zip(category.options, wanted, strict=True)), rel=1e-3, abs=1e-6)
            if abs(max(wanted) - category.threshold) > 1e-3:
                assert answer.unknown == (max(wanted) < category.threshold)
    assert all((vectors[region] == rows).all() for region, rows in before.items())


def test_a_bias_of_the_logits_is_a_factor_of_the_odds() -> None:
    plain = Category("c", "q", ("x", "y"), (None, None))
    words = PromptBank((plain,), np.eye(2, 4, dtype=np.float32), "t", "i", "s")
    alike = {"whole": np.array([[0.6, 0.6, 0.52915, 0]], np.float32)}
    assert match(alike, words, 10.0).probabilities[0] == pytest.approx([0.5, 0.5])
    moved = PromptBank((replace(plain, bias=(math.log(3), 0.0)),), words.vectors, "t", "i", "s")
    assert match(alike, moved, 10.0).probabilities[0] == pytest.approx([0.75, 0.25])


def test_only_the_regions_asked_about_are_needed() -> None:
    head = Category("c", "q", ("x", "y"), (None, None), region="head")
    words = PromptBank((head,), np.eye(2, dtype=np.float32), "t", "i", "s")
    assert words.regions == ("whole", "head")
    vectors = {"whole": np.eye(2, dtype=np.float32), "head": np.eye(2, dtype=np.float32)[::-1]}
    said = match(vectors, words, 100.0)
    assert [said.answers(person, 1)[0].top[0].option for person in range(2)] == ["y", "x"]
