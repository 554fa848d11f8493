"""Crops to vectors: chunked runs give what one run would."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.encode import MAX_BATCH, Encoder
from edge.errors import BackendError
from tests.fakes import ENCODER_FACTS, Arrays, FakeSession


def embed(feeds: Arrays) -> dict[str, NDArray[np.float32]]:
    """A vector per crop that tells the crops apart: its means along four parts."""
    image = feeds["image"]
    return {"embedding": image.reshape(len(image), 4, -1).mean(axis=2).astype(np.float32)}


def crops(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("count", "batches"),
    [(0, []), (1, [1]), (31, [31]), (32, [32]), (33, [32, 1]), (64, [32, 32]), (65, [32, 32, 1])],
)
def test_chunks_together_are_the_whole(count: int, batches: list[int]) -> None:
    session, images = FakeSession(embed), crops(count)
    before = images.copy()
    vectors = Encoder(session, ENCODER_FACTS)(images)
    assert vectors.shape == (count, ENCODER_FACTS.dim)
    assert vectors.dtype == np.float32
    if count:
        assert (vectors == embed({"image": images})["embedding"]).all(), "in the crops' order"
    assert [len(feed["image"]) for feed in session.feeds] == batches
    assert all(list(feed) == ["image"] and feed["image"].dtype == np.uint8 for feed in session.feeds)
    assert (images == before).all()


def test_the_largest_run_is_the_documented_one() -> None:
    assert MAX_BATCH == 32


def test_a_half_precision_answer_becomes_float32() -> None:
    session = FakeSession({"embedding": np.eye(2, 4, dtype=np.float16)})
    vectors = Encoder(session, ENCODER_FACTS)(crops(2))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == np.eye(2, 4).tolist()


def test_the_sessions_error_comes_through() -> None:
    session = FakeSession(embed)
    encoder = Encoder(session, ENCODER_FACTS)
    session.close()
    with pytest.raises(BackendError):
        encoder(crops(1))
    assert encoder(crops(0)).shape == (0, 4), "nobody needs no session"
