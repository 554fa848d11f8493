"""Fuzz target: edge.events.decode. Whatever comes is an Event or a WireError; an Event is the same after a journey."""

from __future__ import annotations

import json

import numpy as np

from tests.fuzz.fuzzing import Choices, assert_fits, frames_of, fuzz, instrumented, joined, json_of

with instrumented():
    from edge.errors import WireError
    from edge.events import Answer, Choice, Ended, Event, Header, Person, decode, encode

RAW, WITH_JSON = b"\0", b"\1"


def valid(people: int, dim: int = 4, crop: bool = False, followed: bool = False) -> list[bytes]:
    """The frames of an event of as many people; where they are followed, as many tracks ended."""
    answer = Answer(category="sex", top=(Choice(option="woman", label="женщина", probability=0.75),))
    person = Person(box=(1.5, 2, 30, 40), score=0.5, answers=(answer,), crop=crop)
    ended = (Ended(track=5, frames=3, first_seen=1.5, last_seen=2.5),) * people if followed else ()
    if followed:
        answer = answer.model_copy(update={"unknown": True, "support": 0.5})
        person = person.model_copy(update={"answers": (answer,), "track": 6, "looks": 2})
    header = Header(
        device="box", epoch=7, seq=3, camera="door", frame=3, captured_at=4.5, frame_size=(640, 480), bundle="b",
        bank="c", embedding_dim=dim, people=(person,) * people, ended=ended, notices=("the disk is full",) * people,
    )  # fmt: skip
    rows = np.tile(np.eye(1, dim, dtype=np.float16), (people, 1))  # (n, d)
    return encode(Event(header, rows, (b"\xff\xd8jpeg" if crop else None,) * people))


VALID = [valid(0), valid(1), valid(2, crop=True), valid(1, followed=True)]


def target(data: bytes) -> None:
    choices = Choices(data)
    if choices.take(1) != WITH_JSON:
        check(frames_of(choices.rest()))
        return
    header, rows, *crops = choices.pick(VALID)
    content: object = json.loads(header)
    for _ in range(choices.below(4)):
        content = choices.changed(content)
    match choices.below(4):
        case 0:
            rows = choices.take(len(rows))  # any bits
        case 1:
            rows += rows[: choices.below(len(rows) + 1)] if len(rows) < 255 else b""
    if choices.below(4) == 1 and crops:
        crops[0] = choices.take(4)
    frames = [json_of(content), rows, *crops]
    match choices.below(8):
        case 1:
            del frames[choices.below(len(frames))]
        case 2:
            frames.insert(choices.below(len(frames)), choices.pick(frames))
    check(frames)


def check(frames: list[bytes]) -> None:
    try:
        event = decode(frames)
    except WireError as error:
        assert_fits(error)
        return
    again = decode(encode(event))
    assert again.header == event.header
    assert again.crops == event.crops
    assert again.embeddings.tobytes() == event.embeddings.tobytes()
    assert np.isfinite(event.embeddings).all()
    header = event.header
    numbers = (header.epoch, header.seq, header.frame, header.skipped, *header.frame_size)
    counts = [one for person in header.people for one in (person.track, person.looks) if one is not None]
    gone = [one for track in header.ended for one in (track.track, track.frames)]
    assert all(0 <= number < 2**63 for number in (*numbers, *counts, *gone)), "no store can keep it"
    shares = [answer.support for person in header.people for answer in person.answers if answer.support is not None]
    assert all(0 <= share <= 1 for share in shares)
    assert np.isfinite([(track.first_seen, track.last_seen) for track in header.ended]).all()


def seeds() -> list[bytes]:
    whole = [RAW + joined(frames) for frames in VALID]
    changes = [
        WITH_JSON + bytes((which, 1, 1, key, 2, kind))
        for which in range(len(VALID))
        for key in range(15)
        for kind in (0, 1)
    ]
    return whole + changes


if __name__ == "__main__":
    fuzz(target, seeds())
