"""The box's end of lookout/1 as a pure machine: what it hears and the clock go in, what to say comes out.

docs/protocol.md draws its states. It opens no socket and reads no clock, so that every order of events can be tested.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from edge.errors import WireError
from edge.protocol import (
    HEARTBEAT,
    SILENCE,
    Ack,
    Data,
    Denied,
    FromBox,
    Gone,
    Hello,
    Ping,
    Pong,
    Refused,
    Reset,
    Welcome,
    Window,
    from_collector,
)

PATIENCE = 60.0  # s that sent events may go without an acknowledgement of any, though the other end is there
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # s between tries; doubled each time, and drawn at random below that

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """One epoch of a source: the numbers it holds, first <= number < end."""

    epoch: int
    first: int
    end: int


class Source(Protocol):
    """Where the events to be delivered come from: a spool, or a store that is sent on."""

    def stream(self) -> Stream:
        """The epoch to be delivered now: the oldest with anything left, else the one that is being written."""

    def read(self, epoch: int, start: int, events: int, size: int) -> list[Data | Gone]:
        """The next entries from number `start`: at most `events`, and no more once they have `size` bytes."""

    def forget(self, epoch: int, end: int) -> None:
        """The other end has every number of this epoch below `end`."""


@dataclass
class Delivery:
    """What became of the events, since the start. Plain numbers, for a log line or a metric."""

    delivered: int = 0  # acknowledged
    gone: int = 0  # acknowledged as not to be had any more
    refused: int = 0  # set aside by the collector
    connections: int = 0  # that were welcomed
    failures: int = 0  # tries that were not, and connections that broke
    handshakes_refused: int = 0  # of these, in the handshake: keys that do not match, mostly
    connected: bool = False
    acknowledged_at: float | None = None  # when the collector last said that it has something, on the clock of the link


class Link:
    """Delivers what `source` holds, in order, a window at a time, from wherever the collector says it stands.

    device: the box's name. now: any clock that only goes forward, s; the same for every call. `heard` and `say` may
    end the connection: then `up` is False, and whoever owns the socket closes it and opens another at `retry_at`.
    """

    def __init__(self, device: str, source: Source, now: float, chance: random.Random | None = None) -> None:
        self.delivery = Delivery()
        self.up = False
        self.retry_at = now
        self._device, self._source = device, source
        self._chance = chance or random.Random()
        self._state: Literal["away", "greeting", "streaming"] = "away"
        self._pause = FIRST_PAUSE
        self._trouble = ""  # the last one said
        self._start(now)

    def _start(self, now: float) -> None:
        self._stream: Stream | None = None  # the one that HELLO named
        self._window = Window(events=1, bytes=1)
        self._cursor = 0  # the next number to send
        self._flight: deque[tuple[Data | Gone, int]] = deque()  # sent and not acknowledged, with its bytes
        self._flying = 0  # bytes in flight
        self._heard_at = self._said_at = self._moved_at = now

    def connected(self, now: float) -> None:
        """A fresh connection is there, or will be: `say` begins with HELLO."""
        self._start(now)
        self._state, self.up = "greeting", True

    def lost(self, why: str, now: float, pause: float | None = None) -> None:
        """The connection is of no use any more. pause: s until the next try, instead of the next longer one."""
        if pause is None:
            pause = self._chance.uniform(0, self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._state, self.up = "away", False
        self.retry_at = now + pause
        self.delivery.failures += 1
        self.delivery.connected = False
        if why != self._trouble:  # once, not at each of a thousand tries
            log.warning("no collector: %s; what is seen meanwhile is kept", why)
        self._trouble = why

    def heard(self, frames: list[bytes], now: float) -> None:
        """A message came."""
        self._heard_at = now
        try:
            message = from_collector(frames)
        except WireError as error:
            self.lost(f"what answers is no collector: {error}", now, LONGEST_PAUSE)
            return
        match message:
            case Welcome():
                self._welcome(message, now)
            case Ack():
                self._acknowledged(message, now)
            case Refused():
                self.delivery.refused += 1
                log.error("the collector refused event %d of epoch %d: %s", message.seq, message.epoch, message.reason)
            case Reset():
                self.lost(f"it asks to begin again: {message.reason}", now)
            case Denied():
                self.lost(f"it does not let this box in: {message.reason}", now, LONGEST_PAUSE)
            case Pong():
                pass

    def _welcome(self, welcome: Welcome, now: float) -> None:
        stream = self._stream
        if self._state != "greeting" or stream is None or welcome.epoch != stream.epoch:
            return  # not an answer to what was said last
        if welcome.next < stream.first:
            self.lost(f"it asks for number {welcome.next}, which this box did not offer", now)
            return
        if not self.delivery.connected:
            self.delivery.connections += 1
            log.info("the collector is there")
        self._state, self.delivery.connected, self._trouble = "streaming", True, ""
        self._window, self._cursor, self._moved_at = welcome.window, welcome.next, now
        if welcome.next > stream.first:
            self.delivery.acknowledged_at = now
        self._source.forget(stream.epoch, welcome.next)

    def _acknowledged(self, ack: Ack, now: float) -> None:
        if self._state != "streaming" or self._stream is None or ack.epoch != self._stream.epoch:
            return
        if ack.next > self._cursor:
            self.lost(f"it acknowledges number {ack.next - 1}, which was not sent", now)
            return
        self._window = ack.window
        moved = False
        while self._flight and last_of(self._flight[0][0]) < ack.next:
            entry, size = self._flight.popleft()
            self._flying -= size
            moved = True
            if isinstance(entry, Gone):
                self.delivery.gone += entry.count
            else:
                self.delivery.delivered += 1
        if moved:
            self._source.forget(ack.epoch, ack.next)
            self._moved_at = self.delivery.acknowledged_at = now
            self._pause = FIRST_PAUSE

    def say(self, now: float) -> list[FromBox]:
        """What to send now, in this order."""
        if not self.up:
            return []
        if now - self._heard_at >= SILENCE:
            self.lost("it does not answer", now)
            return []
        if self._flight and now - self._moved_at >= PATIENCE:
            self.lost("it acknowledges nothing", now)
            return []
        said: list[FromBox] = []
        if self._stream is None or (self._state == "streaming" and not self._flight):
            current = self._source.stream()
            if self._stream is None or current.epoch != self._stream.epoch:
                self._stream, self._state = current, "greeting"
                said.append(Hello(device=self._device, epoch=current.epoch, first=current.first, end=current.end))
        if self._state == "streaming":
            said += self._next(now)
        if not said and now - self._said_at >= HEARTBEAT:
            said.append(Ping())
        if said:
            self._said_at = now
        return said

    def _next(self, now: float) -> list[Data | Gone]:
        """What the window has room for."""
        assert self._stream is not None
        events, size = self._window.events - len(self._flight), self._window.bytes - self._flying
        if events <= 0 or (size <= 0 and self._flight):
            return []
        entries = self._source.read(self._stream.epoch, self._cursor, events, max(size, 1))
        for entry in entries:
            size = sum(map(len, entry.frames)) if isinstance(entry, Data) else 0
            if not self._flight:
                self._moved_at = now  # patience begins with the first that waits
            self._flight.append((entry, size))
            self._flying += size
            self._cursor = last_of(entry) + 1
        return list(entries)

    def wake(self, now: float) -> float:
        """Seconds until `say` has something to do, unless a message or a new event comes before."""
        if not self.up:
            return max(self.retry_at - now, 0.0)
        due = [self._heard_at + SILENCE, self._said_at + HEARTBEAT]
        if self._flight:
            due.append(self._moved_at + PATIENCE)
        return max(min(due) - now, 0.0)


def last_of(entry: Data | Gone) -> int:
    """The last number that an entry stands for."""
    return entry.seq if isinstance(entry, Data) else entry.last
