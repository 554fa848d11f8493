"""Vectors against words: one matrix product, a softmax within each category."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge.bank import PromptBank
from edge.values import Floats, Matches, Region, columns_of


def match(vectors: Mapping[Region, Floats], bank: PromptBank, logit_scale: float) -> Matches:
    """How well every option of the bank fits every person.

    vectors: of "whole" and of every region that the bank looks at, (n, d) float32, unit rows; n may be 0. logit_scale:
    CLIP's trained factor on the cosine (Radford et al. 2021), the inverse of the softmax's temperature. A calibrated
    category divides the logits by a temperature of its own (Guo et al. 2017) and adds its options' bias.
    """
    probabilities = np.empty((len(vectors["whole"]), len(bank.vectors)), np.float32)
    for category, columns in columns_of(bank.categories):
        logits = logit_scale * (vectors[category.region] @ bank.vectors[columns].T) / category.temperature
        if category.bias:
            logits = logits + np.array(category.bias, np.float32)
        probabilities[:, columns] = softmax(logits)
    return Matches(bank.categories, probabilities)


def softmax(logits: Floats) -> Floats:
    """Over the last axis; the largest is subtracted first, so that nothing overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
