"""The command line of the centre: `collector run` receives, the others tell and give out what came."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from time import time
from types import FrameType
from typing import IO, TYPE_CHECKING

import click

from collector import keyring
from collector.report import copying, report_gaps, report_stats, utc
from collector.server import Server, harmless
from collector.store import Store
from collector.table import shown
from edge.commands import Commands
from edge.errors import ConfigError
from edge.keys import needs_encryption

if TYPE_CHECKING:
    from collector.nats import NatsSink

COLUMNS = ("device", "epoch", "seq", "camera", "frame", "captured_at", "captured_utc", "x1", "y1", "x2", "y2", "score")
FORMULA = tuple("=+-@＝＋－＠")  # what a cell that is run begins with; the wide ones count in East Asian locales

_STORE = click.argument("path", metavar="STORE", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
_KEYS = click.option(
    "--keys",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("keys"),
    show_default=True,
    help="Folder of the collector's key and the allow list.",
)


@click.group(cls=Commands)
def main() -> None:
    """The far end of the wire: keeps what the boxes saw."""


@main.command()
@click.option("--bind", default="tcp://127.0.0.1:5577", show_default=True, help="ZeroMQ address to listen on.")
@click.option("--store", "path", type=click.Path(path_type=Path), help="SQLite file to keep it in; made if missing.")
@click.option("--sink", "url", metavar="nats://HOST:PORT", help="Keep it in a NATS JetStream instead.")
@click.option("--keys", "folder", type=click.Path(path_type=Path), help="Folder of `collector keys new`: encrypt.")
@click.option("--insecure", is_flag=True, help="Listen to other machines without encryption.")
@click.option("--keep-days", type=click.FloatRange(min=0, min_open=True), help="Delete what came longer ago.")
@click.option("--keep-bytes", type=click.IntRange(min=1), help="Delete the oldest when the store needs more.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def run(
    bind: str,
    path: Path | None,
    url: str | None,
    folder: Path | None,
    insecure: bool,
    keep_days: float | None,
    keep_bytes: int | None,
    quiet: bool,
) -> None:
    """Receive events and keep them until Ctrl-C or SIGTERM."""
    if (path is None) == (url is None):
        raise click.UsageError("one of --store and --sink is needed")
    if path is None and (keep_days or keep_bytes):
        raise click.UsageError("--keep-days and --keep-bytes are for a --store")
    if folder is None and not insecure and needs_encryption(bind):
        raise ConfigError(
            f"--bind {bind}: other machines can reach it, and there are no keys",
            remedy="make them with `collector keys new` and name their folder with --keys, or say --insecure",
        )
    with ExitStack() as stack:
        ring = stack.enter_context(keyring.Keyring(folder)) if folder is not None else None
        # no box is heard before its events can be kept
        sink: Store | NatsSink
        if path is not None:
            sink = stack.enter_context(Store(path, create=True))
            where, work, cancel = str(path), partial(_expire, sink, keep_days, keep_bytes), _nothing
        else:
            from collector.nats import NatsSink

            sink = stack.enter_context(NatsSink(str(url)))
            where, work, cancel = str(sink.address), partial(_nothing), sink.cancel
        server = stack.enter_context(Server(bind, ring))
        _stop_on_signal(server, cancel)
        show = stack.enter_context(nullcontext(_nothing) if quiet else shown(server, where))

        def tick() -> None:
            work()
            show()

        server.run(sink, tick)
        stats = server.stats
    click.echo(
        f"stored {stats.events} events, {stats.people} people, {stats.duplicates} duplicates,"
        f" {stats.refused} refused in {where}"
    )


def _expire(store: Store, days: float | None, size: int | None) -> None:
    """One short step of deleting what is too old or too much."""
    if days is not None or size is not None:
        store.prune(time(), max_age_s=None if days is None else 86_400 * days, max_bytes=size)


@main.command()
@_STORE
@click.option("--format", "layout", type=click.Choice(["jsonl", "csv"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="File to write; without it stdout.")
def export(path: Path, layout: str, out: Path | None) -> None:
    """Write a store as JSON lines, an event each, or as CSV, a row per person."""
    with Store(path) as store:
        if out is not None and out.exists() and out.samefile(path):
            raise click.UsageError("--out is the store itself")
        with click.open_file(str(out or "-"), "w", encoding="utf-8") as file, store.snapshot():
            (_write_jsonl if layout == "jsonl" else _write_csv)(store, file)


@main.command()
@_STORE
@_JSON
def gaps(path: Path, as_json: bool) -> None:
    """Tell which events are missing from a store, and why. With --json an object per line."""
    with Store(path) as store:
        report_gaps(store.gaps(), as_json)


@main.command()
@_STORE
@_JSON
def stats(path: Path, as_json: bool) -> None:
    """Tell what a store has of each device."""
    with Store(path) as store:
        report_stats(store.stats(), *store.size(), as_json)


@main.command()
@_STORE
@click.argument("to", type=click.Path(path_type=Path))
def backup(path: Path, to: Path) -> None:
    """Copy a store, which may be in use, into the new file TO: all it holds at this moment."""
    with Store(path) as store, copying(str(to)) as progress:
        store.backup(to, progress)
    click.echo(f"{to}: {to.stat().st_size / 1e6:,.1f} MB, checked")


@main.group()
def keys() -> None:
    """The keys of a collector whose boxes send encrypted."""


@keys.command("new")
@_KEYS
def keys_new(folder: Path) -> None:
    """Make the collector's key: the secret half into FOLDER, the public half for the boxes."""
    public = keyring.new_keyring(folder)
    click.echo(f'public key: {public}\n\nin the configuration of every box:\n\n[publish]\ncollector_key = "{public}"')


@main.command()
@click.argument("device")
@click.argument("key")
@_KEYS
def allow(device: str, key: str, folder: Path) -> None:
    """Let the box with this public KEY write as DEVICE ("*": under any name). A running collector takes it up."""
    new = keyring.allow(folder, device, key)
    click.echo(f"{device}: {'allowed' if new else 'had already'} {key}")


@main.command()
@click.argument("device")
@click.argument("key", required=False)
@_KEYS
def deny(device: str, key: str | None, folder: Path) -> None:
    """Take this KEY, or all of its keys, from DEVICE. A running collector ends its connections."""
    for taken in keyring.deny(folder, device, key):
        click.echo(f"{device}: denied {taken}")


def _write_jsonl(store: Store, file: IO[str]) -> None:
    """The header of every event, as on the wire."""
    for header in store.headers():
        file.write(header.model_dump_json(by_alias=True, exclude_none=True) + "\n")


def _write_csv(store: Store, file: IO[str]) -> None:
    """Box in px; captured_at in seconds since 1970; per category the best option and its probability."""
    categories = store.categories()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*COLUMNS, *(_cell(text) for name in categories for text in (name, f"{name} probability"))])
    for header in store.headers():
        names = (_cell(header.device), header.epoch, header.seq, _cell(header.camera), header.frame)
        for person in header.people:
            best = {answer.category: answer.top[0] for answer in person.answers}
            answers: list[str | float] = []
            for name in categories:
                answers += (_cell(best[name].option), best[name].probability) if name in best else ("", "")
            rows.writerow([*names, header.captured_at, utc(header.captured_at), *person.box, person.score, *answers])


def _cell(text: str) -> str:
    """`text` from the wire as a spreadsheet may see it: an apostrophe keeps it from running as a formula."""
    text = harmless(text)  # a lone carriage return would begin a row of its own
    return f"'{text}" if text.lstrip()[:1] in FORMULA else text


def _nothing() -> None:
    """Where there is nothing to do."""


def _stop_on_signal(server: Server, cancel: Callable[[], None]) -> None:
    """The first SIGINT or SIGTERM ends `server.run`; a second Ctrl-C does not wait for it."""

    def stop(number: int, at: FrameType | None) -> None:
        server.stop()
        cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
