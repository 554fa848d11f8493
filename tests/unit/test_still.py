"""What counts as the same picture again and again."""

from __future__ import annotations

import numpy as np
import pytest

from edge.still import Still
from edge.values import Image


def frozen(pictures: list[Image], limit: float = 10.0, rate: float = 1.0) -> list[bool]:
    still = Still(limit)
    return [still.frozen(image, 1e5 + i / rate) for i, image in enumerate(pictures)]


def noisy(level: float, n: int, shape: tuple[int, int, int] = (180, 320, 3)) -> list[Image]:
    """A sensor's pictures of an even scene: noise of one grey level."""
    chance = np.random.default_rng(0)
    return [np.clip(chance.normal(level, 1, shape), 0, 255).astype(np.uint8) for _ in range(n)]


def test_the_same_picture_is_frozen_once_it_lasted() -> None:
    same = noisy(100, 1) * 15
    assert frozen([one.copy() for one in same]) == [False] * 10 + [True] * 5


@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_a_dark_or_empty_scene_is_not(level: float) -> None:
    assert not any(frozen(noisy(level, 30)))


def test_it_moves_again() -> None:
    first, second = noisy(100, 2)
    assert frozen([first] * 12 + [second] * 3) == [False] * 10 + [True] * 2 + [False] * 3


@pytest.mark.parametrize("shape", [(16, 16, 3), (37, 41, 3), (1080, 1920, 3), (16, 4000, 3)])
def test_one_pixel_that_changes_is_motion(shape: tuple[int, int, int]) -> None:
    chance = np.random.default_rng(1)
    image = np.zeros(shape, np.uint8)
    pictures = []
    for _ in range(25):
        image = image.copy()
        image[chance.integers(shape[0]), chance.integers(shape[1]), 1] += 1
        pictures.append(image)
    assert not any(frozen(pictures))


def test_another_size_is_another_picture() -> None:
    small, large = np.zeros((48, 64, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
    assert not any(frozen([small] * 8 + [large] * 8 + [small] * 8))


def test_what_is_forgotten_is_not_compared() -> None:
    still, image = Still(10), np.zeros((48, 64, 3), np.uint8)
    assert not still.frozen(image, 0)
    still.forget()
    assert not still.frozen(image, 100)
    assert still.frozen(image, 110)
