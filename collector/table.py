"""What people look at while the collector works: one row per camera, its newest people in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, strftime

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from collector.server import Server
from collector.stats import Camera, Stats, harmless
from edge.events import Person

LIVE_SECONDS = 0.25
PLAIN_SECONDS = 5.0
PEOPLE_SHOWN = 2  # lines per camera
LATE, LOST = 10.0, 60.0  # seconds of silence from a camera that are worth a look, and worth a walk


@contextmanager
def shown(server: Server, store: str) -> Iterator[Callable[[], None]]:
    """Show the server's progress on stdout; what this yields is the `tick` of `Server.run`.

    On a terminal a table that stays in place, elsewhere a line every few seconds.
    """
    console = Console()
    if not (sys.stdout.isatty() and console.is_interactive):
        click.echo(f"listening on {server.address}, storing in {store}")
        yield _every(PLAIN_SECONDS, lambda: click.echo(progress(server.stats)))
        return

    def picture() -> Group:
        # below each row are at most PEOPLE_SHOWN lines; 9 lines are the title, the head and a footer of two lines
        rows = max(1, (console.height - 9) // PEOPLE_SHOWN)
        return live_picture(server.stats, server.address, store, monotonic(), rows)

    # a log line appears above the table, unless stderr goes elsewhere
    with Live(picture(), console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty()) as live:
        yield _every(LIVE_SECONDS, lambda: live.update(picture(), refresh=True))
        live.update(picture(), refresh=True)


def progress(stats: Stats) -> str:
    """One plain line."""
    rate = sum(camera.rate(monotonic()) for camera in stats.cameras.values())
    return f"{strftime('%H:%M:%S')} {stats.boxes} boxes, {len(stats.cameras)} cameras, {rate:.1f}/s: {counts(stats)}"


def counts(stats: Stats) -> str:
    """What became of what came; at the end what should be nothing, where it is not."""
    came = f"{stats.events} events, {stats.people} people, {stats.duplicates} duplicates, {stats.refused} refused"
    return ", ".join([came, *(f"{count} {name}" for count, name in _troubles(stats))])


def _troubles(stats: Stats) -> list[tuple[int, str]]:
    troubles = [
        (stats.gone, "gone"),
        (stats.resets, "resets"),
        (stats.handshakes_refused, "handshakes refused"),
    ]
    return [(count, name) for count, name in troubles if count]


def live_picture(stats: Stats, address: str, store: str, now: float, rows: int) -> Group:
    """The `rows` cameras heard last, by name. now: `time.monotonic`, seconds."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, header_style="dim", pad_edge=False)
    table.add_column("camera", no_wrap=True, max_width=32)
    table.add_column("seen", justify="right", no_wrap=True)
    table.add_column("events", justify="right", no_wrap=True)
    table.add_column("per s", justify="right", no_wrap=True)
    table.add_column("people", justify="right", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("newest people", no_wrap=True, ratio=1)
    heard_last = sorted(stats.cameras.items(), key=lambda item: -item[1].last_seen)[:rows]
    for (device, name), camera in sorted(heard_last, key=lambda item: item[0]):
        table.add_row(
            Text.assemble((harmless(device), "dim"), "/", (harmless(name), "bold")),
            _seen(now - camera.last_seen),
            f"{camera.events:,}",
            f"{camera.rate(now):.1f}",
            f"{camera.people:,}",
            str(len(camera.last.people)) if camera.last else "",
            _people(camera),
        )
    if not stats.cameras:
        table.add_row(Text("waiting for the first event", "dim italic"))
    elif len(stats.cameras) > rows:
        table.add_row(Text(f"and {len(stats.cameras) - rows} more", "dim italic"))
    title = Text.assemble((f"Lookout collector on {address}", "bold"), f" · {stats.boxes:,} boxes connected")
    footer = Text.assemble(
        (f"{stats.events:,} events · {stats.people:,} people", "bold"),
        f" · {stats.duplicates:,} duplicates",
        (f" · {stats.refused:,} refused", "red" if stats.refused else ""),
        *((f" · {count:,} {name}", "yellow") for count, name in _troubles(stats)),
        f" · {store}",
    )
    return Group(title, table, footer)


def in_words(person: Person) -> Text:
    """Every category's best option: first those that are likelier than not, the sure ones bold; the others dim.

    What is not known is left out.
    """
    words = Text()
    known = (answer for answer in person.answers if not answer.unknown)
    for answer in sorted(known, key=lambda answer: answer.top[0].probability < 0.5):
        best = answer.top[0]
        style = "bold" if best.probability >= 0.8 else "" if best.probability >= 0.5 else "dim"
        words.append(" · " if words else "", "dim")
        words.append(harmless(best.option), style)
        words.append(f" {best.probability:.0%}".replace("%", " %"), "dim")
    return words or Text("a person", "dim")


def _people(camera: Camera) -> Text:
    lines = [in_words(person) for person in camera.newest[:PEOPLE_SHOWN]]
    lines += [Text()] * (PEOPLE_SHOWN - len(lines))  # rows of one height: a table that does not jump
    words = Text("\n").join(lines)
    if camera.last and not camera.last.people:  # they have left
        words.stylize("dim")
    return words


def _seen(seconds: float) -> Text:
    """How long ago, in words."""
    if seconds < LATE:
        return Text("now", "green") if seconds < 2 else Text(f"{seconds:.0f} s")
    style = "yellow" if seconds < LOST else "red"
    return Text(f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min", style)


def _every(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """`act`, at most once in so many seconds."""
    due = monotonic() + seconds

    def tick() -> None:
        nonlocal due
        if monotonic() >= due:
            due = monotonic() + seconds
            act()

    return tick
