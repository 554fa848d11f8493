"""The gate's pictures: the golden ones as other light and other cameras would have shown them, the same every time."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from edge.values import Image

_Levels = NDArray[np.float64]  # (H, W, 3), of 0..255 before it is cut off there

_LIGHTS: dict[str, Callable[[_Levels, np.random.Generator], _Levels]] = {
    "": lambda picture, rng: picture,
    "darker": lambda picture, rng: 0.5 * picture,
    "brighter": lambda picture, rng: 1.5 * picture,
    "of low contrast": lambda picture, rng: 0.4 * picture + 0.6 * picture.mean(),
    "blurred": lambda picture, rng: np.asarray(
        cv2.GaussianBlur(picture, (0, 0), max(1.0, picture.shape[1] / 100)), np.float64
    ),
    "noisy": lambda picture, rng: picture + rng.normal(0, 25, picture.shape),
}
_MOVES = {  # scale, and x and y as shares of the picture
    "": (1.0, 0.0, 0.0),
    "shifted left": (1.0, -0.08, 0.0),
    "shifted right": (1.0, 0.08, 0.0),
    "shifted up": (1.0, 0.0, -0.08),
    "shifted down": (1.0, 0.0, 0.08),
    "nearer": (1.15, -0.075, -0.075),
}
MOST = 2 * len(_LIGHTS) * len(_MOVES)  # different ones, mirrored or not


def variants_of(pictures: Image, count: int) -> Image:
    """(n, H, W, 3) uint8 BGR -> (n count, H, W, 3): picture by picture, first as it is and last noise alone.

    count: 2 to MOST.
    """
    made = [_variant(picture, number, k, count) for number, picture in enumerate(pictures) for k in range(count)]
    return np.stack(made) if made else np.zeros((0, *pictures.shape[1:]), np.uint8)


def name_of(number: int, count: int) -> str:
    """What stands at `number` in variants_of's answer: "3 (darker, shifted left, mirrored)"; 3 counts from 0."""
    picture, k = divmod(number, count)
    said = "noise" if k == count - 1 else ", ".join(filter(None, _parts(k))) or "as it is"
    return f"{picture} ({said})"


def _parts(k: int) -> tuple[str, str, str]:
    """Light, move, mirrored: neighbours differ in all three, and all MOST are different."""
    turn, light = divmod(k, len(_LIGHTS))
    move = (light + turn) % len(_MOVES)
    mirrored = (k + k // (MOST // 2)) % 2
    return tuple(_LIGHTS)[light], tuple(_MOVES)[move], "mirrored" if mirrored else ""


def _variant(picture: Image, number: int, k: int, count: int) -> Image:
    rng = np.random.default_rng([number, k])
    if k == count - 1:
        return rng.integers(0, 256, picture.shape, np.uint8)
    light, move, mirrored = _parts(k)
    scale, x, y = _MOVES[move]
    height, width = picture.shape[:2]
    place = np.array([[scale, 0, x * width], [0, scale, y * height]])
    moved = cv2.warpAffine(picture, place, (width, height), borderMode=cv2.BORDER_REPLICATE)
    levels = _LIGHTS[light](moved.astype(np.float64), rng)
    changed = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(changed[:, ::-1]) if mirrored else changed
