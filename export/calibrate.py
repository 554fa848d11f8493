"""Calibration: probabilities that come true, and a threshold below which an answer is not known.

Per category a temperature and a bias per option are fitted to labelled people (Platt's scaling of many classes: Guo et
al. 2017), by maximum likelihood with a weak pull to "no change".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from edge.bank import Fit, PromptBank
from edge.values import Category, Floats
from export.metrics import Reals, Truth, threshold_for

PULL = 1.0  # people's worth of evidence against a bias of one
SLACK = 1e-4  # of the threshold: a box computes in float32, and who is exactly at it gets an answer there too


@dataclass(frozen=True)
class Calibration:
    """What is done to a category's logits: divided by temperature, bias (K,) added. threshold: see Category."""

    temperature: float
    bias: tuple[float, ...]
    threshold: float


def calibration_from(logits: Floats, truth: Truth, weights: Reals, coverage: float) -> Calibration:
    """Fit one category. logits: (n, K), as uncalibrated; truth: (n,); weights: (n,), one per person.

    coverage: the share of these people that is answered; the least sure others are unknown. Options nobody has keep no
    bias of their own but what makes them as rare as they are. n may be small: the pull then leaves all as it was.
    """
    count = logits.shape[1]
    scores = logits.astype(np.float64)
    hit, rows = np.eye(count)[truth], np.arange(len(truth))  # (n, K), (n,)

    def loss(values: Reals) -> tuple[float, Reals]:
        sharpness, bias = np.exp(values[0]), values[1:]
        likely = _log_softmax(sharpness * scores + bias)
        cost = -(weights * likely[rows, truth]).sum()
        slopes = weights[:, None] * (np.exp(likely) - hit)  # (n, K)
        by_sharpness = (slopes * scores).sum() * sharpness + PULL * values[0]
        pull = PULL / 2 * (values**2).sum()
        return float(cost + pull), np.concatenate([[by_sharpness], slopes.sum(axis=0) + PULL * bias])

    found = minimize(loss, np.zeros(1 + count), jac=True, method="L-BFGS-B").x
    sharpness, bias = float(np.exp(found[0])), found[1:]
    sure = np.exp(_log_softmax(sharpness * scores + bias).max(axis=1)).astype(np.float32)
    threshold = threshold_for(sure, weights, coverage) * (1 - SLACK)
    return Calibration(1 / sharpness, tuple(map(float, bias)), threshold)


def calibrated(bank: PromptBank, by_category: Mapping[str, Calibration], fit: Fit) -> PromptBank:
    """The bank with these categories calibrated; the others are left as they were."""

    def one(category: Category) -> Category:
        if (found := by_category.get(category.name)) is None:
            return category
        return replace(category, temperature=found.temperature, bias=found.bias, threshold=found.threshold)

    categories = tuple(map(one, bank.categories))
    kept = tuple(earlier for earlier in bank.fits if earlier.how != "calibrated")
    return replace(bank, categories=categories, fits=(*kept, fit), words_sha256=bank.words)


def uncalibrated(bank: PromptBank) -> PromptBank:
    """The same words with neutral temperatures, no bias and no threshold."""
    categories = tuple(replace(one, temperature=1.0, bias=(), threshold=0.0) for one in bank.categories)
    fits = tuple(fit for fit in bank.fits if fit.how != "calibrated")
    return replace(bank, categories=categories, fits=fits, words_sha256=bank.words_sha256 if fits else "")


def _log_softmax(logits: Reals) -> Reals:
    less = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(less - np.log(np.exp(less).sum(axis=1, keepdims=True)), np.float64)
