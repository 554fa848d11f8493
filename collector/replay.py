"""A store sent on: to another collector, by the box's own end of the protocol, or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from time import monotonic
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from collector.stats import harmless
from collector.store import Store
from edge.errors import ConfigError, WireError
from edge.link import Stream, last_of
from edge.protocol import Data, Gone
from edge.publish import Secure, Sender

CHUNK = 16  # entries read at once: with crops they may be large
GIVE_UP = 60.0  # s in which nothing is acknowledged

Say = Callable[[str, int], None]  # whose numbers are on their way, and how many more of them are done


@dataclass
class Sent:
    """What a replay came to, in numbers. Those that are neither events nor gone were there already."""

    numbers: int = 0
    events: int = 0
    gone: int = 0
    refused: int = 0  # of the events

    @property
    def known(self) -> int:
        """How many the other collector had."""
        return max(self.numbers - self.events - self.gone, 0)


class StoreSource:
    """The epochs of one device of a store, up to the ends they have now; an edge.link.Source.

    store: may be in use. streams: at least one. done: how many numbers have arrived.
    """

    def __init__(self, store: Store, device: str, streams: list[Stream]) -> None:
        self._store, self._device, self._streams = store, device, streams
        self._at = 0
        self.done = 0

    @property
    def over(self) -> bool:
        """Whether all have arrived."""
        current = self.stream()
        return self._at == len(self._streams) - 1 and current.first >= current.end

    def stream(self) -> Stream:
        """As edge.link.Source has it."""
        return self._streams[self._at]

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """As edge.link.Source has it."""
        end = self.stream().end
        found: list[Data | Gone] = []
        while len(found) < events and size > 0 and start < end:
            for entry in self._store.entries(self._device, epoch, start, min(CHUNK, events - len(found))):
                if size <= 0:
                    break
                found.append(entry)
                size -= sum(map(len, entry.frames)) if isinstance(entry, Data) else 0
            start = last_of(found[-1]) + 1
        return found

    def forget(self, epoch: int, end: int) -> None:
        """As edge.link.Source has it. The store keeps what it has."""
        current = self.stream()
        if epoch == current.epoch:
            reached = max(current.first, min(end, current.end))
            self.done += reached - current.first
            self._streams[self._at] = replace(current, first=reached)
            if reached == current.end and self._at < len(self._streams) - 1:
                self._at += 1


def send(store: Store, address: str, secure: Secure | None, say: Say, give_up: float = GIVE_UP) -> Sent:
    """Deliver everything in `store` to the collector at `address`; return when it is kept there.

    Raises WireError where nothing is acknowledged for `give_up` seconds, ConfigError for an address that cannot be.
    """
    sent = Sent()
    for device, streams in _devices(store):
        source = StoreSource(store, device, streams)
        sent.numbers += sum(stream.end for stream in streams)
        try:
            with Sender(address, device, source, secure) as sender:
                sender.run(_Watch(source, device, say, give_up))
                delivery = sender.link.delivery
        except (ConfigError, UnicodeError) as error:  # which speaks of a box's configuration
            wanted = "tcp://host:port, or ipc:// and the path of a socket file"
            raise ConfigError(f"cannot send to '{address}'", expected=wanted, got=error.__cause__) from error
        sent.events += delivery.delivered
        sent.gone += delivery.gone
        sent.refused += delivery.refused
        if not source.over:
            raise WireError(
                f"{address}: nothing was acknowledged for {give_up:.0f} s,"
                f" after {sent.events} events and {sent.gone} missing numbers",
                remedy="mend what was said before and run it again: it goes on from where it stands",
            )
    return sent


class _Watch:
    """Tells whether a replay is over, or has to be given up, and that it goes on."""

    def __init__(self, source: StoreSource, device: str, say: Say, give_up: float) -> None:
        self._source, self._device, self._say, self._give_up = source, device, say, give_up
        self._done, self._moved_at = 0, monotonic()

    def __call__(self) -> bool:
        now = monotonic()
        if moved := self._source.done - self._done:
            self._say(self._device, moved)
            self._done, self._moved_at = self._source.done, now
        return self._source.over or now - self._moved_at >= self._give_up


def write_lines(store: Store, file: IO[str], say: Say) -> None:
    """The header of every event as on the wire, and what is missing, in the order of the numbers of each epoch."""
    for device, streams in _devices(store):
        for stream in streams:
            start = 0
            while start < stream.end:
                for entry in store.entries(device, stream.epoch, start, CHUNK):
                    file.write(_line(device, stream.epoch, entry) + "\n")
                    say(device, last_of(entry) + 1 - start)
                    start = last_of(entry) + 1


def _line(device: str, epoch: int, entry: Data | Gone) -> str:
    if isinstance(entry, Data):
        return entry.frames[0].decode()
    missing = {"schema": "lookout.gone/1", "device": device, "epoch": epoch, **entry.model_dump()}
    return json.dumps(missing, ensure_ascii=False)


def _devices(store: Store) -> Iterator[tuple[str, list[Stream]]]:
    for device, streams in groupby(store.streams(), key=lambda stream: stream[0]):
        yield device, [Stream(epoch, 0, end) for _, epoch, end in streams]


@contextmanager
def showing(store: Store) -> Iterator[Say]:
    """A bar on stderr where a person is looking; what this yields is the `say` of the others."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (sys.stderr.isatty() and console.is_interactive)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=sum(end for _, _, end in store.streams()))
        yield lambda device, count: progress.update(task, description=harmless(device), advance=count)
