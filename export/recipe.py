"""The recipe of a bundle: the pydantic model of configs/models-*.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from edge.bundle import Grey, Precision, ResizeMode, SquareMode
from edge.config import Settings, read_toml
from edge.detect import PERSON
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
    resize: ResizeMode = Field(default="stretch", description="stretch: as Darknet itself does")
    bn_epsilon: float = Field(default=1e-5, gt=0, description="1e-5 as in AlexeyAB's Darknet, 1e-6 as in OpenCV's")
    precision: Precision = Field(default="fp32", description="fp16 for devices that compute in it; a CPU does not")


class EncoderRecipe(Settings):
    """[encoder]: a CLIP checkpoint."""

    checkpoint: FileRef
    vocabulary: FileRef
    square: SquareMode = Field(default="pad", description="how a tall crop becomes a square")
    fill_rgb: tuple[Grey, Grey, Grey] = Field(
        default=(123, 117, 104), strict=False, description="padding: CLIP's mean colour"
    )
    precision: Precision = Field(default="fp32", description="fp16 for devices that compute in it; a CPU does not")


class Recipe(Settings):
    """configs/models-*.toml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the bundle's folder name under engines/")
    prompts: Path = Field(strict=False, description="the words, relative to the recipe")
    golden: Path = Field(strict=False, description="a picture with people; verify and self-test look at it")
    detector: DetectorRecipe
    encoder: EncoderRecipe


def read_recipe(path: Path) -> Recipe:
    """A recipe with its paths made relative to the working folder. Raises ConfigError."""
    recipe = read_toml(path, Recipe)
    detector, encoder = recipe.detector, recipe.encoder
    for name in detector.keep:
        if name not in detector.classes:
            raise ConfigError(f"{path}: detector.keep: not among detector.classes", got=repr(name))
    if PERSON not in detector.keep:
        raise ConfigError(f"{path}: detector.keep: a box describes people", expected=repr(PERSON), got=detector.keep)
    return recipe.model_copy(
        update={
            "prompts": path.parent / recipe.prompts,
            "golden": path.parent / recipe.golden,
            "detector": detector.model_copy(
                update={"cfg": _placed(path, detector.cfg), "weights": _placed(path, detector.weights)}
            ),
            "encoder": encoder.model_copy(
                update={
                    "checkpoint": _placed(path, encoder.checkpoint),
                    "vocabulary": _placed(path, encoder.vocabulary),
                }
            ),
        }
    )


def _placed(recipe: Path, ref: str) -> str:
    return ref if ref.startswith(_SCHEME) else str(recipe.parent / ref)


def resolve(ref: FileRef, *, mirror: Path | None, cache: Path) -> Path:
    """The file a recipe names, downloaded where it is an official one.

    Raises ConfigError for an unknown name or a missing file, ModelError for a wrong sum or a failed download.
    """
    if ref.startswith(_SCHEME):
        name = ref.removeprefix(_SCHEME)
        if name not in OFFICIAL:
            raise ConfigError(f"{ref}: no official file", expected=" or ".join(OFFICIAL), got=name)
        return fetch(OFFICIAL[name], mirror=mirror, cache=cache)
    if not Path(ref).is_file():
        raise ConfigError(f"{ref}: no such file; the recipe names it")
    return Path(ref)
