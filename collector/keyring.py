"""Who may write: the collector's own key, the list of the boxes' keys, and the answers to ZeroMQ's handshakes.

A folder of the collector's own (0700) holds collector.key (edge.keys) and allowed.txt, one "KEY DEVICE" per line, # for
comments. A device may have several keys, as while they are changed; a key belongs to one device.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from time import monotonic
from types import TracebackType

import zmq
from zmq.utils import z85

from edge.errors import ConfigError
from edge.keys import checked_key, is_key, new_key, read_key

KEY = "collector.key"
ALLOWED = "allowed.txt"
MAX_DEVICE = 200  # characters, as in an event's header
ZAP_ADDRESS = "inproc://zeromq.zap.01"  # RFC 27's own; where libzmq asks
ZAP_DOMAIN = b"lookout"
CURVE_ADDS = 33  # bytes to each frame: the command's name, a nonce, flags, the authenticator
HEAD = "# KEY DEVICE; a running collector takes up what changes here"  # the first line of a new allowed.txt
LOG_SECONDS = 1.0  # between two lines about denied keys
RETRY_SECONDS = 1.0  # between two looks at the same damaged file

log = logging.getLogger(__name__)


class Keyring:
    """The folder's keys, as they are on disk now; a context manager, after which the secret is forgotten.

    public, secret: the collector's own key, in Z85. Raises ConfigError for a folder without a key, files that are
    damaged, and any that others could change. No allowed.txt: nobody may write.
    """

    def __init__(self, folder: Path) -> None:
        _check_folder(folder)
        key = read_key(folder / KEY)
        self.public, self.secret = key.public, key.secret
        self._path = folder / ALLOWED
        self._used = self._tried = _fingerprint(self._path)
        self._again = 0.0  # monotonic; when to try the same file again
        self._trouble = ""  # said last
        self._devices = read_allowed(self._path)

    def device_of(self, user_id: str) -> str | None:
        """The device that this public key belongs to, "*" (it may write under any), or None: nobody's, or not any more.

        The User-Id of a message is its sender's key. Asked for each message, this ends a live connection's rights too.
        """
        return self._devices.get(user_id)

    def refresh(self) -> None:
        """Look at the disk. An allow list that cannot be used is logged, and the one in force stays."""
        found = _fingerprint(self._path)
        if found == self._used or (found == self._tried and monotonic() < self._again):
            return
        try:
            if found is None and self._devices:
                raise ConfigError(f"{self._path}: is not there any more")
            devices = read_allowed(self._path)
        except ConfigError as error:
            self._tried, self._again = found, monotonic() + RETRY_SECONDS
            if str(error) != self._trouble:
                log.warning("%s; the list in force stays", error)
            self._trouble = str(error)
            return
        log.info("%s: now %d keys", self._path, len(devices))
        self._used, self._devices, self._trouble = found, devices, ""

    def __enter__(self) -> Keyring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.secret = ""


class Zap:
    """Answers, for the sockets of one context, whether a client's key may come in (RFC 27, ZAP); a context manager.

    Poll `socket` along with the server's own and call `handle` when it can be read: then a handshake waits for the
    server's loop, and no other thread reads the keys. (pyzmq's own Authenticator wants a thread or asyncio, and knows
    keys by a folder of certificates.) refused: how often the answer was no. Each of these is HANDSHAKE_FAILED_AUTH at
    the server's monitor too; what else fails a handshake is seen only there (edge.keys has the table).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keyring: Keyring) -> None:
        self.refused = 0
        self._keyring = keyring
        self._log_again = 0.0  # monotonic
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ADDRESS)

    def handle(self) -> None:
        """Answer one request, if there is one."""
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        user_id = ""
        match frames:
            case [b"1.0", _, _, address, _, b"CURVE", key] if len(key) == 32:
                self._keyring.refresh()
                user_id = z85.encode(key).decode()
                if self._keyring.device_of(user_id) is None:
                    self._refuse(address, user_id)
                    user_id = ""
        status = [b"200", b"OK"] if user_id else [b"400", b"this key is not allowed here"]
        self.socket.send_multipart([b"1.0", frames[1] if len(frames) > 1 else b"", *status, user_id.encode(), b""])

    def _refuse(self, address: bytes, key: str) -> None:
        self.refused += 1
        if monotonic() >= self._log_again:  # a flood of handshakes is not to become a flood of lines
            self._log_again = monotonic() + LOG_SECONDS
            where = address.decode("ascii", "replace") or "this machine"
            log.warning("refused %s: the key %s… is not allowed (%d so far)", where, key[:8], self.refused)

    def close(self) -> None:
        """Free the address. From then on nobody gets in."""
        self.socket.close()

    def __enter__(self) -> Zap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def secure_server(socket: zmq.Socket[bytes], keyring: Keyring) -> None:
    """Let `socket`, not bound yet, talk to nobody but those whom a Zap of its context lets in.

    If it has a maxmsgsize, that is to be set before: it grows by what encryption adds to each frame.
    """
    socket.curve_server = True
    socket.curve_secretkey = keyring.secret.encode()
    socket.zap_domain = ZAP_DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, where no Zap is, libzmq lets everybody in
    size = int(socket.maxmsgsize)
    if size >= 0:
        socket.maxmsgsize = size + CURVE_ADDS


def new_keyring(folder: Path) -> str:
    """Make the collector's key in `folder`, made where it is missing; return the public half.

    Raises ConfigError where there is one already.
    """
    return new_key(folder / KEY)


def allow(folder: Path, device: str, key: str) -> bool:
    """Let the owner of this public key write as `device`; False: that was so already.

    Raises ConfigError for what is no key or no name, a key of another device, or a folder that is no keyring.
    """
    checked_key(key, "KEY")
    if not _is_name(device):
        wanted = f"1 to {MAX_DEVICE} characters, none of them a control character, no space at either end"
        raise ConfigError("DEVICE: not a device's name", expected=wanted, got=ascii(device[:MAX_DEVICE]))
    with _edited(folder) as (lines, devices):
        owner = devices.get(key)
        if owner not in (None, device):
            remedy = "take it from there first, with `collector deny`"
            raise ConfigError(f"this is a key of {owner!r}, and a key belongs to one device", remedy=remedy)
        if owner is None:
            lines.append(f"{key} {device}")
    return owner is None


def deny(folder: Path, device: str, key: str | None = None) -> list[str]:
    """Take this key, or all of them, from `device`; return what was taken, at least one.

    Raises ConfigError where there was nothing to take, or `folder` is no keyring.
    """
    if key is not None:
        checked_key(key, "KEY")
    with _edited(folder) as (lines, devices):
        taken = [one for one, owner in devices.items() if owner == device and key in (None, one)]
        if not taken:
            known = f"this is a key of {devices[key]!r}, not" if key in devices else "there is no such key"
            raise ConfigError(f"{folder / ALLOWED}: {known if key else 'there is no key'} of {device!r}")
        lines[:] = [line for line in lines if (_entry(line) or ("",))[0] not in taken]
    return taken


def read_allowed(path: Path) -> dict[str, str]:
    """key -> device; empty where there is no such file. Raises ConfigError."""
    return _devices(path, _lines(path))


def _devices(path: Path, lines: list[str]) -> dict[str, str]:
    devices: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = _entry(line)
        except ValueError as error:  # without the line itself: a secret may stand in it by mistake
            raise ConfigError(f"{path}: line {number}", expected="KEY DEVICE", got=error) from error
        if entry is not None and devices.setdefault(*entry) != entry[1]:
            raise ConfigError(f"{path}: line {number}: a line before gives this key to another device")
    return devices


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()).st_mode)
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    return text.removesuffix("\n").split("\n") if text else []


def _entry(line: str) -> tuple[str, str] | None:
    """The key and the device of a line; None: it is empty or a comment. Raises ValueError."""
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    key, device = (*line.split(maxsplit=1), "")[:2]
    if not is_key(key):
        raise ValueError("no key at its beginning")
    if not _is_name(device):
        raise ValueError("no device's name after the key")
    return key, device


def _is_name(device: str) -> bool:
    # Cc: control characters, line feeds among them; Cs: halves of a letter, which UTF-8 cannot write
    text = not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in device)
    return text and device == device.strip() and 0 < len(device) <= MAX_DEVICE


@contextmanager
def _edited(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The lines of allowed.txt, to be changed, and what they say. The file is replaced in one step.

    Whoever else edits it so waits for this one. (The lock is on the folder: a lock file would have an owner, and be in
    the way of another user.)
    """
    _check_folder(folder)
    path = folder / ALLOWED
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        lines = _lines(path)
        before = list(lines)
        yield lines, _devices(path, before)
        if lines != before:
            _replace(path, "".join(f"{line}\n" for line in (lines if before else [HEAD, *lines])))
            os.fsync(descriptor)  # of the folder: a key that was taken does not come back after a power cut
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)  # of an edit that was killed
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
        if os.geteuid() == 0:  # `sudo collector deny` must not leave a list that the collector cannot read
            owner = path.parent.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _check_folder(folder: Path) -> None:
    """Raises ConfigError for one that holds no collector's key, or that others could put another list into."""
    if not (folder / KEY).exists():
        remedy = f"make one with `collector keys new --keys {shlex.quote(str(folder))}`, or name another folder"
        raise ConfigError(f"{folder}: no {KEY} in it", remedy=remedy)
    _check_mode(folder, folder.stat().st_mode)


def _check_mode(path: Path, mode: int) -> None:
    if mode & 0o022:
        remedy = f"chmod go-w {shlex.quote(str(path))}"
        raise ConfigError(f"{path}: others can change it", got=f"{S_IMODE(mode):04o}", remedy=remedy)


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What differs after any change of a file, even of its owner; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
