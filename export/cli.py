"""`python -m export`: bundles from recipes, and each step as a command of its own."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
import onnx
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from edge.bundle import IMAGE, TEXT, Precision, open_bundle
from edge.commands import Commands
from edge.errors import BundleError, ConfigError
from export.build import build as build_bundle
from export.checkpoint import read_checkpoint
from export.clip import onnx_from_clip
from export.coco import COCO
from export.darknet import onnx_from_darknet
from export.engines import build_engines, no_engines_here
from export.labels import read_labels
from export.pack import alone, replace_bank
from export.prompts import embed_prompts
from export.recipe import fetched, read_recipe
from export.samples import find_sample
from export.watch import Watch
from export.weights import cache_folder

if TYPE_CHECKING:
    from export.study import Study

WIDTH = 160  # columns of what goes to a file
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
    with Watch(console, f"exporting {target}") as watch:
        build_bundle(chosen, target, _sayer(console))
        if chosen.engine and (reason := no_engines_here()):
            _sayer(console)("engines", f"none: {reason}; `python -m export engines` builds them on the box")
        elif chosen.engine:
            build_engines(target, _sayer(console), watch)
    click.echo(f"{target} is ready")


@main.command()
@click.argument("bundle", type=_PATH)
def engines(bundle: Path) -> None:
    """Build a bundle's TensorRT engines for the GPU of this machine; weights are not needed.

    An engine that answers otherwise than ONNX Runtime is refused, and the bundle stays as it was.
    """
    console = Console(stderr=True)
    with Watch(console, f"engines of {bundle}") as watch:
        build_engines(bundle, _sayer(console), watch)
    click.echo(f"{bundle} is ready")


@main.command()
@click.argument("file", type=_PATH)
@click.option(
    "--bundle", type=_PATH, required=True, help="The bundle that gets the words; a running box takes them up."
)
def prompts(file: Path, bundle: Path) -> None:
    """Embed the words of a prompt file again: the bundle's prompts.npz alone changes."""
    opened = open_bundle(bundle, words=False)
    with alone(bundle.absolute().parent):
        bank = embed_prompts(file, opened)
        with suppress(BundleError):  # what lies there may be damaged, or of another encoder: that is what this mends
            for fit in opened.read_bank().fits:
                click.echo(f"the bank before was {fit.how} on {fit.labels}; these are the words alone", err=True)
        replace_bank(opened, bank)
    click.echo(f"{bundle}: {len(bank.categories)} categories, {len(bank.vectors)} options, bank {bank.sha256[:12]}")


_LABELLED = click.argument("labelled", type=_PATH)
_BUNDLE = click.option("--bundle", type=_PATH, required=True, help="The bundle whose encoder and words are meant.")
_MAP = click.option("--map", "mapping", type=_PATH, help="The map from a labels.json's words to the bank's options.")
_OUT = click.option("--out", type=_PATH, help="Folder for report.json and report.png.")
_TO = click.option("--to", type=_PATH, help="Write the bank into this file, and leave the bundle as it is.")
_EVERYONE = click.option("--everyone", is_flag=True, help="Learn from all people, with none left to judge by.")


@main.command()
@_LABELLED
@_BUNDLE
@_MAP
@click.option(
    "--compare", multiple=True, metavar="[NAME:]KEY=VALUE,…", help="Judge this variant too; may be given often."
)
@click.option("--best-regions", is_flag=True, help="Also let each category look where half of the people say.")
@_OUT
def evaluate(
    labelled: Path, bundle: Path, mapping: Path | None, compare: Sequence[str], best_regions: bool, out: Path | None
) -> None:
    """Tell how right the bundle's words are about LABELLED, a folder of pictures of people with labels.

    \b
    --compare square=squash              another look: square, margin, flip=yes, region=head
    --compare 'tuned: bank=FILE.npz'     another bank, as --to of calibrate and adapt writes it, and its name
    --compare prompts=FILE.toml          other words; with phrases=first an option's first phrase alone
    """
    with _studied(labelled, bundle, mapping) as study:
        study.evaluate(compare, best_regions, out)


@main.command()
@_LABELLED
@_BUNDLE
@_MAP
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.8,
    show_default=True,
    help="Share of the people that get an answer; the least sure others are unknown.",
)
@_EVERYONE
@_TO
@_OUT
def calibrate(
    labelled: Path,
    bundle: Path,
    mapping: Path | None,
    coverage: float,
    everyone: bool,
    to: Path | None,
    out: Path | None,
) -> None:
    """Fit the probabilities of the bundle's words, and when to say unknown, to half of the people in LABELLED.

    The other half judges. A running box takes the bank up.
    """
    with _studied(labelled, bundle, mapping) as study:
        study.calibrate(coverage, everyone, to, out)


@main.command()
@_LABELLED
@_BUNDLE
@_MAP
@_EVERYONE
@_TO
@_OUT
def adapt(
    labelled: Path, bundle: Path, mapping: Path | None, everyone: bool, to: Path | None, out: Path | None
) -> None:
    """Move the vectors of the bundle's words towards what half of the people in LABELLED look like.

    The other half judges. No engine changes; a running box takes the bank up. Calibrate afterwards.
    """
    with _studied(labelled, bundle, mapping) as study:
        study.adapt(everyone, to, out)


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


def _sayer(console: Console) -> Callable[[str, str], None]:
    """Tells how each step ended."""
    return lambda step, said: console.print(Text(f"{step:>9}  {said}"), soft_wrap=True)


@contextmanager
def _studied(labelled: Path, bundle: Path, mapping: Path | None) -> Iterator[Study]:
    """The labelled set and the bundle, with a bar on stderr while pictures are encoded and learned from."""
    from export.study import Study

    opened = open_bundle(bundle)
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bars:
        yield Study(opened, read_labels(labelled, opened.bank.categories, mapping), bars, _wide())


def _wide() -> Console:
    """Where results are told; a file or a pipe has room for all columns of a table."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


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
