"""The prompt bank: the words as vectors, how they want people to be looked at, and what they learned; sealed by itself.

Part of contract 1, the bundle, in which new words replace this one file, in one rename, under a running box.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from edge.errors import BundleError
from edge.values import Category, Floats, Region

SquareMode = Literal["pad", "squash", "crop"]

SEAL = 64  # hex digits of a sha256
MIN_MARGIN, MAX_MARGIN = -0.3, 1.0  # shares of a box; what is cut off on both sides must leave something
MAX_LENGTH = 100.0  # of an adapted vector: text's have 1, and what is longer no fit made
MEND_BANK = "run `python -m export prompts FILE --bundle DIR` to embed the words again"


@dataclass(frozen=True)
class Look:
    """How the crops are made that a bank's vectors may be compared with.

    square: None: as the bundle's manifest says. margin: added on each side as a share of the box's width and height;
    less than 0 cuts off. flip: the crop's vector is averaged with its mirror image's.
    """

    square: SquareMode | None = None
    margin: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.square not in (None, *get_args(SquareMode)) or not MIN_MARGIN <= self.margin <= MAX_MARGIN:
            got = f"{self.square!r}, {self.margin}"
            raise ValueError(f"Look must have a square mode and a margin of {MIN_MARGIN} to {MAX_MARGIN}, got {got}")


@dataclass(frozen=True)
class Fit:
    """What a bank learned from: which command, from which labels, of how many people and crops.

    how: "calibrated" or "adapted". labels: the labelled set's name. sha256: of that set. everyone: of all its people,
    rather than the half that `LabelledSet.half` names, so that nobody is left to judge by.
    """

    how: Literal["calibrated", "adapted"]
    labels: str
    sha256: str
    people: int
    crops: int
    everyone: bool


@dataclass(frozen=True, eq=False)
class PromptBank:
    """The words as vectors.

    categories: C of them. vectors: (m, d) float32, m = all options in the categories' order; unit rows as the text
    tower makes them, of any length where they were adapted. text_sha256: the text.onnx that made the vectors.
    image_sha256: the image.onnx they may be compared with. source: the name of the prompt file. look: how a crop is
    made. fits: what was learned from labels, in order; words_sha256: the bank as it was before that ("": this one).
    text: (m, d) what the text tower made, where `vectors` were adapted; else None.
    """

    categories: tuple[Category, ...]
    vectors: Floats
    text_sha256: str
    image_sha256: str
    source: str
    look: Look = Look()
    fits: tuple[Fit, ...] = ()
    words_sha256: str = ""
    text: Floats | None = None

    def __post_init__(self) -> None:
        options = sum(len(category.options) for category in self.categories)
        if self.vectors.dtype != np.float32 or self.vectors.ndim != 2 or len(self.vectors) != options:
            got = f"{self.vectors.dtype} {self.vectors.shape}"
            raise ValueError(f"PromptBank.vectors must be float32 ({options}, d), got {got}")
        if self.from_text.shape != self.vectors.shape or self.from_text.dtype != np.float32:
            got = f"{self.from_text.dtype} {self.from_text.shape}"
            raise ValueError(f"PromptBank.text must be float32 {self.vectors.shape}, got {got}")
        if not np.allclose(np.linalg.norm(self.from_text, axis=1), 1, atol=1e-3):
            raise ValueError("PromptBank.vectors must have unit rows, or .text where they were adapted")
        if not (np.linalg.norm(self.vectors, axis=1) < MAX_LENGTH).all():  # NaN is less than nothing
            raise ValueError(f"PromptBank.vectors must have rows shorter than {MAX_LENGTH}")

    @property
    def from_text(self) -> Floats:
        """(m, d) unit rows, what the words alone say."""
        return self.vectors if self.text is None else self.text

    @property
    def regions(self) -> tuple[Region, ...]:
        """What has to be encoded of a person: "whole", which events carry, and whatever else a question looks at."""
        return ("whole", *sorted({category.region for category in self.categories} - {"whole"}))

    @property
    def words(self) -> str:
        """sha256 of the bank as the words alone make it, whatever was learned since."""
        return self.words_sha256 or self.sha256

    @cached_property
    def sha256(self) -> str:
        """Names this bank in events: equal words on an equal encoder give an equal sum."""
        return self.to_bytes()[-SEAL:].decode()

    def permitted(self, sensitive: Collection[str]) -> PromptBank:
        """The bank without its sensitive categories, but for those named in `sensitive`."""
        return self.only({one.name for one in self.categories if not one.sensitive or one.name in sensitive})

    def only(self, names: Collection[str]) -> PromptBank:
        """The bank with the categories of these names."""
        kept = [category.name in names for category in self.categories]
        rows = [keep for keep, category in zip(kept, self.categories, strict=True) for _ in category.options]
        categories = tuple(category for category, keep in zip(self.categories, kept, strict=True) if keep)
        keep = np.array(rows, bool)
        text = None if self.text is None else self.text[keep]
        return replace(self, categories=categories, vectors=self.vectors[keep], text=text)

    def to_bytes(self) -> bytes:
        """An .npz whose zip comment, its last 64 bytes, is the hex sha256 of all bytes before: any changed byte shows.

        The same bank gives the same bytes (no time stamps).
        """
        words = {
            "categories": [asdict(category) for category in self.categories],
            "text_sha256": self.text_sha256,
            "image_sha256": self.image_sha256,
            "source": self.source,
            "look": asdict(self.look),
            "fits": [asdict(fit) for fit in self.fits],
            "words_sha256": self.words_sha256,
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in (("vectors.npy", self.vectors), ("text.npy", self.text)):
                if array is not None:
                    file = io.BytesIO()
                    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                    archive.writestr(zipfile.ZipInfo(name), file.getvalue())
            archive.writestr(zipfile.ZipInfo("words.json"), json.dumps(words, ensure_ascii=False))
            archive.comment = b"0" * SEAL
        body = buffer.getvalue()[:-SEAL]
        return body + hashlib.sha256(body).hexdigest().encode()

    @classmethod
    def read(cls, path: Path) -> PromptBank:
        """Read and check one prompts.npz. Raises BundleError."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}", remedy=MEND_BANK) from error
        wanted, got = hashlib.sha256(data[:-SEAL]).hexdigest(), data[-SEAL:].decode("ascii", "replace")
        if wanted != got:
            raise BundleError(f"{path}: damaged", expected=f"seal {wanted}", got=repr(got), remedy=MEND_BANK)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                words = json.loads(archive.read("words.json"))
                arrays = {
                    name: np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
                    for name in archive.namelist()
                    if name.endswith(".npy")
                }
            # what came after the first version has defaults: a bank of that one is read as it was meant
            tuples = ("options", "labels", "bias")
            fields: list[dict[str, Any]] = [
                {key: tuple(value) if key in tuples else value for key, value in category.items()}
                for category in words["categories"]
            ]
            categories = tuple(Category(**one) for one in fields)
            look, fits = Look(**words.get("look", {})), tuple(Fit(**fit) for fit in words.get("fits", ()))
            sums = words["text_sha256"], words["image_sha256"]
            before, text = words.get("words_sha256", ""), arrays.get("text.npy")
            return cls(categories, arrays["vectors.npy"], *sums, words["source"], look, fits, before, text)
        except Exception as error:  # zip, numpy and JSON refuse in a dozen ways
            raise BundleError(f"{path}: sealed, but no prompt bank: {error}", remedy=MEND_BANK) from error
