"""The box's end of the wire: any order of messages, losses and time ends with everything at the other end, once."""

from __future__ import annotations

import logging
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.link import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE, Link, last_of
from edge.protocol import (
    HEARTBEAT,
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
    encode,
)
from tests.fakes import ListSource

WIDE = Window(events=100, bytes=10_000)


def data(*numbers: int, size: int = 10) -> list[Data | Gone]:
    return [Data(number, (bytes(size),)) for number in numbers]


def hear(link: Link, message: FromCollector, now: float) -> None:
    link.heard(encode(message), now)


def welcomed(source: ListSource, window: Window = WIDE, next_: int = 0) -> Link:
    """A link that has just been told to go on from `next_`."""
    link = Link("box", source, 0.0, random.Random(0))
    link.connected(0.0)
    (hello,) = link.say(0.0)
    assert isinstance(hello, Hello)
    hear(link, Welcome(epoch=hello.epoch, next=next_, window=window), 0.0)
    assert link.delivery.connected
    return link


def test_it_says_nothing_before_there_is_a_connection() -> None:
    link = Link("box", ListSource(data(0)), 5.0)
    assert link.say(5.0) == []
    assert (link.up, link.retry_at) == (False, 5.0)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_hello_then_the_events_in_order_then_silence(count: int) -> None:
    source = ListSource(data(*range(count)))
    link = Link("box", source, 0.0)
    link.connected(0.0)
    assert link.say(0.0) == [Hello(device="box", epoch=1, first=0, end=count)]
    assert link.say(0.0) == [], "it waits for the answer"
    hear(link, Welcome(epoch=1, next=0, window=WIDE), 0.0)
    assert link.say(0.0) == data(*range(count))
    assert link.say(0.0) == []
    hear(link, Ack(epoch=1, next=count, window=WIDE), 1.0)
    assert source.epochs == [[]]
    assert link.delivery.delivered == count


def test_it_goes_on_from_where_the_collector_stands() -> None:
    source = ListSource(data(*range(10)))
    link = welcomed(source, next_=7)
    assert source.forgotten == [(1, 7)]
    assert link.say(0.0) == data(7, 8, 9)


def test_when_the_collector_last_said_that_it_has_something() -> None:
    assert welcomed(ListSource(data(0))).delivery.acknowledged_at is None, "a greeting is no acknowledgement"
    assert welcomed(ListSource(data(0, 1)), next_=1).delivery.acknowledged_at == 0.0, "but where it names numbers"
    link = welcomed(ListSource(data(0, 1, 2)))
    link.say(1.0)
    hear(link, Ack(epoch=1, next=2, window=WIDE), 5.0)
    assert link.delivery.acknowledged_at == 5.0
    hear(link, Ack(epoch=1, next=2, window=WIDE), 7.0)
    assert link.delivery.acknowledged_at == 5.0, "nothing new"
    link.lost("the network", 8.0)
    assert link.delivery.acknowledged_at == 5.0


@pytest.mark.parametrize(
    ("window", "sent"),
    [
        (Window(events=3, bytes=10_000), 3),
        (Window(events=100, bytes=25), 3),  # the third begins within the bound
        (Window(events=100, bytes=1), 1),  # one is always allowed
        (Window(events=1, bytes=1), 1),
    ],
)
def test_no_more_than_the_window_is_on_its_way(window: Window, sent: int) -> None:
    link = welcomed(ListSource(data(*range(10))), window)
    assert link.say(0.0) == data(*range(sent))
    assert link.say(0.0) == []
    hear(link, Ack(epoch=1, next=1, window=window), 0.0)
    assert link.say(0.0) == data(sent), "one came back, one goes"


def test_a_window_that_shrinks_holds_back_and_one_that_grows_lets_go() -> None:
    link = welcomed(ListSource(data(*range(20))), Window(events=8, bytes=10_000))
    assert link.say(0.0) == data(*range(8))
    hear(link, Ack(epoch=1, next=2, window=Window(events=2, bytes=10_000)), 0.0)
    assert link.say(0.0) == []
    hear(link, Ack(epoch=1, next=7, window=Window(events=4, bytes=10_000)), 0.0)
    assert link.say(0.0) == data(8, 9, 10)


def test_what_is_gone_takes_its_place_in_the_order() -> None:
    gone = Gone(first=0, last=6, reason="spool full")
    source = ListSource([gone, *data(7, 8)])
    link = welcomed(source, next_=3)
    assert link.say(0.0) == [Gone(first=3, last=6, reason="spool full"), *data(7, 8)]
    hear(link, Ack(epoch=1, next=9, window=WIDE), 0.0)
    assert (link.delivery.gone, link.delivery.delivered, source.epochs) == (4, 2, [[]])


def test_an_epoch_that_is_done_gives_way_to_the_next_on_the_same_connection() -> None:
    source = ListSource(data(0, 1), [], data(0))
    link = welcomed(source)
    assert link.say(0.0) == data(0, 1)
    assert link.say(0.0) == [], "not before the old one is acknowledged"
    hear(link, Ack(epoch=1, next=2, window=WIDE), 0.0)
    assert link.say(0.0) == [Hello(device="box", epoch=3, first=0, end=1)]
    hear(link, Ack(epoch=1, next=2, window=WIDE), 0.0)
    assert link.say(0.0) == [], "a late word about the old epoch is not an answer"
    hear(link, Welcome(epoch=3, next=0, window=WIDE), 0.0)
    assert link.say(0.0) == data(0)


def test_silence_is_broken_by_ping_and_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    link = welcomed(ListSource())
    assert link.wake(0.0) == HEARTBEAT
    assert link.say(HEARTBEAT - 0.1) == []
    assert link.say(HEARTBEAT) == [Ping()]
    hear(link, Pong(), HEARTBEAT)
    assert link.say(SILENCE) == [Ping()], "the answer counted"
    assert link.say(HEARTBEAT + SILENCE) == []
    assert not link.up
    assert not link.delivery.connected
    assert "it does not answer" in caplog.text


def test_no_answer_to_hello_ends_the_try() -> None:
    link = Link("box", ListSource(), 0.0)
    link.connected(0.0)
    link.say(0.0)
    link.say(SILENCE)
    assert not link.up


def test_a_collector_that_is_there_but_acknowledges_nothing_is_left() -> None:
    link = welcomed(ListSource(data(0, 1)))
    now = 0.0
    while link.up:
        link.say(now)
        if link.up:
            hear(link, Pong(), now)
        now += 1
        assert now < 2 * PATIENCE
    assert now >= PATIENCE


def test_pauses_grow_at_random_and_an_acknowledgement_makes_them_short_again() -> None:
    source = ListSource(data(*range(3)))
    link = Link("box", source, 0.0, random.Random(1))
    pauses = []
    for _ in range(200):
        link.connected(0.0)
        link.lost("gone", 0.0)
        pauses.append(link.retry_at)
    assert max(pauses[:1]) <= FIRST_PAUSE
    assert LONGEST_PAUSE * 0.8 < max(pauses) <= LONGEST_PAUSE
    assert min(pauses[20:]) < LONGEST_PAUSE * 0.2, "a fleet does not come back all at once"
    link.connected(0.0)
    link.say(0.0)
    hear(link, Welcome(epoch=1, next=0, window=WIDE), 0.0)
    link.say(0.0)
    hear(link, Ack(epoch=1, next=1, window=WIDE), 0.0)
    link.lost("gone", 0.0)
    assert link.retry_at <= FIRST_PAUSE


def test_the_same_trouble_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    link = Link("box", ListSource(), 0.0)
    for _ in range(50):
        link.connected(0.0)
        link.lost("nobody listens", 0.0)
    assert len(caplog.records) == 1
    link.connected(0.0)
    link.say(0.0)
    hear(link, Welcome(epoch=1, next=0, window=WIDE), 0.0)
    link.lost("nobody listens", 0.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Denied(reason="not your name"), "not your name"),
        (Reset(reason="who are you"), "who are you"),
        (Ack(epoch=1, next=99, window=WIDE), "98"),
    ],
)
def test_what_ends_a_session_says_why(message: FromCollector, says: str, caplog: pytest.LogCaptureFixture) -> None:
    link = welcomed(ListSource(data(0, 1)))
    link.say(0.0)
    hear(link, message, 0.0)
    assert not link.up
    assert link.say(0.0) == []
    assert says in caplog.text
    if isinstance(message, Denied):
        assert link.retry_at == LONGEST_PAUSE


def test_a_welcome_to_numbers_it_did_not_offer_is_no_welcome(caplog: pytest.LogCaptureFixture) -> None:
    source = ListSource(data(5, 6))
    source.forget(1, 5)
    link = Link("box", source, 0.0)
    link.connected(0.0)
    assert link.say(0.0) == [Hello(device="box", epoch=1, first=5, end=7)]
    hear(link, Welcome(epoch=1, next=4, window=WIDE), 0.0)
    assert not link.up
    assert "did not offer" in caplog.text


@pytest.mark.parametrize("frames", [[], [b""], [b"GET / HTTP/1.1"], [b"ACK", b"{}"], [b"PONG", b"more"]])
def test_garbage_is_no_collector(frames: list[bytes]) -> None:
    link = welcomed(ListSource(data(0)))
    link.heard(frames, 0.0)
    assert not link.up


def test_a_refused_event_is_counted_and_not_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    link = welcomed(ListSource(data(0, 1)))
    assert link.say(0.0) == data(0, 1)
    hear(link, Refused(epoch=1, seq=0, reason="no event"), 0.0)
    hear(link, Ack(epoch=1, next=2, window=WIDE), 0.0)
    assert link.delivery.refused == 1
    assert "no event" in caplog.text
    assert link.say(0.0) == []


class Delivering(RuleBasedStateMachine):
    """A link, a lossy wire and a collector that keeps numbers; connections break, both ends restart their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.source = ListSource([], [], [])
        self.produced: list[tuple[int, int]] = []  # (epoch, number)
        self.writing = 1
        self.kept: dict[int, list[int]] = {1: [], 2: [], 3: []}
        self.link = Link("box", self.source, 0.0, random.Random(0))
        self.to_collector: list[FromBox] = []
        self.to_box: list[FromCollector] = []
        self.session: tuple[int, int] | None = None  # epoch, expected

    def window(self) -> Window:
        return Window(events=3, bytes=50)

    @rule(count=st.integers(1, 5))
    def produce(self, count: int) -> None:
        for _ in range(count):
            number = sum(epoch == self.writing for epoch, _ in self.produced)
            self.produced.append((self.writing, number))
            self.source.epochs[self.writing - 1] += data(number)

    @precondition(lambda self: self.writing < 3)
    @rule()
    def restart_box(self) -> None:
        """As after kill -9: the link is new, the source is not, and a new epoch begins."""
        self.writing += 1
        self.break_connection()
        self.link = Link("box", self.source, self.now, random.Random(0))

    @rule()
    def break_connection(self) -> None:
        self.to_collector, self.to_box, self.session = [], [], None
        if self.link.up:
            self.link.lost("broken", self.now)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def box_speaks(self) -> None:
        if not self.link.up and self.now >= self.link.retry_at:
            self.to_collector, self.to_box, self.session = [], [], None
            self.link.connected(self.now)
        said = self.link.say(self.now)
        if self.link.up:
            self.to_collector += said

    @precondition(lambda self: self.to_collector)
    @rule(acknowledge=st.booleans())
    def collector_hears(self, acknowledge: bool) -> None:
        message = self.to_collector.pop(0)
        if isinstance(message, Hello):
            assert message.first <= len(self.kept[message.epoch]), "a number was forgotten before it was kept"
            self.session = (message.epoch, len(self.kept[message.epoch]))
            self.to_box.append(Welcome(epoch=message.epoch, next=self.session[1], window=self.window()))
        elif isinstance(message, Ping):
            self.to_box.append(Pong())
        else:
            assert isinstance(message, Data)
            assert self.session is not None
            epoch, expected = self.session
            assert message.seq == expected, "out of order"
            if message.seq == len(self.kept[epoch]):
                self.kept[epoch].append(message.seq)
            self.session = (epoch, expected + 1)
            if acknowledge:
                self.to_box.append(Ack(epoch=epoch, next=expected + 1, window=self.window()))

    @precondition(lambda self: self.to_box)
    @rule()
    def box_hears(self) -> None:
        hear(self.link, self.to_box.pop(0), self.now)

    @invariant()
    def in_flight_fits_the_window(self) -> None:
        assert sum(isinstance(message, Data) for message in self.to_collector) <= self.window().events

    @invariant()
    def nothing_is_forgotten_that_is_not_kept(self) -> None:
        left = {(i + 1, last_of(entry)) for i, entries in enumerate(self.source.epochs) for entry in entries}
        kept = {(epoch, number) for epoch, numbers in self.kept.items() for number in numbers}
        assert left | kept == set(self.produced)

    def teardown(self) -> None:
        """Left alone, it delivers everything, in order."""
        for _ in range(2000):
            if not any(self.source.epochs):
                break
            self.now += 1.0
            self.box_speaks()
            while self.to_collector:
                self.collector_hears(True)
            while self.to_box:
                self.box_hears()
        for epoch, numbers in self.kept.items():
            assert numbers == [number for e, number in self.produced if e == epoch]


TestDelivering = Delivering.TestCase
TestDelivering.settings = settings(max_examples=100, stateful_step_count=60)
