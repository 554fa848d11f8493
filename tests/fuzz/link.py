"""Fuzz target: edge.link, the box's end. Whatever a collector says, nothing is forgotten without its word.

The bytes are a play: the clock goes on, the collector says things that fit and things that do not, events come in. At
the end an honest collector takes over, and must receive all that is left.
"""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress

from tests.fuzz.fuzzing import Choices, fuzz, instrumented, json_of

with instrumented():
    from edge import protocol
    from edge.errors import WireError
    from edge.link import LONGEST_PAUSE, Link, Stream, last_of
    from edge.protocol import Ack, Data, Denied, FromCollector, Gone, Hello, Ping, Pong, Refused, Reset, Welcome, Window
    from tests.fakes import ListSource

TIMES = (0.0, 0.25, 1.0, 5.0, 14.75, 15.0, 30.0, 60.0)  # s; exact in binary
PLAY = {
    name: number for number, name in enumerate(("tick", "say", "connect", "lose", "more", "ack", "welcome", "other"))
}


class Source(ListSource):
    """Numbers its entries itself, whatever it is told to forget; and is told so by the collector only."""

    def __init__(self) -> None:
        super().__init__([], [], [])
        self.ends = [0, 0, 0]  # of the three epochs: the numbers that will come next
        self.released: set[tuple[int, int]] = set()  # (epoch, next) of this connection's WELCOME and ACKs

    def stream(self) -> Stream:
        number = next((i for i, entries in enumerate(self.epochs) if entries), len(self.epochs) - 1)
        entries, end = self.epochs[number], self.ends[number]
        return Stream(number + 1, first_of(entries[0]) if entries else end, end)

    def forget(self, epoch: int, end: int) -> None:
        assert (epoch, end) in self.released, "forgotten without the collector's word"
        self.epochs[epoch - 1] = [entry for entry in self.epochs[epoch - 1] if last_of(entry) >= end]

    def more(self, epoch: int, count: int) -> None:
        """Append an event, or a gap of `count` numbers."""
        start = self.ends[epoch - 1]
        entry = Gone(first=start, last=start + count - 1, reason="x") if count else Data(start, (bytes(10),))
        self.epochs[epoch - 1].append(entry)
        self.ends[epoch - 1] = last_of(entry) + 1


def first_of(entry: Data | Gone) -> int:
    return entry.seq if isinstance(entry, Data) else entry.first


class Play:
    """One connection after another, as the collector sees them."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.source, self.now = choices, Source(), 0.0
        self.link = Link("box", self.source, self.now, random.Random(0))
        self.begin()

    def begin(self) -> None:
        self.hello: Hello | None = None
        self.window: Window | None = None  # since WELCOME
        self.expected = 0
        self.flight: list[Data | Gone] = []
        self.source.released.clear()

    def reach(self, time: float) -> None:
        """Wait until then, or a moment longer: sums of these times stay exact."""
        self.now = max(self.now, math.ceil(4 * time) / 4)

    def step(self) -> None:
        choices, link = self.choices, self.link
        match choices.below(len(PLAY)):
            case 0:
                self.now += choices.pick(TIMES)
            case 1:
                self.say()
            case 2:
                if not link.up:
                    assert link.wake(self.now) < LONGEST_PAUSE + 1e-6
                    self.reach(link.retry_at)
                    link.connected(self.now)
                    self.begin()
            case 3:
                if link.up:
                    link.lost("a test", self.now)
            case 4:
                self.source.more(1 + choices.below(3), choices.below(4))
            case 5:
                self.hear(Ack(epoch=self.epoch(), next=self.number(), window=self.some_window()))
            case 6:
                self.hear(Welcome(epoch=self.epoch(), next=self.number(), window=self.some_window()))
            case _:
                self.other()

    def other(self) -> None:
        """The rarer messages, and what is none."""
        kinds: tuple[FromCollector, ...] = (
            Pong(), Reset(reason="x"), Denied(reason="x"), Refused(epoch=self.epoch(), seq=3, reason="x"),
            Ack(epoch=1, next=1, window=Window(events=1, bytes=1)),
        )  # fmt: skip
        name, *rest = protocol.encode(self.choices.pick(kinds))
        if self.choices.below(4) == 1:
            content = json.loads(rest[0]) if rest else {}
            self.hear([name, json_of(self.choices.changed(content))])
        else:
            self.hear([name, *rest])

    def epoch(self) -> int:
        """Mostly the right one."""
        return self.hello.epoch if self.hello and self.choices.below(8) else self.choices.below(4)

    def number(self) -> int:
        """Mostly one that may be."""
        step = self.choices.pick((0, 0, 0, 1, -1, -2, 2, None))
        number = self.choices.number() if step is None else self.expected + step
        return min(max(number, 0), 2**63 - 1)

    def some_window(self) -> Window:
        return Window(events=1 + self.choices.below(5), bytes=self.choices.pick((1, 10, 11, 25, 1000)))

    def hear(self, message: FromCollector | list[bytes]) -> None:
        frames = message if isinstance(message, list) else protocol.encode(message)
        if not self.link.up:
            return
        with suppress(WireError):
            message = protocol.from_collector(frames)
        match message:
            case Welcome() if self.hello and message.epoch == self.hello.epoch and self.window is None:
                if message.next >= self.hello.first:
                    self.source.released.add((message.epoch, message.next))
                    self.window, self.expected, self.flight = message.window, message.next, []
            case Ack() if self.hello and message.epoch == self.hello.epoch and self.window is not None:
                if message.next <= self.expected:
                    self.source.released.add((message.epoch, message.next))
                    self.window = message.window
                    self.flight = [entry for entry in self.flight if last_of(entry) >= message.next]
        self.link.heard(frames, self.now)

    def say(self) -> None:
        """Let the box speak; check every word."""
        up = self.link.up
        said = self.link.say(self.now)
        assert up or not said
        if self.link.up:
            assert self.link.wake(self.now) > 0, "a loop that never sleeps"
        for message in said:
            assert protocol.from_box(protocol.encode(message)) == message
            match message:
                case Hello():
                    assert not self.flight, "epochs do not mix"
                    self.hello, self.window, self.expected = message, None, message.first
                case Data() | Gone():
                    self.sent(message)
                case Ping():
                    assert said == [message]

    def sent(self, entry: Data | Gone) -> None:
        assert self.window is not None, "before WELCOME"
        assert first_of(entry) == self.expected, "out of order"
        waiting = sum(len(one.frames[0]) for one in self.flight if isinstance(one, Data))
        assert len(self.flight) < self.window.events, "more than the window"
        assert waiting < self.window.bytes or not self.flight, "more bytes than the window"
        self.flight.append(entry)
        self.expected = last_of(entry) + 1

    def honest(self) -> None:
        """A collector that behaves takes over: it receives everything that is left, in order."""
        for epoch in (1, 2, 3):
            self.source.more(epoch, 0)
        left = [(number + 1, last_of(entry)) for number, all_ in enumerate(self.source.epochs) for entry in all_]
        got: list[tuple[int, int]] = []
        if self.link.up:
            self.link.lost("a test", self.now)
        self.reach(self.link.retry_at)
        self.link.connected(self.now)
        self.begin()
        for _ in range(10 * len(left)):
            if got == left:
                return
            self.say()
            if self.hello and self.window is None:
                first, window = self.hello.first, Window(events=2, bytes=15)
                self.hear(Welcome(epoch=self.hello.epoch, next=first, window=window))
            elif self.hello and self.window and self.flight:
                got += [(self.hello.epoch, last_of(entry)) for entry in self.flight]
                self.hear(Ack(epoch=self.hello.epoch, next=self.expected, window=self.window))
        raise AssertionError(f"delivered {got}, not {left}")


def target(data: bytes) -> None:
    play = Play(Choices(data))
    while play.choices:
        play.step()
    play.honest()


def seeds() -> list[bytes]:
    step = {name: bytes((number,)) for name, number in PLAY.items()}
    more = step["more"] + b"\0\0"
    begin = step["connect"] + step["say"]
    # the right epoch; the number that fits, or one or two before it; a window of 5 events and 1000 bytes
    welcome, low, lower = (step["welcome"] + b"\1" + number + b"\4\4" for number in (b"\0", b"\4", b"\5"))
    ack = step["ack"] + b"\1\0\4\4"
    once = begin + welcome + step["say"] + ack
    return [
        3 * more + once,
        3 * more + once + step["lose"] + more + begin + lower + step["say"],
        3 * more + begin + low + step["say"] + step["tick"] + b"\7" + step["say"] + begin,
        begin + step["tick"] + b"\3" + step["say"] + step["other"] + b"\0\0" + more + step["say"],
        more + step["more"] + b"\1\3" + once + step["say"] + welcome,
        *(more + begin + welcome + step["say"] + step["other"] + bytes((kind, 1, 1, 1, 0)) for kind in range(5)),
    ]


if __name__ == "__main__":
    fuzz(target, seeds())
