"""The command line of the centre: `collector run` receives, `collector export` gives it out again."""

from __future__ import annotations

import csv
import signal
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import IO

import click

from collector.server import Server, harmless
from collector.store import Store
from collector.table import shown
from edge.commands import Commands

COLUMNS = ("device", "epoch", "seq", "camera", "frame", "captured_at", "captured_utc", "x1", "y1", "x2", "y2", "score")
FORMULA = tuple("=+-@＝＋－＠")  # what a cell that is run begins with; the wide ones count in East Asian locales


@click.group(cls=Commands)
def main() -> None:
    """The far end of the wire: keeps what the boxes saw."""


@main.command()
@click.option("--bind", default="tcp://127.0.0.1:5577", show_default=True, help="ZeroMQ address to listen on.")
@click.option("--store", "path", type=click.Path(path_type=Path), required=True, help="SQLite file; made if missing.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def run(bind: str, path: Path, quiet: bool) -> None:
    """Receive events and store them until Ctrl-C or SIGTERM."""
    with Store(path, create=True) as store, Server(bind) as server:  # no box is heard before its events can be kept
        _stop_on_signal(server)
        with nullcontext(_nothing) if quiet else shown(server, path) as tick:
            server.run(store, tick)
        stats = server.stats
    click.echo(
        f"stored {stats.events} events, {stats.people} people, {stats.duplicates} duplicates,"
        f" {stats.refused} refused in {path}"
    )


@main.command()
@click.argument("path", metavar="STORE", type=click.Path(path_type=Path))
@click.option("--format", "layout", type=click.Choice(["jsonl", "csv"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="File to write; without it stdout.")
def export(path: Path, layout: str, out: Path | None) -> None:
    """Write a store as JSON lines, an event each, or as CSV, a row per person."""
    with Store(path) as store:
        if out is not None and out.exists() and out.samefile(path):
            raise click.UsageError("--out is the store itself")
        with click.open_file(str(out or "-"), "w", encoding="utf-8") as file, store.snapshot():
            (_write_jsonl if layout == "jsonl" else _write_csv)(store, file)


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
            rows.writerow([*names, header.captured_at, _utc(header.captured_at), *person.box, person.score, *answers])


def _cell(text: str) -> str:
    """`text` from the wire as a spreadsheet may see it: an apostrophe keeps it from running as a formula."""
    text = harmless(text)  # a lone carriage return would begin a row of its own
    return f"'{text}" if text.lstrip()[:1] in FORMULA else text


def _utc(seconds: float) -> str:
    """ISO 8601, or nothing for a time outside the years 1 to 9999."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return ""


def _nothing() -> None:
    """The tick of `--quiet`."""


def _stop_on_signal(server: Server) -> None:
    """The first SIGINT or SIGTERM ends `server.run`; a second Ctrl-C does not wait for it."""

    def stop(number: int, at: FrameType | None) -> None:
        server.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
