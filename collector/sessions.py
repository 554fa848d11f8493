"""The collector's end of lookout/1 as a pure machine: who may write what, which number comes next, what to answer.

docs/protocol.md draws its states. It opens no socket, keeps no event and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from collector.sinks import Item, Kept, Outcome, Poison
from edge.errors import WireError
from edge.events import Event, decode
from edge.protocol import (
    SILENCE,
    Ack,
    Data,
    Denied,
    FromCollector,
    Gone,
    Hello,
    Ping,
    Pong,
    Refused,
    Reset,
    Welcome,
    Window,
    from_box,
)

ANYONE = "*"  # a peer that may write under any name
FORGOTTEN = 4 * SILENCE  # s of a box's silence after which its session ends
MAX_SESSIONS = 10_000  # of which the longest silent ends when another comes
EVENTS, BYTES = 4096, 64 << 20  # that all boxes together may have on their way
MOST_EVENTS, FEWEST_EVENTS, FEWEST_BYTES = 256, 8, 256 << 10  # of it for one box

Reply = tuple[bytes, FromCollector]  # to which peer


@dataclass
class _Session:
    device: str
    epoch: int
    expected: int  # the number that comes next
    heard_at: float


class Sessions:
    """Everything the boxes said, in order. peer: bytes that name a connection.

    resume: as Sink has it. Items gather in `take`; what the sink made of them goes to `settle`, which acknowledges.
    """

    def __init__(self, resume: Callable[[str, int], int | None]) -> None:
        self._resume = resume
        self._sessions: dict[bytes, _Session] = {}  # the one heard longest ago first
        self._batch: list[tuple[bytes, Item]] = []
        self._again: dict[bytes, tuple[int, int]] = {}  # peers that sent what was there: epoch, expected
        self.duplicates = 0  # numbers that came again within a session or a batch

    def __len__(self) -> int:
        """How many boxes are connected."""
        return len(self._sessions)

    @property
    def gathered(self) -> int:
        """How many items wait for `take`."""
        return len(self._batch)

    @property
    def window(self) -> Window:
        """What each box may have on its way: its share."""
        sharing = max(len(self._sessions), 1)
        events = min(max(EVENTS // sharing, FEWEST_EVENTS), MOST_EVENTS)
        return Window(events=events, bytes=max(BYTES // sharing, FEWEST_BYTES))

    def heard(self, peer: bytes, writes: str | None, frames: Sequence[bytes], now: float) -> list[FromCollector]:
        """Take one message; what to answer at once.

        writes: the device that this peer may write as, ANYONE, or None: it may not, or not any more. Raises WireError
        for what is no message of the protocol: the peer's session ends.
        """
        session = self._sessions.pop(peer, None)
        if writes is None:
            return [Denied(reason="this key is not allowed here")]
        message = from_box(frames)
        if isinstance(message, Hello):
            return self._greet(peer, writes, message, now)
        if isinstance(message, Ping) and session is None:
            return [Pong()]  # it may have said HELLO before a restart; DATA will tell
        if session is None:
            return [Reset(reason="a HELLO comes first")]
        if writes not in (session.device, ANYONE):
            return [Denied(reason=f"this key may not write as {session.device!r} any more")]
        session.heard_at = now
        self._sessions[peer] = session  # as the last: a dict keeps its order
        if isinstance(message, Ping):
            return [Pong()]
        first, last = (message.seq, message.seq) if isinstance(message, Data) else (message.first, message.last)
        if first > session.expected:
            del self._sessions[peer]
            return [Reset(reason=f"number {session.expected} comes next, not {first}")]
        if last < session.expected:
            self.duplicates += 1
            self._again[peer] = (session.epoch, session.expected)
            return []
        payload = message if isinstance(message, Gone) else _opened(message, session)
        frames = () if isinstance(message, Gone) else message.frames
        item = Item(session.device, session.epoch, max(first, session.expected), last, payload, tuple(frames))
        self._batch.append((peer, item))
        session.expected = last + 1
        return []

    def _greet(self, peer: bytes, writes: str, hello: Hello, now: float) -> list[FromCollector]:
        if writes not in (hello.device, ANYONE):
            return [Denied(reason=f"this key may not write as {hello.device!r}")]
        kept = self._resume(hello.device, hello.epoch)
        start = hello.first if kept is None else max(kept, hello.first)
        if kept is not None and kept < hello.first:
            gone = Gone(first=kept, last=hello.first - 1, reason="not kept by the box")
            self._batch.append((peer, Item(hello.device, hello.epoch, gone.first, gone.last, gone)))
        self._sessions[peer] = _Session(hello.device, hello.epoch, start, now)
        if len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return [Welcome(epoch=hello.epoch, next=start, window=self.window)]

    def take(self) -> list[Item]:
        """What is to be kept now, in the order in which it came. `settle` is to follow."""
        return [item for _, item in self._batch]

    def settle(self, outcomes: Sequence[Outcome]) -> list[Reply]:
        """The sink has what `take` gave, with these outcomes: what to tell whom."""
        replies: list[Reply] = []
        done: dict[tuple[bytes, int], int] = {
            (peer, epoch): expected for peer, (epoch, expected) in self._again.items() if peer in self._sessions
        }
        for (peer, item), outcome in zip(self._batch, outcomes, strict=True):
            if outcome.kept is Kept.REFUSED:
                replies.append((peer, Refused(epoch=item.epoch, seq=item.first, reason=outcome.reason[:500])))
            done[peer, item.epoch] = max(done.get((peer, item.epoch), 0), item.last + 1)
        window = self.window
        replies += [(peer, Ack(epoch=epoch, next=next_, window=window)) for (peer, epoch), next_ in done.items()]
        self._batch, self._again = [], {}
        return replies

    def expire(self, now: float) -> None:
        """Forget the boxes that have been silent for too long."""
        while self._sessions:
            peer, session = next(iter(self._sessions.items()))
            if now - session.heard_at < FORGOTTEN:
                return
            del self._sessions[peer]


def _opened(data: Data, session: _Session) -> Event | Poison:
    """The event in a message, if it is one, and the one that its number says."""
    try:
        event = decode(data.frames)
    except WireError as error:
        return Poison(str(error))
    header = event.header
    got, wanted = (header.device, header.epoch, header.seq), (session.device, session.epoch, data.seq)
    return event if got == wanted else Poison(f"the event says {got}, its message {wanted}")
