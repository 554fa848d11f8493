"""Whether the cameras and the collector of a configuration can be reached, without a picture or an event, and without
telling a password."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edge.config import is_url_or_device
from edge.images import SUFFIXES, image_files

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


@dataclass(frozen=True)
class Reached:
    """shown: the source as anyone may see it. say: what is wrong, and what to do; None where nothing is."""

    shown: str
    say: str | None = None

    @property
    def good(self) -> bool:
        return self.say is None


def reach(sources: Sequence[str], root: Path, timeout: float) -> list[Reached]:
    """One answer per source, in order, all together within about `timeout` seconds.

    root: where /dev is looked for. Names are resolved too, for which the system knows no timeout: a thread that still
    waits for one is left behind.
    """
    answers: list[Reached | None] = [None] * len(sources)

    def ask(i: int) -> None:
        answers[i] = _reached(sources[i], root, timeout)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(sources))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout + 0.5
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = f"no answer in {timeout:g} s"
    return [answer or Reached(_address(source)[0], silent) for answer, source in zip(answers, sources, strict=True)]


def reach_collector(address: str, timeout: float) -> Reached:
    """Whether anybody takes connections at tcp://host:port or ipc://path; whom they let in, only they know."""
    scheme, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    try:
        if scheme == "ipc":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout)
                connection.connect(place)
        else:
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, ValueError) as error:
        return Reached(address, f"nobody answers there: {_why(error)}")
    return Reached(address)


def _reached(source: str, root: Path, timeout: float) -> Reached:
    if source.isdecimal():
        return _device(root / f"dev/video{int(source)}", f"/dev/video{int(source)}")
    if not is_url_or_device(source):
        return _file(Path(source))
    shown, address, unclear = _address(source)
    if address is None:
        return Reached(shown, unclear)
    try:
        socket.create_connection(address, timeout).close()
    except (OSError, ValueError) as error:  # ValueError: a name that IDNA does not take
        return Reached(shown, f"nobody answers at its address: {_why(error)}" + (f"; {unclear}" if unclear else ""))
    return Reached(shown)


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or "timed out" if isinstance(error, OSError) else "no such name"


def _device(path: Path, shown: str) -> Reached:
    if not path.exists():
        return Reached(shown, "no such device: is the camera plugged in?")
    if not os.access(path, os.R_OK | os.W_OK):
        return Reached(shown, 'not for this user: `sudo usermod -aG video "$USER"`, then log in again')
    return Reached(shown)


def _file(path: Path) -> Reached:
    shown = "…" if ":/" in str(path) else str(path)  # a mistyped address is no path, and may hold a password
    try:
        if path.is_dir():
            return Reached(shown, None if image_files(path) else "no images: files named " + " ".join(SUFFIXES))
        with path.open("rb"):
            return Reached(shown)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return Reached(shown, getattr(error, "strerror", None) or "no path")


def _address(source: str) -> tuple[str, tuple[str, int] | None, str | None]:
    """What of a URL may be shown; host and port, None where there are none; and what is unclear about it.

    FFmpeg takes everything up to the first / ? # for user, password and host. An @ behind that may mean a password
    with such a sign in it, so then not even the host is shown.
    """
    if not is_url_or_device(source) or source.isdecimal():
        return "…", None, None
    scheme = source.partition("://")[0].lower()
    if scheme not in PORTS:
        return f"{scheme}://…", None, "unknown kind of address; it should begin with " + ", ".join(PORTS)
    hint = "a / ? # or @ in a user name or password is written as %2F %3F %23 %40"
    try:
        parts = urlsplit(source)
        host, port = parts.hostname, parts.port or PORTS[scheme]
    except ValueError:
        return f"{scheme}://…", None, f"no address: {hint}"
    if not host:
        return f"{scheme}://…", None, f"no host in the address: {hint}"
    if "@" in source.partition("://")[2][len(parts.netloc) :]:
        return f"{scheme}://…", (host, port), hint
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", (host, port), None
