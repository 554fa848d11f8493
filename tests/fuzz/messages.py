"""Fuzz target: edge.protocol. Whatever comes is a message or a WireError; what was read is said in the same words."""

from __future__ import annotations

import json

from tests.fuzz.fuzzing import Choices, assert_fits, frames_of, fuzz, instrumented, joined, json_of

with instrumented():
    from edge import protocol
    from edge.errors import WireError

WINDOW = protocol.Window(events=256, bytes=4 << 20)
VALID = [
    protocol.encode(message)
    for message in (
        protocol.Hello(device="box", epoch=7, first=3, end=5),
        protocol.Data(4, (b"header", b"rows")),
        protocol.Gone(first=3, last=9, reason="spool full"),
        protocol.Ping(),
        protocol.Welcome(epoch=7, next=3, window=WINDOW),
        protocol.Ack(epoch=7, next=3, window=WINDOW),
        protocol.Refused(epoch=7, seq=3, reason="no event"),
        protocol.Reset(reason="a gap"),
        protocol.Denied(reason="unknown key"),
        protocol.Pong(),
    )
]
RAW, WITH_JSON = b"\0", b"\1"


def target(data: bytes) -> None:
    choices = Choices(data)
    if choices.take(1) != WITH_JSON:
        check(frames_of(choices.rest()))
        return
    name, *rest = choices.pick([frames for frames in VALID if frames[1:] and frames[1].startswith(b"{")])
    content: object = json.loads(rest[0])
    while choices:
        content = choices.changed(content)
    check([name, json_of(content)])


def check(frames: list[bytes]) -> None:
    for read in (protocol.from_box, protocol.from_collector):
        try:
            message = read(frames)
        except WireError as error:
            assert_fits(error)
            continue
        assert read(protocol.encode(message)) == message
        match message:
            case protocol.Data(seq=seq) | protocol.Gone(last=seq) | protocol.Refused(seq=seq):
                protocol.Ack(epoch=0, next=seq + 1, window=WINDOW)
            case protocol.Hello():
                assert message.first <= message.end
        if isinstance(message, protocol.Gone):
            assert message.count > 0


def seeds() -> list[bytes]:
    whole = [RAW + joined(frames) for frames in VALID]
    changes = [WITH_JSON + bytes((which, 1, 2, kind)) for which in range(8) for kind in range(8)]
    return whole + changes


if __name__ == "__main__":
    fuzz(target, seeds())
