"""The store keeps every event once, whole and in order, knows what is missing, and says what it cannot open."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event as Flag
from threading import Thread, Timer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.people import LAST
from collector.schema import SCHEMA_VERSION
from collector.sheet import write_csv
from collector.sinks import Item, Kept, Outcome, Poison, Sink
from collector.store import CONFLICT, QUARANTINE, QUARANTINE_BYTES, RETENTION, DeviceStats, Gap, Store
from edge.errors import ConfigError, StoreError
from edge.events import Answer, Choice, Ended, Event, Header, Person, decode, encode
from edge.protocol import Data, Gone
from tests.fakes import item

NEW, DUPLICATE = Outcome(Kept.NEW), Outcome(Kept.DUPLICATE)
REFUSED = Outcome(Kept.REFUSED, CONFLICT)

# what collector/store.py of version 0.1 wrote, word for word
SCHEMA_1 = (
    "PRAGMA application_id = 1280266059",
    "PRAGMA user_version = 1",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
        camera TEXT NOT NULL, frame INTEGER NOT NULL, captured_at REAL NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bundle TEXT NOT NULL, bank TEXT NOT NULL,
        embedding_dim INTEGER NOT NULL, skipped INTEGER NOT NULL, received_at REAL NOT NULL,
        UNIQUE (device, epoch, seq)
    )""",
    """CREATE TABLE people (
        event INTEGER NOT NULL REFERENCES events (id), number INTEGER NOT NULL,
        x1 REAL NOT NULL, y1 REAL NOT NULL, x2 REAL NOT NULL, y2 REAL NOT NULL, score REAL NOT NULL,
        answers TEXT NOT NULL, embedding BLOB NOT NULL, crop BLOB,
        PRIMARY KEY (event, number)
    )""",
)
# what collector/schema.py of version 0.2 made of it, word for word
SCHEMA_2 = (
    "ALTER TABLE events ADD COLUMN digest BLOB",
    "ALTER TABLE events ADD COLUMN notices TEXT",
    """CREATE TABLE streams (
        device TEXT NOT NULL, epoch INTEGER NOT NULL, next INTEGER NOT NULL, pruned INTEGER NOT NULL,
        refused INTEGER NOT NULL, PRIMARY KEY (device, epoch)
    ) WITHOUT ROWID""",
    """CREATE TABLE gone (
        device TEXT NOT NULL, epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        reason TEXT NOT NULL, recorded_at REAL NOT NULL, PRIMARY KEY (device, epoch, last)
    ) WITHOUT ROWID""",
    """CREATE TABLE quarantine (
        id INTEGER PRIMARY KEY,
        device TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL,
        received_at REAL NOT NULL, size INTEGER NOT NULL, digest BLOB NOT NULL, frames BLOB NOT NULL,
        UNIQUE (device, epoch, seq, digest)
    )""",
    "PRAGMA user_version = 2",
)
# and of version 0.3
SCHEMA_3 = (
    "ALTER TABLE events ADD COLUMN ended TEXT",
    "ALTER TABLE events ADD COLUMN encoder TEXT",
    """CREATE TABLE tracks (
        event INTEGER NOT NULL, number INTEGER NOT NULL, track INTEGER, looks INTEGER,
        PRIMARY KEY (event, number)
    ) WITHOUT ROWID""",
    """CREATE TABLE labels (
        event INTEGER NOT NULL, number INTEGER NOT NULL, category TEXT NOT NULL, option TEXT NOT NULL,
        labelled_at REAL NOT NULL, PRIMARY KEY (event, number, category)
    ) WITHOUT ROWID""",
    """CREATE TRIGGER person_left AFTER DELETE ON people BEGIN
        DELETE FROM tracks WHERE event = old.event AND number = old.number;
        DELETE FROM labels WHERE event = old.event AND number = old.number;
    END""",
    "PRAGMA user_version = 3",
)


def event(
    seq: int,
    people: int = 1,
    device: str = "box",
    epoch: int = 7,
    crop: bytes | None = None,
    notices: tuple[str, ...] = (),
) -> Event:
    answer = Answer(category="größe", top=(Choice(option="tall", label="高", probability=1 / 3),))
    person = Person(box=(0.1, 2, 30, 40), score=0.7, answers=(answer,), crop=crop is not None)
    header = Header(
        device=device, epoch=epoch, seq=seq, camera="dör", frame=seq // 2, captured_at=1e9 + seq / 3,
        frame_size=(640, 480), bundle="b", bank="c", embedding_dim=16, people=(person,) * people, skipped=3,
        notices=notices,
    )  # fmt: skip
    return Event(header, np.eye(16, dtype=np.float16)[:people], (crop,) * people)


def items(*numbers: int, **fields: object) -> list[Item]:
    return [item(event(number, **fields)) for number in numbers]


def gone(first: int, last: int, reason: str = "spool full", device: str = "box", epoch: int = 7) -> Item:
    return Item(device, epoch, first, last, Gone(first=first, last=last, reason=reason))


def poison(seq: int, *frames: bytes, reason: str = "no event", device: str = "box") -> Item:
    return Item(device, 7, seq, seq, Poison(reason), frames)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a store?#%.db"


@pytest.fixture
def store(path):
    with Store(path, create=True) as store:
        yield store


def content(event: Event) -> tuple[Header, bytes, tuple[bytes | None, ...]]:
    return event.header, event.embeddings.tobytes(), event.crops


def contents(store: Store) -> list[tuple[Header, bytes, tuple[bytes | None, ...]]]:
    return [content(event) for event in store.events()]


def numbers(store: Store) -> list[int]:
    return [header.seq for header in store.headers()]


def rows(path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def count(path) -> tuple[int, int]:
    """How many events and people the file holds."""
    return rows(path, "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM people)")[0]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: no file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- events -----------------------------------------------------------------------------------------------------------


def test_what_was_added_comes_back_in_order(store, path):
    events = [
        event(5, notices=("the disk is full", "größer")),
        event(2, people=0),
        event(3, people=3, crop=b"\xff\xd8\x00jpeg"),
        event(2**63 - 1),
    ]
    assert store.add([item(one) for one in events[:2]], received_at=1.0) == [NEW, NEW]
    assert store.add([item(one) for one in events[2:]], received_at=2.0) == [NEW, NEW]
    assert contents(store) == [content(one) for one in events]
    assert list(store.headers()) == [one.header for one in events]
    assert all(one.embeddings.dtype == np.float16 for one in store.events())
    assert count(path) == (4, 5)


PROBABILITIES = st.floats(0, 1)
NUMBERS = st.none() | st.integers(0, 2**63 - 1)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
FOLLOWED = st.tuples(
    st.lists(
        st.builds(
            Person, box=st.just((1.0, 2.0, 3.0, 4.0)), score=PROBABILITIES, track=NUMBERS, looks=NUMBERS,
            answers=st.lists(
                st.builds(
                    Answer, category=st.text(max_size=3), unknown=st.sampled_from([None, True]),
                    support=st.none() | PROBABILITIES,
                    top=st.lists(st.builds(Choice, option=st.text(max_size=3), probability=PROBABILITIES), min_size=1,
                                 max_size=2).map(tuple),
                ), max_size=2,
            ).map(tuple),
        ), max_size=3,
    ).map(tuple),
    st.lists(
        st.builds(Ended, track=st.integers(0, 2**63 - 1), frames=st.integers(0, 9), first_seen=TIMES, last_seen=TIMES),
        max_size=2,
    ).map(tuple),
)  # fmt: skip


@given(followed=FOLLOWED)
def test_what_is_followed_over_time_comes_back_as_it_was_sent(shared, followed):
    store, epochs, clock = shared
    people, ended = followed
    one = event(0, people=len(people), epoch=next(epochs))
    sent = Event(one.header.model_copy(update={"people": people, "ended": ended}), one.embeddings, one.crops)
    assert store.add([item(sent)], received_at=float(next(clock))) == [NEW]
    (data,) = store.entries("box", sent.header.epoch, 0, 2)
    assert content(decode(data.frames)) == content(sent)
    assert store.add([item(sent), item(decode(data.frames))], received_at=0.0) == [DUPLICATE, DUPLICATE]
    lacking = sent.header.model_copy(update={"people": event(0, people=len(people)).header.people, "ended": ()})
    if lacking != sent.header:
        assert store.add([item(Event(lacking, one.embeddings, one.crops))], received_at=0.0) == [REFUSED]


def followed(seq: int, *tracks: int | None, **fields: object) -> Event:
    """Each person with a track, and as many looks as the event's number."""
    one = event(seq, people=len(tracks), **fields)
    people = tuple(
        person.model_copy(update={"track": track, "looks": None if track is None else seq})
        for person, track in zip(one.header.people, tracks, strict=True)
    )
    ended = (Ended(track=seq, frames=3, first_seen=1 / 3, last_seen=1e9),)
    return Event(one.header.model_copy(update={"people": people, "ended": ended}), one.embeddings, one.crops)


def test_a_person_leaves_with_track_and_labels(store, path):
    store.add([item(followed(seq, 5, None, 6)) for seq in range(3)], received_at=1.0)
    store.add([item(followed(3, 5))], received_at=9.0)
    assert rows(path, "SELECT event, number, track, looks FROM tracks")[:2] == [(1, 0, 5, 0), (1, 2, 6, 0)]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO labels SELECT event, number, 'hat', 'cap', 2.0 FROM people")
    pruned(store, 10.0, max_age_s=5)
    assert rows(path, "SELECT event, number FROM tracks") == rows(path, "SELECT event, number FROM labels") == [(4, 0)]
    pruned(store, 20.0, max_age_s=5)
    assert rows(path, "SELECT * FROM tracks UNION SELECT event, number, NULL, NULL FROM labels") == []
    store.add(items(4), received_at=30.0)
    assert [header.people[0].track for header in store.headers()] == [None], "though the row has an old one's number"


def test_an_event_is_kept_once(store, path):
    batch = [*items(1, 1), *items(1, device="x"), *items(1, epoch=8)]
    assert store.add(batch, received_at=1.0) == [NEW, DUPLICATE, NEW, NEW]
    assert store.add(batch, received_at=2.0) == [DUPLICATE] * 4
    assert count(path) == (3, 3)
    assert rows(path, "SELECT DISTINCT received_at FROM events") == [(1.0,)]


def test_another_event_under_the_same_number_is_set_aside_and_the_first_stays(store, path):
    first = event(1)
    others = [event(1, people=2), event(1, notices=("new",)), event(1, crop=b"\xff\xd8")]
    vectors = Event(first.header, np.eye(16, dtype=np.float16)[1:2], first.crops)
    assert store.add([item(first), item(others[0])], received_at=1.0) == [NEW, REFUSED]
    assert store.add([item(one) for one in (*others, vectors, first)], received_at=2.0) == [*[REFUSED] * 4, DUPLICATE]
    assert contents(store) == [content(first)]
    kept = rows(path, "SELECT device, epoch, seq, reason FROM quarantine")
    assert kept == [("box", 7, 1, CONFLICT)] * 4, "what was sent twice is there once"
    assert store.stats()[0].refused == 4
    assert [gap.last for gap in store.gaps()] == [0], "the number that has an event is not missing"


def test_the_same_event_in_other_bytes_is_the_same(store):
    one = item(event(1))
    spaced = one.frames[0].replace(b'":', b'" : ')
    assert spaced != one.frames[0]
    again = Item("box", 7, 1, 1, decode([spaced, *one.frames[1:]]), (spaced, *one.frames[1:]))
    assert store.add([one, again], received_at=1.0) == [NEW, DUPLICATE]


def test_a_zero_with_a_sign_is_the_same_zero(store, path, tmp_path):
    one = event(0)  # SQLite keeps no sign, so that what it gives out is written in other bytes
    person = one.header.people[0].model_copy(update={"box": (-0.0, 0.0, 1.0, 1.0)})
    one = Event(one.header.model_copy(update={"people": (person,)}), one.embeddings, one.crops)
    store.add([item(one)], received_at=1.0)
    (data,) = store.entries("box", 7, 0, 10)
    again = Item("box", 7, 0, 0, decode(data.frames), data.frames)
    assert again.frames != item(one).frames
    assert store.add([item(one), again], received_at=1.0) == [DUPLICATE, DUPLICATE]
    with Store(tmp_path / "other.db", create=True) as other:
        assert other.add([again, item(one)], received_at=1.0) == [NEW, DUPLICATE]


def test_a_batch_is_stored_whole_or_not_at_all(store, path):
    good, bad = event(1), event(2)
    bad = Event(bad.header.model_copy(update={"camera": None}), bad.embeddings, bad.crops)
    batch = [item(good), gone(5, 6), poison(7, b"x"), item(bad)]
    with pytest.raises(StoreError, match="a store"):
        store.add(batch, received_at=1.0)
    assert count(path) == (0, 0)
    assert (store.streams(), rows(path, "SELECT * FROM gone"), rows(path, "SELECT * FROM quarantine")) == ([], [], [])
    assert store.add([item(good)], received_at=1.0) == [NEW]


def test_a_name_may_hold_anything(store):
    names = ["a\0b", "a", "'; DROP TABLE events; --", "\n\x1b[2J", "größe 高"]
    for name in names:
        assert store.add([*items(0, device=name), gone(1, 1, device=name)], received_at=1.0) == [NEW, NEW]
    assert [header.device for header in store.headers()] == names
    assert {gap.device for gap in store.gaps()} == {device.device for device in store.stats()} == set(names)
    assert [store.resume(name, 7) for name in names] == [2] * 5


def test_no_events_is_no_special_case(store):
    assert store.add([], received_at=1.0) == []
    assert (list(store.events()), list(store.headers()), store.categories()) == ([], [], [])
    assert (list(store.gaps()), store.stats(), store.streams(), store.entries("box", 7, 0, 9)) == ([], [], [], [])
    assert store.prune(1e9, max_age_s=0, max_bytes=0) == 0


def test_it_can_be_read_while_events_come_in(store, path):
    store.add(items(1), received_at=1.0)
    with Store(path) as reader:
        with reader.snapshot():
            assert numbers(reader) == [1]
            store.add(items(2, 4), received_at=2.0)
            assert numbers(reader) == [1]
            assert [(gap.first, gap.last) for gap in reader.gaps()] == [(0, 0)]
            assert reader.stats()[0].events == 1
        assert numbers(reader) == [1, 2, 4]


def test_categories_are_in_the_order_of_arrival(store):
    def asked(seq, *names):
        one = event(seq)
        answers = tuple(Answer(category=name, top=(Choice(option="x", probability=1),)) for name in names)
        person = one.header.people[0].model_copy(update={"answers": answers})
        return item(Event(one.header.model_copy(update={"people": (person,)}), one.embeddings, one.crops))

    store.add([asked(1, "zebra", "hat"), asked(2), asked(3, "hat", "bag"), asked(4, "a'b\"c")], received_at=1.0)
    assert store.categories() == ["zebra", "hat", "bag", "a'b\"c"]


# --- what is accounted for --------------------------------------------------------------------------------------------


def test_it_is_a_sink(store):
    sink: Sink = store
    assert sink.resume("box", 7) == 0


def test_a_box_resumes_where_everything_below_is_accounted_for(store, path):
    store.add(items(0, 1), received_at=1.0)
    assert (store.resume("box", 7), store.resume("box", 8), store.resume("x", 7)) == (2, 0, 0)
    assert store.add([gone(2, 9), poison(10, b"x"), *items(11)], received_at=1.0)[0] == NEW
    assert store.resume("box", 7) == 12
    store.add(items(20), received_at=1.0)
    assert store.resume("box", 7) == 12, "a hole stays a hole"
    store.add(items(5), received_at=1.0)
    assert store.resume("box", 7) == 12, "and what is behind moves nothing back"
    with Store(path) as reader:
        assert reader.resume("box", 7) == 12


def test_the_highest_number_fits(store):
    highest = 2**63 - 2  # of the protocol: the number after it still is one of SQLite
    store.add([gone(0, highest)], received_at=1.0)
    assert store.resume("box", 7) == highest + 1
    assert list(store.gaps()) == [Gap("box", 7, 0, highest, "spool full")]
    assert store.add(items(highest), received_at=1.0) == [NEW]
    assert list(store.gaps()) == [Gap("box", 7, 0, highest - 1, "spool full")]
    assert store.prune(9.0, max_age_s=1) == 1
    assert list(store.gaps()) == [Gap("box", 7, 0, highest - 1, "spool full")]


def test_gaps_are_what_is_neither_stored_nor_pruned_and_say_why(store):
    store.add([*items(2, 3), gone(5, 6), gone(7, 9), poison(10, b"x"), *items(12, epoch=3)], received_at=1.0)
    store.add([gone(0, 3, device="another", reason="too old")], received_at=1.0)
    assert list(store.gaps()) == [
        Gap("another", 7, 0, 3, "too old"),
        Gap("box", 7, 0, 1, "unknown"),
        Gap("box", 7, 4, 4, "unknown"),
        Gap("box", 7, 5, 9, "spool full"),
        Gap("box", 7, 10, 10, "refused: no event"),
        Gap("box", 3, 0, 11, "unknown"),
    ]
    assert [gap.count for gap in store.gaps()] == [4, 2, 1, 5, 1, 12]


def test_gone_is_idempotent_and_counts_only_what_is_missing(store, path):
    assert store.add([*items(0, 1), gone(2, 5), gone(2, 5)], received_at=1.0) == [NEW, NEW, NEW, DUPLICATE]
    assert store.add([gone(3, 5, reason="other"), gone(0, 1)], received_at=1.0) == [DUPLICATE, DUPLICATE]
    assert store.add([gone(4, 7)], received_at=1.0) == [NEW], "it grew"
    assert store.add([*items(20), gone(18, 22, reason="torn")], received_at=1.0) == [NEW, NEW]
    assert list(store.gaps()) == [
        Gap("box", 7, 2, 7, "spool full"),
        Gap("box", 7, 8, 17, "unknown"),
        Gap("box", 7, 18, 19, "torn"),
        Gap("box", 7, 21, 22, "torn"),
    ]
    assert store.add(items(4, 21), received_at=2.0) == [NEW, NEW], "the box had found them after all"
    assert [(gap.first, gap.last) for gap in store.gaps()] == [(2, 3), (5, 7), (8, 17), (18, 19), (22, 22)]
    assert numbers(store) == [0, 1, 20, 4, 21]


def test_an_event_may_still_come_for_a_number_that_was_refused(store):
    assert store.add([poison(0, b"x"), *items(0)], received_at=1.0) == [Outcome(Kept.REFUSED, "no event"), NEW]
    assert list(store.gaps()) == []
    assert store.stats()[0].refused == 1


# --- the quarantine ---------------------------------------------------------------------------------------------------


def test_poison_is_kept_with_its_reason_and_its_beginning(store, path):
    frames = (b"abc", b"", bytes(range(256)) * 4096)
    refused = Outcome(Kept.REFUSED, "no event")
    assert store.add([poison(0, *frames), *items(1)], received_at=5.0) == [refused, NEW]
    assert store.add([poison(0, *frames)], received_at=6.0) == [refused], "sent again, it is told again, and kept once"
    ((*fields, size, kept),) = rows(
        path, "SELECT device, epoch, seq, reason, received_at, size, frames FROM quarantine"
    )
    assert fields == ["box", 7, 0, "no event", 5.0]
    assert size == 3 + 256 * 4096
    whole = b"".join(len(frame).to_bytes(8, "big") + frame for frame in frames)
    assert kept == whole[:QUARANTINE_BYTES]
    assert len(kept) == 65536
    assert numbers(store) == [1]


def test_a_long_reason_is_cut_to_what_the_protocol_carries(store):
    (outcome,) = store.add([poison(0, b"x", reason="y" * 4000)], received_at=1.0)
    assert outcome.reason == "y" * 500
    (gap,) = store.gaps()
    assert gap.reason == "refused: " + "y" * 491
    (entry,) = store.entries("box", 7, 0, 9)
    assert entry.reason == gap.reason


def test_the_quarantine_is_bounded_and_forgets_no_reason(store, path):
    for start in range(0, QUARANTINE + 500, 500):
        store.add([poison(seq, b"%d" % seq) for seq in range(start, start + 500)], received_at=1.0)
    assert rows(path, "SELECT count(*), min(seq), max(seq) FROM quarantine") == [(10_000, 500, 10_499)]
    assert list(store.gaps()) == [Gap("box", 7, 0, 10_499, "refused: no event")]
    assert store.stats()[0].refused == 10_500


# --- retention --------------------------------------------------------------------------------------------------------


def pruned(store: Store, now: float = 0.0, **bounds: float) -> list[int]:
    """What each step removed."""
    steps = []
    while step := store.prune(now, **bounds):
        steps.append(step)
    return steps


def test_what_is_too_old_leaves_and_is_not_called_lost(store, path):
    for start in range(0, 1000, 100):
        store.add(items(*range(start, start + 100)), received_at=float(start))
    store.add([gone(1000, 1001), *items(1002)], received_at=1000.0)
    assert pruned(store, 1000.0) == []
    assert pruned(store, 1000.0, max_age_s=1001) == []
    assert pruned(store, 1000.0, max_age_s=400) == [256, 256, 88]
    assert numbers(store) == [*range(600, 1000), 1002]
    assert count(path) == (401, 401)
    assert list(store.gaps()) == [Gap("box", 7, 1000, 1001, "spool full")]
    assert store.resume("box", 7) == 1003
    assert store.add(items(0, 599, 600), received_at=1.0) == [DUPLICATE] * 3, "what was removed does not come back"
    assert sum(pruned(store, 9999.0, max_age_s=0)) == 401
    assert (count(path), len(list(store.gaps()))) == ((0, 0), 1)
    assert store.resume("box", 7) == 1003
    assert store.add(items(1003), received_at=1.0) == [NEW]


def test_what_is_too_much_leaves_the_oldest_first(store):
    crop = b"\xff\xd8" + bytes(50_000)
    for start in range(0, 200, 20):
        store.add([item(event(seq, people=2, crop=crop)) for seq in range(start, start + 20)], received_at=1.0)
    full, _ = store.size()
    assert pruned(store, max_bytes=full) == []
    steps = pruned(store, max_bytes=full // 2)
    left = numbers(store)
    assert left == list(range(sum(steps), 200))
    assert store.size()[0] <= full // 2
    assert 85 <= len(left) <= 100, "no more than had to"
    whole = store.size()[1]
    store.add([item(event(200 + seq, people=2, crop=crop)) for seq in range(80)], received_at=2.0)
    assert store.size()[1] <= whole, "what was freed is used again"
    assert list(store.gaps()) == []
    pruned(store, max_bytes=0)
    assert numbers(store) == []


def test_the_quarantine_grows_old_too(store, path):
    store.add([poison(0, bytes(60_000)), *items(1)], received_at=1.0)
    store.add([poison(2, bytes(60_000)), *items(3)], received_at=2.0)
    assert pruned(store, 3.0, max_age_s=1.5) == [2]
    assert (numbers(store), rows(path, "SELECT seq FROM quarantine")) == ([3], [(2,)])
    assert pruned(store, max_bytes=0) == [1, 1]
    assert (numbers(store), rows(path, "SELECT seq FROM quarantine")) == ([], [])
    assert list(store.gaps()) == [
        Gap("box", 7, 0, 0, "refused: no event"),
        Gap("box", 7, 2, 2, "refused: no event"),
    ]


def test_a_hole_stays_known_when_what_is_around_it_leaves(store):
    store.add(items(3, 9, 4), received_at=1.0)
    before = [(0, 2), (5, 8)]
    assert [(gap.first, gap.last) for gap in store.gaps()] == before
    pruned(store, 9.0, max_age_s=1)
    assert [(gap.first, gap.last) for gap in store.gaps()] == before
    assert store.add(items(4, 5), received_at=9.0) == [DUPLICATE, NEW], "what never came still may"
    assert [(gap.first, gap.last) for gap in store.gaps()] == [(0, 2), (6, 8)]
    assert numbers(store) == [5]
    pruned(store, 99.0, max_age_s=1)
    assert store.add([gone(0, 9)], received_at=99.0) == [DUPLICATE], "what was removed is not gone"
    assert [(gap.first, gap.last) for gap in store.gaps()] == [(0, 2), (6, 8)]


# --- against a model --------------------------------------------------------------------------------------------------


SPAN = st.tuples(st.integers(0, 25), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))
THINGS = st.one_of(
    st.tuples(st.just("event"), st.integers(0, 30)),
    st.tuples(st.just("event"), st.integers(0, 30)),
    st.tuples(st.just("gone"), SPAN, st.sampled_from(["spool full", "too old"])),
    st.tuples(st.just("poison"), st.integers(0, 30)),
)
PLANS = st.lists(st.one_of(st.lists(THINGS, min_size=1, max_size=8), st.integers(-1, 2)), max_size=8)


class Model:
    """One epoch as sets would have it. known: number -> "here", "removed", or the reason why it is missing."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.next = 0
        self.arrived: list[tuple[int, int]] = []  # batch, number

    def add(self, batch: int, kind: str, *what: object) -> Kept:
        first, last = what[0] if kind == "gone" else (what[0], what[0])
        before = self.known.get(first)
        outcome = Kept.REFUSED
        if kind == "event":
            outcome = Kept.DUPLICATE if before in ("here", "removed") else Kept.NEW
            if outcome is Kept.NEW:
                self.known[first] = "here"
                self.arrived.append((batch, first))
        else:
            reason = what[1] if kind == "gone" else "refused: no event"
            free = [number for number in range(first, last + 1) if number not in self.known]
            self.known.update(dict.fromkeys(free, reason))
            if kind == "gone":
                outcome = Kept.NEW if free else Kept.DUPLICATE
        if first <= self.next:
            self.next = max(self.next, last + 1)
        return outcome

    def prune(self, before: int) -> None:
        """Batches below `before` leave."""
        old = [number for batch, number in self.arrived if batch < before]
        self.arrived = [(batch, number) for batch, number in self.arrived if batch >= before]
        self.known |= {number: "unknown" for number in range(max(old, default=0)) if number not in self.known}
        self.known |= dict.fromkeys(old, "removed")

    def gaps(self) -> dict[int, str]:
        every = {number: self.known.get(number, "unknown") for number in range(max(self.known, default=-1) + 1)}
        return {number: why for number, why in every.items() if why not in ("here", "removed")}


@pytest.fixture(scope="module")
def shared():
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "store.db", create=True) as store:
        yield store, iter(range(10**6)), iter(range(10**9))


@given(plan=PLANS)
def test_whatever_comes_in_whatever_order_it_knows_what_is_missing(shared, plan):
    store, epochs, clock = shared
    epoch, model, now = next(epochs), Model(), 0
    for batch in plan:
        if isinstance(batch, int):
            model.prune(now - batch)
            pruned(store, float(now), max_age_s=batch)
            continue
        now = next(clock)
        arriving = []
        for kind, *what in batch:
            if kind == "event":
                arriving.append(item(event(what[0], epoch=epoch)))
            elif kind == "gone":
                arriving.append(gone(*what[0], what[1], epoch=epoch))
            else:
                arriving.append(Item("box", epoch, what[0], what[0], Poison("no event"), (b"x",)))
        expected = [model.add(now, kind, *what) for kind, *what in batch]
        assert [outcome.kept for outcome in store.add(arriving, received_at=float(now))] == expected
    gaps = [gap for gap in store.gaps() if gap.epoch == epoch]
    found = {number: gap.reason for gap in gaps for number in range(gap.first, gap.last + 1)}
    assert found == model.gaps()
    assert len(found) == sum(gap.count for gap in gaps)
    assert store.resume("box", epoch) == model.next

    # and every number is told once, in order, in pieces of any size
    for limit in (1, 3, 100):
        entries, start = [], 0
        while piece := store.entries("box", epoch, start, limit):
            assert len(piece) <= limit
            entries += piece
            start = 1 + (piece[-1].seq if isinstance(piece[-1], Data) else piece[-1].last)
        told = {}
        for entry in entries:
            if isinstance(entry, Data):
                assert content(decode(entry.frames)) == content(event(entry.seq, epoch=epoch))
                told[entry.seq] = "here"
            else:
                removed = entry.reason == RETENTION
                told |= dict.fromkeys(range(entry.first, entry.last + 1), "removed" if removed else entry.reason)
        assert list(told) == list(range(start))
        assert told == {number: model.known.get(number, "unknown") for number in told}
        assert start == max(model.known, default=-1) + 1


# --- giving out -------------------------------------------------------------------------------------------------------


def test_streams_are_told_in_the_order_of_arrival(store):
    store.add([*items(0, 1, epoch=9), *items(0, epoch=2), *items(3, device="a"), *items(2, epoch=9)], received_at=1.0)
    assert store.streams() == [("a", 7, 4), ("box", 9, 3), ("box", 2, 1)]


def test_entries_start_anywhere_and_leave_no_hole(store):
    store.add([*items(0, 1, 2), gone(3, 6), *items(7, 9)], received_at=1.0)
    whole = store.entries("box", 7, 0, 100)
    assert [type(entry) for entry in whole] == [Data, Data, Data, Gone, Data, Gone, Data]
    assert whole[0] == Data(0, tuple(encode(event(0))))
    assert store.entries("box", 7, 5, 2) == [Gone(first=5, last=6, reason="spool full"), whole[4]]
    assert whole[5] == Gone(first=8, last=8, reason="unknown")
    assert store.entries("box", 7, 10, 5) == store.entries("box", 8, 0, 5) == []


def test_stats_tell_of_each_device(store, path):
    store.add([*items(0, 1, people=2), gone(2, 4), poison(5, b"x")], received_at=10.0)
    store.add([*items(9, people=0, epoch=8), gone(0, 0, device="a", reason="too old")], received_at=20.0)
    assert store.stats() == [
        DeviceStats("a", 1, 0, 0, None, None, {"too old": 1}, 0),
        DeviceStats(
            "box", 2, 3, 4, (1e9, 1e9 + 3), (10.0, 20.0), {"unknown": 9, "spool full": 3, "refused: no event": 1}, 1
        ),
    ]
    assert store.size() == (rows(path, "PRAGMA page_count")[0][0] * 16384,) * 2


# --- backup -----------------------------------------------------------------------------------------------------------


def test_a_backup_is_of_one_moment_whatever_is_written_meanwhile(path, tmp_path):
    to, started, stop = tmp_path / "copy.db", Flag(), Flag()
    crop = b"\xff\xd8" + bytes(100_000)
    with Store(path, create=True) as store:
        store.add([item(event(seq, crop=crop)) for seq in range(300)], received_at=1.0)

    def write() -> None:
        with Store(path, create=True) as store:
            seq = 300
            while not stop.is_set():
                store.add(items(seq, seq + 1), received_at=2.0)
                seq += 2
                started.set()

    writer = Thread(target=write)
    writer.start()
    steps = []
    try:
        assert started.wait(30)
        with Store(path) as store:
            before = count(path)[0]
            store.backup(to, lambda done, total: steps.append((done, total)))
    finally:
        stop.set()
        writer.join()
    assert len(steps) > 3
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    with Store(to) as copy:
        copied = numbers(copy)
        assert copied == list(range(len(copied)))
        assert copy.resume("box", 7) == len(copied)
        assert list(copy.gaps()) == []
    assert before <= len(copied) < count(path)[0]
    assert sorted(tmp_path.iterdir()) == sorted([path, to]), "nothing is left beside it"
    with Store(to, create=True) as copy:
        assert copy.add(items(len(copied)), received_at=3.0) == [NEW]


def test_a_backup_overwrites_nothing(store, path, tmp_path):
    store.add(items(0), received_at=1.0)
    taken, part = tmp_path / "taken", tmp_path / "new.db.part"
    taken.write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not there")
    for name in (path, taken, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="exists already; choose another name"):
            store.backup(name)
    part.write_text("half")
    with pytest.raises(ConfigError, match=r"new\.db\.part exists already; wait for the backup that writes it"):
        store.backup(tmp_path / "new.db")
    assert (taken.read_text(), part.read_text(), numbers(store)) == ("mine", "half", [0])
    with pytest.raises(OSError, match="nowhere"):
        store.backup(tmp_path / "nowhere" / "x.db")


def test_a_backup_that_fails_leaves_nothing_behind(store, path, tmp_path):
    store.add([item(event(0, crop=b"\xff\xd8" + bytes(10**6)))], received_at=1.0)
    with files_of_at_most(300_000), pytest.raises(StoreError, match=r"copy\.db"):
        store.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))
    store.backup(tmp_path / "copy.db")
    assert count(tmp_path / "copy.db") == (1, 1)


def test_a_damaged_store_has_no_backup(path, tmp_path):
    with Store(path, create=True) as store:
        store.add(items(*range(200)), received_at=1.0)
    damage(path)
    with Store(path) as store, pytest.raises(StoreError, match="backup of"):
        store.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))


# --- older and other files --------------------------------------------------------------------------------------------


def make_schema_2(path: Path, *events: Event) -> None:
    """As collector/store.py of version 0.2 did: each event, a number gone after it, and a message set aside."""
    make_schema_1(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in SCHEMA_2:
            database.execute(statement)
        for one in events:
            insert_as_schema_1(database, one)
            header, notices = one.header, json.dumps(one.header.notices) if one.header.notices else None
            stream = (header.device, header.epoch, header.seq + 2, header.seq, 1)
            database.execute(
                "UPDATE events SET digest = ?, notices = ? WHERE id = (SELECT max(id) FROM events)", (b"d", notices)
            )
            database.execute("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?, ?)", stream)
            gone = (header.device, header.epoch, header.seq + 1, header.seq + 1, "spool full", 3.0)
            database.execute("INSERT INTO gone VALUES (?, ?, ?, ?, ?, ?)", gone)
            database.execute(
                "INSERT INTO quarantine VALUES (NULL, ?, ?, ?, 'no event', 3.0, 1, ?, ?)", (*stream[:3], b"d", b"f")
            )


def make_schema_1(path: Path, *events: Event) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for statement in SCHEMA_1:
            database.execute(statement)
        for one in events:
            insert_as_schema_1(database, one)


def insert_as_schema_1(database: sqlite3.Connection, one: Event) -> None:
    """As collector/store.py of version 0.1 did."""
    header = one.header
    fields = ("device", "epoch", "seq", "camera", "frame", "captured_at", "bundle", "bank", "embedding_dim", "skipped")
    inserted = database.execute(
        f"INSERT INTO events (received_at, width, height, {', '.join(fields)})"
        f" VALUES (?, ?, ?{', ?' * len(fields)}) ON CONFLICT (device, epoch, seq) DO NOTHING",
        (3.0, *header.frame_size, *(getattr(header, name) for name in fields)),
    )
    for number, (person, vector, crop) in enumerate(zip(header.people, one.embeddings, one.crops, strict=True)):
        answers = "[" + ",".join(answer.model_dump_json(exclude_none=True) for answer in person.answers) + "]"
        row = (inserted.lastrowid, number, *person.box, person.score, answers, vector.tobytes(), crop)
        database.execute("INSERT INTO people VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


@pytest.mark.parametrize("create", [True, False])
def test_a_store_of_schema_1_keeps_its_data(path, tmp_path, create, caplog):
    old = [event(0), event(1, people=3, crop=b"\xff\xd8x"), event(4, people=0), event(3, epoch=8), event(0, device="x")]
    make_schema_1(path, *old)
    with Store(path, create=create) as store:
        assert contents(store) == [content(one) for one in old]
        assert store.categories() == ["größe"]
        assert store.streams() == [("box", 7, 5), ("box", 8, 4), ("x", 7, 1)]
        assert [store.resume(*key) for key in (("box", 7), ("box", 8), ("x", 7))] == [2, 0, 1]
        assert [(gap.epoch, gap.first, gap.last) for gap in store.gaps()] == [(7, 2, 3), (8, 0, 2)]
        assert store.add([item(old[1]), item(event(4)), *items(5)], received_at=4.0) == [DUPLICATE, REFUSED, NEW]
    with Store(tmp_path / "new.db", create=True):
        pass
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    with Store(path) as store:  # and is opened as any other from now on
        assert len(contents(store)) == 6
    assert [record.message for record in caplog.records] == [f"store {path}: schema 1 becomes 4; all it holds is kept"]


def schema_of(path: Path) -> list[str]:
    tables = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    queries = ("PRAGMA user_version", "PRAGMA application_id", tables)
    return [str(row).replace("\\n", "").replace(" ", "") for query in queries for row in rows(path, query)]


@pytest.mark.parametrize("create", [True, False])
def test_a_store_of_schema_2_keeps_its_data(path, tmp_path, create, caplog):
    notices = ("the disk is full", "größer")
    old = [event(0, people=3, crop=b"\xff\xd8x"), event(4, people=0, epoch=8), event(0, device="x", notices=notices)]
    make_schema_2(path, *old)
    with Store(path, create=create) as store:
        assert contents(store) == [content(one) for one in old]
        assert [store.resume(*key) for key in (("box", 7), ("box", 8), ("x", 7))] == [2, 6, 2]
        assert [(gap.device, gap.epoch, gap.first, gap.reason) for gap in store.gaps()] == [
            ("box", 7, 1, "spool full"),
            ("box", 8, 5, "spool full"),
            ("x", 7, 1, "spool full"),
        ]
        assert [device.refused for device in store.stats()] == [2, 1]
        new = followed(2, 9, None)
        assert store.add([item(old[0]), item(old[2]), item(event(0)), item(new)], received_at=4.0) == [
            DUPLICATE, DUPLICATE, REFUSED, NEW,
        ]  # fmt: skip
        assert contents(store) == [content(one) for one in (*old, new)]
    with Store(tmp_path / "new.db", create=True):
        pass
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    assert [record.message for record in caplog.records] == [f"store {path}: schema 2 becomes 4; all it holds is kept"]


def test_a_store_of_schema_3_keeps_its_data(path, tmp_path):
    old = [event(0, people=2), event(0, device="x")]
    make_schema_2(path, *old)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in SCHEMA_3:
            database.execute(statement)
        database.execute("INSERT INTO tracks VALUES (1, 0, 5, 2)")
    with Store(path) as store:
        assert [one.clock for one in store.headers()] == [None, None]
        assert [person.track for person in next(store.headers()).people] == [5, None]
        unset = unsynchronised(5)
        assert store.add([item(old[1]), item(unset), item(unset)], received_at=4.0) == [DUPLICATE, NEW, DUPLICATE]
        assert content(unset) == contents(store)[-1]
    with Store(tmp_path / "new.db", create=True):
        pass
    assert schema_of(path) == schema_of(tmp_path / "new.db")


def unsynchronised(seq: int) -> Event:
    one = event(seq)
    return Event(one.header.model_copy(update={"clock": "unsynchronised"}), one.embeddings, one.crops)


def test_an_event_of_a_clock_that_was_not_set_says_so(store):
    store.add([item(unsynchronised(0)), *items(1)], received_at=1.0)
    assert [one.clock for one in store.headers()] == ["unsynchronised", None]
    with store.snapshot():
        seen = [store.people.sighting(key) for key in store.people.each(LAST)]
    assert [one.clock for one in seen if one] == [None, "unsynchronised"]
    table = io.StringIO()
    write_csv(store, table)
    assert [row["clock"] for row in csv.DictReader(io.StringIO(table.getvalue()))] == ["unsynchronised", ""]


def test_a_migration_that_fails_leaves_the_old_store(path):
    make_schema_1(path, *(event(seq) for seq in range(50)))
    rows(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    with files_of_at_most(8192), pytest.raises(StoreError, match="a store"):
        Store(path)
    assert rows(path, "PRAGMA user_version") == [(1,)]
    assert "digest" not in str(rows(path, "SELECT sql FROM sqlite_master"))
    with Store(path) as store:
        assert numbers(store) == list(range(50))


def test_a_collector_of_schema_1_that_still_runs_goes_on(path):
    make_schema_1(path, event(0))
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        insert_as_schema_1(old, event(1))
        with Store(path) as store:
            insert_as_schema_1(old, event(3))
            insert_as_schema_1(old, event(1, device="new"))
            assert numbers(store) == [0, 1, 3, 1]
            assert store.streams() == [("box", 7, 4), ("new", 7, 2)]
            assert [(gap.device, gap.first, gap.last) for gap in store.gaps()] == [("box", 2, 2), ("new", 0, 0)]
            assert [device.events for device in store.stats()] == [3, 1]


@contextmanager
def nobody() -> Iterator[Path]:
    """A folder that can be read and not written, for as long as this process is nobody; gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


def read_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    if os.geteuid() == 0:  # whom no permission stops
        os.seteuid(65534)


@pytest.mark.parametrize(
    ("journal", "says"),
    [
        ("DELETE", "expected schema 4, got 1; open it, or a copy of it, once where"),
        ("WAL", "expected a file in a folder that can be written, .*; copy it to one"),
    ],
)
def test_an_older_store_that_cannot_be_written_is_one_error_with_its_remedy(journal, says):
    with nobody() as folder:
        path = folder / "old.db"
        make_schema_1(path, event(0))
        rows(path, f"PRAGMA journal_mode = {journal}")
        read_only(folder)
        with pytest.raises(ConfigError, match=says) as caught:
            Store(path)
        assert str(path) in str(caught.value)


def test_an_older_store_that_another_user_has_open_is_one_error_with_its_remedy():
    with nobody() as folder:
        path = folder / "old.db"
        make_schema_1(path)
        with closing(sqlite3.connect(path, isolation_level=None)) as owner:
            insert_as_schema_1(owner, event(0))
            read_only(folder)
            with pytest.raises(ConfigError, match="expected schema 4, got 1; open it, or a copy of it, once where"):
                Store(path)
            assert rows(path, "PRAGMA user_version") == [(1,)]


def test_a_store_that_cannot_be_written_can_be_read():
    with nobody() as folder:
        with Store(folder / "store.db", create=True) as store:
            store.add([*items(0, 1), gone(2, 3)], received_at=1.0)
            store.backup(folder / "copy.db")
        (folder / "store.db").unlink()
        read_only(folder)
        with Store(folder / "copy.db") as store:
            assert numbers(store) == [0, 1]
            assert [gap.count for gap in store.gaps()] == [2]
            assert store.stats()[0].events == 2
            with pytest.raises(StoreError, match="readonly"):
                store.add(items(4), received_at=1.0)


def make_directory(path):
    path.mkdir()


def make_text(path):
    path.write_text("these are words, and more than sixteen of them\n" * 20)


def make_foreign(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE events (title TEXT)")
    database.close()


def make_newer(path):
    Store(path, create=True).close()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()


def make_nothing(path):
    pass


@pytest.mark.parametrize(
    ("make", "create", "says"),
    [
        (make_directory, True, "cannot be opened"),
        (make_directory, False, "cannot be opened"),
        (make_text, True, "not a database"),
        (make_text, False, "not a database"),
        (make_foreign, True, "another program's"),
        (make_foreign, False, "another program's"),
        (make_newer, True, "newer lookout: expected schema 4, got 5; update"),
        (make_newer, False, "newer lookout"),
        (make_nothing, False, "expected an existing file"),
        (lambda path: path.touch(), False, "empty file"),
    ],
)
def test_what_is_no_store_is_refused_and_left_alone(path, make, create, says):
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=says) as caught:
        Store(path, create=create)
    assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_folder_that_is_not_there_is_a_config_error(path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        Store(path / "x.db", create=True)


def test_a_full_disk_while_it_is_opened_is_a_store_error(path):
    with files_of_at_most(8192), pytest.raises(StoreError, match="a store"):
        Store(path, create=True)
    with Store(path, create=True) as store:  # once there is room
        assert contents(store) == []


def test_a_full_disk_keeps_nothing_of_the_batch_and_all_before_it(store, path):
    store.add([*items(0), gone(1, 1)], received_at=1.0)
    full = [*items(2, 3), item(event(4, crop=b"\xff\xd8" + bytes(10**6)))]
    with files_of_at_most(600_000), pytest.raises(StoreError, match="a store"):
        store.add(full, received_at=2.0)
    assert (numbers(store), store.resume("box", 7), count(path)) == ([0], 2, (1, 1))
    assert store.add(full, received_at=3.0) == [NEW] * 3


def test_it_waits_for_another_program_that_writes(store, path):
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = Timer(5.5, other.execute, ["COMMIT"])  # s; SQLite's Python module would have waited for 5
        timer.start()
        assert store.add(items(1), received_at=1.0) == [NEW]
        timer.join()


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with Store(path, create=True) as store:
        assert contents(store) == []


def damage(path: Path) -> None:
    """Leave the first page, which says what the file is, and spoil the rest."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    path.write_bytes(whole[:size] + b"\xff" * (len(whole) - size))


def test_a_damaged_file_is_a_store_error(path):
    with Store(path, create=True) as store:
        store.add(items(*range(200)), received_at=1.0)
    damage(path)
    with Store(path) as store, pytest.raises(StoreError, match="a store"):
        list(store.events())
    with Store(path) as store, pytest.raises(StoreError, match="a store"):
        store.stats()
