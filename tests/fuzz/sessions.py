"""Fuzz target: collector.sessions, the collector's end. Whatever boxes say, it acknowledges only what the sink has.

The bytes are a play: three peers say things that fit and things that do not, batches are committed, the collector dies
and comes back. At the end an honest box must be able to deliver.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np

from tests.fuzz.fuzzing import Choices, fuzz, instrumented, json_of

with instrumented():
    from collector.sessions import ANYONE, EVENTS, FEWEST_EVENTS, FORGOTTEN, MOST_EVENTS, Sessions
    from collector.sinks import Item, Kept, Outcome, Poison
    from edge import protocol
    from edge.errors import WireError
    from edge.events import Event, Header, encode
    from edge.protocol import Ack, Data, Denied, FromBox, FromCollector, Gone, Hello, Ping, Refused, Welcome

PEERS = (b"a", b"b", b"c")
DEVICES = ("x", "y")
PLAY = {
    name: number for number, name in enumerate(("hello", "data", "gone", "other", "commit", "crash", "tick", "key"))
}


@lru_cache(maxsize=10_000)
def event(device: str, epoch: int, seq: int) -> tuple[bytes, ...]:
    """The frames of an event with nobody in it."""
    header = Header(
        device=device, epoch=epoch, seq=seq, camera="door", frame=0, captured_at=0.0, frame_size=(8, 6), bundle="b",
        bank="c", embedding_dim=4, people=(),
    )  # fmt: skip
    return tuple(encode(Event(header, np.zeros((0, 4), np.float16), ())))


class MemorySink:
    """What was committed: of each (device, epoch) the ranges of numbers, merged."""

    def __init__(self, stateless: bool) -> None:
        self.stateless = stateless
        self.kept: dict[tuple[str, int], list[tuple[int, int]]] = {}  # first, end

    def resume(self, device: str, epoch: int) -> int | None:
        return None if self.stateless else self.end_of(device, epoch, 0)

    def end_of(self, device: str, epoch: int, start: int) -> int:
        """The first number from `start` on that is not kept."""
        for first, end in self.kept.get((device, epoch), []):
            if first <= start < end:
                start = end
        return start

    def add(self, items: list[Item]) -> list[Outcome]:
        outcomes = []
        for item in items:
            known = self.end_of(item.device, item.epoch, item.first) > item.last
            ranges = self.kept.setdefault((item.device, item.epoch), [])
            ranges.append((item.first, item.last + 1))
            ranges.sort()
            if isinstance(item.payload, Poison):
                outcomes.append(Outcome(Kept.REFUSED, item.payload.reason))
            else:
                outcomes.append(Outcome(Kept.DUPLICATE if known else Kept.NEW))
        return outcomes


class Play:
    """Three connections; what they were last welcomed to, as a box would remember it."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.now = choices, 0.0
        self.sink = MemorySink(stateless=choices.below(4) == 1)
        self.writes: dict[bytes, str | None] = dict.fromkeys(PEERS, ANYONE)
        self.start()

    def start(self) -> None:
        self.sessions = Sessions(self.sink.resume)
        self.said: dict[bytes, Hello] = {}  # by whom, in the session that is open
        self.welcomed: dict[bytes, int] = {}  # to which number, or will be
        self.greeted: set[bytes] = set()  # with WELCOME

    def step(self) -> None:
        choices = self.choices
        kind = choices.below(len(PLAY))
        peer = choices.pick(PEERS)
        match kind:
            case 0:
                first, more = choices.number(), choices.below(4)
                if 0 <= first < 2**63 - more:
                    self.say(
                        peer, Hello(device=choices.pick(DEVICES), epoch=choices.below(2), first=first, end=first + more)
                    )
            case 1:
                self.data(peer)
            case 2:
                first = self.next(peer) + choices.pick((0, 0, 0, 1, -1, -3))
                last = max(first + choices.below(4), choices.number() if choices.below(8) == 1 else 0)
                if 0 <= first <= last < 2**63 - 1:
                    self.say(peer, Gone(first=first, last=last, reason="x"))
            case 3:
                self.other(peer)
            case 4:
                self.commit()
            case 5:
                self.start()  # what was not committed is gone
            case 6:
                self.commit()  # as the server does before it looks at the clock
                self.now += choices.pick((0.0, 1.0, FORGOTTEN - 1, FORGOTTEN))
                self.sessions.expire(self.now)
            case _:
                self.writes[peer] = choices.pick((ANYONE, "x", "y", None))

    def next(self, peer: bytes) -> int:
        """The number that this peer should say next."""
        return self.welcomed.get(peer, 0)

    def data(self, peer: bytes) -> None:
        seq = self.next(peer) + self.choices.pick((0, 0, 0, 0, 0, 1, -1, -3))
        hello = self.said.get(peer)
        if not 0 <= seq < 2**63 - 1:
            return
        device, epoch = (hello.device, hello.epoch) if hello else ("x", 0)
        frames = event(device, epoch, seq)
        match self.choices.below(16):
            case 1:
                frames = event("another", epoch, seq)
            case 2:
                frames = event(device, epoch + 1, seq)
            case 3:
                frames = tuple(self.choices.take(3) for _ in range(self.choices.below(4)))
        self.say(peer, Data(seq, frames))

    def other(self, peer: bytes) -> None:
        """PING, and what is no message."""
        match self.choices.below(4):
            case 0:
                self.say(peer, Ping())
            case 1:
                self.say(peer, [self.choices.take(5), self.choices.take(9)])
            case _:
                name, text = protocol.encode(Hello(device="x", epoch=0, first=0, end=1))
                self.say(peer, [name, json_of(self.choices.changed(json.loads(text)))])

    def say(self, peer: bytes, message: FromBox | list[bytes]) -> None:
        """Have a peer say something; check what is answered at once."""
        frames = message if isinstance(message, list) else protocol.encode(message)
        writes, before, expected = self.writes[peer], self.sessions.gathered, self.next(peer)
        try:
            replies = self.sessions.heard(peer, writes, frames, self.now)
        except WireError:
            assert isinstance(message, list), "a right message is refused"
            self.forget(peer)
            return
        read = protocol.from_box(frames) if writes is not None else None
        match read:
            case Hello() if not any(isinstance(reply, Denied) for reply in replies):
                self.said[peer] = read
                self.greeted.discard(peer)
                if not replies:  # it is welcomed once what it dropped is on the disk
                    self.welcomed[peer] = read.first
            case Data() | Gone() if not replies and peer in self.said:
                first, last = (read.seq, read.seq) if isinstance(read, Data) else (read.first, read.last)
                assert first <= self.next(peer), "it takes what leaves a gap"
                assert all(item.first == expected for item in self.sessions.take()[before:]), "an overlap"
                self.welcomed[peer] = max(self.next(peer), last + 1)
        for reply in replies:
            self.hear(peer, reply)
        self.check_items(before, peer, writes)

    def check_items(self, before: int, peer: bytes, writes: str | None) -> None:
        for item in self.sessions.take()[before:]:
            assert writes in (ANYONE, item.device), "under another's name"
            assert 0 <= item.first <= item.last < 2**63 - 1
            if isinstance(item.payload, Event):
                header = item.payload.header
                assert (header.device, header.epoch, header.seq) == (item.device, item.epoch, item.first)
                assert item.first == item.last

    def forget(self, peer: bytes) -> None:
        self.said.pop(peer, None)
        self.welcomed.pop(peer, None)

    def hear(self, peer: bytes, reply: FromCollector) -> None:
        """What a peer is told must be so."""
        assert protocol.from_collector(protocol.encode(reply)) == reply
        hello = self.said.get(peer)
        match reply:
            case Welcome():
                assert hello is not None
                assert reply.epoch == hello.epoch
                kept = self.sink.end_of(hello.device, hello.epoch, 0)
                assert hello.first <= reply.next <= max(kept, hello.first), "it welcomes beyond what is kept"
                self.welcomed[peer] = reply.next
                self.greeted.add(peer)
            case Ack():
                if hello is None or reply.epoch != hello.epoch:
                    return  # a box does not listen to it
                kept = self.sink.end_of(hello.device, hello.epoch, hello.first)
                assert reply.next <= max(kept, hello.first), "acknowledged, and not kept"
            case protocol.Reset() | Denied():
                self.forget(peer)

    def commit(self) -> None:
        items = self.sessions.take()
        outcomes = self.sink.add(items)
        refused = [outcome.reason[:500] for outcome in outcomes if outcome.kept is Kept.REFUSED]
        replies = self.sessions.settle(outcomes)
        assert all(reply.reason in refused for _, reply in replies if isinstance(reply, Refused))
        acknowledged = set()
        for peer, reply in replies:
            if isinstance(reply, Refused):
                assert not acknowledged, "REFUSED comes before the ACK that covers it"
            else:
                acknowledged.add(peer)
            self.hear(peer, reply)
        assert self.sessions.gathered == 0
        assert self.sessions.settle([]) == [], "said twice"
        assert self.said.keys() <= self.greeted, "a HELLO without an answer"
        assert len(self.sessions) <= len(PEERS)
        window = self.sessions.window
        assert FEWEST_EVENTS <= window.events <= MOST_EVENTS
        assert window.events * len(self.sessions) <= max(EVENTS, FEWEST_EVENTS * len(self.sessions))

    def honest(self) -> None:
        """A box that behaves delivers three events."""
        peer = PEERS[0]
        self.commit()
        self.writes[peer] = "x"
        self.forget(peer)
        start = self.sink.end_of("x", 0, 0)
        if start > 2**63 - 10:
            return  # there are no numbers left
        self.say(peer, Hello(device="x", epoch=0, first=start, end=start + 3))
        assert self.next(peer) == start
        for seq in range(start, start + 3):
            self.say(peer, Data(seq, event("x", 0, seq)))
        self.commit()
        assert self.sink.end_of("x", 0, 0) >= start + 3, "not delivered"


def target(data: bytes) -> None:
    play = Play(Choices(data))
    while play.choices:
        play.step()
    play.honest()


def seeds() -> list[bytes]:
    step = {name: bytes((number,)) for name, number in PLAY.items()}
    hello, other_device = (step["hello"] + b"\0\2\0\3" + device + b"\0" for device in (b"\0", b"\1"))
    good, wrong, garbage = (step["data"] + b"\0\0" + kind for kind in (b"\0", b"\1", b"\3\2abcdef"))
    gone = step["gone"] + b"\0\0\2\0"
    commit = step["commit"] + b"\0"
    begin = b"\0" + hello
    return [
        begin + good + good + gone + commit + good + commit,
        begin + wrong + garbage + good + commit + step["hello"] + b"\0\2\7\1\0\0" + commit,
        begin + good + step["crash"] + b"\0" + hello + good + commit,
        begin + good + step["hello"] + b"\1\2\0\0\0\0" + step["data"] + b"\1\0\0" + commit,
        begin + good + other_device + good + commit + good + commit,
        begin + step["data"] + b"\0\5\0" + good + step["key"] + b"\0\1" + good + commit,
        begin + step["key"] + b"\0\3" + good + step["tick"] + b"\0\3" + commit,
        b"\1" + step["hello"] + b"\0\2\7\1\0\0" + good + commit,
        *(begin + step["other"] + bytes((0, kind, 1, 1, 1, 1, 1)) + good + commit for kind in range(4)),
    ]


if __name__ == "__main__":
    fuzz(target, seeds())
