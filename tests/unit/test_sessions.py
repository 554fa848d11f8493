"""The collector's end of the wire: whatever boxes say in whatever order, it acknowledges only what is kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from collector.sessions import (
    AGAIN,
    ANYONE,
    BYTES,
    EVENTS,
    FEWEST_BYTES,
    FEWEST_EVENTS,
    FORGOTTEN,
    MAX_SESSIONS,
    MOST_BYTES,
    MOST_EVENTS,
    Sessions,
)
from collector.sinks import Item, Kept, Outcome, Poison
from edge.errors import WireError
from edge.events import MAX_HEADER, Event, encode
from edge.protocol import (
    SILENCE,
    Ack,
    Data,
    Denied,
    FromBox,
    FromCollector,
    Gone,
    Hello,
    Ping,
    Pong,
    Refused,
    Reset,
    Welcome,
    Window,
)
from edge.protocol import encode as frames_of
from tests.boxes import data, event, person

WIDE = Window(events=MOST_EVENTS, bytes=MOST_BYTES)
LAST = 2**63 - 2  # the highest number that an event can have


class Kitchen:
    """A sink for tests: what stands under the numbers of each (device, epoch), and a machine before it."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], dict[int, bytes | str]] = {}  # the header of an event, or why there is none
        self.refused: list[tuple[int, str]] = []
        self.sessions = Sessions(self.resume)

    def resume(self, device: str, epoch: int) -> int | None:
        kept = self.kept.get((device, epoch), {})
        return next(number for number in range(len(kept) + 1) if number not in kept)

    def add(self, items: Sequence[Item]) -> list[Outcome]:
        return [self._keep(item, self.kept.setdefault((item.device, item.epoch), {})) for item in items]

    def _keep(self, item: Item, kept: dict[int, bytes | str]) -> Outcome:
        before = dict(kept)
        match item.payload:
            case Gone(reason=reason):
                kept.update({n: reason for n in range(item.first, item.last + 1) if n not in kept})
                return Outcome(Kept.NEW if kept != before else Kept.DUPLICATE)
            case Poison(reason=reason):
                self.refused.append((item.last, reason))
                kept.setdefault(item.last, reason)
                return Outcome(Kept.REFUSED, reason)
        header = item.frames[0]
        if kept.setdefault(item.last, header) == header:
            return Outcome(Kept.DUPLICATE if item.last in before else Kept.NEW)
        if isinstance(kept[item.last], str):
            kept[item.last] = header
            return Outcome(Kept.NEW)
        self.refused.append((item.last, "another"))
        return Outcome(Kept.REFUSED, "another")

    def hear(self, peer: bytes, message: FromBox, now: float = 0.0, writes: str | None = ANYONE) -> list[FromCollector]:
        return self.sessions.heard(peer, writes, frames_of(message), now)

    def commit(self) -> list[tuple[bytes, FromCollector]]:
        return self.sessions.settle(self.add(self.sessions.take()))


@pytest.fixture
def kitchen() -> Kitchen:
    return Kitchen()


def hello(first: int = 0, end: int = 100, epoch: int = 7, device: str = "box") -> Hello:
    return Hello(device=device, epoch=epoch, first=first, end=max(first, end))


def greeted(kitchen: Kitchen, *peers: bytes, first: int = 0, now: float = 0.0) -> None:
    for peer in peers:
        (welcome,) = kitchen.hear(peer, hello(first), now)
        assert isinstance(welcome, Welcome)


# --- in order ---------------------------------------------------------------------------------------------------------


def test_hello_data_commit_ack(kitchen: Kitchen) -> None:
    assert kitchen.hear(b"p", hello()) == [Welcome(epoch=7, next=0, window=WIDE)]
    for seq in range(3):
        assert kitchen.hear(b"p", data(event(seq))) == []
    assert kitchen.kept == {}, "nothing is kept before the commit"
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=3, window=WIDE))]
    assert list(kitchen.kept["box", 7]) == [0, 1, 2]
    assert kitchen.commit() == [], "an ACK is said once"


def test_an_item_has_the_bytes_as_they_came(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    one = event(0, person(crop=True))
    kitchen.hear(b"p", data(one))
    (item,) = kitchen.sessions.take()
    assert (item.device, item.epoch, item.first, item.last, item.frames) == ("box", 7, 0, 0, tuple(encode(one)))
    assert isinstance(item.payload, Event)
    assert item.payload.header == one.header


def test_a_box_goes_on_where_the_sink_stands(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    for seq in range(5):
        kitchen.hear(b"p", data(event(seq)))
    kitchen.commit()
    kitchen.sessions = Sessions(kitchen.resume)  # it was killed
    assert kitchen.hear(b"q", hello(first=3)) == [Welcome(epoch=7, next=5, window=WIDE)]
    assert kitchen.hear(b"q", data(event(5))) == []
    assert kitchen.commit() == [(b"q", Ack(epoch=7, next=6, window=WIDE))]


def test_a_sink_that_does_not_know_begins_where_the_box_does(kitchen: Kitchen) -> None:
    kitchen.sessions = Sessions(lambda device, epoch: None)
    assert kitchen.hear(b"p", hello(first=3)) == [Welcome(epoch=7, next=3, window=WIDE)]
    assert kitchen.sessions.take() == []
    kitchen.hear(b"p", data(event(3)))
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=4, window=WIDE))]


def test_what_came_before_is_acknowledged_again(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    for seq in (0, 1, 1, 0):
        assert kitchen.hear(b"p", data(event(seq))) == []
    assert len(kitchen.sessions.take()) == 2
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=2, window=WIDE))]
    assert kitchen.sessions.duplicates == 2
    kitchen.hear(b"p", data(event(0)))
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=2, window=WIDE))]


def test_gone_takes_the_place_of_its_numbers(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    kitchen.hear(b"p", Gone(first=0, last=4, reason="spool full"))
    kitchen.hear(b"p", Gone(first=2, last=6, reason="too old"))
    kitchen.hear(b"p", Gone(first=1, last=6, reason="again"))
    kitchen.hear(b"p", data(event(7)))
    spans = [(item.first, item.last) for item in kitchen.sessions.take()]
    assert spans == [(0, 4), (5, 6), (7, 7)]
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=8, window=WIDE))]
    assert [kitchen.kept["box", 7][n] for n in (0, 4, 5, 6)] == ["spool full"] * 2 + ["too old"] * 2


def test_the_last_number_there_is(kitchen: Kitchen) -> None:
    kitchen.sessions = Sessions(lambda device, epoch: None)
    greeted(kitchen, b"p", first=LAST)
    kitchen.hear(b"p", data(event(LAST)))
    (item,) = kitchen.sessions.take()
    assert (item.first, item.last) == (LAST, LAST)
    assert kitchen.sessions.settle([Outcome(Kept.NEW)]) == [(b"p", Ack(epoch=7, next=LAST + 1, window=WIDE))]
    assert kitchen.hear(b"p", Gone(first=0, last=LAST, reason="x")) == []
    assert kitchen.sessions.settle([]) == [(b"p", Ack(epoch=7, next=LAST + 1, window=WIDE))]


# --- what the box did not keep ----------------------------------------------------------------------------------------


def test_what_the_box_did_not_keep_is_recorded_before_it_is_welcomed(kitchen: Kitchen) -> None:
    assert kitchen.hear(b"p", hello(first=3)) == [], "WELCOME would say that this is kept"
    (item,) = kitchen.sessions.take()
    assert (item.first, item.last, item.payload) == (0, 2, Gone(first=0, last=2, reason="not kept by the box"))
    assert kitchen.commit() == [(b"p", Welcome(epoch=7, next=3, window=WIDE))]
    assert kitchen.hear(b"p", data(event(3))) == []
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=4, window=WIDE))]


def test_one_that_does_not_wait_for_its_welcome_is_told_where_it_stands(kitchen: Kitchen) -> None:
    kitchen.hear(b"p", hello(first=3))
    kitchen.hear(b"p", data(event(3)))
    assert kitchen.commit() == [(b"p", Welcome(epoch=7, next=4, window=WIDE))]


def test_one_that_says_hello_again_before_its_welcome_gets_one(kitchen: Kitchen) -> None:
    kitchen.hear(b"p", hello(first=3))
    kitchen.hear(b"p", hello(first=4))
    assert kitchen.commit() == [(b"p", Welcome(epoch=7, next=4, window=WIDE))]


# --- out of order -----------------------------------------------------------------------------------------------------

ASTRAY = [data(event(1)), data(event(LAST)), Gone(first=1, last=1, reason="x"), Gone(first=1, last=LAST, reason="x")]


@pytest.mark.parametrize("message", ASTRAY)
def test_a_gap_is_answered_by_reset_and_nothing_of_it_is_kept(kitchen: Kitchen, message: FromBox) -> None:
    greeted(kitchen, b"p")
    (reset,) = kitchen.hear(b"p", message)
    assert isinstance(reset, Reset)
    assert kitchen.sessions.take() == []
    assert kitchen.sessions.resets == 1
    assert kitchen.hear(b"p", data(event(0))) == [], "it has to say HELLO first, and was told so"
    assert kitchen.commit() == []
    greeted(kitchen, b"p")


def test_a_gap_takes_back_nothing_that_came_in_order(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    kitchen.hear(b"p", data(event(0)))
    kitchen.hear(b"p", data(event(5)))
    assert kitchen.commit() == [], "its session has ended"
    assert list(kitchen.kept["box", 7]) == [0]
    assert kitchen.hear(b"p", hello()) == [Welcome(epoch=7, next=1, window=WIDE)]


@pytest.mark.parametrize("message", [data(event(0)), Gone(first=0, last=1, reason="x"), Ping()])
def test_without_a_hello_there_is_only_reset_now_and_then(kitchen: Kitchen, message: FromBox) -> None:
    assert kitchen.hear(b"p", message, 0.0) == [Reset(reason="a HELLO comes first")]
    for _ in range(1000):
        assert kitchen.hear(b"p", message, AGAIN / 2) == []
    assert kitchen.hear(b"q", message, AGAIN / 2) == [Reset(reason="a HELLO comes first")], "that is another one"
    assert kitchen.hear(b"p", message, AGAIN) == [Reset(reason="a HELLO comes first")]
    assert (kitchen.sessions.resets, kitchen.sessions.take()) == (3, [])


def test_a_box_that_goes_wrong_again_after_a_hello_is_told_again(kitchen: Kitchen) -> None:
    for _ in range(3):
        greeted(kitchen, b"p")
        (reset,) = kitchen.hear(b"p", data(event(9)))
        assert isinstance(reset, Reset)


@pytest.mark.parametrize(
    "frames",
    [[], [b""], [b"", b""], [b"GET / HTTP/1.1"], [b"DATA"], [b"HELLO", b"{}"], [b"PING", b""], [b"WELCOME", b"{}"]],
)
def test_what_is_no_message_ends_the_session(kitchen: Kitchen, frames: list[bytes]) -> None:
    greeted(kitchen, b"p", b"q")
    for now, expected in ((0.0, 1), (AGAIN / 2, 0), (AGAIN, 1)):
        with pytest.raises(WireError) as caught:
            kitchen.sessions.heard(b"p", ANYONE, frames, now)
        replies = kitchen.sessions.misunderstood(b"p", caught.value, now)
        assert len(replies) == expected
        assert all(isinstance(reply, Reset) for reply in replies) or frames == [b"HELLO", b"{}"]
        if frames == [b"HELLO", b"{}"]:  # of whatever protocol
            break
    assert len(kitchen.sessions) == 1
    assert kitchen.hear(b"q", data(event(0))) == [], "the other one goes on"


@pytest.mark.parametrize("protocol", ['"lookout/2"', '"LOOKOUT/1"', "1", "null"])
def test_another_protocol_is_denied(kitchen: Kitchen, protocol: str) -> None:
    text = f'{{"protocol": {protocol}, "whatever": 1}}'.encode()
    with pytest.raises(WireError) as caught:
        kitchen.sessions.heard(b"p", ANYONE, [b"HELLO", text], 0.0)
    assert kitchen.sessions.misunderstood(b"p", caught.value, 0.0) == [Denied(reason="this collector speaks lookout/1")]


def test_who_goes_wrong_is_remembered_in_bounds(kitchen: Kitchen) -> None:
    for number in range(MAX_SESSIONS + 10):
        assert kitchen.hear(b"%d" % number, Ping(), 0.0)
    assert kitchen.hear(b"0", Ping(), 0.0), "forgotten, and told again"
    assert not kitchen.hear(b"%d" % (MAX_SESSIONS + 9), Ping(), 0.0)


# --- poison -----------------------------------------------------------------------------------------------------------

GOOD = encode(event(0, person()))
POISON: dict[str, list[bytes]] = {
    "nothing": [],
    "one frame": GOOD[:1],
    "no JSON": [b"no JSON", b""],
    "deep JSON": [b"[" * 100_000, b""],
    "a header too long": [b" " * (MAX_HEADER + 1), b""],
    "another schema": [GOOD[0].replace(b"lookout.event/1", b"lookout.event/2"), GOOD[1]],
    "an unknown field": [GOOD[0].replace(b'"camera"', b'"x":1,"camera"'), GOOD[1]],
    "embeddings too short": [GOOD[0], GOOD[1][:-1]],
    "embeddings of no length": [GOOD[0], bytes(len(GOOD[1]))],
    "a crop too many": [*GOOD, b"\xff\xd8"],
    "no JPEG": [*encode(event(0, person(crop=True)))[:2], b"GIF89a"],
    "another device": encode(event(0, device="other")),
    "another epoch": encode(event(0, epoch=8)),
    "another number": encode(event(1)),
}


@pytest.mark.parametrize("frames", POISON.values(), ids=POISON)
def test_a_poison_is_refused_once_and_the_next_one_passes(kitchen: Kitchen, frames: list[bytes]) -> None:
    greeted(kitchen, b"p")
    assert kitchen.hear(b"p", Data(0, tuple(frames))) == []
    assert kitchen.hear(b"p", data(event(1))) == []
    (bad, good) = kitchen.sessions.take()
    assert isinstance(bad.payload, Poison)
    assert bad.frames == tuple(frames)
    assert isinstance(good.payload, Event)
    (_, refused), (_, ack) = kitchen.commit()
    assert isinstance(refused, Refused)
    assert (refused.epoch, refused.seq) == (7, 0)
    assert refused.reason
    assert ack == Ack(epoch=7, next=2, window=WIDE)


def test_a_reason_that_is_too_long_is_cut(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    kitchen.hear(b"p", data(event(0)))
    (_, refused), _ = kitchen.sessions.settle([Outcome(Kept.REFUSED, "x" * 5000)])
    assert isinstance(refused, Refused)
    assert refused.reason == "x" * 500


def test_two_events_under_one_number(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p", b"q")
    kitchen.hear(b"p", data(event(0)))
    kitchen.hear(b"q", data(event(0, frame=9)))
    kitchen.hear(b"q", data(event(1)))
    assert kitchen.commit() == [
        (b"q", Refused(epoch=7, seq=0, reason="another")),
        (b"p", Ack(epoch=7, next=1, window=WIDE)),
        (b"q", Ack(epoch=7, next=2, window=WIDE)),
    ]


# --- several sessions -------------------------------------------------------------------------------------------------


def test_two_sessions_of_one_box_are_acknowledged_what_each_has_sent(kitchen: Kitchen) -> None:
    greeted(kitchen, b"old", b"new")
    for seq in range(3):
        kitchen.hear(b"new", data(event(seq)))
    kitchen.hear(b"old", data(event(0)))
    assert kitchen.commit() == [
        (b"new", Ack(epoch=7, next=3, window=WIDE)),
        (b"old", Ack(epoch=7, next=1, window=WIDE)),
    ]
    kitchen.hear(b"old", data(event(1)))
    assert kitchen.commit() == [(b"old", Ack(epoch=7, next=2, window=WIDE))]
    assert list(kitchen.kept["box", 7]) == [0, 1, 2]


def test_hello_again_begins_again(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    kitchen.hear(b"p", data(event(0)))
    assert kitchen.hear(b"p", hello()) == [Welcome(epoch=7, next=0, window=WIDE)], "0 is not kept yet"
    assert kitchen.commit() == [], "an ACK of what the new session has not sent would confuse it"
    kitchen.hear(b"p", data(event(0)))
    assert kitchen.commit() == [(b"p", Ack(epoch=7, next=1, window=WIDE))]
    assert len(kitchen.sessions) == 1


def test_one_connection_serves_one_epoch_after_the_other(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    kitchen.hear(b"p", data(event(0)))
    kitchen.commit()
    assert kitchen.hear(b"p", hello(epoch=8)) == [Welcome(epoch=8, next=0, window=WIDE)]
    kitchen.hear(b"p", data(event(0, epoch=8)))
    assert kitchen.commit() == [(b"p", Ack(epoch=8, next=1, window=WIDE))]


def test_ping_is_answered_at_once(kitchen: Kitchen) -> None:
    greeted(kitchen, b"p")
    assert kitchen.hear(b"p", Ping()) == [Pong()]
    assert kitchen.commit() == []


@pytest.mark.parametrize(
    ("count", "events", "size"),
    [
        (1, MOST_EVENTS, MOST_BYTES),
        (3, MOST_EVENTS, MOST_BYTES),
        (16, MOST_EVENTS, MOST_BYTES),
        (100, 40, BYTES // 100),
        (512, FEWEST_EVENTS, 128 << 10),
        (5000, FEWEST_EVENTS, FEWEST_BYTES),
    ],
)
def test_the_window_is_a_share(kitchen: Kitchen, count: int, events: int, size: int) -> None:
    peers = [b"%d" % number for number in range(count)]
    for number, peer in enumerate(peers):
        (welcome,) = kitchen.hear(peer, hello(device=f"box-{number}"))
    assert isinstance(welcome, Welcome)
    assert welcome.window == Window(events=events, bytes=size)
    kitchen.hear(peers[0], data(event(0, device="box-0")))
    ((_, ack),) = kitchen.commit()
    assert isinstance(ack, Ack)
    assert ack.window == welcome.window, "the first hears of it with its next ACK"
    assert count > EVENTS // FEWEST_EVENTS or ack.window.events * count <= EVENTS


def test_the_silent_are_forgotten_and_the_window_grows_again(kitchen: Kitchen) -> None:
    for number in range(100):
        kitchen.hear(b"%d" % number, hello(device=f"box-{number}"), 0.0)
    assert kitchen.sessions.boxes(0.0) == 100
    kitchen.hear(b"7", Ping(), SILENCE)
    assert kitchen.sessions.boxes(SILENCE) == 1, "the others do not answer any more"
    kitchen.sessions.expire(FORGOTTEN - 1)
    assert len(kitchen.sessions) == 100
    kitchen.sessions.expire(FORGOTTEN)
    assert len(kitchen.sessions) == 1
    assert kitchen.sessions.window == WIDE
    assert kitchen.hear(b"7", Ping(), FORGOTTEN) == [Pong()]
    (reset,) = kitchen.hear(b"8", Ping(), FORGOTTEN)
    assert isinstance(reset, Reset)


def test_a_box_with_two_sessions_is_one_box(kitchen: Kitchen) -> None:
    greeted(kitchen, b"old", b"new")
    assert (len(kitchen.sessions), kitchen.sessions.boxes(0.0)) == (2, 1)


def test_when_there_are_too_many_the_longest_silent_leaves(kitchen: Kitchen) -> None:
    for number in range(MAX_SESSIONS):
        kitchen.hear(b"%d" % number, hello(device=f"box-{number}"))
    kitchen.hear(b"0", Ping())
    kitchen.hear(b"new", hello(device="new"))
    assert len(kitchen.sessions) == MAX_SESSIONS
    assert kitchen.hear(b"0", Ping()) == [Pong()]
    assert kitchen.hear(b"1", Ping()) == [Reset(reason="a HELLO comes first")]


# --- who may ----------------------------------------------------------------------------------------------------------


def test_a_box_writes_under_its_own_name_only(kitchen: Kitchen) -> None:
    (denied,) = kitchen.hear(b"p", hello(device="other"), writes="box")
    assert denied == Denied(reason="this key may not write as 'other'")
    assert len(kitchen.sessions) == 0
    assert kitchen.hear(b"p", hello(), writes="box") == [Welcome(epoch=7, next=0, window=WIDE)]
    (denied,) = kitchen.hear(b"p", hello(device="other"), writes="box")
    assert isinstance(denied, Denied)
    assert len(kitchen.sessions) == 0, "and the session that it had has ended"


@pytest.mark.parametrize("writes", [None, "other"])
@pytest.mark.parametrize("message", [data(event(1)), Ping(), Gone(first=1, last=2, reason="x")])
def test_a_key_that_is_taken_away_is_denied_at_its_next_message(
    kitchen: Kitchen, writes: str | None, message: FromBox
) -> None:
    kitchen.hear(b"p", hello(), writes="box")
    kitchen.hear(b"p", data(event(0)), writes="box")
    (denied,) = kitchen.hear(b"p", message, writes=writes)
    assert isinstance(denied, Denied)
    assert kitchen.commit() == []
    assert list(kitchen.kept["box", 7]) == [0], "what came while it was allowed"
    assert kitchen.hear(b"p", data(event(1)), writes="box") == [] or writes == "other"


def test_somebody_without_rights_is_told_now_and_then(kitchen: Kitchen) -> None:
    assert kitchen.hear(b"p", hello(), 0.0, writes=None) == [Denied(reason="this key is not allowed here")]
    for frames in ([b"garbage"], frames_of(hello()), []):
        assert kitchen.sessions.heard(b"p", None, frames, 0.1) == []
    assert kitchen.sessions.take() == []


@pytest.mark.parametrize("device", ["\x1b" * 200, "\U000e0001" * 200, "'\"" * 100])
def test_a_name_from_hell_is_denied_like_any_other(kitchen: Kitchen, device: str) -> None:
    (denied,) = kitchen.hear(b"p", hello(device=device), writes="box")
    assert isinstance(denied, Denied)
    kitchen.hear(b"p", hello(device=device))
    kitchen.hear(b"p", data(event(0)))
    (_, refused), _ = kitchen.commit()
    assert isinstance(refused, Refused)


# --- anything, in any order -------------------------------------------------------------------------------------------

PEERS = (b"a", b"b", b"c")
DEVICES = ("x", "y")
peers, devices = st.sampled_from(PEERS), st.sampled_from(DEVICES)
small = st.integers(0, 12)


class AnyOrder(RuleBasedStateMachine):
    """Several peers say anything; batches are committed; the collector dies. The model is what the sink holds.

    What a peer is told must be so: every number below the `next` of a WELCOME or an ACK has something in the sink.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kitchen = Kitchen()
        self.now = 0.0
        self.writes: dict[bytes, str | None] = dict.fromkeys(PEERS, ANYONE)
        self.greeted: dict[bytes, Hello] = {}  # what each peer said last, unless it was told to begin again
        self.said: dict[tuple[str, int, int], set[bytes]] = {}  # headers that were sent under a number
        self.welcomed: set[bytes] = set()  # of those
        self.taken: dict[bytes, Item] = {}  # of each session, the last
        self.fixed: dict[tuple[str, int, int], bytes] = {}  # the headers that were kept

    def hear(self, peer: bytes, frames: list[bytes]) -> list[FromCollector]:
        sessions = self.kitchen.sessions
        before = len(sessions.take())
        try:
            replies = sessions.heard(peer, self.writes[peer], frames, self.now)
        except WireError as error:
            self.greeted.pop(peer, None)
            replies = sessions.misunderstood(peer, error, self.now)
        for reply in replies:
            self.told(peer, reply)
        for item in sessions.take()[before:]:
            assert self.writes[peer] in (item.device, ANYONE), "under another's name"
            self.takes(peer, item)
        return replies

    def takes(self, peer: bytes, item: Item) -> None:
        assert (item.device, item.epoch) == (self.greeted[peer].device, self.greeted[peer].epoch)
        assert item.first == (self.taken[peer].last + 1 if peer in self.taken else item.first), "not in order"
        match item.payload:
            case Gone() as gone:
                assert (item.first, item.last) == (gone.first, gone.last)
            case Event(header=header):
                named = (header.device, header.epoch, header.seq)
                assert named == (item.device, item.epoch, item.first) == (*named[:2], item.last)
        self.taken[peer] = item

    def told(self, peer: bytes, reply: FromCollector) -> None:
        match reply:
            case Welcome() | Ack():
                hello = self.greeted[peer]
                assert reply.epoch == hello.epoch
                assert isinstance(reply, Welcome) != (peer in self.welcomed), "WELCOME comes first, and once"
                self.welcomed.add(peer)
                kept = self.kitchen.kept.get((hello.device, hello.epoch), {})
                assert set(range(reply.next)) <= set(kept), f"{reply} covers what is not kept"
            case Reset() | Denied():
                self.greeted.pop(peer, None)

    def end_all(self) -> None:
        self.kitchen.sessions = Sessions(self.kitchen.resume)
        self.greeted.clear()

    @rule(peer=peers, device=devices, epoch=st.integers(0, 1), first=small, more=small)
    def hello(self, peer: bytes, device: str, epoch: int, first: int, more: int) -> None:
        message = Hello(device=device, epoch=epoch, first=first, end=first + more)
        self.greeted[peer] = message
        self.taken.pop(peer, None)
        self.welcomed.discard(peer)
        if self.writes[peer] is None:
            del self.greeted[peer]
        self.hear(peer, frames_of(message))

    @rule(peer=peers, seq=small, frame=st.integers(0, 1), other=st.booleans())
    def data(self, peer: bytes, seq: int, frame: int, other: bool) -> None:
        """Of any number; some are another event, or none."""
        hello = self.greeted.get(peer)
        device, epoch = (hello.device, hello.epoch) if hello and not other else ("x", 0)
        one = event(seq, device=device, epoch=epoch, frame=100 + frame)
        self.said.setdefault((device, epoch, seq), set()).add(encode(one)[0])
        self.hear(peer, frames_of(data(one)))

    @precondition(lambda self: self.greeted)
    @rule(choice=st.data(), count=st.integers(1, 4), astray=st.sampled_from([0, 0, 0, 1, 2]))
    def data_in_order(self, choice: st.DataObject, count: int, astray: int) -> None:
        """What the sink lacks, or a little further on."""
        peer = choice.draw(st.sampled_from(sorted(self.greeted)))
        hello = self.greeted[peer]
        start = self.kitchen.resume(hello.device, hello.epoch)
        assert start is not None
        start = max(start, hello.first) + astray
        for seq in range(start, start + count):
            one = event(seq, device=hello.device, epoch=hello.epoch)
            self.said.setdefault((hello.device, hello.epoch, seq), set()).add(encode(one)[0])
            self.hear(peer, frames_of(data(one)))

    @rule(peer=peers, first=small, more=st.integers(0, 3))
    def gone(self, peer: bytes, first: int, more: int) -> None:
        self.hear(peer, frames_of(Gone(first=first, last=first + more, reason="gone")))

    @rule(peer=peers, seq=small, frames=st.lists(st.binary(max_size=5), max_size=3))
    def poison(self, peer: bytes, seq: int, frames: list[bytes]) -> None:
        self.hear(peer, frames_of(Data(seq, tuple(frames))))

    @rule(peer=peers)
    def ping(self, peer: bytes) -> None:
        replies = self.hear(peer, frames_of(Ping()))
        assert all(isinstance(reply, Pong | Reset | Denied) for reply in replies)

    @rule(peer=peers, name=st.sampled_from([b"HELLO", b"DATA", b"GONE", b"PING", b"ACK", b""]), rest=st.binary())
    def garbage(self, peer: bytes, name: bytes, rest: bytes) -> None:
        self.hear(peer, [name, rest])

    @rule()
    def commit(self) -> None:
        for peer, reply in self.kitchen.commit():
            self.told(peer, reply)
        assert self.kitchen.sessions.take() == []

    @rule()
    def crash(self) -> None:
        """What was not committed is gone, and so is every session."""
        self.end_all()

    @rule()
    def crash_after_the_commit(self) -> None:
        """The sink has it, and nobody was told."""
        self.kitchen.add(self.kitchen.sessions.take())
        self.end_all()

    @rule(seconds=st.sampled_from([AGAIN, SILENCE, FORGOTTEN]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.kitchen.sessions.expire(self.now)

    @rule(peer=peers, writes=st.sampled_from([ANYONE, ANYONE, *DEVICES, None]))
    def other_rights(self, peer: bytes, writes: str | None) -> None:
        self.writes[peer] = writes

    @invariant()
    def what_is_kept_was_said(self) -> None:
        for (device, epoch), kept in self.kitchen.kept.items():
            for seq, what in kept.items():
                if isinstance(what, bytes):
                    assert what in self.said[device, epoch, seq]
                    assert self.fixed.setdefault((device, epoch, seq), what) == what, "it became another event"
        assert all(self.kitchen.kept[device, epoch].get(seq) for device, epoch, seq in self.fixed), "it was lost"

    @invariant()
    def there_are_bounds(self) -> None:
        assert len(self.kitchen.sessions) <= len(PEERS)

    def teardown(self) -> None:
        """A box that behaves delivers, whatever was before."""
        self.commit()
        self.writes[b"a"] = "x"
        start = self.kitchen.resume("x", 1)
        assert start is not None
        (welcome,) = self.kitchen.hear(b"a", hello(start, epoch=1, device="x"), self.now, writes="x")
        assert isinstance(welcome, Welcome)
        assert welcome.next == start
        for seq in range(start, start + 3):
            assert self.kitchen.hear(b"a", data(event(seq, device="x", epoch=1)), self.now, writes="x") == []
        assert (b"a", Ack(epoch=1, next=start + 3, window=welcome.window)) in self.kitchen.commit()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)
