"""What systemd is told about this process: sd_notify(3), datagrams to $NOTIFY_SOCKET; nothing where there is none."""

from __future__ import annotations

import logging
import os
import socket
import time

SECONDS = 1.0  # that a datagram may take: systemd itself may be busy

log = logging.getLogger(__name__)
_failed = False


def ready() -> None:
    """The box has passed its self-test and serves; after a reload: it serves again."""
    _tell("READY=1")


def reloading() -> None:
    """The configuration is read anew; `ready` ends it."""
    _tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """The box is about to end."""
    _tell("STOPPING=1")


def status(text: str) -> None:
    """One line for people, which `systemctl status` shows."""
    _tell("STATUS=" + " ".join(text.split()))


def alive() -> None:
    """Feed the watchdog."""
    _tell("WATCHDOG=1")


def _tell(*fields: str) -> None:
    """Never fails: a box that watches is worth more than one that is watched. What went wrong is logged once."""
    global _failed
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    abstract = address.startswith("@")  # as systemd writes the names that are no files
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.settimeout(SECONDS)
            one.sendto("\n".join(fields).encode(), "\0" + address[1:] if abstract else address)
    except OSError as error:
        if not _failed:
            log.warning(
                "$NOTIFY_SOCKET %s: %s; systemd does not hear of this process", address, error.strerror or error
            )
        _failed = True
