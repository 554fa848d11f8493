"""Log records: with fields to systemd's journal where stderr is one, and as lines of text elsewhere.

The fields are journald's native protocol, https://systemd.io/JOURNAL_NATIVE_PROTOCOL: `journalctl CAMERA=gate` finds
what was logged with `extra={"camera": "gate"}`.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
SECONDS = 1.0  # that a datagram may wait for journald to read
LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # as syslog counts
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def configure_logging() -> None:
    """What every command line starts with."""
    handler = JournalHandler() if _stderr_is_the_journal() else None
    logging.basicConfig(format=TEXT, level=logging.INFO, handlers=[handler] if handler else None)


def _stderr_is_the_journal() -> bool:
    """systemd names the device and inode of the stream it gave, as a child may have been given another one."""
    try:
        status = os.fstat(2)
    except OSError:  # closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def encode(record: logging.LogRecord, message: str) -> bytes:
    """A record as journald takes it; `message` is its text with the traceback, if there is one."""
    fields: dict[str, object] = {
        "MESSAGE": message,
        "PRIORITY": next((number for level, number in LEVELS if record.levelno >= level), 7),
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
    }
    for name, value in vars(record).items():
        if name not in _OWN and _FIELD.fullmatch(name.upper()):
            fields.setdefault(name.upper(), value)
    return b"".join(_field(name.encode(), str(value)) for name, value in fields.items())


def _field(name: bytes, value: str) -> bytes:
    text = value.encode(errors="backslashreplace")  # half a surrogate may come from a file's name
    if b"\n" in text:
        return b"%s\n%s%s\n" % (name, struct.pack("<Q", len(text)), text)
    return b"%s=%s\n" % (name, text)


class JournalHandler(logging.Handler):
    """Sends each record to journald; what does not take the way goes to stderr as text."""

    def __init__(self, path: Path = SOCKET) -> None:
        super().__init__()
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(SECONDS)
        self._text = logging.StreamHandler()

    def setFormatter(self, fmt: logging.Formatter | None) -> None:  # noqa: N802
        """For the text only: in the journal the parts of a record are fields."""
        self._text.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(encode(record, logging.Formatter().format(record)))
        except OSError:  # journald is just being started anew, say
            self._text.emit(record)
        except Exception:  # a record whose arguments do not fit its text
            self.handleError(record)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """What is too long for a datagram goes as a sealed file in memory."""
        file = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(file, "wb", closefd=False) as writer:
                writer.write(data)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
            self._socket.sendmsg([], rights, 0, self._path)
        finally:
            os.close(file)

    def close(self) -> None:
        self._socket.close()
        super().close()
