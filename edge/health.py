"""How a program is, told over HTTP: /livez and /readyz for whoever restarts it, /status for people, /metrics."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from edge.errors import ConfigError

MOST = 32  # connections at once; one more ends the one that has been open longest
SILENCE = 5.0  # s that a client may say, or take, nothing
POLL = 0.1  # s; how late the end is noticed
LEAVE = 1.0  # s at the end for the answers at hand
TEXT = "text/plain; charset=utf-8"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Yes or no, and what there is to say of it, a line each."""

    good: bool
    lines: Sequence[str] = ()


class Subject(Protocol):
    """Whoever tells how it is. All of it is asked by threads of the server's, several at once."""

    @property
    def registry(self) -> CollectorRegistry:
        """What it measures."""
        ...

    def live(self) -> Verdict:
        """Whether it makes progress; if not, a restart may help."""
        ...

    def ready(self) -> Verdict:
        """Whether it can do its job now; good, it still says what is not as it should be."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Everything there is to tell, of what JSON holds."""
        ...


class Health:
    """An HTTP server that tells of `subject`, by threads of its own; a context manager.

    address: host:port, [host]:port for IPv6, port 0 for any free one; "" is nowhere. key: where the operator wrote
    that. Raises ConfigError for an address that cannot be listened on.
    """

    def __init__(self, address: str, subject: Subject, key: str = "health.address") -> None:
        self._server: _Server | None = None
        if not address:
            return
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and int(port) < 65536):
            raise ConfigError(f"{key}: no address", expected="host:port, like 127.0.0.1:9477", got=repr(address))
        try:
            self._server = _Server(host.strip("[]"), int(port), subject)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that can be no name
            reason = getattr(error, "strerror", None) or "no such host"
            remedy = "name a free address of this machine, or '' for none"
            raise ConfigError(f"{key}: cannot listen on {address}: {reason}", remedy=remedy) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL,), name="health", daemon=True)
        self._thread.start()
        log.info("health at http://%s", self.address)

    @property
    def address(self) -> str:
        """Where it listens, as host:port, the port included where the system chose it; "" is nowhere."""
        if self._server is None:
            return ""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Free the address, once what is being answered has left, within LEAVE. A second time it does nothing."""
        if self._server is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def __enter__(self) -> Health:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    """A thread per connection, so that none waits for a slow one; at most MOST, so that slow ones do not gather."""

    daemon_threads = True
    request_queue_size = 4 * MOST  # that come at once; of more, some come again a second later

    def __init__(self, host: str, port: int, subject: Subject) -> None:
        self.subject = subject
        self._open: dict[socket.socket, None] = {}  # the oldest first
        self._changed = threading.Condition()
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__((str(place[0]), port), _Handler)

    def server_bind(self) -> None:
        """Without http.server's question to the DNS for this machine's name: that can take a minute to fail."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if len(self._open) >= MOST:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _end(oldest)
            self._open[request] = None
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._changed:
            self._open.pop(request, None)
            super().close_request(request)
            self._changed.notify_all()

    def hang_up(self) -> None:
        """Nobody is answered any more."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._open, LEAVE):
                for one in self._open:
                    _end(one)
                self._changed.wait_for(lambda: not self._open, LEAVE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was too slow, is nothing to speak of; what else there is has been logged."""


def _end(connection: socket.socket) -> None:
    """Whoever reads or writes it stops."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class _Page:
    status: int
    kind: str
    body: bytes


class _Handler(BaseHTTPRequestHandler):
    """One request, then the connection ends (HTTP/1.0): a client that stays would hold a place."""

    server: _Server
    timeout = SILENCE
    server_version, sys_version = "lookout", ""
    error_content_type, error_message_format = TEXT, "%(message)s\n"

    def do_GET(self) -> None:
        pages: dict[str, Callable[[], _Page]] = {
            "/livez": lambda: _verdict(self.server.subject.live()),
            "/readyz": lambda: _verdict(self.server.subject.ready()),
            "/status": lambda: _status(self.server.subject.status()),
            "/metrics": lambda: _metrics(self.server.subject.registry, self.headers.get("Accept", "")),
        }
        page = _page(pages.get(self.path.partition("?")[0], lambda: _Page(404, TEXT, f"{' '.join(pages)}\n".encode())))
        self.send_response(page.status)
        self.send_header("Content-Type", page.kind)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """A request each few seconds is nothing for the log."""


def _page(made: Callable[[], _Page]) -> _Page:
    try:
        return made()
    except Exception:  # a fault of ours, that whoever asks should hear of, too
        log.exception("cannot tell how it is")
        return _Page(500, TEXT, b"it cannot be told; the log says why\n")


def _verdict(verdict: Verdict) -> _Page:
    lines = ["ok" if verdict.good else "not ok", *(" ".join(line.split()) for line in verdict.lines)]
    return _Page(200 if verdict.good else 503, TEXT, ("\n".join(lines) + "\n").encode("utf-8", "replace"))


def _status(status: Mapping[str, Any]) -> _Page:
    text = json.dumps(status, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    return _Page(200, "application/json", text.encode("utf-8", "replace"))


def _metrics(registry: CollectorRegistry, accept: str) -> _Page:
    encode, kind = choose_encoder(accept)
    return _Page(200, kind, encode(registry))
