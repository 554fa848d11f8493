"""Receives events over ZeroMQ and hands them to a store; bytes that are no Event change nothing."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, time
from types import TracebackType

import zmq

from collector.store import Store
from edge.errors import ConfigError, WireError
from edge.events import MAX_CROP, Event, Header, Person, decode

BATCH_EVENTS = 256  # per transaction
BATCH_SECONDS = 0.2  # the longest a received event waits for others before it is committed
DRAIN_QUIET = 0.3  # seconds without a message: what had been sent has arrived
DRAIN_SECONDS = 5.0  # boxes that never fall silent do not hold up the end
RATE_SECONDS = 10.0  # events per second are averaged over this
MAX_CAMERAS = 1000  # of which the view knows something; names come from the wire and could be endless

# control characters, line and paragraph separators, and what reverses the direction of writing
_HARMFUL = dict.fromkeys([*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], "?")

log = logging.getLogger(__name__)


@dataclass
class Camera:
    """What came from one camera since the server started. Times are `time.monotonic`, seconds."""

    first_seen: float
    last_seen: float = 0.0
    events: int = 0
    people: int = 0
    last: Header | None = None  # of the newest event
    newest: tuple[Person, ...] = ()  # of the newest event with anybody in it
    _arrivals: deque[float] = field(default_factory=deque)  # within the last RATE_SECONDS

    def note(self, header: Header, now: float) -> None:
        """Count one new event."""
        self.events += 1
        self.people += len(header.people)
        self.last, self.last_seen = header, now
        self.newest = header.people or self.newest
        self._arrivals.append(now)
        self.rate(now)  # forgets the old ones

    def rate(self, now: float) -> float:
        """Events per second, lately."""
        while self._arrivals and self._arrivals[0] < now - RATE_SECONDS:
            self._arrivals.popleft()
        return len(self._arrivals) / min(max(now - self.first_seen, 1.0), RATE_SECONDS)


@dataclass
class Stats:
    """What the server did since it started. Read it between two steps of `run`.

    `cameras` by (device, camera), the one heard longest ago first; at most MAX_CAMERAS, those heard last.
    """

    events: int = 0
    people: int = 0
    duplicates: int = 0
    refused: int = 0
    cameras: dict[tuple[str, str], Camera] = field(default_factory=dict)


class Server:
    """A ZeroMQ PULL socket bound to `address`; a context manager.

    What arrives as a message and is no Event is counted as refused and logged. ZeroMQ itself drops other connections,
    which are neither counted nor logged here: of a peer that fails the handshake of its protocol (ZMTP), and of one
    that sends a single frame longer than any an event may have. (Bytes of other protocols can pass for its version 1,
    which had no handshake, and then are messages.) Raises ConfigError for an address that cannot be bound.
    """

    def __init__(self, address: str) -> None:
        self.stats = Stats()
        self._stopping = False
        self._log_again = 0.0  # monotonic
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_CROP  # of one frame, the longest kind
        self._socket.rcvhwm = BATCH_EVENTS  # messages per sender; the rest waits at the sender
        self._socket.ipv6 = "[" in address
        try:
            _check_port(address)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            wanted = "a free address of this machine, like tcp://127.0.0.1:5577"
            raise ConfigError(f"cannot listen on '{address}'", expected=wanted, got=_reason(error)) from error

    @property
    def address(self) -> str:
        """Where it listens, the port included when the system chose it (`tcp://127.0.0.1:*`)."""
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def run(self, store: Store, tick: Callable[[], None] = lambda: None) -> None:
        """Receive and store until `stop`, then what has already been sent. Calls `tick` several times a second.

        Raises StoreError when the store fails; what was committed before stays.
        """
        while not self._stopping:
            self._keep(self._receive(), store)
            tick()
        deadline = monotonic() + DRAIN_SECONDS
        while monotonic() < deadline and self._socket.poll(int(DRAIN_QUIET * 1000)):
            self._keep(self._receive(), store)
        tick()

    def stop(self) -> None:
        """Make `run` return soon; for a signal handler or another thread."""
        self._stopping = True

    def _receive(self) -> list[Event]:
        """The events that arrive within BATCH_SECONDS, at most BATCH_EVENTS."""
        events: list[Event] = []
        until = monotonic() + BATCH_SECONDS
        while len(events) < BATCH_EVENTS and (left := until - monotonic()) > 0:
            if not self._socket.poll(max(1, int(left * 1000))):
                break
            frames = self._socket.recv_multipart(copy=False)
            try:
                events.append(decode([frame.bytes for frame in frames]))
            except WireError as error:
                self._refuse(error, _sender(frames[0]))
        return events

    def _keep(self, events: list[Event], store: Store) -> None:
        """Commit `events` and count them."""
        if not events:
            return
        new = store.add(events, received_at=time())
        self.stats.duplicates += len(events) - len(new)
        now = monotonic()
        for event in new:
            header = event.header
            self.stats.events += 1
            self.stats.people += len(header.people)
            name = (header.device, header.camera)
            camera = self.stats.cameras.pop(name, None) or Camera(now)
            camera.note(header, now)
            self.stats.cameras[name] = camera  # as the last: a dict keeps its order
            if len(self.stats.cameras) > MAX_CAMERAS:
                del self.stats.cameras[next(iter(self.stats.cameras))]

    def _refuse(self, error: WireError, sender: str) -> None:
        self.stats.refused += 1
        if monotonic() >= self._log_again:  # a flood of garbage is not to become a flood of lines
            self._log_again = monotonic() + 1
            log.warning("refused bytes from %s: %s (%d so far)", sender, harmless(str(error))[:200], self.stats.refused)

    def close(self) -> None:
        """Free the address."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def harmless(text: str) -> str:
    """`text` from the wire without what moves a terminal's cursor or a spreadsheet's: one "?" for each."""
    return text.translate(_HARMFUL)


def _sender(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # not every transport tells
        return "unknown"


def _reason(error: zmq.ZMQError) -> str:
    """The system's words without the address that pyzmq appends."""
    return zmq.strerror(error.errno) if error.errno else str(error)


def _check_port(address: str) -> None:
    """ZeroMQ takes ports modulo 65536 and would listen where nobody looks. Raises ZMQError."""
    port = address.rpartition(":")[2]
    if address.startswith("tcp:") and port.isdecimal() and int(port) > 65535:
        raise zmq.ZMQError(zmq.EINVAL)
