"""Crops to unit vectors, in batches of a size the encoder takes."""

from __future__ import annotations

import numpy as np

from edge.backend import Pictures, Session
from edge.bundle import EncoderFacts
from edge.failpoints import failpoint
from edge.values import Floats

MAX_BATCH = 32  # in one call of a session: bounds the memory of an engine, and of a graph outside a box; see ROWS


class Encoder:
    """The image tower."""

    def __init__(self, session: Session, facts: EncoderFacts) -> None:
        self._session, self._facts = session, facts

    @property
    def about(self) -> str:
        """What it runs on, in words."""
        return self._session.about

    def __call__(self, crops: Pictures, mirrored: Pictures | None = None) -> Floats:
        """(n, S, S, 3) uint8 BGR -> (n, d) float32, unit rows; n may be 0. Raises BackendError.

        mirrored: the crops' mirror images, with which each row is the mean of both vectors, at twice the cost.
        """
        if mirrored is not None:
            both = self(crops) + self(mirrored)
            lengths = np.linalg.norm(both, axis=1, keepdims=True)
            return np.asarray(both / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)
        failpoint("box.encode")
        runs = [crops[start : start + MAX_BATCH] for start in range(0, len(crops), MAX_BATCH)]
        vectors = [np.asarray(self._session.run({"image": run})["embedding"], np.float32) for run in runs]
        return np.concatenate(vectors) if vectors else np.zeros((0, self._facts.dim), np.float32)
