"""Receives what boxes say over ZeroMQ, has a sink keep it, and acknowledges what is kept."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, time
from types import TracebackType

import zmq
from zmq.utils.monitor import recv_monitor_message

from collector.keyring import Keyring, Zap, secure_server
from collector.sessions import ANYONE, Sessions
from collector.sinks import Item, Kept, Outcome, Sink
from edge.errors import ConfigError, WireError
from edge.events import MAX_CROP, Event, Header, Person
from edge.failpoints import failpoint
from edge.protocol import HEARTBEAT, SILENCE, FromCollector, Gone, Welcome, encode

BATCH_EVENTS = 256  # per commit
GATHER_SECONDS = 0.05  # the longest a message waits for others that are there already
TICK_SECONDS = 0.25  # between two looks at a quiet wire
LEAVE_SECONDS = 1.0  # for the last acknowledgements to leave
PIPE = 64  # messages of one box that wait in this process; the rest waits in the box's window
RATE_SECONDS = 10.0  # events per second are averaged over this
MAX_CAMERAS = 1000  # of which the view knows something; names come from the wire and could be endless
FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH

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

    refused: messages that are none, and events set aside. gone: events that boxes had to drop, as they told.
    handshakes_refused: connections that encryption, or another protocol, did not let in. boxes: connected now.
    `cameras` by (device, camera), the one heard longest ago first; at most MAX_CAMERAS, those heard last.
    """

    events: int = 0
    people: int = 0
    duplicates: int = 0
    refused: int = 0
    gone: int = 0
    handshakes_refused: int = 0
    boxes: int = 0
    cameras: dict[tuple[str, str], Camera] = field(default_factory=dict)


class Server:
    """A ZeroMQ ROUTER socket bound to `address`, which speaks lookout/1; a context manager.

    keyring: who may connect, encrypted, and as which device; None: everybody, in the clear, as any. ZeroMQ itself drops
    a peer that sends one frame longer than any an event may have. Raises ConfigError for an address that cannot be
    bound.
    """

    def __init__(self, address: str, keyring: Keyring | None = None) -> None:
        self.stats = Stats()
        self._stopping = False
        self._log_again = 0.0  # monotonic
        self._keyring = keyring
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = MAX_CROP  # of one frame, the longest kind
        self._socket.rcvhwm = self._socket.sndhwm = PIPE  # what a box does not read is dropped, and said again
        self._socket.heartbeat_ivl = int(1000 * HEARTBEAT)  # a dead connection is given back to the system
        self._socket.heartbeat_timeout = int(1000 * SILENCE)
        self._socket.ipv6 = "[" in address
        self._zap = None if keyring is None else Zap(self._context, keyring)
        if keyring is not None:
            secure_server(self._socket, keyring)
        self._monitor = self._socket.get_monitor_socket(FAILED)
        try:
            _check_port(address)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            wanted = "a free address of this machine, like tcp://127.0.0.1:5577"
            raise ConfigError(f"cannot listen on '{address}'", expected=wanted, got=_reason(error)) from error
        self._poller = zmq.Poller()
        for socket in (self._socket, self._monitor, *([self._zap.socket] if self._zap else [])):
            self._poller.register(socket, zmq.POLLIN)

    @property
    def address(self) -> str:
        """Where it listens, the port included when the system chose it (`tcp://127.0.0.1:*`)."""
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def run(self, sink: Sink, tick: Callable[[], None] = lambda: None) -> None:
        """Receive and have kept until `stop`, then what has already arrived. Calls `tick` several times a second.

        Raises StoreError when the sink fails: what was not kept is not acknowledged, and the boxes keep it.
        """
        sessions = Sessions(sink.resume)
        while not self._stopping:
            ready = dict(self._poller.poll(int(1000 * TICK_SECONDS)))
            self._look_after(ready)
            if self._socket in ready:
                self._gather(sessions)
                self._keep(sessions, sink)
            sessions.expire(monotonic())
            self.stats.boxes = len(sessions)
            tick()
        self._gather(sessions)
        self._keep(sessions, sink)
        tick()

    def stop(self) -> None:
        """Make `run` return soon; for a signal handler or another thread."""
        self._stopping = True

    def _look_after(self, ready: dict[zmq.Socket[bytes], int]) -> None:
        """Handshakes, and those that failed."""
        if self._keyring is not None:
            self._keyring.refresh()
        if self._zap is not None and self._zap.socket in ready:
            self._zap.handle()
        if self._monitor in ready:
            event = zmq.Event(recv_monitor_message(self._monitor)["event"])
            self.stats.handshakes_refused += 1
            self._warn(f"a connection was not let in: {event.name} ({self.stats.handshakes_refused} so far)")

    def _gather(self, sessions: Sessions) -> None:
        """Take what has arrived: at most BATCH_EVENTS, and for GATHER_SECONDS."""
        until = monotonic() + GATHER_SECONDS
        while sessions.gathered < BATCH_EVENTS and monotonic() < until:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                replies = sessions.heard(peer.bytes, self._writes(peer), [one.bytes for one in frames], monotonic())
            except WireError as error:
                self.stats.refused += 1
                sender, said = _property(peer, "Peer-Address"), harmless(str(error))[:200]
                self._warn(f"refused bytes from {sender or 'unknown'}: {said} ({self.stats.refused} so far)")
                continue
            for reply in replies:
                self._say(peer.bytes, reply)

    def _writes(self, peer: zmq.Frame) -> str | None:
        """The device that the sender of this frame may write as now."""
        return ANYONE if self._keyring is None else self._keyring.device_of(_property(peer, "User-Id"))

    def _say(self, peer: bytes, message: FromCollector) -> None:
        self._socket.send_multipart([peer, *encode(message)])  # never waits: a ROUTER drops what a peer does not take
        if isinstance(message, Welcome):
            failpoint("collector.after-hello")

    def _keep(self, sessions: Sessions, sink: Sink) -> None:
        """Have the sink keep what was gathered, then acknowledge it."""
        items = sessions.take()
        outcomes = sink.add(items, received_at=time()) if items else []
        if items:
            failpoint("collector.after-commit")
        for peer, reply in sessions.settle(outcomes):
            self._say(peer, reply)
        if items:
            failpoint("collector.after-ack")
        self.stats.duplicates += sessions.duplicates
        sessions.duplicates = 0
        self._count(items, outcomes)

    def _count(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
        now = monotonic()
        for item, outcome in zip(items, outcomes, strict=True):
            if outcome.kept is Kept.DUPLICATE:
                self.stats.duplicates += 1
            elif outcome.kept is Kept.REFUSED:
                self.stats.refused += 1
                said = harmless(f"event {item.first} of {item.device}: {outcome.reason}")[:300]
                self._warn(f"set aside: {said} ({self.stats.refused} so far)")
            elif isinstance(item.payload, Gone):
                self.stats.gone += item.payload.count
            elif isinstance(item.payload, Event):
                self._show(item.payload.header, now)

    def _show(self, header: Header, now: float) -> None:
        self.stats.events += 1
        self.stats.people += len(header.people)
        name = (header.device, header.camera)
        camera = self.stats.cameras.pop(name, None) or Camera(now)
        camera.note(header, now)
        self.stats.cameras[name] = camera  # as the last: a dict keeps its order
        if len(self.stats.cameras) > MAX_CAMERAS:
            del self.stats.cameras[next(iter(self.stats.cameras))]

    def _warn(self, line: str) -> None:
        if monotonic() >= self._log_again:  # a flood of garbage is not to become a flood of lines
            self._log_again = monotonic() + 1
            log.warning("%s", line)

    def close(self) -> None:
        """Free the address, when the last words have left."""
        if self._zap is not None:
            self._zap.close()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(int(1000 * LEAVE_SECONDS))
        self._context.term()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def harmless(text: str) -> str:
    """`text` from the wire without what moves a terminal's cursor or a spreadsheet's: one "?" for each."""
    return text.translate(_HARMFUL)


def _property(frame: zmq.Frame, name: str) -> str:
    """What ZeroMQ knows of the sender of a frame, or nothing: not every transport tells."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def _reason(error: zmq.ZMQError) -> str:
    """The system's words without the address that pyzmq appends."""
    return zmq.strerror(error.errno) if error.errno else str(error)


def _check_port(address: str) -> None:
    """ZeroMQ takes ports modulo 65536 and would listen where nobody looks. Raises ZMQError."""
    port = address.rpartition(":")[2]
    if address.startswith("tcp:") and port.isdecimal() and int(port) > 65535:
        raise zmq.ZMQError(zmq.EINVAL)
