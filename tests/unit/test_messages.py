"""How items stand in a stream: what goes in comes out, within every limit."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from collector.messages import MAX_REFUSED, device, message_of, pack, token, unpack
from collector.sinks import Item, Poison
from edge.errors import WireError
from edge.events import Event, Header, encode
from edge.protocol import Gone
from tests.fakes import unit_rows

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)
ROOMY = 1 << 20


def event(seq: int = 5, name: str = "box 1") -> Event:
    header = Header(
        device=name, epoch=7, seq=seq, camera="door", frame=seq, captured_at=1.7e9, frame_size=(640, 480),
        bundle="b", bank="c", embedding_dim=64, people=(),
    )  # fmt: skip
    return Event(header, unit_rows(1, 64)[:0].astype("<f2"), ())


def item(payload: Event | Gone | Poison, *frames: bytes, first: int = 5, name: str = "box 1") -> Item:
    last = payload.last if isinstance(payload, Gone) else first
    return Item(name, 7, first, last, payload, frames)


# --- frames as one value ----------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), max_size=8))
@example([])
@example([b""])
@example([b"", b"\0" * 256])
def test_frames_come_out_as_they_went_in(frames: list[bytes]) -> None:
    assert unpack(pack(frames)) == frames


def test_the_layout_is_the_documented_one() -> None:
    assert pack([b"ab", b"", b"c" * 258]) == b"\0\0\0\2ab\0\0\0\0\0\0\1\2" + b"c" * 258


@given(st.binary(max_size=64))
def test_bytes_are_frames_or_a_wire_error(payload: bytes) -> None:
    try:
        frames = unpack(payload)
    except WireError:
        return
    assert pack(frames) == payload


@pytest.mark.parametrize("payload", [b"\0", b"\0\0\0", b"\0\0\0\2a", b"\0\0\0\1ab", b"\xff\xff\xff\xff"])
def test_half_a_frame_is_none(payload: bytes) -> None:
    with pytest.raises(WireError, match="packed frames"):
        unpack(payload)


# --- names ------------------------------------------------------------------------------------------------------------


@given(NAMES)
@example(".")
@example("%2E")
@example("a b\r\n*>")
def test_a_name_is_one_word_and_comes_back(name: str) -> None:
    word = token(name)
    assert re.fullmatch(r"[A-Za-z0-9_~%-]+", word)
    assert device(word) == name


@given(NAMES, NAMES)
def test_two_names_are_two_words(one: str, other: str) -> None:
    assert (token(one) == token(other)) == (one == other)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_an_event() -> None:
    frames = tuple(encode(event()))
    message = message_of(item(event(), *frames), ROOMY)
    assert message.subject == "lookout.event.box%201"
    assert message.headers == {
        "Nats-Msg-Id": "box%201:7:5", "Lookout-Device": "box%201", "Lookout-Epoch": "7", "Lookout-Seq": "5",
    }  # fmt: skip
    assert unpack(message.payload) == list(frames)
    assert not message.refused


def test_what_is_gone() -> None:
    gone = Gone(first=5, last=9, reason="spool full")
    message = message_of(item(gone), ROOMY)
    assert message.subject == "lookout.gone.box%201"
    assert (message.headers["Nats-Msg-Id"], message.headers["Lookout-Seq"]) == ("box%201:7:5-9", "5-9")
    assert Gone.model_validate_json(message.payload) == gone
    assert not message.refused


def test_of_what_is_gone_only_what_was_not_known_before() -> None:
    message = message_of(Item("box 1", 7, 8, 9, Gone(first=5, last=9, reason="spool full")), ROOMY)
    assert message.headers["Lookout-Seq"] == "8-9"
    assert Gone.model_validate_json(message.payload) == Gone(first=8, last=9, reason="spool full")


def test_one_that_is_gone_is_not_taken_for_the_event() -> None:
    gone = message_of(item(Gone(first=5, last=5, reason="too old")), ROOMY)
    assert gone.headers["Nats-Msg-Id"] == "box%201:7:5-5"


def test_poison() -> None:
    frames = (b"\xff" * 10, b"not an event")
    message = message_of(item(Poison("header: no\nJSON \x1b[2J é"), *frames), ROOMY)
    assert message.subject == "lookout.refused.box%201"
    assert message.headers["Nats-Msg-Id"] == "box%201:7:5:refused"
    assert message.headers["Lookout-Reason"] == "header: no?JSON ?[2J ?"
    assert unpack(message.payload) == list(frames)
    assert message.refused == "header: no\nJSON \x1b[2J é"


def test_of_what_is_too_large_the_leading_frames_stay() -> None:
    frames = (b"header", b"vectors", b"\xff\xd8" + b"j" * 5000)
    message = message_of(item(event(), *frames), 4096)
    assert message.subject == "lookout.refused.box%201"
    assert unpack(message.payload) == [b"header", b"vectors"]
    whole = message_of(item(event(), *frames), ROOMY).size
    assert message.refused == f"{whole} bytes, and NATS takes 4096: raise max_payload in the server's configuration"
    assert message.size <= 4096


def test_a_limit_is_kept_to_the_byte() -> None:
    frames = (b"header", b"j" * 5000)
    size = message_of(item(event(), *frames), ROOMY).size
    assert not message_of(item(event(), *frames), size).refused
    assert message_of(item(event(), *frames), size - 1, "the roof").refused == (
        f"{size} bytes, and NATS takes {size - 1}: raise the roof"
    )


def test_of_a_long_poison_a_person_gets_enough() -> None:
    frames = (b"a" * 1000, b"b" * MAX_REFUSED, b"c")
    message = message_of(item(Poison("no"), *frames), ROOMY)
    assert unpack(message.payload) == [frames[0]]
    assert not message_of(item(Poison("no"), b"b" * (MAX_REFUSED - 3)), ROOMY).payload


@given(NAMES, st.text(max_size=500), st.lists(st.binary(max_size=100), max_size=3))
def test_headers_are_lines_of_ascii(name: str, reason: str, frames: list[bytes]) -> None:
    message = message_of(item(Poison(reason), *frames, name=name), ROOMY)
    assert all(re.fullmatch(r"[ -~]*", value) for value in message.headers.values())
