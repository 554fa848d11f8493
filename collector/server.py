"""Receives what boxes say over ZeroMQ, has a sink keep it, and acknowledges what is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic, time
from types import TracebackType

import zmq
from zmq.utils.monitor import recv_monitor_message

from collector.keyring import Keyring, Zap, secure_server
from collector.sessions import ANYONE, MOST_EVENTS, Sessions
from collector.sinks import Kept, Outcome, Sink
from collector.stats import Stats, harmless
from edge.errors import ConfigError, WireError
from edge.events import MAX_CROP
from edge.failpoints import failpoint
from edge.keys import needs_encryption
from edge.protocol import HEARTBEAT, SILENCE, Denied, FromCollector, Welcome, encode

BATCH_EVENTS = 256  # per commit
BATCH_BYTES = 16 << 20  # the same
GATHER_SECONDS = 0.05  # the longest a message waits for others that are there already
TICK_SECONDS = 0.25  # between two looks at a quiet wire
LEAVE_SECONDS = 1.0  # for what has arrived at the end, and as much for the last acknowledgements to leave
MAX_FRAMES = 100_000  # of one message that are looked at: no header has room to announce as many crops
PIPE = 64  # messages of one box that wait in this process; the rest waits in the network and the box
ANSWERS = 2 * MOST_EVENTS  # that a box has not read; more are dropped. A window of REFUSED and their ACK fit
HANDSHAKES = 64  # that are looked at between two batches
MONITORED = 100_000  # failed handshakes that wait to be counted; with more, libzmq's own thread would stand still
LOG_SECONDS = 1.0  # between two lines about the same kind of trouble
FAILURES = {  # of handshakes, as libzmq tells them, in words
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "it hung up before it had said who it is",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "it is encrypted on one side only, or with keys that do not match",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "its key is not allowed",
}

log = logging.getLogger(__name__)


class Server:
    """A ZeroMQ ROUTER socket bound to `address`, tcp or ipc, which speaks lookout/1; a context manager.

    keyring: who may connect, encrypted, and as which device; None: everybody, in the clear, as any device. insecure:
    that is meant so, even where other machines can connect. ZeroMQ itself drops a peer that sends one frame longer than
    any an event may have. Raises ConfigError for an address that cannot be bound, or not without keys.
    """

    def __init__(self, address: str, keyring: Keyring | None = None, *, insecure: bool = False) -> None:
        self.stats = Stats()
        self._stopping = False
        self._log_again: dict[str, float] = {}  # kind of trouble -> monotonic
        self._keyring = keyring
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = MAX_CROP  # of one frame, the longest kind
        self._socket.rcvhwm, self._socket.sndhwm = PIPE, ANSWERS
        self._socket.heartbeat_ivl = int(1000 * HEARTBEAT)  # a dead connection is given back to the system
        self._socket.heartbeat_timeout = int(1000 * SILENCE)
        self._socket.ipv6 = "[" in address
        self._zap = None if keyring is None else Zap(self._context, keyring)
        if keyring is not None:
            secure_server(self._socket, keyring)
        self._monitor = self._monitored()
        try:
            _check_address(address)
            if keyring is None and not insecure and needs_encryption(address):
                raise ConfigError(
                    f"cannot listen on '{address}' without keys, as other machines can reach it",
                    remedy="make keys with `collector keys new` and name their folder with --keys, or say --insecure",
                )
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            wanted = "a free address of this machine, like tcp://127.0.0.1:5577"
            raise ConfigError(f"cannot listen on '{address}'", expected=wanted, got=_reason(error)) from error
        except ConfigError:
            self.close()
            raise
        self._poller = zmq.Poller()
        for socket in (self._socket, self._monitor, *([self._zap.socket] if self._zap else [])):
            self._poller.register(socket, zmq.POLLIN)

    def _monitored(self) -> zmq.Socket[bytes]:
        """Where the socket tells of failed handshakes."""
        self._socket.monitor("inproc://monitor", sum(FAILURES))
        monitor = self._context.socket(zmq.PAIR)
        monitor.rcvhwm = MONITORED
        monitor.connect("inproc://monitor")
        return monitor

    @property
    def address(self) -> str:
        """Where it listens, the port included when the system chose it (`tcp://127.0.0.1:*`)."""
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def run(self, sink: Sink, tick: Callable[[], None] = lambda: None) -> None:
        """Receive and have kept until `stop`, then what has already arrived. Calls `tick` several times a second.

        Raises StoreError when the sink fails: what was not kept is not acknowledged, and the boxes keep it.
        """
        sessions = Sessions(sink.resume)
        count_again = 0.0  # monotonic
        while not self._stopping:
            ready = dict(self._poller.poll(int(1000 * TICK_SECONDS)))
            self._look_after()
            if self._socket in ready:
                self._gather(sessions)
                self._keep(sessions, sink)
            if monotonic() >= count_again:  # of thousands of boxes: not after every message
                count_again = monotonic() + TICK_SECONDS
                self._count(sessions)
            tick()
        until = monotonic() + LEAVE_SECONDS
        while self._gather(sessions) and monotonic() < until:
            self._keep(sessions, sink)
        self._keep(sessions, sink)
        self._count(sessions)
        tick()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def stop(self) -> None:
        """Make `run` return soon; for a signal handler or another thread."""
        self._stopping = True

    def _count(self, sessions: Sessions) -> None:
        """Those that are there, once the silent are forgotten."""
        now = monotonic()
        sessions.expire(now)
        self.stats.boxes, self.stats.resets = sessions.boxes(now), sessions.resets

    def _look_after(self) -> None:
        """Handshakes, and those that failed."""
        if self._keyring is not None:
            self._keyring.refresh()
        for _ in range(HANDSHAKES):
            if self._zap is None or not self._zap.socket.poll(0):
                break
            self._zap.handle()
        while self._monitor.poll(0):
            event = zmq.Event(recv_monitor_message(self._monitor)["event"])
            self.stats.handshakes_refused += 1
            if event is not zmq.Event.HANDSHAKE_FAILED_AUTH:  # of which Zap tells more
                so_far = self.stats.handshakes_refused
                self._warn("handshake", f"a connection was not let in: {FAILURES[event]} ({so_far} so far)")

    def _gather(self, sessions: Sessions) -> bool:
        """Take what has arrived: at most BATCH_EVENTS or BATCH_BYTES, and for GATHER_SECONDS. False: that was all."""
        until, size = monotonic() + GATHER_SECONDS, 0
        while sessions.gathered < BATCH_EVENTS and size < BATCH_BYTES and (now := monotonic()) < until:
            try:
                peer, *frames = self._receive()
            except zmq.Again:
                return False
            size += sum(map(len, frames))
            try:
                replies = sessions.heard(peer.bytes, self._writes(peer), [one.bytes for one in frames], now)
            except WireError as error:
                self._refuse(peer, str(error))
                replies = sessions.misunderstood(peer.bytes, error, now)
            for reply in replies:
                if isinstance(reply, Denied):
                    self._refuse(peer, reply.reason)
                self._say(peer.bytes, reply)
        return True

    def _receive(self) -> list[zmq.Frame]:
        """The next message, its sender first. Raises zmq.Again where there is none.

        Without the frames after MAX_FRAMES: whatever it was, it is refused, and does not fill the memory.
        """
        frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
        frame = frames[0]
        while frame.more:  # as pyzmq's recv_multipart, in half of its time
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
        return frames

    def _refuse(self, peer: zmq.Frame, reason: str) -> None:
        """A message that is none, or may not be."""
        self.stats.refused += 1
        sender = _property(peer, "Peer-Address") or "unknown"
        self._warn("bytes", f"refused bytes from {sender}: {harmless(reason)[:200]} ({self.stats.refused} so far)")

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
        outcomes: list[Outcome] = []
        if items:
            failpoint("collector.before-keep")
            outcomes = sink.add(items, received_at=time())
            failpoint("collector.after-commit")
        for peer, reply in sessions.settle(outcomes):
            self._say(peer, reply)
        if items:
            failpoint("collector.after-ack")
        self.stats.duplicates += sessions.duplicates
        sessions.duplicates = 0
        for item, outcome in zip(items, outcomes, strict=True):
            self.stats.count(item, outcome, monotonic())
            if outcome.kept is Kept.REFUSED:
                said = harmless(f"event {item.last} of {item.device}: {outcome.reason}")[:300]
                self._warn("event", f"set aside: {said} ({self.stats.refused} so far)")

    def _warn(self, kind: str, line: str) -> None:
        if monotonic() >= self._log_again.get(kind, 0.0):  # a flood of garbage is not to become a flood of lines
            self._log_again[kind] = monotonic() + LOG_SECONDS
            log.warning("%s", line)

    def close(self) -> None:
        """Free the address, when the last words have left. A second time it does nothing."""
        if self._context.closed:
            return
        if self._zap is not None:
            self._zap.close()
        while self._monitor.poll(0):  # a thread of libzmq that has to wait for room there would never let go
            self._monitor.recv_multipart()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(int(1000 * LEAVE_SECONDS))
        self._context.term()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _property(frame: zmq.Frame, name: str) -> str:
    """What ZeroMQ knows of the sender of a frame, or nothing: not every transport tells."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def _reason(error: zmq.ZMQError) -> str:
    """The system's words without the address that pyzmq appends."""
    return zmq.strerror(error.errno) if error.errno else str(error)


def _check_address(address: str) -> None:
    """Raises ZMQError for what ZeroMQ would take and listen where nobody looks."""
    if not address.startswith(("tcp://", "ipc://")):
        raise zmq.ZMQError(zmq.EPROTONOSUPPORT if "://" in address else zmq.EINVAL)
    if any("\ud800" <= letter <= "\udfff" for letter in address):  # bytes of a command line that are no text
        raise zmq.ZMQError(zmq.EINVAL)
    port = address.rpartition(":")[2]  # modulo 65536
    if address.startswith("tcp://") and not (port == "*" or (port.isdecimal() and int(port) <= 65535)):
        raise zmq.ZMQError(zmq.EINVAL)
