"""CONTRACT 3: what a box and a collector say to each other, lookout/1, and its bytes.

docs/protocol.md tells the order in which it is said. A message is a list of frames: its name in ASCII, then what the
functions below write. Numbers in frames of their own are 8 bytes, big-endian, unsigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import WireError

NAME: Final = "lookout/1"
HEARTBEAT = 5.0  # s of silence after which a box says PING
SILENCE = 15.0  # s without a word after which the other end counts as gone
MAX_CONTROL = 16 << 10  # bytes of any JSON frame here

Number = Annotated[int, Field(ge=0, lt=2**63)]
Seq = Annotated[int, Field(ge=0, lt=2**63 - 1)]  # of an event: the number after it is a Number, too
Name = Annotated[str, Field(min_length=1, max_length=200)]
Reason = Annotated[str, Field(max_length=500)]


class _Said(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Hello(_Said):
    """Box: who I am and which numbers of one epoch I hold: first <= number < end; equal: none yet."""

    protocol: Literal["lookout/1"] = NAME
    device: Name
    epoch: Number
    first: Number
    end: Number


class Gone(_Said):
    """Box: the events first..last are not to be had any more. It takes their place in the order, and is kept for ever.

    reason: a few words, such as "spool full", "too old", "damaged on disk".
    """

    first: Seq
    last: Seq
    reason: Reason

    @property
    def count(self) -> int:
        """How many events are gone."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Data:
    """Box: one event. frames: those of edge.events, not yet looked at."""

    seq: int
    frames: tuple[bytes, ...]


@dataclass(frozen=True)
class Ping:
    """Box: I am here; are you?"""


class Window(_Said):
    """How much may be on its way unacknowledged: events, and bytes of them. One event is always allowed."""

    events: int = Field(ge=1, lt=2**31)
    bytes: int = Field(ge=1, lt=2**63)


class Welcome(_Said):
    """Collector: of this epoch I have everything below `next`; go on from there."""

    protocol: Literal["lookout/1"] = NAME
    epoch: Number
    next: Number
    window: Window


class Ack(_Said):
    """Collector: everything of this epoch below `next` is kept for good."""

    epoch: Number
    next: Number
    window: Window


class Refused(_Said):
    """Collector: this event was set aside, for this reason. Do not send it again; an Ack covers it."""

    epoch: Number
    seq: Seq
    reason: Reason


class Reset(_Said):
    """Collector: I lost the thread; say Hello again."""

    reason: Reason


class Denied(_Said):
    """Collector: not you, or not this protocol. Nothing you say is kept."""

    reason: Reason


@dataclass(frozen=True)
class Pong:
    """Collector: I am here."""


FromBox = Hello | Data | Gone | Ping
FromCollector = Welcome | Ack | Refused | Reset | Denied | Pong

_Json = TypeVar("_Json", bound=_Said)


def encode(message: FromBox | FromCollector) -> list[bytes]:
    """The frames of a message."""
    name = type(message).__name__.upper().encode()
    if isinstance(message, Data):
        return [name, message.seq.to_bytes(8, "big"), *message.frames]
    if isinstance(message, Ping | Pong):
        return [name]
    return [name, message.model_dump_json().encode()]


def from_box(frames: Sequence[bytes]) -> FromBox:
    """What a box said. Raises WireError for anything else."""
    match list(frames):
        case [b"DATA", number, *event] if len(number) == 8 and (seq := int.from_bytes(number, "big")) < 2**63 - 1:
            return Data(seq, tuple(event))
        case [b"HELLO", text]:
            hello = _parsed(Hello, text)
            if hello.end < hello.first:
                raise WireError("HELLO", expected="first <= end", got=f"{hello.first}, {hello.end}")
            return hello
        case [b"GONE", text]:
            gone = _parsed(Gone, text)
            if gone.last < gone.first:
                raise WireError("GONE", expected="first <= last", got=f"{gone.first}, {gone.last}")
            return gone
        case [b"PING"]:
            return Ping()
    raise _unknown(frames, "HELLO, DATA, GONE or PING")


def from_collector(frames: Sequence[bytes]) -> FromCollector:
    """What a collector said. Raises WireError for anything else."""
    match list(frames):
        case [b"WELCOME", text]:
            return _parsed(Welcome, text)
        case [b"ACK", text]:
            return _parsed(Ack, text)
        case [b"REFUSED", text]:
            return _parsed(Refused, text)
        case [b"RESET", text]:
            return _parsed(Reset, text)
        case [b"DENIED", text]:
            return _parsed(Denied, text)
        case [b"PONG"]:
            return Pong()
    raise _unknown(frames, "WELCOME, ACK, REFUSED, RESET, DENIED or PONG")


def _parsed(model: type[_Json], text: bytes) -> _Json:
    name = model.__name__.upper()
    if len(text) > MAX_CONTROL:
        raise WireError(f"{name} too long", expected=f"at most {MAX_CONTROL} bytes", got=len(text))
    try:
        said = model.model_validate_json(text, strict=True)  # "7", 7.0 and true are no numbers
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise WireError(f"{name}: {key + ': ' if key else ''}{first['msg']}") from error
    if "protocol" in model.model_fields.keys() - said.model_fields_set:  # its default is for those who write
        raise WireError(f"{name}: protocol: Field required")
    return said


def _unknown(frames: Sequence[bytes], expected: str) -> WireError:
    sizes = f"{len(frames)} frames" + (f", the first {bytes(frames[0][:12])!r}" if frames else "")
    return WireError("not a message of lookout/1", expected=expected, got=sizes)
