"""`python -m appliance`: the package for a box."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from appliance.flash import Outcome, boxes_of, flash_all
from appliance.image import build_images
from appliance.packages import building, given
from appliance.wheels import MACHINES
from edge.commands import Commands
from edge.errors import BackendError, ConfigError

WIDTH = 160  # columns of what goes to a file
_PATH = click.Path(path_type=Path)


@click.group(cls=Commands, help="Lookout's appliance: one Debian package holds all that a box needs.")
def main() -> None:
    pass


@main.command()
@click.option("--bundle", type=_PATH, required=True, help="The bundle that the boxes get.")
@click.option(
    "--arch",
    "archs",
    type=click.Choice(list(MACHINES)),
    multiple=True,
    default=list(MACHINES),
    show_default=True,
    help="Debian's name of a box's architecture; may be given often.",
)
@click.option("--out", type=_PATH, default=Path("out"), show_default=True, help="Where packages lie.")
def image(bundle: Path, archs: Sequence[str], out: Path) -> None:
    """Build lookout_VERSION_ARCH.deb: wheels for every Python of the boxes, the bundle, a configuration, a unit."""
    for deb in build_images(archs, bundle, out, Console(stderr=True)):
        click.echo(deb)


@main.command()
@click.option("--box", "named", multiple=True, help="An ssh destination, like user@host; may be given often.")
@click.option("--boxes", "file", type=_PATH, help="A file of them, one a line; # begins a comment.")
@click.option("--bundle", type=_PATH, help="Build packages with this bundle, for the boxes' architectures.")
@click.option("--image", "built", type=_PATH, multiple=True, help="A package that was built; one per architecture.")
@click.option("--out", type=_PATH, default=Path("out"), show_default=True, help="Where packages are built.")
def flash(named: Sequence[str], file: Path | None, bundle: Path | None, built: Sequence[Path], out: Path) -> None:
    """Bring boxes a release over ssh; each tests it, and goes back by itself where it does not get ready."""
    boxes = [*named, *(boxes_of(file) if file is not None else ())]
    if not boxes:
        raise ConfigError("no box is named", remedy="make flash BOX=user@host, or BOXES=file")
    if (bundle is None) == (not built):
        raise ConfigError("either --bundle or --image says what the boxes get")
    image = given(built) if bundle is None else building(bundle, out, Console(stderr=True))
    outcomes = flash_all(boxes, image, click.echo)
    if len(boxes) > 1:
        _print_outcomes(outcomes)
    if failed := [outcome for outcome in outcomes if not outcome.good]:
        raise BackendError(failed[0].said if len(boxes) == 1 else f"{len(failed)} of {len(boxes)} boxes failed")


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    table = Table("box", "from", "to", "seconds", "outcome")
    for name in table.columns[:3]:
        name.overflow = "fold"  # a cut name is no name
    table.columns[3].justify = "right"
    for each in outcomes:
        said = escape(f"{'good' if each.good else 'failed'}: {each.said}")
        table.add_row(escape(each.box), each.before, each.after, f"{each.seconds:.0f}", said)
    (Console() if sys.stdout.isatty() else Console(width=WIDTH)).print(table)
