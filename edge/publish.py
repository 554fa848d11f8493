"""Events out of the box: into the spool, then to the collector by a thread that the camera loop never waits for."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import zmq
from zmq.utils.monitor import recv_monitor_message

from edge.config import PublishConfig
from edge.errors import ConfigError
from edge.events import Event, Stamp
from edge.failpoints import failpoint
from edge.link import Delivery, Link, Source
from edge.protocol import MAX_CONTROL, Hello, encode
from edge.spool import Spool, SpoolHealth

ENDS = {  # of a connection, as libzmq tells them, in words
    zmq.Event.CLOSED: "nobody listens there",
    zmq.Event.DISCONNECTED: "the connection broke",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: keys that do not match, or no collector",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: it is encrypted on one side only, or with other keys",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the collector does not know this box's key",
}
POLL = 1.0  # s; how late the end of `Sender.run` may be noticed

Socket = zmq.Socket[bytes]
Secure = Callable[[Socket], None]  # sets the keys of a socket before it connects

log = logging.getLogger(__name__)


class Sender:
    """Runs a Link over real sockets: one socket, one connection, one try at a time; a context manager.

    address: as in PublishConfig. Raises ConfigError for one that ZeroMQ cannot use. To be used by one thread, but for
    `wake`.
    """

    def __init__(self, address: str, device: str, source: Source, secure: Secure | None) -> None:
        self.link = Link(device, source, time.monotonic())
        self._address, self._secure = address, secure
        self._context = zmq.Context()
        self._bell, self._woken = socket.socketpair()
        self._bell.setblocking(False)
        self._woken.setblocking(False)
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        try:
            self._connect()  # at once, so that an address which cannot be is an error at the start
        except ConfigError:
            self.close()
            raise

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0  # what is not acknowledged is sent again
        self._socket.reconnect_ivl = -1  # a lost connection is a lost session
        self._socket.sndhwm = 0  # the window is the bound
        self._socket.maxmsgsize = MAX_CONTROL  # a collector has no more to say
        self._socket.ipv6 = "[" in self._address
        self._monitor = self._socket.get_monitor_socket(sum(ENDS))
        try:
            if self._secure:
                self._secure(self._socket)
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            raise ConfigError(f"publish.address: {self._address}: {error}") from error
        self.link.connected(time.monotonic())

    def _disconnect(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)
        self._socket = self._monitor = None

    def run(self, done: Callable[[], bool]) -> None:
        """Deliver until `done`, which is asked again after each message, and at least once a second."""
        while not done():
            now = time.monotonic()
            if self._socket is None and now >= self.link.retry_at:
                self._connect()
            if self._socket is not None:
                self._say(self._socket, now)
            if not self.link.up:
                self._disconnect()
            self._listen(min(self.link.wake(now), POLL))

    def _say(self, socket: Socket, now: float) -> None:
        for message in self.link.say(now):
            failpoint("box.before-send")
            try:
                socket.send_multipart(encode(message), zmq.NOBLOCK, copy=False)
            except zmq.Again:  # there is no bound to run into: the connection is gone, before its monitor says so
                self._ended(zmq.Event.DISCONNECTED)
                return
            failpoint("box.after-hello" if isinstance(message, Hello) else "box.after-send")

    def _listen(self, seconds: float) -> None:
        poller = zmq.Poller()
        for one in (self._woken, self._socket, self._monitor):
            if one is not None:
                poller.register(one, zmq.POLLIN)
        ready = dict(poller.poll(int(1000 * seconds) + 1))
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        if self._socket is not None and self._socket in ready:
            self._hear(self._socket)
        if self._monitor is not None and self._monitor in ready and self.link.up:
            self._ended(zmq.Event(recv_monitor_message(self._monitor)["event"]))

    def _hear(self, socket: Socket) -> None:
        while self.link.up and socket.poll(0):
            greeting = not self.link.delivery.connected
            self.link.heard(socket.recv_multipart(), time.monotonic())
            if greeting and self.link.delivery.connected:
                failpoint("box.after-welcome")

    def _ended(self, event: zmq.Event) -> None:
        if event is not zmq.Event.CLOSED and event is not zmq.Event.DISCONNECTED:
            self.link.delivery.handshakes_refused += 1
        self.link.lost(f"{self._address}: {ENDS[event]}", time.monotonic())

    def wake(self) -> None:
        """Make `run` look for new events; from any thread."""
        with suppress(BlockingIOError):  # it has been rung often enough
            self._bell.send(b"\0")

    def close(self) -> None:
        """Hang up."""
        self._disconnect()
        self._context.destroy(linger=0)
        self._bell.close()
        self._woken.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Publisher:
    """Delivers events by way of `spool`, which outlives it; a context manager.

    Raises ConfigError on an address that ZeroMQ cannot use. `send` raises what ended the sending thread, if anything
    did: that is a fault of Lookout, and the events stay in the spool.
    """

    def __init__(self, config: PublishConfig, device: str, spool: Spool, secure: Secure | None = None) -> None:
        self._linger, self._spool = config.linger_ms / 1000, spool
        self._sender = Sender(config.address, device, spool, secure)
        self._closing = threading.Event()
        self._give_up_at = 0.0  # monotonic, once closing
        self._fault: BaseException | None = None
        self._looking = threading.Lock()
        self._left: SpoolHealth | None = None  # how the spool was when this closed
        self._thread = threading.Thread(target=self._deliver, name="publish", daemon=True)
        self._thread.start()

    @property
    def delivery(self) -> Delivery:
        """What became of the events so far."""
        return self._sender.link.delivery

    @property
    def health(self) -> SpoolHealth:
        """How the spool is, or was when this was closed; for any thread."""
        with self._looking:
            return self._left or self._spool.health

    def send(self, build: Callable[[Stamp], Event]) -> None:
        """Keep the event that `build` makes of its number, and have it delivered."""
        if self._fault is not None:
            raise self._fault
        failpoint("box.publish")
        self._spool.append(build)
        self._sender.wake()

    def say(self, text: str) -> None:
        """Have the next event carry this notice; from any thread."""
        self._spool.say(text)

    def _deliver(self) -> None:
        try:
            self._sender.run(self._done)
        except BaseException as fault:
            log.exception("the sending thread failed")
            self._fault = fault

    def _done(self) -> bool:
        return self._closing.is_set() and (not self._spool.waiting() or time.monotonic() >= self._give_up_at)

    def close(self) -> None:
        """Wait at most `linger_ms` for what is still to be acknowledged; what is not stays in the spool."""
        if not self._closing.is_set():
            self._give_up_at = time.monotonic() + self._linger
            self._closing.set()
            self._sender.wake()
        self._thread.join()
        self._sender.close()
        with self._looking:
            self._left = self._spool.health

    def summary(self) -> list[str]:
        """What became of the events, for the end of a run; after `close`."""
        done, spool = self.delivery, self.health
        lines = [f"{done.delivered} events delivered, {spool.waiting} wait in the spool for the next run"]
        if spool.in_memory:
            lines.append(f"the spool is in memory, as the disk refuses: {spool.trouble}")
        if done.gone or done.refused:
            lines.append(
                f"{done.gone} were gone before they could be sent, {done.refused} were refused by the collector"
            )
        if done.failures:
            lines.append(
                f"{done.connections} connections to the collector, and {done.failures} times none or not any more"
                f" ({done.handshakes_refused} in the handshake)"
            )
        return lines

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
