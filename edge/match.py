"""Vectors against words: one matrix product, a softmax within each category."""

from __future__ import annotations

import numpy as np

from edge.bundle import PromptBank
from edge.values import Floats, Matches


def match(vectors: Floats, bank: PromptBank, logit_scale: float) -> Matches:
    """How well every option of the bank fits every person.

    vectors: (n, d) float32, unit rows; n may be 0. logit_scale: CLIP's trained factor on the cosine (Radford et al.
    2021), the inverse of the softmax's temperature.
    """
    logits = logit_scale * (vectors @ bank.vectors.T)  # (n, m)
    probabilities = np.empty_like(logits)
    start = 0
    for category in bank.categories:
        columns = slice(start, start + len(category.options))
        probabilities[:, columns] = softmax(logits[:, columns])
        start = columns.stop
    return Matches(bank.categories, probabilities)


def softmax(logits: Floats) -> Floats:
    """Over the last axis; the largest is subtracted first, so that nothing overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
