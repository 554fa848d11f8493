"""A small box for tests: a real DEALER socket that says what a test wants, whose every wait ends with a reason."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

import numpy as np
import zmq

from edge import events, protocol
from edge.events import Answer, Choice, Event, Header, Person
from edge.keys import KeyPair, secure_client
from edge.protocol import Ack, Data, FromBox, FromCollector, Hello, Welcome

DEADLINE = 30.0  # s

_Said = TypeVar("_Said")


def person(crop: bool = False, **options: str) -> Person:
    answers = tuple(
        Answer(category=name.replace("_", " "), top=(Choice(option=option, probability=0.875),))
        for name, option in options.items()
    )
    return Person(box=(1.5, 2, 30, 40.25), score=0.5, answers=answers, crop=crop)


def event(
    seq: int, *people: Person, device: str = "box", epoch: int = 7, camera: str = "door", frame: int = 0
) -> Event:
    """An event with these people. frame: for another content under the same number."""
    header = Header(
        device=device, epoch=epoch, seq=seq, camera=camera, frame=frame or seq, captured_at=1.7e9 + seq,
        frame_size=(640, 480), bundle="b", bank="c", embedding_dim=64, people=people,
    )  # fmt: skip
    crops = tuple(b"\xff\xd8jpeg %d" % seq if person.crop else None for person in people)
    return Event(header, np.eye(64, dtype=np.float16)[: len(people)], crops)


def data(event: Event) -> Data:
    """A box's message with this event."""
    return Data(event.header.seq, tuple(events.encode(event)))


class Box:
    """One connection of one box; a context manager.

    key, collector_key: for the encryption; without them in the clear. rcvhwm, sndhwm: how many messages wait in it, to
    be heard and to leave; 0: all. `say` waits where there is no room, and raises zmq.Again after DEADLINE.
    """

    def __init__(
        self, address: str, key: KeyPair | None = None, collector_key: str = "", rcvhwm: int = 0, sndhwm: int = 0
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = -1
        self.socket.rcvhwm, self.socket.sndhwm = rcvhwm, sndhwm
        self.socket.sndtimeo = int(1000 * DEADLINE)
        self.socket.ipv6 = "[" in address
        if key is not None:
            secure_client(self.socket, key, collector_key)
        self.socket.connect(address)

    def say(self, *messages: FromBox | list[bytes]) -> None:
        """Send messages, or what is none."""
        for message in messages:
            self.socket.send_multipart(message if isinstance(message, list) else protocol.encode(message))

    def send(self, *events: Event) -> None:
        """Send events."""
        self.say(*map(data, events))

    def hear(self, kind: type[_Said], seconds: float = DEADLINE) -> _Said:
        """The next message, which is to be of this kind."""
        assert self.socket.poll(int(1000 * seconds)), f"no {kind.__name__} within {seconds:.0f} s"
        said = protocol.from_collector(self.socket.recv_multipart())
        assert isinstance(said, kind), said
        return said

    def hear_all(self, seconds: float = 0.0) -> list[FromCollector]:
        """What is there, and what comes until it is quiet for so long."""
        said = []
        while self.socket.poll(int(1000 * seconds)):
            said.append(protocol.from_collector(self.socket.recv_multipart()))
        return said

    def greet(self, epoch: int = 7, first: int = 0, end: int = 0, device: str = "box") -> Welcome:
        """Say HELLO; hear WELCOME."""
        self.say(Hello(device=device, epoch=epoch, first=first, end=max(first, end)))
        welcome = self.hear(Welcome)
        assert welcome.epoch == epoch
        return welcome

    def acknowledged(self, number: int) -> Ack:
        """Hear ACKs, and nothing else, up to the one that covers all numbers below `number`."""
        below = -1
        while below < number:
            ack = self.hear(Ack)
            assert ack.next >= below
            below = ack.next
        assert below == number
        return ack

    def deliver(self, events: Iterable[Event], epoch: int = 7, device: str = "box") -> None:
        """All of them, in order, within the window, until the last is acknowledged."""
        waiting = list(events)
        welcome = self.greet(epoch, waiting[0].header.seq, waiting[-1].header.seq + 1, device)
        window, sent, kept = welcome.window.events, 0, max(welcome.next - waiting[0].header.seq, 0)
        sent = kept
        end = time.monotonic() + DEADLINE
        while kept < len(waiting):
            self.send(*waiting[sent : kept + window])
            sent = max(sent, min(kept + window, len(waiting)))
            ack = self.hear(Ack, end - time.monotonic())
            kept, window = ack.next - waiting[0].header.seq, ack.window.events

    def close(self) -> None:
        """Hang up."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Box:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
