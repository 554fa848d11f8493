"""Test doubles at the seam, and small values of the contracts for tests to start from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collector.sinks import Item
from edge.backend import TensorSpec
from edge.bank import PromptBank
from edge.bundle import (
    DETECTOR,
    GOLDEN,
    IMAGE,
    MANIFEST,
    PROMPTS,
    TEXT,
    VOCABULARY,
    DetectorFacts,
    EncoderFacts,
    Manifest,
    Precision,
)
from edge.errors import BackendError
from edge.events import Event, encode
from edge.link import Stream, last_of
from edge.protocol import Data, Gone
from edge.values import Category, Floats, Frame

Arrays = Mapping[str, NDArray[Any]]

DETECTOR_FACTS = DetectorFacts(height=32, width=64, resize="stretch", classes=("person",), anchors=6, bn_epsilon=1e-05)
SMALLER_FACTS = DETECTOR_FACTS.model_copy(update={"height": 16, "width": 32, "anchors": 4})
ENCODER_FACTS = EncoderFacts(size=16, dim=4, square="pad", fill_bgr=(104, 117, 123), logit_scale=99.99999237060547)
SLEEVE = Category("sleeve length", "sleeve length of this person is", ("long", "short", "none"), ("长袖", "kurz", None))
GENDER = Category("gender", "gender of this person is", ("female", "male"), (None, None), sensitive=True)


class FakeSession:
    """An edge.backend.Session that answers with the given outputs, or with what a function makes of the inputs.

    feeds: copies of the inputs of every run. closed: how often it was closed.
    """

    precision: Precision = "fp32"
    about = "a fake"

    def __init__(self, answer: Arrays | Callable[[Arrays], Arrays]) -> None:
        self.inputs: Mapping[str, TensorSpec] = {}
        self.outputs: Mapping[str, TensorSpec] = {}
        self.feeds: list[dict[str, NDArray[Any]]] = []
        self.closed = 0
        self._answer = answer

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        if self.closed:
            raise BackendError("fake: the session is closed")
        self.feeds.append({name: array.copy() for name, array in feeds.items()})
        return dict(self._answer(feeds) if callable(self._answer) else self._answer)

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class ListSource:
    """A link's source in memory: epochs 1, 2, … in turn, each a list of entries."""

    def __init__(self, *epochs: Sequence[Data | Gone]) -> None:
        self.epochs = [list(entries) for entries in epochs or ([],)]
        self.forgotten: list[tuple[int, int]] = []
        self._begins = [0] * len(self.epochs)

    def stream(self) -> Stream:
        number = next((i for i, entries in enumerate(self.epochs) if entries), len(self.epochs) - 1)
        first, entries = self._begins[number], self.epochs[number]
        return Stream(number + 1, first, last_of(entries[-1]) + 1 if entries else first)

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        found: list[Data | Gone] = []
        for entry in self.epochs[epoch - 1]:
            if last_of(entry) >= start and len(found) < events and size > 0:
                trimmed = (
                    entry if isinstance(entry, Data) else entry.model_copy(update={"first": max(entry.first, start)})
                )
                found.append(trimmed)
                size -= sum(map(len, entry.frames)) if isinstance(entry, Data) else 0
        return found

    def forget(self, epoch: int, end: int) -> None:
        self.forgotten.append((epoch, end))
        self._begins[epoch - 1] = max(self._begins[epoch - 1], end)
        self.epochs[epoch - 1] = [entry for entry in self.epochs[epoch - 1] if last_of(entry) >= end]


def frame(height: int, width: int, seed: int = 0) -> Frame:
    """Noise, so that no two places look alike."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Frame("door", seed, 1700000000.0, image)


def unit_rows(count: int, dim: int, seed: int = 0) -> Floats:
    """(count, dim) float32, each of length 1."""
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


CONTENTS = {name: f"the bytes of {name}".encode() for name in (DETECTOR, IMAGE, TEXT, VOCABULARY, GOLDEN)}


def bank(dim: int = ENCODER_FACTS.dim, image_sha256: str = sha256(CONTENTS[IMAGE]), seed: int = 0) -> PromptBank:
    """Two categories, one of them sensitive; words of three scripts."""
    return PromptBank((SLEEVE, GENDER), unit_rows(5, dim, seed), sha256(CONTENTS[TEXT]), image_sha256, "wörter.toml")


def manifest(**changes: object) -> Manifest:
    """Of the bundle that `write_bundle` writes, with some fields changed."""
    fields: dict[str, object] = {
        "name": "fake",
        "made_by": "lookout 0.1.0",
        "detector": DETECTOR_FACTS,
        "encoder": ENCODER_FACTS,
        "files": {name: sha256(content) for name, content in CONTENTS.items()},
        "steps": {"detector": sha256(b"its inputs")},
    }
    return Manifest.model_validate({**fields, **changes})


def write_bundle(folder: Path) -> Path:
    """A folder that `open_bundle` opens: only hashes count, so its graphs are a few words each."""
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    (folder / PROMPTS).write_bytes(bank().to_bytes())
    (folder / MANIFEST).write_text(manifest().to_json(), encoding="utf-8")
    return folder


def item(event: Event) -> Item:
    """What a collector's server makes of this event."""
    header = event.header
    return Item(header.device, header.epoch, header.seq, header.seq, event, tuple(encode(event)))
