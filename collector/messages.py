"""How what the boxes sent stands in a stream: subjects, headers and payloads, which docs/fleet.md tells its readers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from collector.sinks import Item, Poison
from edge.errors import WireError
from edge.protocol import Gone

STREAM: Final = "LOOKOUT"
SUBJECTS: Final = ("lookout.event.*", "lookout.gone.*", "lookout.refused.*")
MAX_REFUSED = 64 << 10  # bytes of a refused message that are kept for a person to look at


@dataclass(frozen=True)
class Message:
    """One message of the stream. refused: why it is no event; "" for one that is kept as it came."""

    subject: str
    headers: dict[str, str]
    payload: bytes
    refused: str = ""

    @property
    def size(self) -> int:
        """Bytes of headers and payload as the server counts them against its limits."""
        lines = sum(len(name) + len(value) + 4 for name, value in self.headers.items())  # "name: value\r\n"
        return len("NATS/1.0\r\n") + lines + len("\r\n") + len(self.payload)


def message_of(item: Item, limit: int, raise_what: str = "max_payload in the server's configuration") -> Message:
    """How an item stands in the stream. limit: bytes that NATS takes; raise_what: where an operator sets it."""
    match item.payload:
        case Gone(reason=reason):
            gone = Gone(first=item.first, last=item.last, reason=reason)  # of what the box said, the part that is new
            return _message("gone", item, f"{item.first}-{item.last}", gone.model_dump_json().encode())
        case Poison(reason=reason):
            return _refused(item, limit, reason)
    message = _message("event", item, str(item.last), pack(item.frames))
    if message.size > limit:
        return _refused(item, limit, f"{message.size} bytes, and NATS takes {limit}: raise {raise_what}")
    return message


def _message(kind: str, item: Item, numbers: str, payload: bytes) -> Message:
    device, epoch = token(item.device), str(item.epoch)
    name = f"{device}:{epoch}:{numbers}"  # names the content, so that what is sent again is one message
    if kind == "refused":
        name += ":refused"  # the number is still free for an event
    headers = {"Nats-Msg-Id": name, "Lookout-Device": device, "Lookout-Epoch": epoch, "Lookout-Seq": numbers}
    return Message(f"lookout.{kind}.{device}", headers, payload)


def _refused(item: Item, limit: int, reason: str) -> Message:
    """With the leading frames that there is room for: the header first of all."""
    empty = _message("refused", item, str(item.last), b"")
    # a header is one line; what the reason quotes came from the wire
    headers = {**empty.headers, "Lookout-Reason": re.sub(r"[^ -~]", "?", reason)[:500]}
    room = min(MAX_REFUSED, limit - Message(empty.subject, headers, b"").size)
    payload = b""
    for frame in item.frames:
        if len(payload) + len(packed := pack([frame])) > room:
            break
        payload += packed
    return Message(empty.subject, headers, payload, reason)


def token(device: str) -> str:
    """A device's name as one word of a subject: percent-encoding, the dot included. `device` is its inverse."""
    return quote(device, safe="").replace(".", "%2E")


def device(token: str) -> str:
    """The device whose `token` this is."""
    return unquote(token)


def pack(frames: Sequence[bytes]) -> bytes:
    """Frames as one value: each as its length, 4 bytes big-endian, and then itself."""
    return b"".join(part for frame in frames for part in (len(frame).to_bytes(4, "big"), frame))


def unpack(payload: bytes) -> list[bytes]:
    """The frames that `pack` made one value of. Raises WireError for anything else."""
    frames, at = [], 0
    while at < len(payload):
        start = at + 4
        at = start + int.from_bytes(payload[at:start], "big")
        if start > len(payload) or at > len(payload):
            raise WireError("packed frames", expected="a length and as many bytes", got="an end before that")
        frames.append(payload[start:at])
    return frames
