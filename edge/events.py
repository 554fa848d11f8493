"""CONTRACT 2: the Event, what one box saw in one frame, and its bytes on the wire.

A message is a list of frames: the header as JSON (UTF-8), the unit embeddings of the people as float16 (n, d) row after
row, then one JPEG per person whose `crop` is true, in the people's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import WireError

Half = NDArray[np.float16]
Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]

MAX_HEADER = 4 << 20  # bytes; two hundred people with 13 categories are about 200 kB
MAX_CROP = 16 << 20  # bytes
MAX_NOTICES, MAX_NOTICE = 20, 500  # of an event, and characters of one


class _Record(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(_Record):
    """One option of a category."""

    option: str = Field(description="the option's name in the prompt file")
    label: str | None = Field(default=None, description="its name in the owner's second language")
    probability: Probability = Field(description="softmax within the category")


class Answer(_Record):
    """What was answered to one question about one person."""

    category: str
    top: tuple[Choice, ...] = Field(min_length=1, description="the best options, most probable first")
    unknown: Literal[True] | None = Field(
        default=None, description="true: by its calibration the best option is not probable enough to be believed"
    )
    support: Probability | None = Field(
        default=None, description="share of the looks at this track, weighted by quality, that said the best option"
    )


class Person(_Record):
    """One person in the frame."""

    box: tuple[float, float, float, float] = Field(description="x1 y1 x2 y2 in px of the source frame")
    score: Probability = Field(description="the detector's objectness x class probability")
    answers: tuple[Answer, ...]
    crop: bool = Field(default=False, description="true: a JPEG of this person is among the frames of the message")
    track: Count | None = Field(
        default=None, description="the same person in other events of this device, epoch and camera has the same number"
    )
    looks: Count | None = Field(default=None, description="how many crops of this track the answers rest on")


class Ended(_Record):
    """A track that will not come back."""

    track: Count
    frames: Count = Field(description="in how many frames it was seen")
    first_seen: float = Field(description="seconds since 1970, UTC")
    last_seen: float = Field(description="seconds since 1970, UTC")


class Header(_Record):
    """The JSON part of an event. (device, epoch, seq) names an event for ever."""

    schema_: Literal["lookout.event/1"] = Field(default="lookout.event/1", alias="schema")
    device: str = Field(min_length=1, max_length=200, description="the box's name, from its configuration")
    epoch: int = Field(ge=0, lt=2**63, description="drawn anew each time the numbering starts at 0")
    seq: int = Field(ge=0, lt=2**63, description="counts the events of this epoch from 0, without gaps")
    camera: str = Field(min_length=1, max_length=200)
    frame: int = Field(ge=0, lt=2**63, description="the camera's frame number, from 0")
    captured_at: float = Field(description="seconds since 1970, UTC")
    clock: Literal["unsynchronised"] | None = Field(
        default=None, description="unsynchronised: the box's clock was not set by then, its times may be wrong"
    )
    frame_size: tuple[Pixels, Pixels] = Field(description="width, height in px")
    bundle: str = Field(description="sha256 of the bundle's manifest")
    bank: str = Field(description="sha256 of the prompt bank")
    encoder: str | None = Field(
        default=None, description="sha256 of the graph that made the embeddings: only those of one can be compared"
    )
    embedding_dim: int = Field(gt=0, le=65536, description="d of the float16 (n, d) frame")
    people: tuple[Person, ...] = Field(description="n people, best score first")
    skipped: Count = Field(default=0, description="people found but not described: too small, or too many at once")
    ended: tuple[Ended, ...] = Field(default=(), description="tracks that ended since the event before")
    notices: tuple[Annotated[str, Field(max_length=MAX_NOTICE)], ...] = Field(
        default=(), max_length=MAX_NOTICES, description="what the box has to say of itself since its last event"
    )


@dataclass(frozen=True)
class Stamp:
    """What the keeper of the numbers gives to an event: its number, and what the box has to say of itself."""

    epoch: int
    seq: int
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Event:
    """header: who, when, what. embeddings: (n, d) float16, a unit row per person. crops: a JPEG or None per person."""

    header: Header
    embeddings: Half
    crops: tuple[bytes | None, ...]

    def __post_init__(self) -> None:
        shape = (len(self.header.people), self.header.embedding_dim)
        if self.embeddings.dtype != np.float16 or self.embeddings.shape != shape:
            got = f"{self.embeddings.dtype} {self.embeddings.shape}"
            raise ValueError(f"Event.embeddings must be float16 {shape}, got {got}")
        if [crop is not None for crop in self.crops] != [person.crop for person in self.header.people]:
            raise ValueError("Event.crops must hold a JPEG for just the people whose `crop` is true")


def encode(event: Event) -> list[bytes]:
    """The frames of one message; `decode` is its inverse."""
    header = event.header.model_dump_json(by_alias=True, exclude_none=True).encode()
    embeddings = np.ascontiguousarray(event.embeddings, dtype="<f2").tobytes()
    return [header, embeddings, *(crop for crop in event.crops if crop is not None)]


def decode(frames: Sequence[bytes]) -> Event:
    """The event in these frames. Raises WireError for anything else, whatever it is."""
    if len(frames) < 2:
        raise WireError("no event", expected="a header and an embeddings frame", got=f"{len(frames)} frames")
    if len(frames[0]) > MAX_HEADER:
        raise WireError("header too long", expected=f"at most {MAX_HEADER} bytes", got=len(frames[0]))
    try:
        header = Header.model_validate_json(frames[0])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:100]  # an unknown key may be as long as a header
        raise WireError(f"header: {key + ': ' if key else ''}{first['msg']}") from error
    n, d = len(header.people), header.embedding_dim
    if len(frames[1]) != 2 * n * d:
        raise WireError(
            "embeddings", expected=f"{2 * n * d} bytes for ({n}, {d}) float16", got=f"{len(frames[1])} bytes"
        )
    embeddings = np.frombuffer(frames[1], "<f2").reshape(n, d).astype(np.float16)
    with np.errstate(invalid="ignore"):  # hostile bytes may be NaN, which is no length either
        lengths = np.linalg.norm(embeddings.astype(np.float32), axis=1)
    # float16 rounding of a unit row stays within 1e-2 of length 1; what is further off no encoder wrote
    if not (np.abs(lengths - 1) < 1e-2).all():
        raise WireError("embeddings", expected="unit rows", got="other lengths")
    pictures = list(frames[2:])
    if len(pictures) != sum(person.crop for person in header.people):
        raise WireError("crops", expected=sum(person.crop for person in header.people), got=len(pictures))
    if any(len(picture) > MAX_CROP or not picture.startswith(b"\xff\xd8") for picture in pictures):
        raise WireError("crops", expected=f"JPEGs of at most {MAX_CROP} bytes", got="something else")
    crops = tuple(pictures.pop(0) if person.crop else None for person in header.people)
    return Event(header, embeddings, crops)
