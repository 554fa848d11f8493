"""CONTRACT 1: the bundle, a folder with a manifest that export writes and the box reads.

    engines/<name>/  manifest.json  detector.onnx  image.onnx  text.onnx  vocabulary.txt.gz  golden.npz  prompts.npz
                     detector-smaller.onnx
                     detector-fp16.onnx  image-fp16.onnx  detector-<sum>.engine  image-<sum>.engine  timing.cache

The manifest names every file but the prompt bank with its sha256 and is sealed by its own. The bank is sealed by itself
(`PromptBank.to_bytes`), so that new questions replace prompts.npz alone, in one rename, under a running box. The second
line is there where the recipe asks for it: the same detector at a smaller size, for a box that has too much to do. The
third is there for boxes with TensorRT: an engine fits one kind of machine only, which its fingerprint tells.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edge.bank import MEND_BANK, PromptBank, SquareMode
from edge.errors import BundleError

Precision = Literal["fp32", "fp16"]
ResizeMode = Literal["stretch", "letterbox"]
Network = Literal["detector.onnx", "detector-smaller.onnx", "image.onnx"]  # what runs on a box

MANIFEST = "manifest.json"
DETECTOR: Network = "detector.onnx"  # image uint8 (n, H, W, 3) BGR -> boxes float32 (n, A, 4), scores float32 (n, A, K)
SMALLER: Network = "detector-smaller.onnx"  # the same network and weights, fewer pixels; not every bundle has one
IMAGE: Network = "image.onnx"  # image uint8 (n, S, S, 3) BGR -> embedding float32 (n, d)
HALF: dict[Network, str] = {  # the same, typed fp16
    DETECTOR: "detector-fp16.onnx",
    SMALLER: "detector-smaller-fp16.onnx",
    IMAGE: "image-fp16.onnx",
}
TIMING = "timing.cache"  # what TensorRT measured while it built; a second build is quicker with it
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
    bn_epsilon: float = Field(gt=0, description="epsilon with which batch normalisation was folded")


class EncoderFacts(_Facts):
    """image.onnx: `image` uint8 (n, size, size, 3) BGR -> `embedding` float32 (n, dim), unit length."""

    size: int = Field(gt=0, description="crop edge, px")
    dim: int = Field(gt=0, description="length of an embedding")
    square: SquareMode = Field(description="how a tall crop becomes a square: padded, squashed or centre-cropped")
    fill_bgr: tuple[Channel, Channel, Channel] = Field(description="colour of the padding")
    logit_scale: float = Field(gt=0, description="CLIP's trained factor on the cosine, before the softmax")


def _ascending(batches: tuple[int, ...]) -> tuple[int, ...]:
    if any(low >= high for low, high in pairwise(batches)):
        raise ValueError(f"sizes should ascend, got {batches}")
    return batches


Batches = Annotated[
    tuple[Annotated[int, Field(gt=0)], ...],
    AfterValidator(_ascending),
    Field(min_length=1, description="sizes an engine is tuned for, ascending; it takes every number up to the last"),
]


class EnginePlan(_Facts):
    """What engines are to be like, on whatever machine they are built."""

    detector_batches: Batches
    encoder_batches: Batches
    workspace_mib: int = Field(gt=0, description="memory that TensorRT may try tactics with, MiB")

    def batches(self, network: Network) -> tuple[int, ...]:
        return self.encoder_batches if network == IMAGE else self.detector_batches


class Platform(_Facts):
    """The kind of machine that an engine runs on: no other, and no other TensorRT."""

    tensorrt: str = Field(description="version of TensorRT")
    compute_capability: str = Field(description="of the GPU, as in 8.7")
    gpu: str = Field(description="the GPU's name, and how many multiprocessors it has")

    def __str__(self) -> str:
        return f"{self.gpu} (sm_{self.compute_capability.replace('.', '')}), TensorRT {self.tensorrt}"


class Fingerprint(_Facts):
    """Everything that must be equal for an engine to be the right one."""

    platform: Platform
    precision: Precision
    onnx_sha256: str = Field(description="of the graph that it was built from")
    batches: Batches

    def short(self) -> str:
        """12 hex digits that name it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


class EngineFacts(_Facts):
    """A TensorRT engine among the bundle's files."""

    network: Network = Field(description="the graph whose place it takes")
    graph: str = Field(description="the file that it was built from")
    fingerprint: Fingerprint
    held: tuple[str, ...] = Field(description="what had to compute in fp32 to be right: rungs of export/hold.py")
    verified: str = Field(
        description="how far it is from ONNX Runtime on the fp32 graph, as measured when it was built"
    )


class Manifest(_Facts):
    """The facts of one bundle; every number about the models that the box needs is here and nowhere else."""

    format: Literal["lookout.bundle/2"] = "lookout.bundle/2"
    name: str
    made_by: str = Field(description="the exporter's version")
    detector: DetectorFacts
    encoder: EncoderFacts
    smaller: DetectorFacts | None = Field(
        default=None, description="of the detector at a smaller size; none: the bundle has no such graph"
    )
    files: dict[str, str] = Field(description="file name -> sha256")
    engine: EnginePlan | None = Field(default=None, description="none: no engines are meant to be built")
    engines: dict[str, EngineFacts] = Field(default={}, description="file name -> what it is")
    steps: dict[str, str] = Field(description="export step -> sha256 of its inputs; an unchanged step is not run again")

    @property
    def networks(self) -> tuple[Network, ...]:
        """Those that run on a box."""
        return (DETECTOR, IMAGE) if self.smaller is None else (DETECTOR, SMALLER, IMAGE)

    def seal(self) -> str:
        """sha256 over the canonical JSON of all fields."""
        text = json.dumps(self._told(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**self._told(), "sha256": self.seal()}, indent=2) + "\n"

    def _told(self) -> dict[str, Any]:
        # `smaller` came after bundles were in use: where there is none, manifest and seal are what they were before
        return self.model_dump(mode="json", exclude={"smaller"} if self.smaller is None else None)

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
            got = None if isinstance(first["input"], dict | list) else repr(first["input"])
            raise BundleError(f"{path}: {key + ': ' if key else ''}{first['msg']}", got=got, remedy=MEND) from error
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise BundleError(f"{path}: no manifest: {error}", remedy=MEND) from error
        if manifest.seal() != sealed:
            raise BundleError(
                f"{path}: changed by hand or damaged", expected=f"sha256 {manifest.seal()}", got=sealed, remedy=MEND
            )
        return manifest


MEND = "build it with `make export`, or `python -m export build RECIPE`"


def _mend_engines(bundle: Path) -> str:
    return f"build it on this machine with `make export`, or `python -m export engines {bundle}`"


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: its files' hashes were right when it was opened."""

    path: Path
    manifest: Manifest
    bank: PromptBank

    def file(self, name: str) -> Path:
        return self.path / name

    def engines_of(self, network: Network) -> dict[str, EngineFacts]:
        """The engines of a network for whatever platform, at least one, by file name. Raises BundleError."""
        built = {name: facts for name, facts in self.manifest.engines.items() if facts.network == network}
        if not built:
            raise self._without(network)
        return built

    def _without(self, network: Network) -> BundleError:
        return BundleError(f"{self.path}: no engine for {network}", remedy=_mend_engines(self.path))

    def engine_for(self, network: Network, here: Platform) -> tuple[str, EngineFacts]:
        """The engine of a network for exactly this platform, by file name. Raises BundleError: what does not fit."""
        plan, files = self.manifest.engine, self.manifest.files
        built = self.engines_of(network)
        if plan is None:
            raise self._without(network)
        faults = {}
        for name, facts in built.items():
            one, graph = facts.fingerprint, files.get(facts.graph, "absent")
            pairs = [
                ("GPU", here.gpu, one.platform.gpu),
                ("compute capability", here.compute_capability, one.platform.compute_capability),
                ("TensorRT", here.tensorrt, one.platform.tensorrt),
                ("precision", "fp16", one.precision),
                (facts.graph, f"sha256 {graph[:12]}", f"sha256 {one.onnx_sha256[:12]}"),
                ("batches", plan.batches(network), one.batches),
            ]
            faults[name] = [pair for pair in pairs if pair[1] != pair[2]]
        name = min(faults, key=lambda name: len(faults[name]))
        for what, expected, got in faults[name]:
            raise BundleError(
                f"{self.file(name)}: built for another {what}",
                expected=expected,
                got=got,
                remedy=_mend_engines(self.path),
            )
        return name, built[name]

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
    for name in (*manifest.networks, TEXT, VOCABULARY, GOLDEN, *manifest.engines):
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
