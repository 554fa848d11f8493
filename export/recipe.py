"""The recipe of a bundle: the pydantic model of configs/models-*.toml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from edge.bank import SquareMode
from edge.bundle import Batches, Channel, ResizeMode
from edge.config import Settings, read_toml
from edge.detect import PERSON
from edge.encode import MAX_BATCH
from edge.errors import ConfigError
from export.coco import COCO
from export.weights import OFFICIAL, fetch

FileRef = Annotated[
    str,
    Field(min_length=1, description="a path relative to the recipe, or official:NAME for a file of export/weights.py"),
]
_SCHEME = "official:"


class DetectorRecipe(Settings):
    """[detector]: a Darknet network."""

    cfg: FileRef
    weights: FileRef
    classes: tuple[str, ...] = Field(
        default=COCO, min_length=1, strict=False, description="all classes, in the cfg's order"
    )
    keep: tuple[str, ...] = Field(default=("person",), min_length=1, strict=False, description="the classes to report")
    size: int = Field(default=416, gt=0, description="net input edge, px; a multiple of 32 for YOLOv4")
    smaller: int | None = Field(
        default=None,
        gt=0,
        multiple_of=32,
        description="a second net input edge, px, below size: what a box sees by while it has too much to do",
    )
    resize: ResizeMode = Field(default="stretch", description="stretch: as Darknet itself does")
    bn_epsilon: float = Field(default=1e-5, gt=0, description="1e-5 as in AlexeyAB's Darknet, 1e-6 as in OpenCV's")

    @model_validator(mode="after")
    def _is_smaller(self) -> DetectorRecipe:
        if self.smaller is not None and self.smaller >= self.size:
            raise ValueError(f"smaller should be below size, {self.size}, got {self.smaller}")
        return self


class EncoderRecipe(Settings):
    """[encoder]: a CLIP checkpoint."""

    checkpoint: FileRef
    vocabulary: FileRef
    square: SquareMode = Field(default="pad", description="how a tall crop becomes a square")
    fill_rgb: tuple[Channel, Channel, Channel] = Field(
        default=(123, 117, 104), strict=False, description="padding: CLIP's mean colour"
    )


class EngineRecipe(Settings):
    """[engine]: what a box with TensorRT runs; without it the bundle has no fp16 graphs, and no engine is built."""

    detector_batches: Batches = Field(default=(1, 4), strict=False, description="cameras looked at in one run")
    encoder_batches: Batches = Field(
        default=(1, 8, MAX_BATCH), strict=False, description="people encoded in one run; a box takes up to 32"
    )
    workspace_mib: int = Field(
        default=1024, gt=0, description="memory TensorRT may try tactics with; 1024 leaves room on a board of 8 GB"
    )

    @field_validator("encoder_batches")
    @classmethod
    def _of_use(cls, batches: tuple[int, ...]) -> tuple[int, ...]:
        if batches[-1] > MAX_BATCH:
            raise ValueError(f"a box encodes up to {MAX_BATCH} people in one run, got {batches[-1]}")
        return batches


class Recipe(Settings):
    """configs/models-*.toml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the bundle's folder name under engines/")
    prompts: Path = Field(strict=False, description="the words, relative to the recipe")
    golden: Path = Field(strict=False, description="a picture with people; verify and self-test look at it")
    detector: DetectorRecipe
    encoder: EncoderRecipe
    engine: EngineRecipe | None = Field(default=None, description="for boxes with TensorRT")


def read_recipe(path: Path) -> Recipe:
    """A recipe with its paths made relative to the working folder. Raises ConfigError."""
    recipe = read_toml(path, Recipe)
    detector = recipe.detector
    for name in detector.keep:
        if name not in detector.classes:
            raise ConfigError(f"{path}: detector.keep: not among detector.classes", got=repr(name))
    if PERSON not in detector.keep:
        raise ConfigError(f"{path}: detector.keep: a box describes people", expected=repr(PERSON), got=detector.keep)
    here = path.parent
    placed = {"prompts": here / recipe.prompts, "golden": here / recipe.golden}
    return _each_file(recipe.model_copy(update=placed), lambda ref: ref if ref.startswith(_SCHEME) else str(here / ref))


def fetched(recipe: Recipe, *, mirror: Path | None, cache: Path) -> Recipe:
    """The recipe with every official:NAME replaced by the path of its copy, downloaded where there is none.

    mirror, cache: where official files are looked for first, and where they are kept. Raises ConfigError for an unknown
    name or a missing file, ModelError for a wrong sum or a failed download.
    """

    def path_of(ref: FileRef) -> str:
        if not ref.startswith(_SCHEME):
            if not Path(ref).is_file():
                raise ConfigError(f"{ref}: no such file; the recipe names it")
            return ref
        name = ref.removeprefix(_SCHEME)
        if name not in OFFICIAL:
            raise ConfigError(f"{ref}: no official file", expected=" or ".join(OFFICIAL), got=name)
        return str(fetch(OFFICIAL[name], mirror=mirror, cache=cache))

    return _each_file(recipe, path_of)


def _each_file(recipe: Recipe, change: Callable[[FileRef], str]) -> Recipe:
    d, e = recipe.detector, recipe.encoder
    detector = d.model_copy(update={"cfg": change(d.cfg), "weights": change(d.weights)})
    encoder = e.model_copy(update={"checkpoint": change(e.checkpoint), "vocabulary": change(e.vocabulary)})
    return recipe.model_copy(update={"detector": detector, "encoder": encoder})
