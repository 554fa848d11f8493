"""Contract 3: every message comes back as it was, anything else is a WireError, and its document tells the truth."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Lt, MaxLen, MinLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from edge.errors import WireError
from edge.protocol import (
    MAX_CONTROL,
    NAME,
    Ack,
    Data,
    Denied,
    FromBox,
    FromCollector,
    Gone,
    Hello,
    Name,
    Number,
    Ping,
    Pong,
    Reason,
    Refused,
    Reset,
    Seq,
    Welcome,
    Window,
    encode,
    from_box,
    from_collector,
)

DOC = (Path(__file__).parents[2] / "docs/protocol.md").read_text(encoding="utf-8")

numbers = st.integers(0, 2**63 - 1)
seqs = st.integers(0, 2**63 - 2)
reasons = st.text(max_size=500)
windows = st.builds(Window, events=st.integers(1, 2**31 - 1), bytes=st.integers(1, 2**63 - 1))
pairs = st.tuples(seqs, seqs).map(sorted)
said_by_box = st.one_of(
    st.builds(
        lambda device, epoch, pair: Hello(device=device, epoch=epoch, first=pair[0], end=pair[1]),
        st.text(min_size=1, max_size=200),
        numbers,
        st.tuples(numbers, numbers).map(sorted),
    ),
    st.builds(Data, seqs, st.lists(st.binary(max_size=50), max_size=4).map(tuple)),
    st.builds(lambda pair, reason: Gone(first=pair[0], last=pair[1], reason=reason), pairs, reasons),
    st.just(Ping()),
)
said_by_collector = st.one_of(
    st.builds(Welcome, epoch=numbers, next=numbers, window=windows),
    st.builds(Ack, epoch=numbers, next=numbers, window=windows),
    st.builds(Refused, epoch=numbers, seq=seqs, reason=reasons),
    st.builds(Reset, reason=reasons),
    st.builds(Denied, reason=reasons),
    st.just(Pong()),
)
WINDOW = Window(events=256, bytes=4 << 20)
EXAMPLES: dict[str, tuple[FromBox | FromCollector, list[bytes]]] = {
    "HELLO": (
        Hello(device="tür", epoch=2**62 - 1, first=0, end=3),
        [
            b"HELLO",
            '{"protocol":"lookout/1","device":"tür","epoch":4611686018427387903,"first":0,"end":3}'.encode(),
        ],
    ),
    "DATA": (Data(258, (b"header", b"", b"jpeg")), [b"DATA", b"\0\0\0\0\0\0\1\2", b"header", b"", b"jpeg"]),
    "GONE": (Gone(first=3, last=9, reason="spool full"), [b"GONE", b'{"first":3,"last":9,"reason":"spool full"}']),
    "PING": (Ping(), [b"PING"]),
    "WELCOME": (
        Welcome(epoch=1, next=2, window=WINDOW),
        [b"WELCOME", b'{"protocol":"lookout/1","epoch":1,"next":2,"window":{"events":256,"bytes":4194304}}'],
    ),
    "ACK": (
        Ack(epoch=1, next=2, window=WINDOW),
        [b"ACK", b'{"epoch":1,"next":2,"window":{"events":256,"bytes":4194304}}'],
    ),
    "REFUSED": (Refused(epoch=1, seq=2, reason="x"), [b"REFUSED", b'{"epoch":1,"seq":2,"reason":"x"}']),
    "RESET": (Reset(reason="x"), [b"RESET", b'{"reason":"x"}']),
    "DENIED": (Denied(reason="x"), [b"DENIED", b'{"reason":"x"}']),
    "PONG": (Pong(), [b"PONG"]),
}
NAMES = {one.__name__.upper() for one in get_args(FromBox) + get_args(FromCollector)}
READERS = {
    **dict.fromkeys((one.__name__.upper() for one in get_args(FromBox)), from_box),
    **dict.fromkeys((one.__name__.upper() for one in get_args(FromCollector)), from_collector),
}


@given(said_by_box)
def test_what_a_box_says_comes_back_as_it_was(message: FromBox) -> None:
    assert from_box(encode(message)) == message


@given(said_by_collector)
def test_what_a_collector_says_comes_back_as_it_was(message: FromCollector) -> None:
    assert from_collector(encode(message)) == message


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_bytes_are_those_that_others_read_and_write(name: str) -> None:
    message, frames = EXAMPLES[name]
    assert encode(message) == frames
    assert READERS[name](frames) == message


def test_every_message_has_its_example() -> None:
    assert set(EXAMPLES) == NAMES


@pytest.mark.parametrize("name", EXAMPLES)
def test_who_may_say_it(name: str) -> None:
    (other,) = {from_box, from_collector} - {READERS[name]}
    with pytest.raises(WireError, match=r"not a message of lookout/1: expected .*, got \d frames"):
        other(EXAMPLES[name][1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_has_its_frames_and_no_others(name: str) -> None:
    frames = EXAMPLES[name][1]
    read = READERS[name]
    if name != "DATA":  # an event has as many as it likes
        with pytest.raises(WireError, match="not a message"):
            read([*frames, b""])
    for fewer in ([], frames[1:], frames[:1] if len(frames) > 1 else []):
        with pytest.raises(WireError, match="not a message"):
            read(fewer)


def fields(name: str) -> dict[str, Any]:
    """The JSON of the example of a message; empty for those without."""
    frames = EXAMPLES[name][1]
    return json.loads(frames[1]) if len(frames) == 2 and frames[1].startswith(b"{") else {}


def changed(name: str, *path: str, to: object) -> list[bytes]:
    """The example with one field replaced; `...` leaves it out."""
    content = fields(name)
    place = content
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return [name.encode(), json.dumps(content).encode()]


PATHS = [(name, key) for name in EXAMPLES for key in fields(name)] + [
    (name, "window", key) for name in ("WELCOME", "ACK") for key in ("events", "bytes")
]
ids = "/".join


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_listed_field_must_be_there(path: tuple[str, ...]) -> None:
    with pytest.raises(WireError, match=rf"^{path[0]}: {'.'.join(path[1:])}: Field required"):
        READERS[path[0]](changed(*path, to=...))


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_field_of_another_kind_is_refused(path: tuple[str, ...]) -> None:
    good = EXAMPLES[path[0]][0]
    for part in path[1:]:
        good = getattr(good, part)
    kinds: list[object] = [None, True, 1.0, 1e3, -1, 2**63, "7", "", ["x"], {}, float("nan"), float("inf"), "x" * 501]
    for kind in kinds:
        if isinstance(good, str) and path[1] == "reason" and kind in ("7", ""):
            continue
        if path[1] == "device" and kind == "7":
            continue
        with pytest.raises(WireError, match=rf"^{path[0]}: "):
            READERS[path[0]](changed(*path, to=kind))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if fields(name)])
def test_unknown_fields_are_ignored_and_the_order_is_free(name: str) -> None:
    message, (first, text) = EXAMPLES[name]
    content = {"later": [1, {"x": None}], **dict(reversed(json.loads(text).items())), "zzz": 2**70}
    if "window" in content:
        content["window"]["people"] = 7
    assert READERS[name]([first, json.dumps(content, indent=3).encode()]) == message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"reason":"\xff"}',
        b'{"reason":"\\ud800"}',
        b'{"reason":"x"',
        b'{"reason":"x"}{}',
        b'{"reason":"x","deep":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"reason":"x","deep":' + b'{"":' * 3000,
        b'{"reason":"x","long":' + b"9" * 6000 + b"}",
        b'{"reason":"' + b" " * MAX_CONTROL + b'"}',
        b'{"reason":"x"}' + b" " * MAX_CONTROL,
    ],
    ids=lambda text: repr(text[:24]),
)
@pytest.mark.parametrize("name", [name for name in EXAMPLES if fields(name)])
def test_what_is_no_json_object_is_refused(name: str, text: bytes) -> None:
    with pytest.raises(WireError) as caught:
        READERS[name]([name.encode(), text])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "frames",
    [
        changed("HELLO", "end", to=2**63 - 1),
        changed("HELLO", "epoch", to=2**63 - 1),
        changed("HELLO", "device", to="ü" * 200),
        changed("GONE", "last", to=2**63 - 2),
        changed("GONE", "reason", to="\0" * 500),
        [b"DATA", (2**63 - 2).to_bytes(8, "big")],
        changed("ACK", "next", to=2**63 - 1),
        changed("ACK", "window", "events", to=2**31 - 1),
    ],
    ids=lambda frames: repr(frames[0]),
)
def test_the_last_that_is_allowed(frames: list[bytes]) -> None:
    READERS[frames[0].decode()](frames)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (changed("HELLO", "first", to=4), "first <= end"),
        (changed("HELLO", "protocol", to="lookout/2"), "lookout/1"),
        (changed("HELLO", "device", to="ü" * 201), "200"),
        (changed("GONE", "last", to=2), "first <= last"),
        (changed("GONE", "last", to=2**63 - 1), "less than"),  # or the number after it would be none
        (changed("REFUSED", "seq", to=2**63 - 1), "less than"),
        (changed("ACK", "window", "events", to=0), "greater than"),
        (changed("ACK", "window", "events", to=2**31), "less than"),
        ([b"DATA", b"\0" * 7, b"x"], "not a message"),
        ([b"DATA", b"\0" * 9, b"x"], "not a message"),
        ([b"DATA", (2**63 - 1).to_bytes(8, "big"), b"x"], "not a message"),
        ([b"DATA", b"\xff" * 8, b"x"], "not a message"),
        ([b"hello", EXAMPLES["HELLO"][1][1]], "not a message"),
        ([b"A" * 100_000], "not a message"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[0][:8]),
)
def test_the_first_that_is_not_allowed(frames: list[bytes], says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        READERS.get(frames[0].decode(), from_box)(frames)
    assert len(str(caught.value)) < 300


def test_how_many_are_gone() -> None:
    assert Gone(first=3, last=3, reason="").count == 1
    assert Gone(first=0, last=2**63 - 2, reason="").count == 2**63 - 1


# --- whatever comes ---------------------------------------------------------------------------------------------------


def reads_or_refuses(frames: list[bytes]) -> None:
    """Anything but a message or a WireError fails the test; what is read is said again in the same words."""
    for read in (from_box, from_collector):
        with suppress(WireError):
            message = read(frames)
            assert read(encode(message)) == message


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_random_frames(frames: list[bytes]) -> None:
    reads_or_refuses(frames)


@given(st.sampled_from(sorted(NAMES)), st.lists(st.binary(max_size=100), max_size=3))
def test_random_frames_behind_a_name(name: str, frames: list[bytes]) -> None:
    reads_or_refuses([name.encode(), *frames])


@given(st.one_of(said_by_box, said_by_collector), st.data())
def test_a_damaged_message(message: FromBox | FromCollector, data: st.DataObject) -> None:
    frames = encode(message)
    at = data.draw(st.integers(0, len(frames) - 1))
    damages: dict[str, Callable[[bytes], bytes]] = {
        "flip": lambda frame: flipped(frame, data.draw(st.integers(0, 8 * len(frame) - 1))) if frame else b"",
        "cut": lambda frame: frame[: data.draw(st.integers(0, len(frame)))],
        "insert": lambda frame: data.draw(st.binary(max_size=9)) + frame,
    }
    for damage in data.draw(st.lists(st.sampled_from(sorted(damages)), max_size=3)):
        frames[at] = damages[damage](frames[at])
    if data.draw(st.booleans()):
        frames.insert(data.draw(st.integers(0, len(frames))), data.draw(st.sampled_from(frames)))
    if data.draw(st.booleans()):
        del frames[data.draw(st.integers(0, len(frames) - 1))]
    reads_or_refuses(frames)


def flipped(frame: bytes, bit: int) -> bytes:
    return (int.from_bytes(frame, "big") ^ 1 << bit).to_bytes(len(frame), "big")


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(PATHS), anything)
def test_a_field_of_any_kind(path: tuple[str, ...], value: object) -> None:
    reads_or_refuses(changed(*path, to=value))


# --- docs/protocol.md -------------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text: each a list of rows of cells, without head and rule."""
    found = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]


def section(heading: str) -> str:
    """What stands under a heading, up to the next."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", DOC, re.MULTILINE | re.DOTALL)
    return str(found)


# the document's word for the type of a field
TYPES = {Number: "number", Seq: "seq", Name: "name", Reason: "reason", Window: "window"}


def word_of(model: type[BaseModel], field: str) -> str:
    annotation, metadata = model.model_fields[field].annotation, model.model_fields[field].metadata
    if get_args(annotation) == (NAME,):
        return NAME
    if model is Window:
        (low,) = (one.ge for one in metadata if isinstance(one, Ge))
        (high,) = (int(str(one.lt)) for one in metadata if isinstance(one, Lt))
        return f"{low} <= n < 2^{high.bit_length() - 1}"
    return next(
        word for kind, word in TYPES.items() if kind is annotation or bounds(kind) == (annotation, str(metadata))
    )


def bounds(kind: Any) -> tuple[object, str]:
    """Of an Annotated type: the plain one, and its bounds as pydantic keeps them."""

    class Probe(BaseModel):
        field: kind

    return Probe.model_fields["field"].annotation, str(Probe.model_fields["field"].metadata)


def test_the_document_has_every_message() -> None:
    (rows,) = (table for table in tables(section("Messages")) if table[0][0] == "`HELLO`")
    by = {"box": get_args(FromBox), "collector": get_args(FromCollector)}
    assert [(name, who) for name, who, *_ in rows] == [
        (f"`{one.__name__.upper()}`", who) for who, messages in by.items() for one in messages
    ]
    for name, _, frames, _ in rows:
        example = EXAMPLES[name.strip("`")][1]
        assert frames == ("" if len(example) == 1 else "number, then the event's frames" if "DATA" in name else "JSON")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if fields(name)])
def test_the_document_has_every_field(name: str) -> None:
    model = type(EXAMPLES[name][0])
    assert issubclass(model, BaseModel)
    shown, *_ = tables(section(name))
    assert [row[:2] for row in shown] == [[field, word_of(model, field)] for field in model.model_fields]


def test_the_document_has_the_windows_fields() -> None:
    _, shown = tables(section("ACK"))
    assert [row[:2] for row in shown] == [[field, word_of(Window, field)] for field in Window.model_fields]


def test_the_document_has_the_bounds_of_every_type() -> None:
    (rows,) = (table for table in tables(section("Messages")) if table[0][0] == "number")
    told = dict(rows)
    assert set(told) == {*TYPES.values(), NAME}

    def bound(kind: Any, of: type[Any], attribute: str) -> int:
        (found,) = (getattr(one, attribute) for one in get_args(kind)[1].metadata if isinstance(one, of))
        return int(found)

    assert (bound(Number, Ge, "ge"), bound(Number, Lt, "lt")) == (0, 2**63)
    assert "0 <= n < 2^63, " in told["number"]
    assert (bound(Seq, Ge, "ge"), bound(Seq, Lt, "lt")) == (0, 2**63 - 1)
    assert told["seq"].endswith("0 <= n < 2^63 - 1")
    low, high = bound(Name, MinLen, "min_length"), bound(Name, MaxLen, "max_length")
    assert told["name"] == f"text of {low} to {high} Unicode characters"
    assert told["reason"].startswith(f"text of at most {bound(Reason, MaxLen, 'max_length')} Unicode characters")
    assert f"`{NAME}`" in told[NAME]


def test_the_document_has_the_numbers_of_the_code() -> None:
    (rows,) = tables(section("Numbers of the code"))
    for name, value, file, _ in rows:
        module = importlib.import_module(file.strip("`").removesuffix(".py").replace("/", "."))
        assert float(value.split()[0]) == getattr(module, name.strip("`")), name
    told = {name.strip("`") for name, *_ in rows}
    assert {"HEARTBEAT", "SILENCE", "MAX_CONTROL", "MAX_HEADER", "MAX_CROP", "PATIENCE", "MAX_SESSIONS"} <= told
    in_capitals = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", DOC)) - NAMES
    assert {name for name in in_capitals if not name.startswith("ZMQ_")} == told
