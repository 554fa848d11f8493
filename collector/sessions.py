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
    NAME,
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
MOST_EVENTS, FEWEST_EVENTS = 256, 8  # of it for one box
MOST_BYTES, FEWEST_BYTES = 4 << 20, 64 << 10
AGAIN = 1.0  # s until a peer without a session is told once more: a flood is not answered by a flood
MAX_REASON = 500  # characters; more the protocol does not carry

Reply = tuple[bytes, FromCollector]  # to which peer


@dataclass(eq=False)
class _Session:
    device: str
    epoch: int
    expected: int  # the number that comes next
    heard_at: float
    welcomed: bool


class Sessions:
    """Everything the boxes said, in order. peer: bytes that name a connection. now: a clock that only goes forward, s.

    resume: as Sink has it. Items gather in `take`; what the sink made of them goes to `settle`, which acknowledges.
    Each session counts for itself: two of one epoch, one of them half-open, do not disturb each other, and the sink
    keeps every event once.
    """

    def __init__(self, resume: Callable[[str, int], int | None]) -> None:
        self._resume = resume
        self._sessions: dict[bytes, _Session] = {}  # the one heard longest ago first
        self._told: dict[bytes, float] = {}  # peers without a session: when they were told so; the first of all first
        self._batch: list[tuple[bytes, Item]] = []
        self._due: dict[bytes, _Session] = {}  # whom an ACK is due, or WELCOME
        self.duplicates = 0  # messages whose numbers were there already, by what their session knew
        self.resets = 0  # how often a box was asked to begin again

    def __len__(self) -> int:
        """How many sessions there are, those of boxes that are gone without a word among them."""
        return len(self._sessions)

    def boxes(self, now: float) -> int:
        """How many devices are connected."""
        devices = set()
        for session in reversed(self._sessions.values()):
            if now - session.heard_at >= SILENCE:
                break
            devices.add(session.device)
        return len(devices)

    @property
    def gathered(self) -> int:
        """How many items wait for `take`."""
        return len(self._batch)

    @property
    def window(self) -> Window:
        """What each box may have on its way: its share."""
        sharing = max(len(self._sessions), 1)
        return Window(
            events=min(max(EVENTS // sharing, FEWEST_EVENTS), MOST_EVENTS),
            bytes=min(max(BYTES // sharing, FEWEST_BYTES), MOST_BYTES),
        )

    def heard(self, peer: bytes, writes: str | None, frames: Sequence[bytes], now: float) -> list[FromCollector]:
        """Take one message; what to answer at once.

        writes: the device that this peer may write as, ANYONE, or None: it may not, or not any more. Raises WireError
        for what is no message of the protocol: the peer's session ends, and `misunderstood` has the answer.
        """
        session = self._sessions.pop(peer, None)  # it comes back, as the last, when all is well
        if writes is None:
            return self._tell(peer, Denied(reason="this key is not allowed here"), now)
        message = from_box(frames)
        if isinstance(message, Hello):
            return self._greet(peer, writes, message, now)
        if session is None:
            return self._reset(peer, "a HELLO comes first", now)
        if writes not in (session.device, ANYONE):
            return [_denied(session.device)]
        if isinstance(message, Data | Gone):
            first = message.seq if isinstance(message, Data) else message.first
            if first > session.expected:
                return self._reset(peer, f"number {session.expected} comes next, not {first}", now)
            self._receive(peer, session, message)
        session.heard_at = now
        self._sessions[peer] = session
        return [Pong()] if isinstance(message, Ping) else []

    def misunderstood(self, peer: bytes, error: WireError, now: float) -> list[FromCollector]:
        """What to answer at once where `heard` raised `error`."""
        if error.what.startswith("HELLO: protocol"):
            return [Denied(reason=f"this collector speaks {NAME}")]
        return self._reset(peer, f"that is no message of {NAME}", now)

    def _greet(self, peer: bytes, writes: str, hello: Hello, now: float) -> list[FromCollector]:
        if writes not in (hello.device, ANYONE):
            return [_denied(hello.device)]
        kept = self._resume(hello.device, hello.epoch)
        start = hello.first if kept is None else max(kept, hello.first)
        session = _Session(hello.device, hello.epoch, start, now, welcomed=kept is None or kept >= hello.first)
        self._sessions[peer] = session
        self._told.pop(peer, None)
        if len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        if kept is not None and kept < hello.first:
            gone = Gone(first=kept, last=hello.first - 1, reason="not kept by the box")
            self._batch.append((peer, Item(hello.device, hello.epoch, gone.first, gone.last, gone)))
            self._due[peer] = session  # WELCOME says that this is kept
            return []
        return [Welcome(epoch=hello.epoch, next=start, window=self.window)]

    def _receive(self, peer: bytes, session: _Session, message: Data | Gone) -> None:
        """What begins with the number that is expected, or before it."""
        self._due[peer] = session
        last = message.seq if isinstance(message, Data) else message.last
        if last < session.expected:
            self.duplicates += 1
            return
        if isinstance(message, Gone):
            gone = message.model_copy(update={"first": session.expected})
            item = Item(session.device, session.epoch, gone.first, last, gone)
        else:
            item = Item(session.device, session.epoch, last, last, _opened(message, session), message.frames)
        self._batch.append((peer, item))
        session.expected = last + 1

    def take(self) -> list[Item]:
        """What is to be kept now, in the order in which it came. `settle` is to follow."""
        return [item for _, item in self._batch]

    def settle(self, outcomes: Sequence[Outcome]) -> list[Reply]:
        """The sink has what `take` gave, with these outcomes: what to tell whom."""
        replies: list[Reply] = []
        for (peer, item), outcome in zip(self._batch, outcomes, strict=True):
            if outcome.kept is Kept.REFUSED:
                replies.append((peer, Refused(epoch=item.epoch, seq=item.last, reason=outcome.reason[:MAX_REASON])))
        window = self.window
        for peer, session in self._due.items():
            if self._sessions.get(peer) is session:  # and has not ended, or begun again, since
                say = Ack if session.welcomed else Welcome
                replies.append((peer, say(epoch=session.epoch, next=session.expected, window=window)))
                session.welcomed = True
        self._batch, self._due = [], {}
        return replies

    def expire(self, now: float) -> None:
        """Forget the boxes that have been silent for too long."""
        while self._sessions:
            peer, session = next(iter(self._sessions.items()))
            if now - session.heard_at < FORGOTTEN:
                return
            del self._sessions[peer]

    def _reset(self, peer: bytes, reason: str, now: float) -> list[FromCollector]:
        told = self._tell(peer, Reset(reason=reason), now)
        self.resets += len(told)
        return told

    def _tell(self, peer: bytes, message: FromCollector, now: float) -> list[FromCollector]:
        """`message` to a peer without a session, unless it was told something a moment ago."""
        if now - self._told.get(peer, -AGAIN) < AGAIN:
            return []
        self._told.pop(peer, None)
        self._told[peer] = now
        if len(self._told) > MAX_SESSIONS:
            del self._told[next(iter(self._told))]
        return [message]


def _denied(device: str) -> Denied:
    return Denied(reason=f"this key may not write as {device!r}"[:MAX_REASON])


def _opened(data: Data, session: _Session) -> Event | Poison:
    """The event in a message, if it is one, and the one that its number says."""
    try:
        event = decode(data.frames)
    except WireError as error:
        return Poison(str(error))
    header = event.header
    got, wanted = (header.device, header.epoch, header.seq), (session.device, session.epoch, data.seq)
    return event if got == wanted else Poison(f"the event says {got}, its message {wanted}")
