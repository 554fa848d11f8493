"""The store keeps every event once, whole and in order, and says in one line what it cannot open."""

import resource
import sqlite3
from contextlib import closing
from threading import Timer

import numpy as np
import pytest

from collector.store import SCHEMA_VERSION, Store
from edge.errors import ConfigError, StoreError
from edge.events import Answer, Choice, Event, Header, Person


def event(seq: int, people: int = 1, device: str = "box", epoch: int = 7, crop: bytes | None = None) -> Event:
    answer = Answer(category="größe", top=(Choice(option="tall", label="高", probability=1 / 3),))
    person = Person(box=(0.1, 2, 30, 40), score=0.7, answers=(answer,), crop=crop is not None)
    header = Header(
        device=device, epoch=epoch, seq=seq, camera="dör", frame=seq // 2, captured_at=1e9 + seq / 3,
        frame_size=(640, 480), bundle="b", bank="c", embedding_dim=16, people=(person,) * people, skipped=3,
    )  # fmt: skip
    return Event(header, np.eye(16, dtype=np.float16)[:people], (crop,) * people)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a store?#%.db"


@pytest.fixture
def store(path):
    with Store(path, create=True) as store:
        yield store


def contents(store: Store) -> list[tuple[Header, bytes, tuple[bytes | None, ...]]]:
    return [(event.header, event.embeddings.tobytes(), event.crops) for event in store.events()]


def count(path) -> tuple[int, int]:
    """How many events and people the file holds."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM people)").fetchone()


def test_what_was_added_comes_back_in_order(store, path):
    events = [event(5), event(2, people=0), event(3, people=3, crop=b"\xff\xd8\x00jpeg"), event(2**63 - 1)]
    assert store.add(events[:2], received_at=1.0) == events[:2]
    assert store.add(events[2:], received_at=2.0) == events[2:]
    assert contents(store) == [(one.header, one.embeddings.tobytes(), one.crops) for one in events]
    assert list(store.headers()) == [one.header for one in events]
    assert all(one.embeddings.dtype == np.float16 for one in store.events())
    assert count(path) == (4, 5)


def test_an_event_is_kept_once_and_the_first_one_stays(store, path):
    first, again, other_box, other_epoch = event(1), event(1, people=4), event(1, device="x"), event(1, epoch=8)
    assert store.add([first, again, other_box], received_at=1.0) == [first, other_box]
    assert store.add([again, first, other_epoch], received_at=2.0) == [other_epoch]
    assert [one.header for one in store.events()] == [first.header, other_box.header, other_epoch.header]
    assert count(path) == (3, 3)


def test_a_batch_is_stored_whole_or_not_at_all(store, path):
    good, bad = event(1), event(2)
    bad = Event(bad.header.model_copy(update={"camera": None}), bad.embeddings, bad.crops)
    with pytest.raises(StoreError, match="a store"):
        store.add([good, bad], received_at=1.0)
    assert count(path) == (0, 0)
    assert store.add([good], received_at=1.0) == [good]


def test_no_events_is_no_special_case(store):
    assert store.add([], received_at=1.0) == []
    assert (list(store.events()), list(store.headers()), store.categories()) == ([], [], [])


def test_it_can_be_read_while_events_come_in(store, path):
    store.add([event(1)], received_at=1.0)
    with Store(path) as reader:
        with reader.snapshot():
            assert [header.seq for header in reader.headers()] == [1]
            store.add([event(2)], received_at=2.0)
            assert [header.seq for header in reader.headers()] == [1]
        assert [header.seq for header in reader.headers()] == [1, 2]


def test_categories_are_in_the_order_of_arrival(store):
    def asked(seq, *names):
        one = event(seq)
        answers = tuple(Answer(category=name, top=(Choice(option="x", probability=1),)) for name in names)
        person = one.header.people[0].model_copy(update={"answers": answers})
        return Event(one.header.model_copy(update={"people": (person,)}), one.embeddings, one.crops)

    store.add([asked(1, "zebra", "hat"), asked(2), asked(3, "hat", "bag"), asked(4, "a'b\"c")], received_at=1.0)
    assert store.categories() == ["zebra", "hat", "bag", "a'b\"c"]


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
        (make_newer, True, r"newer lookout: expected schema 1, got 2; update"),
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
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # bytes a file may have
    try:
        with pytest.raises(StoreError, match="a store"):
            Store(path, create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with Store(path, create=True) as store:  # once there is room
        assert contents(store) == []


def test_it_waits_for_another_program_that_writes(store, path):
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = Timer(5.5, other.execute, ["COMMIT"])  # s; SQLite's Python module would have waited for 5
        timer.start()
        assert len(store.add([event(1)], received_at=1.0)) == 1
        timer.join()


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with Store(path, create=True) as store:
        assert contents(store) == []


def test_a_damaged_file_is_a_store_error(path):
    with Store(path, create=True) as store:
        store.add([event(seq) for seq in range(200)], received_at=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with Store(path) as store, pytest.raises(StoreError, match="a store"):
        list(store.events())
