"""What the commands on a store say: tables and bars for a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import islice

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from collector.stats import harmless
from collector.store import DeviceStats, Gap

TABLE_ROWS = 1000  # more nobody scrolls through, and a table has to be whole before it is drawn
REASONS = 3  # told of one device


def utc(seconds: float) -> str:
    """ISO 8601, or nothing for a time outside the years 1 to 9999."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return ""


def when(captured_at: float, clock: str | None) -> str:
    """A time as `utc` has it, with a warning where the box's clock was not set."""
    return utc(captured_at) + (" (clock not set)" if clock else "")


def report_gaps(gaps: Iterable[Gap], as_json: bool) -> None:
    """Each gap, and how many they are."""
    if as_json:
        for gap in gaps:
            click.echo(json.dumps({**asdict(gap), "count": gap.count}))
        return
    rest = iter(gaps)
    ranges = events = 0
    console = Console()
    if sys.stdout.isatty() and console.is_interactive:
        table = _table("device", "epoch", "first", "last", "events", "reason")
        for gap in islice(rest, TABLE_ROWS):
            ranges, events = ranges + 1, events + gap.count
            numbers = (str(gap.epoch), str(gap.first), str(gap.last), f"{gap.count:,}")
            table.add_row(Text(harmless(gap.device)), *numbers, Text(harmless(gap.reason)))
        if ranges:
            console.print(table)
    shown = ranges
    for gap in rest:
        ranges, events = ranges + 1, events + gap.count
        if not shown:
            epoch = f"{harmless(gap.device)}  epoch {gap.epoch}"
            click.echo(f"{epoch}  {gap.first}..{gap.last}  {gap.count} missing  {harmless(gap.reason)}")
    if 0 < shown < ranges:
        click.echo(f"and {ranges - shown:,} more, which --json tells")
    click.echo(f"{events:,} events are missing, in {ranges:,} gaps" if ranges else "no event is missing")


def report_stats(devices: list[DeviceStats], used: int, size: int, as_json: bool) -> None:
    """Each device and all together. used, size: bytes of the file, those in use and all."""
    events, people = sum(device.events for device in devices), sum(device.people for device in devices)
    gone, refused = sum(map(_gone, devices)), sum(device.refused for device in devices)
    if as_json:
        total = {"events": events, "people": people, "gone": gone, "refused": refused}
        file = {"bytes": size, "bytes_in_use": used}
        click.echo(json.dumps({"devices": [asdict(device) for device in devices], "total": total, "file": file}))
        return
    console = Console()
    if devices and sys.stdout.isatty() and console.is_interactive:
        table = _table("device", "epochs", "events", "people", "captured, UTC", "received, UTC", "missing", "refused")
        for device in devices:
            table.add_row(
                Text(harmless(device.device)),
                *(f"{number:,}" for number in (device.epochs, device.events, device.people)),
                _span(device.captured, "\n"),
                _span(device.received, "\n"),
                Text(_reasons(device, "\n"), "yellow"),
                Text(f"{device.refused:,}", "red" if device.refused else ""),
            )
        console.print(table)
    else:
        for device in devices:
            times = "".join(
                f", {what} {_span(span, ' to ')}"
                for what, span in (("captured", device.captured), ("received", device.received))
                if span
            )
            click.echo(
                f"{harmless(device.device)}: {device.events} events, {device.people} people in {device.epochs} epochs"
                f"{times}, missing {_reasons(device, ', ')}, refused {device.refused}"
            )
    click.echo(
        f"{len(devices):,} devices, {events:,} events, {people:,} people, {gone:,} missing, {refused:,} refused;"
        f" {used / 1e6:,.1f} MB in use of {size / 1e6:,.1f} MB"
    )


@contextmanager
def copying(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where a person is looking; what this yields is the `progress` of `Store.backup`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _table(*columns: str) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in columns:
        words = column in ("device", "reason", "missing") or column.endswith("UTC")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _gone(device: DeviceStats) -> int:
    return sum(device.gone.values())


def _span(times: tuple[float, float] | None, between: str) -> str:
    return between.join(utc(time)[:19] for time in times) if times else ""


def _reasons(device: DeviceStats, between: str) -> str:
    """How many are missing, and why the most are."""
    told = [f"{count:,} {harmless(reason)}" for reason, count in islice(device.gone.items(), REASONS)]
    others = _gone(device) - sum(islice(device.gone.values(), REASONS))
    return between.join([*told, *([f"{others:,} other"] if others else [])]) or "0"
