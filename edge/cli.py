"""The command line of the box."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import cv2
import numpy as np

from edge.activate import CONFIG, Box, systemd
from edge.activate import activate as activate_release
from edge.activate import rollback as roll_back
from edge.backend import open_sessions
from edge.bundle import open_bundle
from edge.capture import Cameras
from edge.commands import Commands
from edge.config import DescribeConfig, MatchConfig, RuntimeConfig, TrackConfig, read_edge_config
from edge.describe import Described
from edge.doctor import examine, exit_code, show, to_json
from edge.draw import draw
from edge.errors import CaptureError, ConfigError
from edge.events import Header
from edge.heap import steady
from edge.images import image_files, read_image
from edge.imaging import cut
from edge.journald import configure_logging
from edge.keys import new_key, publish_keys
from edge.releases import HOME, Releases
from edge.serve import Served, check_sensitive, describing, serve, tested
from edge.values import Frame, Image
from edge.zones import Polygon

_PATH = click.Path(path_type=Path, readable=False)  # who reads it says more of what it may not


def _picture(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A file name whose ending says how to write it; refused before the long work, not after."""
    if value is not None and value.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise click.BadParameter(f"{value} ends neither in .png nor in .jpg")
    return value


@click.group(cls=Commands, help="Lookout's box: finds people, describes them in words, publishes what it saw.")
def main() -> None:
    configure_logging()


@main.command()
@click.option(
    "--config", type=_PATH, default=Path("configs/edge.toml"), show_default=True, help="What the box should do."
)
@click.option("--max-frames", type=click.IntRange(min=1), help="Stop after so many frames, of all cameras together.")
@click.option("--draw", "picture", type=_PATH, callback=_picture, help="Save a picture of the fullest frame here.")
def run(config: Path, max_frames: int | None, picture: Path | None) -> None:
    """Describe the people before the cameras and publish them, until every file has ended or a signal comes."""
    steady()
    crowd = _Crowd()
    served = serve(config, *_signals(), on_described=crowd if picture is not None else None, max_frames=max_frames)
    _print_summary(served)
    if picture is not None and crowd.fullest is not None:
        _save(picture, _drawn(crowd.fullest, served.zones))
        click.echo(f"picture: {picture}")
    if served.failures:
        raise served.failures[0]


@main.command()
@click.argument("paths", nargs=-1, required=True, type=_PATH, metavar="IMAGE|FOLDER...")
@click.option("--bundle", type=_PATH, required=True, help="The bundle to describe with.")
@click.option(
    "--top-k", type=click.Choice(["1", "3", "5"]), default="1", show_default=True, help="Options per category."
)
@click.option("--sensitive", multiple=True, metavar="CATEGORY", help="Also answer this category marked as sensitive.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per image and line.")
@click.option("--save-crops", type=_PATH, help="Save every person found into this folder.")
@click.option("--draw", "picture", type=_PATH, callback=_picture, help="Save the described image; of several, each.")
def describe(
    paths: Sequence[Path],
    bundle: Path,
    top_k: str,
    sensitive: Sequence[str],
    as_json: bool,
    save_crops: Path | None,
    picture: Path | None,
) -> None:
    """Describe the people in pictures. A picture that cannot be read is reported, the others are described."""
    files = [file for path in paths for file in _images(path)]
    if picture is not None and picture.exists() and any(file.exists() and picture.samefile(file) for file in files):
        raise ConfigError(f"--draw: {picture} is one of the images to describe", remedy="name another file")
    opened = open_bundle(bundle)
    check_sensitive("--sensitive", sensitive, opened)
    unreadable: list[CaptureError] = []
    each_for_itself = DescribeConfig(track=TrackConfig(enabled=False), match=MatchConfig(sensitive=tuple(sensitive)))
    with describing(opened, each_for_itself, RuntimeConfig()) as describer:
        for number, file in enumerate(files, 1):
            try:
                image = read_image(file)
            except CaptureError as error:
                click.echo(f"error: {error}", err=True)
                unreadable.append(error)
                continue
            (described,) = describer([Frame(file.name, 0, file.stat().st_mtime, image)])
            click.echo(_as_json(file, described, int(top_k)) if as_json else _as_text(file, described, int(top_k)))
            name = file.stem if len(files) == 1 else f"{number:03}-{file.stem}"  # two folders may hold the same names
            if save_crops is not None:
                _save_crops(save_crops, name, described)
            if picture is not None:
                _save(picture if len(files) == 1 else picture.with_stem(f"{picture.stem}-{name}"), _drawn(described))
    if unreadable:
        raise CaptureError(f"{len(unreadable)} of {len(files)} images could not be read")


@main.command()
@click.argument("config", type=_PATH)
@click.option("--bundle", "other", type=_PATH, help="With this bundle in place of the one it names.")
def check(config: Path, other: Path | None) -> None:
    """Check a configuration, its bundle and its cameras' files, without running anything."""
    chosen = read_edge_config(config)
    bundle = open_bundle(other or chosen.bundle)
    publish_keys(chosen.publish)
    if chosen.runtime.backend == "tensorrt":
        for network in bundle.manifest.networks:
            bundle.engines_of(network)
    # files and folders are looked at, live cameras are not called
    Cameras(chosen.camera, decoder=chosen.runtime.decoder).close()
    categories = bundle.bank.permitted(chosen.match.sensitive).categories
    check_sensitive(f"{config}: match.sensitive", chosen.match.sensitive, bundle)
    click.echo(f"{config}: good: {len(chosen.camera)} camera(s), bundle {bundle.manifest.name}")
    learned = "".join(f", {fit.how} on {fit.people} people of {fit.labels}" for fit in bundle.bank.fits)
    sizes = [f"{one.width} x {one.height} px" for one in (bundle.manifest.detector, bundle.manifest.smaller) if one]
    click.echo(f"detector: {', '.join(sizes)}{' while the box has too much to do' if len(sizes) > 1 else ''}")
    click.echo(f"words: {bundle.bank.source}{learned}")
    click.echo(f"answers: {', '.join(category.name for category in categories)}")


@main.command()
@click.option("--bundle", type=_PATH, required=True, help="The bundle to test.")
def selftest(bundle: Path) -> None:
    """Run the bundle's golden inputs on this machine and compare: what a box does before it serves."""
    opened = open_bundle(bundle)
    with open_sessions(opened) as sessions:
        for line in tested(opened, sessions):
            click.echo(line)


@main.command()
@click.option("--config", type=_PATH, help="Also look at what it names: bundle, engines, disks, cameras.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.pass_context
def doctor(ctx: click.Context, config: Path | None, as_json: bool) -> None:
    """Say what is here, what is known to go wrong with it, and what to do; code 69 where something is bad."""
    findings = examine(None if config is None else read_edge_config(config))
    if as_json:
        click.echo(to_json(findings))
    else:
        show(findings)
    ctx.exit(exit_code(findings))


def _of_a_box(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what changes the releases of a machine."""
    home = click.option("--home", type=_PATH, default=HOME, show_default=True, help="Where releases lie.")
    config = click.option("--config", type=_PATH, default=CONFIG, show_default=True, help="What they serve with.")
    return home(config(command))


@main.command()
@click.argument("release")
@_of_a_box
def activate(release: str, config: Path, home: Path) -> None:
    """Test an installed RELEASE, have it serve, and go back by itself where it does not get ready; as root."""
    activate_release(_box(home, config), release)


@main.command()
@_of_a_box
def rollback(config: Path, home: Path) -> None:
    """Have the release before serve again, tested like a new one; as root."""
    roll_back(_box(home, config))


@main.group()
def keys() -> None:
    """The keys of a box whose events go encrypted."""


@keys.command("new")
@click.argument("file", type=_PATH)
def keys_new(file: Path) -> None:
    """Make a key: the secret half into a new FILE, which stays on this box, the public half for the collector."""
    public = new_key(file)
    click.echo(f"public key: {public}")
    click.echo("\non the collector's machine, DEVICE being this box's name:\n")
    click.echo(f"collector allow DEVICE {shlex.quote(public)}")
    click.echo("\nin this box's configuration, with what `collector keys new` printed:\n")
    click.echo(f'[publish]\nkey = {json.dumps(str(file.absolute()), ensure_ascii=False)}\ncollector_key = "…"')


@main.command()
def schema() -> None:
    """Print the JSON Schema of an event's header."""
    click.echo(json.dumps(Header.model_json_schema(by_alias=True), indent=2))


def _box(home: Path, config: Path) -> Box:
    """This machine as one with releases. What is begun goes on though whoever called has gone, as by a lost ssh."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, after which it goes back
    start = time.monotonic()

    def say(text: str) -> None:
        try:
            print(f"{time.monotonic() - start:7.1f} s  {text}", flush=True)
        except OSError:  # nobody listens any more
            with Path(os.devnull).open("wb") as nowhere:
                for stream in (1, 2):
                    os.dup2(nowhere.fileno(), stream)

    return Box(Releases(home), config, systemd(), say)


def _signals() -> tuple[threading.Event, threading.Event]:
    """Two that are set by signals: by SIGINT or SIGTERM, to end after the frame at hand; by SIGHUP, to read again."""
    stop, reload = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: reload.set())
    return stop, reload


class _Crowd:
    """Keeps the frame with the most people."""

    def __init__(self) -> None:
        self.fullest: Described | None = None

    def __call__(self, described: Described) -> None:
        if self.fullest is None or len(described.people) > len(self.fullest.people):
            self.fullest = described


def _print_summary(served: Served) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "median ms", "p95 ms", title="per frame")
    for stage, taken in served.stages.items():
        middle, high = np.percentile(taken, [50, 95])
        table.add_row(stage, f"{middle:.1f}", f"{high:.1f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    seen, rate = served.seen, served.seen.frames / served.seconds if served.seconds else 0.0
    small = f" ({seen.skipped} more were too small, or too many, to describe)" if seen.skipped else ""
    click.echo(f"{seen.frames} frames in {served.seconds:.1f} s ({rate:.1f}/s), {seen.people} people{small}")
    if served.tracks:
        click.echo(f"{served.tracks} tracks, described from {served.encoded} crops")
    for camera in served.cameras:
        line = f"camera {camera.name}: {camera.frames} frames, {camera.dropped} dropped"
        click.echo(line + (f"; {camera.error}" if camera.error else ""))
    for line in served.delivery:
        click.echo(line)


def _as_text(file: Path, described: Described, top_k: int) -> str:
    lines = [
        f"{file}: {len(described.people)} people" + (f", {described.skipped} too small" if described.skipped else "")
    ]
    for i, (box, score) in enumerate(zip(described.people.boxes, described.people.scores, strict=True)):
        lines.append(f"\nperson {i + 1}: score {score:.2f}, box {' '.join(f'{edge:.0f}' for edge in box)}")
        for answer in described.matches.answers(i, top_k):
            lines.append(f"  Category: {answer.category.question}{' unknown' if answer.unknown else ''}")
            for choice in answer.top:
                label = f" ({choice.label})" if choice.label else ""
                lines.append(f"    {choice.option}{label}: {100 * choice.probability:.2f} %")
    return "\n".join(lines)


def _as_json(file: Path, described: Described, top_k: int) -> str:
    people = [
        {
            "box": described.people.box(i),
            "score": round(float(score), 4),
            "answers": {
                answer.category.name: {choice.option: round(choice.probability, 4) for choice in answer.top}
                for answer in described.matches.answers(i, top_k)
            },
            "unknown": [answer.category.name for answer in described.matches.answers(i, 1) if answer.unknown],
        }
        for i, score in enumerate(described.people.scores)
    ]
    return json.dumps({"image": str(file), "people": people, "skipped": described.skipped}, ensure_ascii=False)


def _save_crops(folder: Path, name: str, described: Described) -> None:
    for i, box in enumerate(described.people.boxes, 1):
        _save(folder / f"{name}-person{i}.png", cut(described.frame.image, box))


def _images(path: Path) -> list[Path]:
    """A folder's images, or the one image. Raises CaptureError for a folder without any."""
    if not path.is_dir():
        return [path]
    if files := image_files(path):
        return files
    raise CaptureError(f"{path}: no images in this folder")


def _drawn(described: Described, zones: Mapping[str, Sequence[Polygon]] | None = None) -> Image:
    tracks = None if described.tracks is None else described.tracks.tolist()
    outlined = (zones or {}).get(described.frame.camera, ())
    return draw(described.frame, described.people, described.matches, tracks, outlined)


def _save(path: Path, image: Image) -> None:
    """A picture of the kind its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
