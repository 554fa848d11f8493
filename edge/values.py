"""What the stages hand to each other: frozen values whose arrays are checked at the door."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) BGR
Floats = NDArray[np.float32]
Backend = Literal["auto", "onnxruntime", "tensorrt"]  # what executes a graph
Region = Literal["whole", "head", "upper", "lower", "feet"]  # the part of a person that a question looks at


def _check(name: str, array: NDArray[np.generic], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `array` has this dtype and shape (None: any length)."""
    fits = array.ndim == len(shape) and all(w in (None, h) for w, h in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {dtype.__name__} ({wanted}), got {array.dtype} {array.shape}")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of one camera.

    camera: the camera's name. number: counts the frames of this source from 0. captured_at: seconds since 1970, UTC.
    image: (H, W, 3) uint8 BGR, at least one pixel.
    """

    camera: str
    number: int
    captured_at: float
    image: Image

    def __post_init__(self) -> None:
        _check("Frame.image", self.image, np.uint8, (None, None, 3))
        if 0 in self.image.shape:
            raise ValueError(f"Frame.image must have pixels, got {self.image.shape}")

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.image.shape[0])

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.image.shape[1])


@dataclass(frozen=True, eq=False)
class Detections:
    """The people of one frame, best score first.

    boxes: (n, 4) float32, px of the source frame, x1 y1 x2 y2, inside the frame. scores: (n,) float32 in 0..1.
    """

    boxes: Floats
    scores: Floats

    def __post_init__(self) -> None:
        _check("Detections.boxes", self.boxes, np.float32, (None, 4))
        _check("Detections.scores", self.scores, np.float32, (len(self.boxes),))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, keep: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Detections:
        return Detections(self.boxes[keep], self.scores[keep])

    def box(self, person: int) -> tuple[float, float, float, float]:
        """One person's box as plain numbers, to a tenth of a px."""
        x1, y1, x2, y2 = (round(edge, 1) for edge in self.boxes[person].tolist())
        return x1, y1, x2, y2

    @classmethod
    def empty(cls) -> Detections:
        """Nobody: a value like any other, so that no stage needs an `if`."""
        return cls(np.zeros((0, 4), np.float32), np.zeros((0,), np.float32))


@dataclass(frozen=True)
class Category:
    """One question and its possible answers.

    name: "sleeve length". question: "sleeve length of this person is". options: at least two, unique.
    labels: one per option, its name in a second language, or None. sensitive: answered only where the owner says so.
    region: where the answer is looked for.

    What calibration found, neutral without it: temperature divides the logits, bias (one per option; empty: none) is
    added to them, and an answer whose probability is below threshold is not known.
    """

    name: str
    question: str
    options: tuple[str, ...]
    labels: tuple[str | None, ...]
    sensitive: bool = False
    region: Region = "whole"
    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.region not in get_args(Region):
            regions = " or ".join(get_args(Region))
            raise ValueError(f"Category {self.name!r} must look at {regions}, got {self.region!r}")
        if not 0 < self.temperature < math.inf or not 0 <= self.threshold <= 1:
            got = f"{self.temperature}, {self.threshold}"
            raise ValueError(f"Category {self.name!r} must have a temperature > 0 and a threshold in 0..1, got {got}")
        if self.bias and (len(self.bias) != len(self.options) or not all(map(math.isfinite, self.bias))):
            raise ValueError(f"Category {self.name!r} must have no bias or a finite one per option, got {self.bias}")
        if len(self.options) < 2 or len(set(self.options)) < len(self.options):
            raise ValueError(f"Category {self.name!r} must have two or more different options, got {self.options}")
        if len(self.labels) != len(self.options):
            raise ValueError(f"Category {self.name!r} must have a label or None per option, got {self.labels}")


def columns_of(categories: Iterable[Category]) -> Iterator[tuple[Category, slice]]:
    """Each category with the place of its options in a row that has those of all categories, in order."""
    start = 0
    for category in categories:
        yield category, slice(start, start + len(category.options))
        start += len(category.options)


@dataclass(frozen=True)
class Choice:
    """One option with its probability within its category, 0..1."""

    option: str
    probability: float
    label: str | None = None


@dataclass(frozen=True)
class Answer:
    """One category's best options for one person, most probable first.

    unknown: the best one is not probable enough to be believed. support: of a person seen over time, the share of the
    looks at them, weighted by quality, that said the best one; else None.
    """

    category: Category
    top: tuple[Choice, ...]
    unknown: bool = False
    support: float | None = None


@dataclass(frozen=True, eq=False)
class Matches:
    """How well every option fits every person.

    categories: C of them. probabilities: (n, m) float32, m = all options in the categories' order; each category's
    columns sum to 1 for every person. support: (n, C) float32 in 0..1 of people seen over time, see Answer; or None.
    """

    categories: tuple[Category, ...]
    probabilities: Floats
    support: Floats | None = None

    def __post_init__(self) -> None:
        options = sum(len(category.options) for category in self.categories)
        _check("Matches.probabilities", self.probabilities, np.float32, (None, options))
        if self.support is not None:
            _check("Matches.support", self.support, np.float32, (len(self.probabilities), len(self.categories)))

    def __len__(self) -> int:
        return len(self.probabilities)

    def answers(self, person: int, top_k: int) -> tuple[Answer, ...]:
        """Each category's `top_k` best options (all of them where there are fewer) for person number `person`."""
        answers = []
        for number, (category, columns) in enumerate(columns_of(self.categories)):
            row = self.probabilities[person, columns]
            best: Sequence[int] = np.argsort(-row, kind="stable")[:top_k].tolist()
            choices = tuple(Choice(category.options[i], float(row[i]), category.labels[i]) for i in best)
            support = None if self.support is None else float(self.support[person, number])
            answers.append(Answer(category, choices, choices[0].probability < category.threshold, support))
        return tuple(answers)
