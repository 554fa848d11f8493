"""Learning from labels with the engines untouched: better vectors for the options, and nothing else changes.

Each category is a multinomial logistic regression on the crops' embeddings whose prior mean is the text's vectors: with
few labels the text decides, with many the labels do (maximum a posteriori). Rare options are not outvoted by common
ones: the likelihood is that of a sample with the labels' own shares of options (Menon et al., ICLR 2021, "Long-tail
learning via logit adjustment"), which are not part of the vectors that come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from edge.bank import Fit, PromptBank
from edge.values import Floats, columns_of
from export.calibrate import uncalibrated
from export.metrics import Reals, Truth

PULL = 4.0  # people's worth of evidence against moving a vector by 1/logit scale in every direction alike
NOISE = 1e-9  # of unit vectors' variance: what float32 adds to equal ones
FLOOR = 0.02  # of the mean variance: directions that vary less do not become cheap


@dataclass(frozen=True, eq=False)
class Directions:
    """How freely a vector may move: (d, d), less along directions in which people's embeddings differ much.

    A step along such a direction moves many answers; one along a direction that hardly varies moves few.
    """

    matrix: Reals


def directions_of(vectors: Floats) -> Directions:
    """From (n, d) embeddings of people, labelled or not: the inverse square root of their covariance, scaled."""
    exact = vectors.astype(np.float64)
    centred = exact - exact.sum(axis=0) / max(len(vectors), 1)
    values, basis = np.linalg.eigh(centred.T @ centred / max(len(vectors), 1))
    values = np.maximum(values, 0)
    if values.sum() < NOISE:  # one picture, or none, or all the same: every direction alike
        return Directions(np.eye(vectors.shape[1]))
    reach = (values / values.mean() + FLOOR) ** -0.5
    reach /= np.sqrt((reach**2 * values).sum() / values.sum())
    return Directions((basis * reach) @ basis.T)


def vectors_from(
    text: Floats, crops: Floats, truth: Truth, weights: Reals, directions: Directions, logit_scale: float
) -> Floats:
    """One category's (K, d) float32 vectors.

    text: (K, d), the prior mean. crops: (n, d) unit rows. truth: (n,) columns. weights: (n,), one per person; n may be
    0. An option without labels keeps its text vector.
    """
    options, size = text.shape
    seen = np.bincount(truth, weights, minlength=options)
    labelled = seen > 0
    if labelled.sum() < 2:
        return text
    prior = text.astype(np.float64)
    hit, rows = np.eye(options)[truth], np.arange(len(truth))
    shares = np.log((seen + 1) / (seen.sum() + options))
    moved = crops.astype(np.float64) @ directions.matrix
    start = logit_scale * (crops @ prior.T) + shares  # (n, K)
    pull = PULL * logit_scale**2

    def loss(flat: Reals) -> tuple[float, Reals]:
        steps = flat.reshape(-1, size)
        logits = start.copy()
        logits[:, labelled] += logit_scale * (moved @ steps.T)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        cost = -(weights * logits[rows, truth]).sum()
        slopes = (weights[:, None] * (np.exp(logits) - hit))[:, labelled]
        return float(cost + pull / 2 * (steps**2).sum()), (logit_scale * slopes.T @ moved + pull * steps).ravel()

    found = minimize(loss, np.zeros(int(labelled.sum()) * size), jac=True, method="L-BFGS-B", tol=1e-6).x
    prior[labelled] += found.reshape(-1, size) @ directions.matrix
    return prior.astype(np.float32)


def adapted(bank: PromptBank, by_category: Mapping[str, Floats], fit: Fit) -> PromptBank:
    """The bank with these categories' vectors in the place of the text's. An earlier calibration does not hold."""
    vectors = bank.from_text.copy()
    for category, columns in columns_of(bank.categories):
        if category.name in by_category:
            vectors[columns] = by_category[category.name]
    plain = uncalibrated(bank)
    return replace(plain, vectors=vectors, fits=(fit,), words_sha256=bank.words, text=bank.from_text)
