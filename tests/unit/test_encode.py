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


def lengths(vectors: NDArray[np.float32]) -> list[float]:
    return np.linalg.norm(vectors, axis=1).tolist()


@pytest.mark.parametrize("count", [0, 1, 33])
def test_with_mirror_images_a_vector_is_the_mean_of_both(count: int) -> None:
    def turned(feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """Unit rows that left and right change."""
        corners = feeds["image"][:, :2, :2, 0].reshape(-1, 4).astype(np.float32) + 1
        return {"embedding": corners / np.linalg.norm(corners, axis=1, keepdims=True)}

    session, images = FakeSession(turned), crops(count)
    before = images.copy()
    vectors = Encoder(session, ENCODER_FACTS)(images, images[:, :, ::-1])
    assert vectors.shape == (count, ENCODER_FACTS.dim)
    assert vectors.dtype == np.float32
    assert lengths(vectors) == pytest.approx([1] * count, abs=1e-6)
    for vector, image in zip(vectors, images, strict=True):
        mirrored = np.array([[row[::-1] for row in image]])
        both = (turned({"image": image[None]})["embedding"] + turned({"image": mirrored})["embedding"])[0].astype(float)
        assert vector == pytest.approx(both / np.linalg.norm(both), abs=1e-6)
    assert [len(feed["image"]) for feed in session.feeds] == {0: [], 1: [1, 1], 33: [32, 1, 32, 1]}[count]
    assert (images == before).all()


def test_a_crop_and_its_mirror_image_are_one_when_both_are_looked_at() -> None:
    def turned(feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        rows = feeds["image"][:, 0, ::5].mean(axis=2)
        return {"embedding": (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)}

    encoder, images = Encoder(FakeSession(turned), ENCODER_FACTS), crops(3)
    mirrored = images[:, :, ::-1].copy()
    assert np.abs(encoder(images) - encoder(mirrored)).max() > 0.1
    np.testing.assert_allclose(encoder(images, mirrored), encoder(mirrored, images), atol=1e-6)


def test_opposite_vectors_have_no_mean_and_no_nan() -> None:
    session = FakeSession(lambda feeds: {"embedding": np.where(feeds["image"][:, :1, 0, 0] > 0, 1, -1) * np.eye(1, 4)})
    half = np.zeros((1, 16, 16, 3), np.uint8)
    half[:, :, :8] = 1
    assert Encoder(session, ENCODER_FACTS)(half, half[:, :, ::-1]).tolist() == [[0, 0, 0, 0]]
