"""CONTRACT 1: the bundle, a folder with a manifest that export writes and the box reads.

    engines/<name>/  manifest.json  detector.onnx  image.onnx  text.onnx  vocabulary.txt.gz  golden.npz  prompts.npz

The manifest names every file but the prompt bank with its sha256 and is sealed by its own. The bank is sealed by itself
(`PromptBank.to_bytes`), so that new questions replace prompts.npz alone, in one rename, under a running box.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.bank import MEND_BANK, PromptBank, SquareMode
from edge.errors import BundleError

Precision = Literal["fp32", "fp16"]
ResizeMode = Literal["stretch", "letterbox"]

MANIFEST = "manifest.json"
DETECTOR = "detector.onnx"  # image uint8 (n, H, W, 3) BGR -> boxes float32 (n, A, 4), scores float32 (n, A, K)
IMAGE = "image.onnx"  # image uint8 (n, S, S, 3) BGR -> embedding float32 (n, d)
TEXT = "text.onnx"  # tokens int64 (n, 77) -> embedding float32 (n, d); never loaded on the box
VOCABULARY = "vocabulary.txt.gz"  # how words become the tokens of text.onnx
GOLDEN = "golden.npz"
PROMPTS = "prompts.npz"
Channel = Annotated[int, Field(ge=0, le=255)]  # one of a pixel's three numbers


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


def open_bundle(path: Path, *, words: bool = True) -> Bundle:
    """Open engines/<name>/ after checking the manifest's seal, every file's sha256, and the bank.

    words: False leaves the bank aside, for it to be made anew whatever lies there, and gives one without categories.
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
    if not words:
        nothing = np.zeros((0, manifest.encoder.dim), np.float32)
        return Bundle(path, manifest, PromptBank((), nothing, manifest.files[TEXT], manifest.files[IMAGE], ""))
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
