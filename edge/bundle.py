"""CONTRACT 1: the bundle, a folder with a manifest that export writes and the box reads.

    engines/<name>/  manifest.json  detector.onnx  image.onnx  text.onnx  vocabulary.txt.gz  golden.npz  prompts.npz

The manifest names every file but the prompt bank with its sha256 and is sealed by its own. The bank is sealed by itself
(`PromptBank.to_bytes`), so that new questions replace prompts.npz alone, in one rename, under a running box.
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
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import BundleError
from edge.values import Category, Floats, Region

Precision = Literal["fp32", "fp16"]
SquareMode = Literal["pad", "squash", "crop"]
ResizeMode = Literal["stretch", "letterbox"]

MANIFEST = "manifest.json"
DETECTOR = "detector.onnx"  # image uint8 (n, H, W, 3) BGR -> boxes float32 (n, A, 4), scores float32 (n, A, K)
IMAGE = "image.onnx"  # image uint8 (n, S, S, 3) BGR -> embedding float32 (n, d)
TEXT = "text.onnx"  # tokens int64 (n, 77) -> embedding float32 (n, d); never loaded on the box
VOCABULARY = "vocabulary.txt.gz"  # how words become the tokens of text.onnx
GOLDEN = "golden.npz"
PROMPTS = "prompts.npz"
Channel = Annotated[int, Field(ge=0, le=255)]  # one of a pixel's three numbers
SEAL = 64  # hex digits of a sha256
MIN_MARGIN, MAX_MARGIN = -0.3, 1.0  # shares of a box; what is cut off on both sides must leave something
MAX_LENGTH = 100.0  # of an adapted vector: text's have 1, and what is longer no fit made


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class _Facts(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DetectorFacts(_Facts):
    """detector.onnx: `image` uint8 (n, height, width, 3) BGR -> `boxes` float32 (n, anchors, 4) x1 y1 x2 y2 in 0..1 of
    the input, `scores` float32 (n, anchors, len(classes))."""

    height: int = Field(gt=0, description="net input, px")
    width: int = Field(gt=0, description="net input, px")
    resize: ResizeMode = Field(
        description="how a frame becomes the net input: stretched as Darknet does, or letterboxed"
    )
    classes: tuple[str, ...] = Field(min_length=1, description="kept classes, in the order of the scores' columns")
    anchors: int = Field(gt=0, description="boxes per picture")
    precision: Precision = Field(description="of weights and feature maps; outputs are float32")
    bn_epsilon: float = Field(gt=0, description="epsilon with which batch normalisation was folded")


class EncoderFacts(_Facts):
    """image.onnx: `image` uint8 (n, size, size, 3) BGR -> `embedding` float32 (n, dim), unit length."""

    size: int = Field(gt=0, description="crop edge, px")
    dim: int = Field(gt=0, description="length of an embedding")
    square: SquareMode = Field(description="how a tall crop becomes a square: padded, squashed or centre-cropped")
    fill_bgr: tuple[Channel, Channel, Channel] = Field(description="colour of the padding")
    logit_scale: float = Field(gt=0, description="CLIP's trained factor on the cosine, before the softmax")
    precision: Precision = Field(description="of weights and activations; outputs are float32")


class Manifest(_Facts):
    """The facts of one bundle; every number about the models that the box needs is here and nowhere else."""

    format: Literal["lookout.bundle/1"] = "lookout.bundle/1"
    name: str
    made_by: str = Field(description="the exporter's version")
    detector: DetectorFacts
    encoder: EncoderFacts
    files: dict[str, str] = Field(description="file name -> sha256")
    steps: dict[str, str] = Field(description="export step -> sha256 of its inputs; an unchanged step is not run again")

    def seal(self) -> str:
        """sha256 over the canonical JSON of all fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**self.model_dump(mode="json"), "sha256": self.seal()}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parse and check one manifest.json. Raises BundleError."""
        try:
            fields = json.loads(path.read_bytes())
            sealed = fields.pop("sha256")
            # JSON has no tuples: lists become tuples again, everything else must have its exact type
            manifest = cls.model_validate_json(json.dumps(fields))
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}", remedy=MEND) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"{path}: {key + ': ' if key else ''}{first['msg']}", remedy=MEND) from error
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BundleError(f"{path}: no manifest: {error}", remedy=MEND) from error
        if manifest.seal() != sealed:
            raise BundleError(
                f"{path}: changed by hand or damaged", expected=f"sha256 {manifest.seal()}", got=sealed, remedy=MEND
            )
        return manifest


MEND = "build it with `make export`, or `python -m export build RECIPE`"
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


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: its files' hashes were right when it was opened."""

    path: Path
    manifest: Manifest
    bank: PromptBank

    def file(self, name: str) -> Path:
        return self.path / name

    def read_bank(self) -> PromptBank:
        """The prompt bank as it is on disk now, checked against this bundle's encoder. Raises BundleError."""
        if Manifest.read(self.file(MANIFEST)) != self.manifest:
            raise BundleError(f"{self.path}: the bundle was built anew", remedy="restart the box to use it")
        return self.checked_bank(self.file(PROMPTS))

    def checked_bank(self, path: Path) -> PromptBank:
        """A bank from anywhere, checked against this bundle's encoder. Raises BundleError."""
        bank = PromptBank.read(path)
        _check_bank(path, bank, self.manifest)
        return bank


def open_bundle(path: Path) -> Bundle:
    """Open engines/<name>/ after checking the manifest's seal, every file's sha256, and the bank.

    Raises BundleError: not a bundle, a missing or damaged file, a bank made for another encoder.
    """
    if not path.is_dir():
        raise BundleError(f"{path}: no bundle here", expected="a folder with manifest.json", remedy=MEND)
    manifest = Manifest.read(path / MANIFEST)
    for name in (DETECTOR, IMAGE, TEXT, VOCABULARY, GOLDEN):
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST}: files: no {name}", remedy=MEND)
    for name, wanted in manifest.files.items():
        try:
            got = sha256_of(path / name)
        except OSError as error:
            raise BundleError(f"{path / name}: {error.strerror}", remedy=MEND) from error
        if got != wanted:
            raise BundleError(f"{path / name}: damaged", expected=f"sha256 {wanted}", got=got, remedy=MEND)
    bank = PromptBank.read(path / PROMPTS)
    _check_bank(path / PROMPTS, bank, manifest)
    return Bundle(path, manifest, bank)


def _check_bank(path: Path, bank: PromptBank, manifest: Manifest) -> None:
    for tower, made_for in ((IMAGE, bank.image_sha256), (TEXT, bank.text_sha256)):
        if made_for != manifest.files[tower]:
            raise BundleError(
                f"{path}: its words were embedded for another encoder",
                expected=f"{tower} {manifest.files[tower][:12]}",
                got=made_for[:12],
                remedy=MEND_BANK,
            )
    if bank.vectors.shape[1] != manifest.encoder.dim:
        raise BundleError(
            f"{path}: vectors of the wrong length",
            expected=manifest.encoder.dim,
            got=bank.vectors.shape[1],
            remedy=MEND_BANK,
        )
