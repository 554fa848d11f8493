"""Events to programs with a plain ZeroMQ PULL socket: no acknowledgement, a queue that never makes the loop wait."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import zmq

from edge.config import PublishConfig
from edge.errors import ConfigError
from edge.events import MAX_NOTICE, MAX_NOTICES, Event, Stamp, encode

log = logging.getLogger(__name__)


class Pusher:
    """Queues events for whoever pulls; what the full queue cannot take is dropped and counted.

    queued: events handed to ZeroMQ, which alone knows how many of them left. dropped: events the full queue refused.
    Raises ConfigError on an address that ZeroMQ cannot use.
    """

    def __init__(self, config: PublishConfig) -> None:
        self.queued = self.dropped = 0
        self._epoch, self._seq = secrets.randbits(62), 0
        self._address, self._linger = config.address, config.linger_ms
        self._full = False
        self._notices: deque[str] = deque(maxlen=MAX_NOTICES)
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set_hwm(config.queue)
        self._socket.ipv6 = "[" in config.address
        try:
            self._socket.connect(config.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"publish.address: {config.address}: {error}") from error

    def send(self, build: Callable[[Stamp], Event]) -> None:
        """Queue the event that `build` makes of its number, or drop it at once when the queue is full."""
        with self._lock:
            event = build(Stamp(self._epoch, self._seq, tuple(self._notices)))
            self._seq += 1
            try:
                self._socket.send_multipart(encode(event), zmq.NOBLOCK)
                self.queued += 1
                self._full = False
                self._notices.clear()
            except zmq.Again:
                self.dropped += 1
                if not self._full:  # said once each time it fills up
                    log.warning("%s: the queue is full: events are dropped until somebody takes some", self._address)
                self._full = True

    def say(self, text: str) -> None:
        """Have the next event that is queued carry this notice; from any thread."""
        with self._lock:
            self._notices.append(text[:MAX_NOTICE])

    def close(self) -> None:
        """Wait at most `linger_ms` for the queue to empty, then let go; what is left in it then is lost."""
        start = time.monotonic()
        self._socket.close(linger=self._linger)
        self._context.term()
        if self._linger and time.monotonic() - start >= 0.95 * self._linger / 1000:  # it gave up
            log.warning(
                "%s: not every event was taken within linger_ms = %d; the rest is lost", self._address, self._linger
            )

    def summary(self) -> list[str]:
        """What became of the events, for the end of a run."""
        return [f"{self.queued} events queued, {self.dropped} dropped as the queue was full"]

    def __enter__(self) -> Pusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
