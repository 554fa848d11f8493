"""Whether a camera answers at all: asked before a library is, which could not say why it does not."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from edge.address import parted
from edge.errors import CaptureError

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


def knock(url: str, timeout: float) -> None:
    """Call its address, and of an rtsp:// one wait for the first byte of an answer. Raises CaptureError.

    timeout: seconds for each of both, of a name with several addresses shared out among them. It is looked up before,
    for as long as the system wants.
    """
    try:
        parts = urlsplit(parted(url).url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        with connected(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout) as connection:
            connection.settimeout(timeout)
            if parts.scheme == "rtsp":
                name = f"[{host}]" if ":" in host else host
                connection.sendall(f"OPTIONS rtsp://{name}:{port} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
                connection.recv(1)
    except TimeoutError:
        raise CaptureError(f"cannot be opened: no answer in {timeout:g} s") from None
    except (socket.gaierror, ValueError) as error:  # ValueError: no number as port, or a name that IDNA does not take
        raise CaptureError("cannot be opened: unknown host") from error
    except OSError as error:
        raise CaptureError(f"cannot be opened: {(error.strerror or 'nobody answers').lower()}") from error


def connected(places: Sequence[tuple[Any, ...]], timeout: float) -> socket.socket:
    """To the first of the addresses that answers. Raises the OSError of the last.

    Within `timeout` seconds for all, unlike socket.create_connection: whoever waits here gives no sign of life.
    """
    until, problem = time.monotonic() + timeout, OSError()
    for left, (family, kind, protocol, _, place) in zip(range(len(places), 0, -1), places, strict=True):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(until - time.monotonic(), 0.0) / left + 1e-3)
            connection.connect(place)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise problem
