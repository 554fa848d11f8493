"""A recipe is read as it stands, or refused with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import ConfigError
from export.recipe import EngineRecipe, read_recipe

RECIPE = Path(__file__).parents[2] / "configs/models-mini.toml"


def with_engine(folder: Path, *lines: str) -> Path:
    """The shipped recipe with this [engine]; none where there are no lines."""
    text, _, _ = RECIPE.read_text(encoding="utf-8").partition("[engine]")
    path = folder / "recipe.toml"
    path.write_text(text + "\n".join(lines), encoding="utf-8")
    return path


def test_the_shipped_engine_is_the_default_one(tmp_path: Path) -> None:
    assert read_recipe(RECIPE).engine == EngineRecipe() == read_recipe(with_engine(tmp_path, "[engine]")).engine
    assert read_recipe(with_engine(tmp_path)).engine is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("encoder_batches = [8, 1]", "engine.encoder_batches: sizes should ascend, got (8, 1)"),
        ("encoder_batches = [1, 1]", "sizes should ascend"),
        ("encoder_batches = []", "engine.encoder_batches"),
        ("detector_batches = [0, 4]", "engine.detector_batches"),
        ("detector_batches = 4", "engine.detector_batches"),
        ("encoder_batches = [1, 64]", "engine.encoder_batches: a box encodes up to 32 people in one run, got 64"),
        ("workspace_mib = 0", "engine.workspace_mib"),
        ('precision = "int8"', "engine.precision: unknown key"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_with_its_key(line: str, said: str, tmp_path: Path) -> None:
    path = with_engine(tmp_path, "[engine]", line)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def with_detector(folder: Path, line: str) -> Path:
    """The shipped recipe with this line for the smaller size."""
    lines = RECIPE.read_text(encoding="utf-8").splitlines()
    path = folder / "recipe.toml"
    path.write_text("\n".join(line if one.startswith("smaller") else one for one in lines), encoding="utf-8")
    return path


def test_a_smaller_size_is_a_choice(tmp_path: Path) -> None:
    shipped = read_recipe(RECIPE).detector
    assert shipped.smaller is not None
    assert shipped.smaller < shipped.size
    assert read_recipe(with_detector(tmp_path, "smaller = 384")).detector.smaller == 384
    assert read_recipe(with_detector(tmp_path, "")).detector.smaller is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("smaller = 416", "smaller should be below size, 416, got 416"),
        ("smaller = 608", "smaller should be below size, 416, got 608"),
        ("smaller = 300", "detector.smaller: Input should be a multiple of 32"),
        ("smaller = 0", "detector.smaller"),
        ("smaller = -32", "detector.smaller"),
        ("smaller = true", "detector.smaller"),
        ("smaler = 288", "did you mean 'smaller'?"),
    ],
)
def test_a_smaller_size_that_is_none_is_refused_with_its_key(line: str, said: str, tmp_path: Path) -> None:
    path = with_detector(tmp_path, line)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: detector")
    assert said in str(caught.value)
