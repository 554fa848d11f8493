"""The database of a spool: what it keeps and in which order, what it drops, which files it opens."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge.errors import ConfigError
from edge.journal import Journal, checkpoint
from edge.link import Stream, last_of
from edge.protocol import Data, Gone
from edge.records import DamagedError, DiskRefusedError, event_record, gone_record, translated
from tests.spools import as_killed, quick_folder


def frames(mark: int) -> tuple[bytes, ...]:
    return (b"event %d" % mark, bytes(mark % 7))


def filled(path: Path | None, *, epochs: int = 1, events: int = 10) -> Journal:
    """Event n of its epoch is `frames(n)`, queued at n."""
    journal = Journal(path)
    for _ in range(epochs):
        journal.begin()
        for mark in range(events):
            journal.append(frames(mark), mark)
    return journal


def everything(journal: Journal) -> list[Data | Gone]:
    """Of the oldest epoch."""
    stream = journal.head()
    return journal.read(stream.epoch, stream.first, 10**6, 10**9) if stream else []


class Entries(RuleBasedStateMachine):
    """A journal against a list of numbers, each with the event that it has or the reason why it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = quick_folder()
        self.opened = 0
        self.kept: list[tuple[int, int, int | str]] = []  # epoch, number, mark or reason; the oldest first
        self.epochs: set[int] = set()

    @initialize()
    def open(self) -> None:
        self.journal = Journal(self.path)
        self.begin()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.opened}.db"

    @rule()
    def begin(self) -> None:
        self.journal.begin()
        assert self.journal.epoch not in self.epochs, "an epoch twice"
        assert self.journal.next == 0
        self.epochs.add(self.journal.epoch)

    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        for _ in range(count):
            mark = len(self.epochs) * 1000 + self.journal.next
            self.kept.append((self.journal.epoch, self.journal.next, mark))
            self.journal.append(frames(mark), 0.5)

    @precondition(lambda self: self.kept)
    @rule(share=st.floats(0, 1))
    def forget(self, share: float) -> None:
        stream = self.journal.head()
        end = stream.first + round(share * (stream.end - stream.first))
        self.journal.forget(stream.epoch, end)
        self.kept = [one for one in self.kept if one[0] != stream.epoch or one[1] >= end]

    @rule(count=st.integers(1, 9), reason=st.sampled_from(["spool full", "too old"]))
    def drop(self, count: int, reason: str) -> None:
        events = [at for at, (_, _, what) in enumerate(self.kept[:-1]) if isinstance(what, int)][:count]
        assert self.journal.drop(reason, count) == len(events)
        for at in events:
            self.kept[at] = (*self.kept[at][:2], reason)

    @rule(killed=st.booleans(), logged=st.booleans())
    def reopen(self, killed: bool, logged: bool) -> None:
        """As after a kill, or after it was closed; with all of it in the log, or not."""
        if not logged:
            checkpoint(self.path)
        before = self.path
        self.opened += 1
        if killed:
            as_killed(before, self.path)
        self.journal.close()
        if not killed:
            shutil.copy(before, self.path)
        self.journal = Journal(self.path)
        gone = [(epoch, why) for epoch, _, why in self.kept[:1] if isinstance(why, str)]
        if gone:  # of one that was half acknowledged, it does not know which half
            self.journal.forget(self.kept[0][0], self.kept[0][1])
        self.begin()

    @precondition(lambda self: self.kept)
    @rule(share=st.floats(0, 0.99), events=st.integers(1, 9), size=st.sampled_from([1, 30, 10**6]))
    def read(self, share: float, events: int, size: int) -> None:
        stream = self.journal.head()
        at = stream.first + int(share * (stream.end - stream.first))
        found = self.journal.read(stream.epoch, at, events, size)
        assert 0 < len(found) <= events
        assert sum(sum(map(len, one.frames)) for one in found[:-1] if isinstance(one, Data)) < size
        wanted = {number: what for epoch, number, what in self.kept if epoch == stream.epoch}
        for entry in found:
            if isinstance(entry, Data):
                assert (entry.seq, entry.frames) == (at, frames(wanted[at]))
            else:
                assert entry.first == at
                assert {wanted[number] for number in range(at, entry.last + 1)} == {entry.reason}
            at = last_of(entry) + 1
        rest = [number for number in wanted if number >= at]
        assert len(found) == events or size < 10**6 or not rest, "less than there is"

    @invariant()
    def the_oldest_comes_first(self) -> None:
        if not self.kept:
            assert self.journal.head() is None
            return
        epoch = self.kept[0][0]
        numbers = [number for one, number, _ in self.kept if one == epoch]
        assert self.journal.head() == Stream(epoch, numbers[0], numbers[-1] + 1)

    @invariant()
    def counts(self) -> None:
        runs = groupby(self.kept, key=lambda one: one if isinstance(one[2], int) else (one[0], one[2]))
        assert self.journal.waiting() == len(list(runs))

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


TestEntries = Entries.TestCase
TestEntries.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_too_old_leaves_and_the_newest_stays() -> None:
    with filled(None) as journal:
        assert journal.drop("too old", 100, older_than=4) == 4
        assert journal.drop("too old", 100, older_than=4) == 0
        assert journal.drop("too old", 3, older_than=100) == 3
        assert everything(journal)[:2] == [Gone(first=0, last=6, reason="too old"), Data(7, frames(7))]
        assert journal.drop("too old", 100, older_than=100) == 2
        assert everything(journal) == [Gone(first=0, last=8, reason="too old"), Data(9, frames(9))]
        assert journal.drop("too old", 100, older_than=100) == 0


def test_a_gone_that_was_half_acknowledged_grows_and_what_arrived_is_not_sent_again() -> None:
    with filled(None) as journal:
        journal.drop("spool full", 5)
        journal.forget(journal.epoch, 3)
        assert everything(journal)[0] == Gone(first=3, last=4, reason="spool full")
        journal.drop("spool full", 2)
        assert everything(journal)[0] == Gone(first=3, last=6, reason="spool full")
        assert journal.head() == Stream(journal.epoch, 3, 10)
        assert journal.waiting() == 4
        assert [record.first for _, record in journal.records(0, 9)] == [3, 7]
        journal.forget(journal.epoch, 8)
        assert everything(journal)[0] == Data(8, frames(8))


def test_when_the_oldest_that_waits_was_queued(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.begin()
        assert journal.oldest() is None
        for number in range(5):
            journal.append([b"{}"], 10.0 + number)
        assert journal.oldest() == 10.0
        journal.forget(journal.epoch, 3)
        assert journal.oldest() == 13.0
    with Journal(tmp_path / "j.db") as journal:
        assert journal.oldest() == 13.0


def test_only_the_oldest_epoch_is_forgotten() -> None:
    with filled(None, epochs=2) as journal:
        oldest = journal.head()
        journal.forget(journal.epoch, 5)
        assert (journal.head(), journal.waiting()) == (oldest, 20)
        journal.forget(oldest.epoch, 10**9)
        assert (journal.head(), journal.waiting()) == (Stream(journal.epoch, 0, 10), 10)
        journal.forget(oldest.epoch, 3)
        journal.forget(12345, 3)
        assert journal.waiting() == 10
        assert journal.read(oldest.epoch, 0, 9, 9) == journal.read(12345, 0, 9, 9) == []


def test_what_is_copied_keeps_its_numbers_and_is_delivered_like_the_rest(tmp_path: Path) -> None:
    records = [
        gone_record(5, 1000, 1009, 1.0, "too old"),
        event_record(5, 1010, 2.0, frames(1)),
        event_record(6, 0, 3.0, frames(2)),
    ]
    with Journal(tmp_path / "a.db") as journal:
        journal.copy(records[:1])
        journal.copy(records[1:])
        with pytest.raises(ValueError, match="does not follow"):
            journal.copy([event_record(6, 2, 3.0, frames(2))])
    with Journal(tmp_path / "a.db") as journal:
        assert (journal.head(), journal.waiting(), journal.newest) == (Stream(5, 1000, 1011), 3, 3.0)
        assert everything(journal) == [Gone(first=1000, last=1009, reason="too old"), Data(1010, frames(1))]
        journal.forget(5, 1011)
        assert everything(journal) == [Data(0, frames(2))]
        assert journal.drop("spool full", 9) == 0


def test_numbers_go_on_where_a_file_was_emptied(tmp_path: Path) -> None:
    """Ids may begin again then, but no epoch is written to twice."""
    epochs = set()
    for _ in range(3):
        with filled(tmp_path / "a.db", events=4) as journal:
            assert journal.head() == Stream(journal.epoch, 0, 4)
            journal.forget(journal.epoch, 4)
            assert journal.head() is None
            epochs.add(journal.epoch)
    assert len(epochs) == 3


@pytest.mark.parametrize("events", [0, 3])
def test_epochs_of_which_nothing_waits_leave_the_file(tmp_path: Path, events: int) -> None:
    for _ in range(8):
        with filled(tmp_path / "a.db", events=events) as journal:
            stream = journal.head()
            if stream and stream.epoch != journal.epoch:  # the one before
                journal.forget(stream.epoch, stream.end)
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        assert database.execute("SELECT count(*) <= 3 FROM epochs").fetchone() == (1,)


def test_nobody_else_reads_what_is_about_people(tmp_path: Path) -> None:
    with filled(tmp_path / "a.db"):
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
        assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "reading", "kind"),
    [
        ("database or disk is full", False, DiskRefusedError),
        ("disk I/O error", False, DiskRefusedError),
        ("disk I/O error", True, DamagedError),  # what is in a bad sector does not come back
        ("attempt to write a readonly database", False, DiskRefusedError),
        ("unable to open database file", True, DiskRefusedError),
        ("database is locked", True, DiskRefusedError),
        ("database disk image is malformed", False, DamagedError),
        ("file is not a database", True, DamagedError),
        ("no such table: entries", True, DamagedError),
    ],
)
def test_what_sqlite_says_and_what_it_means(text: str, reading: bool, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=text), translated(reading=reading):
        raise sqlite3.OperationalError(text)


# --- which files it opens ---------------------------------------------------------------------------------------------

SCHEMA_1 = """
    PRAGMA page_size = 4096;
    PRAGMA journal_mode = WAL;
    PRAGMA application_id = 1280267088;
    PRAGMA user_version = 1;
    CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        queued REAL NOT NULL, crc INTEGER NOT NULL, reason TEXT, body BLOB
    );
    CREATE INDEX gone ON entries (id) WHERE body IS NULL;
    CREATE TABLE epochs (
        start INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, base INTEGER NOT NULL, crc INTEGER NOT NULL
    );
    INSERT INTO epochs VALUES (7, 4611686018427387903, 3, 1166468642);
    INSERT INTO entries VALUES (8, 4611686018427387903, 4, 5, 12.5, 2186708105, 'spool full', NULL);
    INSERT INTO entries VALUES (9, 4611686018427387903, 6, 6, 13.0, 4161200104, NULL,
        X'780163636060c8484d4c492d0232189881b828bf1c00262b03cb');
"""


def test_a_spool_of_schema_1_opens_and_keeps_its_data(tmp_path: Path) -> None:
    """As it was written in 2026; the next schema will have such a test of its own."""
    with closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        database.executescript(SCHEMA_1)
    with Journal(tmp_path / "spool.db") as journal:
        epoch = 4611686018427387903
        assert journal.newest == 13.0
        assert journal.head() == Stream(epoch, 4, 7)
        assert everything(journal) == [Gone(first=4, last=5, reason="spool full"), Data(6, (b"header", b"", b"row"))]
        journal.begin()
        journal.append(frames(1), 14.0)
        assert journal.waiting() == 3


def test_another_programs_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE dishes (name PRIMARY KEY)")
    before = path.read_bytes()
    says = r"another program's SQLite file; name another file in spool\.path"
    with pytest.raises(ConfigError, match=rf"spool\.db: {says}"):
        Journal(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(SCHEMA_1.replace("body BLOB", "frames BLOB").replace("body IS", "frames IS"))
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match=r"written by a newer lookout: expected schema 1, got 2"):
        Journal(path)


@pytest.mark.parametrize("pragma", ["user_version = 2", "user_version = 0", "application_id = 7", "user_version = -1"])
def test_one_number_of_the_header_alone_makes_no_other_program_or_schema(tmp_path: Path, pragma: str) -> None:
    """That is damage, and the box starts."""
    filled(tmp_path / "spool.db").close()
    with closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        database.execute(f"PRAGMA {pragma}")
    with pytest.raises(DamagedError):
        Journal(tmp_path / "spool.db")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE epochs SET base = base + 1",
        "UPDATE epochs SET start = start + 1",
        "UPDATE epochs SET epoch = epoch + 1",
        "DELETE FROM epochs WHERE start = (SELECT max(start) FROM epochs)",
        "DELETE FROM epochs WHERE start = (SELECT min(start) FROM epochs)",
        "DELETE FROM entries WHERE id = 10",
        "DELETE FROM entries WHERE id = 7",
        *(f"UPDATE entries SET {column} = {column} + 1 WHERE id = 7" for column in ("epoch", "last", "queued", "crc")),
        "UPDATE entries SET first = first - 1 WHERE id = 7",
        "UPDATE entries SET body = CAST(body AS TEXT) || 'x' WHERE id = 7",
        "UPDATE entries SET body = NULL WHERE id = 7",
        "UPDATE entries SET reason = '' WHERE id = 7",
        "UPDATE entries SET reason = CAST(X'ff' AS TEXT) WHERE id = 7",
        "UPDATE entries SET id = id + 1000 WHERE id = 7",
        "UPDATE entries SET id = 1000 - id",
        "UPDATE entries SET body = (SELECT body FROM entries WHERE id = 8) WHERE id = 7",
        "UPDATE entries SET id = -id WHERE id IN (7, 8); UPDATE entries SET id = 15 + id WHERE id < 0",
        "UPDATE entries SET (epoch, crc, body) = (SELECT epoch, crc, body FROM entries WHERE id = 17) WHERE id = 7",
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, 'REAL', 'RIAL')",
        "DROP TABLE epochs",
        "ALTER TABLE entries RENAME COLUMN first TO fist",
    ],
)
def test_nothing_wrong_comes_out_whatever_was_changed(tmp_path: Path, statement: str) -> None:
    """Of two epochs of ten entries, the ids 1 to 10 and 11 to 20."""
    filled(tmp_path / "spool.db", epochs=2).close()
    with closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        assert database.execute("SELECT min(id), max(id) FROM entries").fetchone() == (1, 20)
        database.executescript(statement)
    with pytest.raises(DamagedError):
        all_right(tmp_path / "spool.db")


def all_right(path: Path) -> int:
    """How many events come out, each of which is the one that it says it is."""
    count = 0
    with Journal(path) as journal:
        while stream := journal.head():
            for entry in everything(journal):
                assert isinstance(entry, Data)
                assert entry.frames == frames(entry.seq)
                count += 1
            journal.forget(stream.epoch, stream.end)
    return count


def test_the_end_of_the_last_epoch_is_where_a_power_cut_puts_it(tmp_path: Path) -> None:
    filled(tmp_path / "spool.db", epochs=2).close()
    with closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        database.execute("DELETE FROM entries WHERE id > 15")
        database.commit()
    assert all_right(tmp_path / "spool.db") == 15


def test_what_is_dropped_is_checked_first(tmp_path: Path) -> None:
    filled(tmp_path / "spool.db").close()
    with closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        database.execute("UPDATE entries SET queued = -1000 WHERE id = 3")
        database.commit()
    with Journal(tmp_path / "spool.db") as journal, pytest.raises(DamagedError):
        journal.drop("too old", 9, older_than=5)


# --- how long it takes ------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """By this thread, from files and the cache of them."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/thread-self/io").exists(), reason="only Linux counts what a thread reads")
def test_a_day_of_events_takes_no_longer_to_open_than_a_few() -> None:
    """Told by what is read of the file: a scan of it would be 30 MB."""
    folder, last = quick_folder(), 432_000
    path = folder / "spool.db"
    try:
        with Journal(path) as journal:
            between = gone_record(7, 1, last - 1, 1.0, "")
            journal.copy([event_record(7, 0, 1.0, [b""]), between, event_record(7, last, 1.0, [b""])])
        with closing(sqlite3.connect(path)) as database:
            database.execute("DELETE FROM entries WHERE body IS NULL")
            database.execute(
                "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ? - 1)"
                " INSERT INTO entries SELECT n + 1, 7, n, n, 1.0, 0, NULL, zeroblob(40) FROM n",
                (last,),
            )
            database.commit()
        assert path.stat().st_size > 30e6
        before = bytes_read()
        with Journal(path) as journal:
            journal.begin()
            for _ in range(20):
                journal.append([b"new"], 2.0)
                assert journal.head() == Stream(7, 0, last + 1)
                journal.size()
                journal.drop("too old", 100, older_than=0.5)
            assert journal.waiting() == last + 21
            assert len(journal.read(7, 0, 1, 1)) == 1
            journal.forget(7, 1)
            assert bytes_read() - before < 100 * 4096
    finally:
        shutil.rmtree(folder)
