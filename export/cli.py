"""`python -m export`: bundles from recipes, and each step as a command of its own."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path

import click
import onnx
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from edge.bundle import IMAGE, TEXT, Precision, open_bundle
from edge.commands import Commands
from edge.errors import ConfigError
from export.build import build as build_bundle
from export.checkpoint import read_checkpoint
from export.clip import onnx_from_clip
from export.coco import COCO
from export.darknet import onnx_from_darknet
from export.pack import alone, replace_bank
from export.prompts import embed_prompts
from export.recipe import fetched, read_recipe
from export.samples import find_sample
from export.weights import cache_folder

_PATH = click.Path(path_type=Path)
_PRECISION = click.Choice(["fp32", "fp16"])


@click.group(cls=Commands, help="Lookout's export toolchain: weights and words in, a verified bundle out.")
def main() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


@main.command()
@click.argument("recipe", type=_PATH)
@click.option("--engines", type=_PATH, default=Path("engines"), show_default=True, help="Where bundles lie.")
def build(recipe: Path, engines: Path) -> None:
    """Make or renew the bundle of a recipe such as configs/models-full.toml.

    LOOKOUT_WEIGHTS names a folder where official weights are looked for before they are downloaded.
    """
    chosen = fetched(read_recipe(recipe), mirror=_mirror(), cache=cache_folder())  # has a progress bar of its own
    target = engines / chosen.name
    console = Console(stderr=True)
    with console.status(escape(f"exporting {target}")):
        build_bundle(chosen, target, lambda step, said: console.print(Text(f"{step:>9}  {said}"), soft_wrap=True))
    click.echo(f"{target} is ready")


@main.command()
@click.argument("file", type=_PATH)
@click.option(
    "--bundle", type=_PATH, required=True, help="The bundle that gets the words; a running box takes them up."
)
def prompts(file: Path, bundle: Path) -> None:
    """Embed the words of a prompt file again: the bundle's prompts.npz alone changes."""
    opened = open_bundle(bundle)
    with alone(bundle.absolute().parent):
        bank = embed_prompts(file, opened)
        replace_bank(opened, bank)
    click.echo(f"{bundle}: {len(bank.categories)} categories, {len(bank.vectors)} options, bank {bank.sha256[:12]}")


@main.command()
@click.argument("cfg", type=_PATH)
@click.argument("weights", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--size", type=click.IntRange(min=1), help="Net input edge in px; without it, as the cfg says.")
@click.option("--keep", default="0", show_default=True, help="Classes to report: numbers, or COCO's names: person,car.")
@click.option("--precision", type=_PRECISION, default="fp32", show_default=True, help="Of everything but the outputs.")
def darknet(cfg: Path, weights: Path, out: Path, size: int | None, keep: str, precision: Precision) -> None:
    """Convert one Darknet network to ONNX."""
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work, where it may fail
    numbers = [_class_number(name.strip()) for name in keep.split(",")]
    graph = onnx_from_darknet(cfg, weights, size=size, keep=numbers, precision=precision)
    onnx.save(graph, out)
    click.echo(f"{out}: {cfg.name}, {precision}, classes {keep}")


@main.command()
@click.argument("checkpoint", type=_PATH)
@click.argument("out_dir", type=_PATH)
@click.option("--precision", type=_PRECISION, default="fp32", show_default=True, help="Of everything but the outputs.")
def clip(checkpoint: Path, out_dir: Path, precision: Precision) -> None:
    """Convert one CLIP checkpoint to image.onnx and text.onnx."""
    graphs = onnx_from_clip(read_checkpoint(checkpoint), precision=precision)
    out_dir.mkdir(parents=True, exist_ok=True)
    onnx.save(graphs.image, out_dir / IMAGE)
    onnx.save(graphs.text, out_dir / TEXT)
    click.echo(
        f"{out_dir}: {graphs.image_size} px, {graphs.embedding_dim} numbers, logit scale {graphs.logit_scale:.2f}"
    )


@main.command()
@click.option("--video", type=_PATH, help="Use this copy of vtest.avi.")
def sample(video: Path | None) -> None:
    """Find the sample video and print its path."""
    click.echo(find_sample(video, cache=cache_folder()))


def _class_number(name: str) -> int:
    if re.fullmatch(r"[0-9]{1,6}", name):
        return int(name)
    if name not in COCO:
        near = difflib.get_close_matches(name, COCO, n=1)
        raise ConfigError(
            f"--keep: no COCO class {name!r}", remedy=f"did you mean {near[0]!r}?" if near else "use its number"
        )
    return COCO.index(name)


def _mirror() -> Path | None:
    named = os.environ.get("LOOKOUT_WEIGHTS")
    return Path(named) if named else None
