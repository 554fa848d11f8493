"""The wire's contract: what is encoded comes back equal; whatever else comes is a WireError."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import WireError
from edge.events import MAX_CROP, MAX_HEADER, Answer, Choice, Ended, Event, Header, Person, decode, encode

finite = st.floats(allow_nan=False, allow_infinity=False)
probability = st.floats(0, 1)
names = st.text(min_size=1, max_size=20)
choices = st.builds(
    Choice, option=st.text(max_size=20), label=st.none() | st.text(max_size=20), probability=probability
)
answers = st.builds(
    Answer,
    category=st.text(max_size=20),
    top=st.lists(choices, min_size=1, max_size=3).map(tuple),
    unknown=st.sampled_from([None, True]),
    support=st.none() | probability,
)
counts = st.integers(0, 2**63 - 1)
ended = st.builds(Ended, track=counts, frames=counts, first_seen=finite, last_seen=finite)
jpegs = st.binary(max_size=50).map(lambda rest: b"\xff\xd8" + rest)


@st.composite
def events(draw):
    """Events of 0 to 5 people with and without crops."""
    crops = tuple(draw(st.lists(st.none() | jpegs, max_size=5)))
    people = tuple(
        Person(
            box=draw(st.tuples(finite, finite, finite, finite)),
            score=draw(probability),
            answers=tuple(draw(st.lists(answers, max_size=3))),
            crop=crop is not None,
            track=draw(st.none() | counts),
            looks=draw(st.none() | counts),
        )
        for crop in crops
    )
    dim = draw(st.integers(1, 64))
    header = Header(
        device=draw(names),
        epoch=draw(st.integers(0, 2**63 - 1)),
        seq=draw(st.integers(0, 2**63 - 1)),
        camera=draw(names),
        frame=draw(st.integers(0, 2**63 - 1)),
        captured_at=draw(finite),
        clock=draw(st.sampled_from([None, "unsynchronised"])),
        frame_size=draw(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000))),
        bundle=draw(st.text(max_size=64)),
        bank=draw(st.text(max_size=64)),
        embedding_dim=dim,
        people=people,
        skipped=draw(st.integers(0, 100)),
        ended=tuple(draw(st.lists(ended, max_size=3))),
        notices=tuple(draw(st.lists(st.text(max_size=20), max_size=3))),
    )
    vectors = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(len(people), dim))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return Event(header, unit, crops)


def event_of(people: int, dim: int = 64, crops: bool = False) -> Event:
    """An event like a box's."""
    answer = Answer(category="sex", top=(Choice(option="woman", label="женщина", probability=0.75),))
    person = Person(box=(1.5, 2, 30, 40), score=0.5, answers=(answer,), crop=crops)
    header = Header(
        device="box", epoch=1, seq=2, camera="door", frame=3, captured_at=4.5, frame_size=(640, 480), bundle="b",
        bank="c", embedding_dim=dim, people=(person,) * people,
    )  # fmt: skip
    unit = np.eye(dim, dtype=np.float16)[:people]
    return Event(header, unit, (b"\xff\xd8jpeg" if crops else None,) * people)


def assert_equal(one: Event, other: Event) -> None:
    assert one.header == other.header
    assert one.crops == other.crops
    np.testing.assert_array_equal(one.embeddings, other.embeddings, strict=True)


@given(events())
def test_an_event_comes_back_as_it_was(event):
    assert_equal(decode(encode(event)), event)


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("people", [0, 1, 40])
def test_any_number_of_people_comes_back(people, crops):
    event = event_of(people, crops=crops)
    frames = encode(event)
    assert len(frames) == 2 + people * crops
    assert_equal(decode(frames), event)


def test_embeddings_of_any_memory_layout_come_back():
    event = event_of(40)
    turned = Event(event.header, np.asfortranarray(event.embeddings), event.crops)
    assert_equal(decode(encode(turned)), event)


def test_the_header_is_the_json_that_others_read():
    header = json.loads(encode(event_of(1))[0])
    assert header["schema"] == "lookout.event/1"
    assert header["people"][0]["answers"][0]["top"][0] == {"option": "woman", "label": "женщина", "probability": 0.75}


def decodes_or_refuses(frames: list[bytes]) -> None:
    """Anything but an Event or a WireError fails the test."""
    with suppress(WireError):
        assert isinstance(decode(frames), Event)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_bytes_are_refused(frames):
    decodes_or_refuses(frames)


@given(events(), st.data())
def test_a_damaged_message_is_refused_or_still_an_event(event, data):
    frames = encode(event)
    at = data.draw(st.integers(0, len(frames) - 1))
    frame = frames[at]
    start = data.draw(st.integers(0, len(frame)))
    end = data.draw(st.integers(start, len(frame)))
    frames[at] = frame[:start] + data.draw(st.binary(max_size=20)) + frame[end:]
    if data.draw(st.booleans()):
        frames.insert(data.draw(st.integers(0, len(frames))), data.draw(st.sampled_from(frames)))
    if data.draw(st.booleans()):
        del frames[data.draw(st.integers(0, len(frames) - 1))]
    decodes_or_refuses(frames)


@given(st.recursive(st.none() | st.booleans() | finite | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_a_header_field_of_any_kind_is_refused_or_still_an_event(value):
    header, *rest = encode(event_of(1))
    for key in json.loads(header):
        decodes_or_refuses([json.dumps(json.loads(header) | {key: value}).encode(), *rest])


@given(st.binary(min_size=128, max_size=128))
def test_embeddings_of_any_bits_are_refused_or_still_an_event(bits):
    decodes_or_refuses([encode(event_of(1))[0], bits])


HEADER, EMBEDDINGS = encode(event_of(1))
WITH_CROP = encode(event_of(1, crops=True))


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "0 frames"),
        ([HEADER], "1 frames"),
        ([b"", EMBEDDINGS], "header"),
        ([b"\xff" + HEADER, EMBEDDINGS], "header"),
        ([b"[" * 100_000, EMBEDDINGS], "header"),
        ([b" " * (MAX_HEADER + 1), EMBEDDINGS], "header too long"),
        ([HEADER.replace(b"event/1", b"event/2"), EMBEDDINGS], "schema"),
        ([HEADER.replace(b'"seq":2', b'"seq":-1'), EMBEDDINGS], "seq"),
        ([HEADER.replace(b'"seq":2', b'"seq":9223372036854775808'), EMBEDDINGS], "seq"),
        ([HEADER.replace(b'"frame":3', b'"frame":9223372036854775808'), EMBEDDINGS], "frame"),
        ([HEADER.replace(b"640", b"9223372036854775808"), EMBEDDINGS], "frame_size"),
        ([HEADER.replace(b'"skipped":0', b'"skipped":9223372036854775808'), EMBEDDINGS], "skipped"),
        ([HEADER.replace(b"4.5", b"1e999"), EMBEDDINGS], "captured_at"),
        ([HEADER.replace(b'"bank"', b'"bonk"'), EMBEDDINGS], "bank"),
        ([HEADER, EMBEDDINGS + b"\0\0"], "(1, 64) float16"),
        ([HEADER, EMBEDDINGS, b"\xff\xd8"], "crops"),
        ([HEADER, bytes(128)], "unit rows"),
        ([HEADER, b"\x00\x7e" * 64], "unit rows"),  # NaN
        ([HEADER, b"\x01\x7c" * 64], "unit rows"),  # NaN of the signaling kind, on which numpy warns
        ([HEADER, b"\x00\x7c" * 64], "unit rows"),  # infinity
        (WITH_CROP[:2], "crops"),
        ([*WITH_CROP[:2], b"GIF89a"], "JPEG"),
        ([*WITH_CROP[:2], b"\xff\xd8".ljust(MAX_CROP + 1)], "JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_event_is_refused(frames, says):
    with pytest.raises(WireError, match=says.replace("(", r"\(").replace(")", r"\)")):
        decode(frames)


@pytest.mark.parametrize(
    ("embeddings", "crops"),
    [
        (np.zeros((1, 64), np.float32), (None,)),
        (np.zeros((2, 64), np.float16), (None,)),
        (np.zeros((1, 64), np.float16), ()),
        (np.zeros((1, 64), np.float16), (b"\xff\xd8",)),
    ],
)
def test_an_event_that_does_not_fit_together_cannot_be_made(embeddings, crops):
    with pytest.raises(ValueError, match="must"):
        Event(event_of(1).header, embeddings, crops)


# ---- people who are followed ----

# as boxes wrote it before people were followed, but for the shorter names
OLD = {
    "schema": "lookout.event/1", "device": "box", "epoch": 1, "seq": 2, "camera": "door", "frame": 3,
    "captured_at": 4.5, "frame_size": [640, 480], "bundle": "b", "bank": "c", "embedding_dim": 64, "skipped": 1,
    "people": [
        {
            "box": [1.5, 2, 30, 40], "score": 0.5, "crop": False,
            "answers": [{"category": "sex", "top": [{"option": "woman", "label": "женщина", "probability": 0.75}]}],
        }
    ],
}  # fmt: skip


def test_an_event_of_a_box_that_follows_nobody_is_read_as_it_was_meant():
    event = decode([json.dumps(OLD).encode(), EMBEDDINGS])
    (person,) = event.header.people
    assert (person.track, person.looks, event.header.ended, event.header.notices) == (None, None, (), ())
    assert (person.answers[0].unknown, person.answers[0].support) == (None, None)
    assert (event.header.skipped, person.answers[0].top[0].option) == (1, "woman")
    assert_equal(decode(encode(event)), event)


def test_what_is_not_known_of_a_person_is_not_in_the_json():
    header = json.loads(HEADER)
    assert header["people"][0].keys() == {"box", "score", "answers", "crop"}
    assert header["people"][0]["answers"][0].keys() == {"category", "top"}


def test_the_json_of_a_person_who_is_followed():
    answer = Answer(category="sex", top=(Choice(option="woman", probability=0.4),), unknown=True, support=0.6667)
    person = Person(box=(1, 2, 3, 4), score=0.5, answers=(answer,), track=12, looks=3)
    gone = Ended(track=11, frames=40, first_seen=1.5, last_seen=5.5)
    plain = event_of(1)
    event = Event(plain.header.model_copy(update={"people": (person,), "ended": (gone,)}), plain.embeddings, (None,))
    header = json.loads(encode(event)[0])
    assert header["people"][0] | {"answers": []} == {
        "box": [1, 2, 3, 4], "score": 0.5, "crop": False, "track": 12, "looks": 3, "answers": [],
    }  # fmt: skip
    assert header["people"][0]["answers"][0] | {"top": []} == {
        "category": "sex", "unknown": True, "support": 0.6667, "top": [],
    }  # fmt: skip
    assert header["ended"] == [{"track": 11, "frames": 40, "first_seen": 1.5, "last_seen": 5.5}]
    assert_equal(decode(encode(event)), event)


def changed(of: object, *path: object, to: object) -> object:
    """A JSON value with one place of it changed."""
    if not path:
        return to
    if isinstance(of, dict):
        return {**of, path[0]: changed(of.get(path[0]), *path[1:], to=to)}
    return [changed(one, *path[1:], to=to) if i == path[0] else one for i, one in enumerate(of)]


GONE = {"track": 1, "frames": 2, "first_seen": 3.0, "last_seen": 4.0}


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("people", 0, "track"), 0),
        (("people", 0, "track"), 2**63 - 1),
        (("people", 0, "track"), None),
        (("people", 0, "looks"), 0),
        (("people", 0, "answers", 0, "support"), 0),
        (("people", 0, "answers", 0, "support"), 1),
        (("people", 0, "answers", 0, "unknown"), True),
        (("people", 0, "answers", 0, "unknown"), None),
        (("ended",), []),
        (("ended",), [GONE, GONE]),
        (("ended",), [GONE | {"track": 2**63 - 1, "frames": 0, "first_seen": -1}]),
    ],
)
def test_what_may_be_said_of_a_track(path, to):
    decode([json.dumps(changed(OLD, *path, to=to)).encode(), EMBEDDINGS])


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("people", 0, "track"), -1),
        (("people", 0, "track"), 2**63),
        (("people", 0, "track"), 1.5),
        (("people", 0, "looks"), -1),
        (("people", 0, "looks"), 2**63),
        (("people", 0, "answers", 0, "support"), 1.01),
        (("people", 0, "answers", 0, "support"), -0.01),
        (("people", 0, "answers", 0, "unknown"), False),
        (("people", 0, "answers", 0, "unknown"), "yes"),
        (("people", 0, "colour"), 1),
        (("ended",), None),
        (("ended",), GONE),
        (("ended",), [GONE | {"track": -1}]),
        (("ended",), [GONE | {"frames": 2**63}]),
        (("ended",), [GONE | {"last_seen": None}]),
        (("ended",), [GONE | {"last_seen": float("inf")}]),
        (("ended",), [GONE | {"colour": 1}]),
        (("ended",), [{key: value for key, value in GONE.items() if key != "frames"}]),
    ],
)
def test_what_may_not_be_said_of_a_track(path, to):
    with pytest.raises(WireError, match=r"header: " + ("ended" if path[0] == "ended" else "people.0")):
        decode([json.dumps(changed(OLD, *path, to=to)).encode(), EMBEDDINGS])
