"""Keys of the encrypted wire (CURVE): their files, who needs them, and how a box's socket uses them.

A key is 32 bytes, written as 40 characters of Z85: none of them a quote, a backslash or a space, and the first never a
number sign (32 bits end at "%nSc0"). Keys are pinned on both sides: the box has the collector's public key in its
configuration, the collector has the box's in its allow list. No secret key is ever printed or logged.

When a handshake fails, nothing gets in, and the monitors of the two sockets tell (libzmq 4.3.5, HANDSHAKE_ left out):

    what is wrong                        the box sees                the collector sees
    box's key not allowed                FAILED_AUTH 400             FAILED_AUTH 400, and the request it denied (RFC 27)
    box pins another collector's key     FAILED_NO_DETAIL EPIPE      FAILED_PROTOCOL CRYPTOGRAPHIC
    only one of them encrypts            FAILED_NO_DETAIL EPIPE or FAILED_PROTOCOL MECHANISM_MISMATCH on either side, as
                                         the first to find out hangs up; the latter on one of them at least

After each of them both see DISCONNECTED. A collector that holds another secret key than the box pinned looks like the
second line: it cannot read what it is sent.
"""

from __future__ import annotations

import os
import shlex
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from stat import S_IMODE

import zmq
from zmq.utils import z85

from edge.config import PublishConfig
from edge.errors import ConfigError

KEY_LENGTH = 40  # characters
_KEY_FILE_MAX = 4096  # bytes; a longer file is something else


@dataclass(frozen=True)
class KeyPair:
    """Two halves of a key, in Z85. The secret one does not appear in its repr."""

    public: str
    secret: str = field(repr=False)


def is_key(text: str) -> bool:
    """True for the Z85 of 32 bytes that are not all zero, which nobody draws and placeholders are made of."""
    try:
        return len(text) == KEY_LENGTH and any(z85.decode(text))
    except (ValueError, KeyError, struct.error):  # not ASCII, not of Z85, more than 32 bits in 5 characters
        return False


def checked_key(text: str, where: str) -> str:
    """`text`, which must be a key. Raises ConfigError, without the text: it may be a secret in the wrong place."""
    if is_key(text):
        return text
    got = f"{len(text)} characters" if len(text) != KEY_LENGTH else f"{KEY_LENGTH} characters that are no key"
    raise ConfigError(f"{where}: not a public key", expected=f"the {KEY_LENGTH} characters `keys new` printed", got=got)


def new_key(path: Path) -> str:
    """Draw a key, write its secret half to a new file that only its owner can read, and return the public half.

    Raises ConfigError where there is a file already, OSError where none can be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = _drawn()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        remedy = "its public key stands in it; for a new key name another file"
        raise ConfigError(f"{path}: is there already, and a key is never overwritten", remedy=remedy) from error
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(
                "# A secret key of Lookout: whoever reads it can pose as its owner. Its public key is\n"
                f"# {key.public}\n"
                f"{key.secret}\n"
            )
            file.flush()
            os.fsync(file.fileno())  # the public half will be handed on: it must not outlive this one
    except BaseException:
        path.unlink()
        raise
    return key.public


def _drawn() -> KeyPair:
    while True:
        public, secret = (half.decode() for half in zmq.curve_keypair())
        if not public.startswith("-"):  # which would be an option on a command line
            return KeyPair(public, secret)


def read_key(path: Path) -> KeyPair:
    """The key of a file written by `new_key`: comments (#), and the secret half on a line of its own.

    Raises ConfigError for a file that is missing, is something else, or can be read by others.
    """
    try:
        with path.open("rb") as file:
            mode = S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_KEY_FILE_MAX + 1).decode("utf-8", "replace")
    except PermissionError as error:
        remedy = "it has to belong to the user that this runs as; on a box that is lookout"
        raise ConfigError(f"{path}: {error.strerror}", remedy=remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}", remedy="`keys new` makes a key") from error
    if mode & 0o077:
        remedy = f"chmod 600 {shlex.quote(str(path))}, and if anybody may have read it, make a new key"
        raise ConfigError(
            f"{path}: a secret key that others can use", expected="0600", got=f"{mode:04o}", remedy=remedy
        )
    lines = [line.strip() for line in text.split("\n")]
    match [line for line in lines if line and not line.startswith("#")]:
        case [secret] if is_key(secret):
            return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    raise ConfigError(f"{path}: not a key file", expected="one line with a secret key", remedy="`keys new` makes one")


def needs_encryption(address: str) -> bool:
    """True when other machines can be at, or reach, this ZeroMQ address: all but ipc, inproc, and tcp on loopback.

    A name other than localhost counts as another machine, whatever it may resolve to.
    """
    transport, _, rest = address.partition("://")
    if transport in ("ipc", "inproc"):
        return False
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return transport != "tcp" or not (host.lower() == "localhost" or ip_address(host).is_loopback)
    except ValueError:  # a name, or *
        return True


def publish_keys(config: PublishConfig) -> tuple[KeyPair, str] | None:
    """The arguments of `secure_client` that follow the socket, or None where the wire goes without encryption.

    Raises ConfigError for keys that are wrong or half there, and where there are none on the way to another machine and
    the operator did not say `insecure`.
    """
    far = needs_encryption(config.address) and not config.insecure
    if config.transport == "push":
        if config.key is not None or config.collector_key is not None:
            remedy = 'remove them, or set publish.transport = "acknowledged"'
            raise ConfigError('publish.transport: "push" is never encrypted, but there are keys', remedy=remedy)
        if far:
            remedy = (
                'set publish.transport = "acknowledged" and keys, or, in a network you trust, publish.insecure = true'
            )
            raise ConfigError(f'publish.transport: "push" to another machine, {config.address}', remedy=remedy)
        return None
    if config.key is not None and config.collector_key is not None:
        return read_key(config.key), checked_key(config.collector_key, "publish.collector_key")
    if config.key is not None:
        remedy = "set it to what `collector keys new` printed on the collector's machine"
        raise ConfigError("publish.collector_key: missing, but publish.key is there", remedy=remedy)
    if config.collector_key is not None:
        remedy = "`edge keys new FILE` makes a key; set publish.key to its file"
        raise ConfigError("publish.key: missing, but publish.collector_key is there", remedy=remedy)
    if far:
        remedy = (
            "set publish.key (`edge keys new FILE`) and publish.collector_key (`collector keys new`), "
            "or, in a network you trust, publish.insecure = true"
        )
        raise ConfigError(f"publish.address: {config.address} is another machine, and there are no keys", remedy=remedy)
    return None


def secure_client(socket: zmq.Socket[bytes], key: KeyPair, collector_key: str) -> None:
    """Let `socket`, not connected yet, talk to nobody but the owner of `collector_key`, and prove that it has `key`."""
    socket.curve_serverkey = collector_key.encode()
    socket.curve_publickey = key.public.encode()
    socket.curve_secretkey = key.secret.encode()
