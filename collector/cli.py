"""The command line of the centre: `collector run` receives, the others tell and give out what came."""

from __future__ import annotations

import gc
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from time import monotonic, time
from types import FrameType
from typing import IO, TYPE_CHECKING

import click

from collector import keyring
from collector.health import Vitals
from collector.labelling import CSV, ask_people, read_set, write_set
from collector.replay import send, showing, write_lines
from collector.report import copying, report_gaps, report_stats
from collector.search import ask_store, permitted, report_asked
from collector.server import Server
from collector.sheet import write_csv
from collector.store import Store
from collector.table import counts, shown
from edge.bundle import open_bundle
from edge.commands import Commands
from edge.errors import ConfigError
from edge.health import Health
from edge.heap import steady
from edge.keys import checked_key, needs_encryption, read_key, secure_client
from edge.publish import Secure

if TYPE_CHECKING:
    from collector.nats import NatsSink

PEOPLE = 1000  # of whom a set, or somebody at a terminal, is asked
PRUNE_SECONDS = 60.0  # between two looks for what is to be deleted

_STORE = click.argument("path", metavar="STORE", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
_BUNDLE = click.option("--bundle", type=click.Path(path_type=Path), required=True, help="The bundle of the boxes.")
_SENSITIVE = click.option(
    "--sensitive", multiple=True, metavar="CATEGORY", help="Also ask this category marked as sensitive."
)
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
@click.option("--keep-bytes", type=click.IntRange(min=1 << 20), help="Delete the oldest when the store needs more.")
@click.option("--health", "told_at", metavar="HOST:PORT", default="", help="Tell there by HTTP how the collector is.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def run(
    bind: str,
    path: Path | None,
    url: str | None,
    folder: Path | None,
    insecure: bool,
    keep_days: float | None,
    keep_bytes: int | None,
    told_at: str,
    quiet: bool,
) -> None:
    """Receive events and keep them until Ctrl-C or SIGTERM."""
    if (path is None) == (url is None):
        raise click.UsageError("one of --store and --sink is needed")
    if path is None and (keep_days or keep_bytes):
        raise click.UsageError("--keep-days and --keep-bytes are for a --store")
    _allow_connections()
    steady()
    with ExitStack() as stack:
        ring = stack.enter_context(keyring.Keyring(folder)) if folder is not None else None
        # no box is heard before its events can be kept
        sink: Store | NatsSink
        prune = cancel = _nothing
        if path is not None:
            sink, where = stack.enter_context(Store(path, create=True)), str(path)
            if keep_days or keep_bytes:
                prune = _pruning(sink, keep_days, keep_bytes)
        else:
            from collector.nats import NatsSink

            sink = stack.enter_context(NatsSink(str(url)))
            where, cancel = str(sink.address), sink.cancel
        server = stack.enter_context(Server(bind, ring, insecure=insecure))
        _stop_on_signal(server, cancel)
        vitals = Vitals(server.stats, server.address, where, path, lambda: server.stopping)
        health = stack.enter_context(Health(told_at, vitals, "--health"))
        if health.address:
            click.echo(f"health at http://{health.address}", err=True)
        show = stack.enter_context(nullcontext(_nothing) if quiet else shown(server, where))

        def tick() -> None:
            prune()
            show()
            vitals.tick()

        # An event is hundreds of small objects that live until the commit and are in no circle: looking for circles
        # among them each 700 objects, as Python does, took more than half of all time.
        gc.set_threshold(100_000, 20, 100)
        server.run(vitals.watched(sink), tick)
    click.echo(f"stored {counts(server.stats)} in {where}")


def _allow_connections() -> None:
    """As many as the system lets this process have: each box takes a file descriptor, and 1024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _pruning(store: Store, days: float | None, size: int | None) -> Callable[[], None]:
    """Delete what is too old or too much: one short step at a time, and when that was all, not for a while."""
    age = None if days is None else 86_400 * days
    again = 0.0  # monotonic

    def step() -> None:
        nonlocal again
        if monotonic() >= again and not store.prune(time(), max_age_s=age, max_bytes=size):
            again = monotonic() + PRUNE_SECONDS

    return step


@main.command()
@_STORE
@click.option("--format", "layout", type=click.Choice(["jsonl", "csv"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="File to write; without it stdout.")
def export(path: Path, layout: str, out: Path | None) -> None:
    """Write a store as JSON lines, an event each, or as CSV, a row per person."""
    with Store(path) as store:
        _check_not_the_store(path, out)
        with click.open_file(str(out or "-"), "w", encoding="utf-8") as file, store.snapshot():
            (_write_jsonl if layout == "jsonl" else write_csv)(store, file)


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
@_BUNDLE
@_SENSITIVE
@click.option("--out", type=click.Path(path_type=Path), help="Folder for a labelled set: a table for a spreadsheet.")
@click.option("--read", "file", type=click.Path(path_type=Path), help="The table, corrected, to be taken up.")
@click.option("--device", help="Only people whom this box saw.")
@click.option("--limit", type=click.IntRange(min=1), show_default=str(PEOPLE), help="At most so many people.")
def label(
    path: Path,
    bundle: Path,
    sensitive: Sequence[str],
    out: Path | None,
    file: Path | None,
    device: str | None,
    limit: int | None,
) -> None:
    """Say what is true of the newest people in a store, which `python -m export` learns from: in a table, or one
    question after the other. The questions and their options are the bundle's."""
    if out is not None and file is not None:
        raise click.UsageError("--out and --read do not go together")
    if file is not None and (device is not None or limit is not None):
        raise click.UsageError("--device and --limit are not for --read")
    if out is None and file is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("no terminal to ask on: --out FOLDER or --read FILE is needed")
    categories = permitted(open_bundle(bundle).bank, sensitive).categories
    with Store(path) as store:
        if out is not None:
            written = write_set(store, categories, out, device, limit or PEOPLE)
            others = f", {written.others} more of another encoder" if written.others else ""
            left = f", {written.left} more beyond --limit" if written.left else ""
            click.echo(f"{out / CSV}: {written.people} people, {written.crops} with a picture{others}{left}")
        elif file is not None:
            read = read_set(store, categories, file)
            if read.ignored:
                names = ", ".join(map(repr, read.ignored))
                click.echo(f"ignored, no category of the bundle, or sensitive and not named: {names}", err=True)
            taken = f", {read.taken_back} taken back" if read.taken_back else ""
            click.echo(f"{file}: {read.new} corrections of {read.people} people{taken}, {read.known} were known")
        else:
            given = ask_people(store, categories, _typed, click.echo, device, limit or PEOPLE)
            click.echo(f"{given} answers")


def _typed(question: str) -> str:
    """Ctrl-D quits; not by click.prompt, which cannot tell it from Ctrl-C."""
    try:
        return input(f"{question} ? ")
    except (EOFError, KeyboardInterrupt) as end:
        click.echo()
        if isinstance(end, KeyboardInterrupt):
            raise
        return "q"


@main.command()
@_STORE
@_BUNDLE
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompt file; without it the bundle's own words.")
@_SENSITIVE
@_JSON
def ask(path: Path, bundle: Path, prompts: Path | None, sensitive: Sequence[str], as_json: bool) -> None:
    """Ask all people in a store, each track once, questions that no box was asked."""
    opened = open_bundle(bundle)
    with Store(path) as store:
        asked = ask_store(store, opened, prompts, sensitive)
    report_asked(asked, as_json)


@main.command()
@_STORE
@click.argument("to", type=click.Path(path_type=Path))
def backup(path: Path, to: Path) -> None:
    """Copy a store, which may be in use, into the new file TO: all it holds at this moment."""
    with Store(path) as store, copying(str(to)) as progress:
        store.backup(to, progress)
    click.echo(f"{to}: {to.stat().st_size / 1e6:,.1f} MB, checked")


@main.command()
@_STORE
@click.option("--out", type=click.Path(path_type=Path), help="JSON lines: one per event, and one for what is missing.")
@click.option("--to", "address", help="ZeroMQ address of another collector; what it has already is not sent again.")
@click.option("--key", type=click.Path(path_type=Path), help="File of a secret key that the other allows as *.")
@click.option("--collector-key", metavar="KEY", help="The other collector's public key.")
@click.option("--insecure", is_flag=True, help="Send to another machine without encryption.")
def replay(
    path: Path, out: Path | None, address: str | None, key: Path | None, collector_key: str | None, insecure: bool
) -> None:
    """Send everything in a store to another collector, or write it in the order of its numbers."""
    if (out is None) == (address is None):
        raise click.UsageError("one of --out and --to is needed")
    if address is None and (key or collector_key or insecure):
        raise click.UsageError("--key, --collector-key and --insecure are for --to")
    with Store(path) as store, showing(store) as say:
        if address is not None:
            sent = send(store, address, _secure(address, key, collector_key, insecure), say)
        else:
            _check_not_the_store(path, out)
            with click.open_file(str(out), "w", encoding="utf-8") as file:
                write_lines(store, file, say)
    if address is not None:
        click.echo(
            f"{address}: sent {sent.events} events, {sent.refused} of them refused, and {sent.gone} missing numbers;"
            f" {sent.known} were there already"
        )


def _secure(address: str, key: Path | None, collector_key: str | None, insecure: bool) -> Secure | None:
    """What sets the keys of a socket to another collector."""
    if (key is None) != (collector_key is None):
        raise click.UsageError("--key and --collector-key go together")
    if key is not None and collector_key is not None:
        checked = checked_key(collector_key, "--collector-key")
        return partial(secure_client, key=read_key(key), collector_key=checked)
    if needs_encryption(address) and not insecure:
        raise ConfigError(
            f"--to {address} is another machine, and there are no keys",
            remedy="give --key and --collector-key, or, in a network you trust, --insecure",
        )
    return None


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


def _check_not_the_store(path: Path, out: Path | None) -> None:
    if out is not None and out.exists() and out.samefile(path):
        raise click.UsageError("--out is the store itself")


def _write_jsonl(store: Store, file: IO[str]) -> None:
    """The header of every event, as on the wire."""
    for header in store.headers():
        file.write(header.model_dump_json(by_alias=True, exclude_none=True) + "\n")


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
