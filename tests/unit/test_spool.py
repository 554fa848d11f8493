"""What is appended comes out once, in order, until it is forgotten: through reopening, kills, power cuts, bad disks."""

from __future__ import annotations

import ast
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge.config import SpoolConfig
from edge.errors import ConfigError
from edge.events import Event, Header, Person, Stamp, decode, encode
from edge.journal import SCHEMA_VERSION, Journal
from edge.link import last_of
from edge.protocol import Data, Gone
from edge.spool import Spool

DEADLINE = 30.0  # s
BIG = 40_000  # bytes


def build(frame: int, size: int = 0) -> Callable[[Stamp], Event]:
    """An event that knows its frame number; with a `size`, it has a picture of so many random bytes."""

    def event(stamp: Stamp) -> Event:
        people = (Person(box=(0, 0, 1, 1), score=0.5, answers=(), crop=True),) if size else ()
        header = Header(
            device="box", epoch=stamp.epoch, seq=stamp.seq, camera="door", frame=frame, captured_at=0.5,
            frame_size=(8, 6), bundle="b", bank="c", embedding_dim=4, people=people, notices=stamp.notices,
        )  # fmt: skip
        picture = b"\xff\xd8" + random.Random(frame).randbytes(size)
        return Event(header, np.eye(4, dtype=np.float16)[: len(people)], (picture,) * len(people))

    return event


def config(path: Path, **changes: object) -> SpoolConfig:
    return SpoolConfig(path=path).model_copy(update={"fsync_ms": 20, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


def drained(spool: Spool) -> list[tuple[int, Data | Gone]]:
    """(epoch, entry) of all that waits, which is forgotten."""
    found = []
    while spool.waiting():
        stream = spool.stream()
        entries = spool.read(stream.epoch, stream.first, 100, 1 << 20)
        if not entries:  # it was found damaged just now, and what comes next is another
            assert list(spool.read(stream.epoch, stream.first, 1, 1)) == []
            continue
        found += [(stream.epoch, entry) for entry in entries]
        spool.forget(stream.epoch, last_of(entries[-1]) + 1)
    return found


def frames_of(found: list[tuple[int, Data | Gone]]) -> list[int]:
    """The frame numbers of the events among them; each event is what its number says."""
    numbers = []
    for epoch, entry in found:
        if isinstance(entry, Data):
            event = decode(entry.frames)
            assert (event.header.epoch, event.header.seq) == (epoch, entry.seq)
            size = max(len(event.crops[0] or b"") - 2, 0) if event.crops else 0
            again = build(event.header.frame, size)(Stamp(epoch, entry.seq, event.header.notices))
            assert encode(again) == list(entry.frames)
            numbers.append(event.header.frame)
    return numbers


def numbers_of(found: list[tuple[int, Data | Gone]]) -> dict[int, list[int]]:
    """Per epoch the numbers that the entries stand for, in order."""
    numbers: dict[int, list[int]] = {}
    for epoch, entry in found:
        first = entry.seq if isinstance(entry, Data) else entry.first
        numbers.setdefault(epoch, []).extend(range(first, last_of(entry) + 1))
    return numbers


def killed(path: Path, to: Path) -> Path:
    """The files as a kill would leave them now, in another folder."""
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith(("-shm", ".lock")):  # what a reboot takes too
            shutil.copy(file, to)
    return to / path.name


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.02)


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("fsync", ["event", "interval", "never"])
def test_what_goes_in_comes_out_in_order_and_once(path: Path, count: int, fsync: str) -> None:
    with Spool(config(path, fsync=fsync)) as spool:
        for frame in range(count):
            spool.append(build(frame, size=frame % 3))
        assert spool.waiting() == count
        found = drained(spool)
        assert frames_of(found) == list(range(count))
        assert list(numbers_of(found).values()) == ([list(range(count))] if count else [])
        stream = spool.stream()
        assert (stream.first, stream.end) == (count, count)


def test_each_opening_begins_an_epoch_and_the_old_ones_come_first(path: Path) -> None:
    for run in range(4):
        with Spool(config(path)) as spool:
            for i in range(3):
                spool.append(build(10 * run + i))
    with Spool(config(path)) as spool:
        found = drained(spool)
    assert frames_of(found) == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]
    assert list(numbers_of(found).values()) == [[0, 1, 2]] * 4


def test_reading_keeps_within_events_and_size(path: Path) -> None:
    with Spool(config(path)) as spool:
        for frame in range(10):
            spool.append(build(frame, size=1000))
        epoch = spool.stream().epoch
        assert [last_of(one) for one in spool.read(epoch, 4, 3, 1 << 20)] == [4, 5, 6]
        assert [last_of(one) for one in spool.read(epoch, 0, 100, 2500)] == [0, 1]
        assert [last_of(one) for one in spool.read(epoch, 9, 100, 1)] == [9], "one at least"
        assert spool.read(epoch, 10, 100, 1 << 20) == []
        assert spool.read(epoch + 1, 0, 100, 1 << 20) == []


class Waiting(RuleBasedStateMachine):
    """A spool beside a list; `killed` goes on with what the files held at that moment."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0" / "spool.db"
        self.opened = 0
        self.spool = Spool(config(self.path))
        self.model: list[tuple[int, int, int]] = []  # epoch, number, frame
        self.given: set[tuple[int, int]] = set()
        self.frame = 0

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 5000]))
    def append(self, count: int, size: int) -> None:
        for _ in range(count):
            stamps: list[Stamp] = []

            def event(stamp: Stamp, frame: int = self.frame, stamps: list[Stamp] = stamps) -> Event:
                stamps.append(stamp)
                return build(frame, size)(stamp)

            self.spool.append(event)
            (stamp,) = stamps
            assert (stamp.epoch, stamp.seq) not in self.given, "a number is given once"
            self.given.add((stamp.epoch, stamp.seq))
            self.model.append((stamp.epoch, stamp.seq, self.frame))
            self.frame += 1

    @rule(ahead=st.integers(0, 6))
    def forget(self, ahead: int) -> None:
        stream = self.spool.stream()
        self.spool.forget(stream.epoch, stream.first + ahead)
        self.model = [one for one in self.model if one[0] != stream.epoch or one[1] >= stream.first + ahead]

    @rule(kill=st.booleans())
    def reopen(self, kill: bool) -> None:
        self.opened += 1
        fresh = killed(self.path, self.folder / str(self.opened)) if kill else self.path
        self.spool.close()
        self.path = fresh
        self.spool = Spool(config(self.path))

    @invariant()
    def all_of_the_oldest_epoch_is_there(self) -> None:
        assert self.spool.waiting() == len(self.model)
        stream = self.spool.stream()
        found = [(stream.epoch, one) for one in self.spool.read(stream.epoch, stream.first, 1000, 1 << 30)]
        expected = [frame for epoch, _, frame in self.model if not self.model or epoch == self.model[0][0]]
        assert frames_of(found) == expected
        assert stream.end - stream.first == len(expected)

    def teardown(self) -> None:
        assert frames_of(drained(self.spool)) == [frame for _, _, frame in self.model]
        self.spool.close()
        shutil.rmtree(self.folder)


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=12, stateful_step_count=25)


def test_two_threads_at_full_speed(path: Path) -> None:
    found: list[tuple[int, Data | Gone]] = []
    with Spool(config(path)) as spool:

        def append() -> None:
            for frame in range(5000):
                spool.append(build(frame))

        writer = Thread(target=append)
        writer.start()
        while writer.is_alive() or spool.waiting():
            found += drained(spool)
        writer.join()
    assert frames_of(found) == list(range(5000))


# --- bounds -------------------------------------------------------------------------------------------------------


def test_over_its_size_the_oldest_leave_and_every_number_is_accounted_for(path: Path) -> None:
    with Spool(config(path, max_bytes=1 << 20)) as spool:
        for frame in range(100):
            spool.append(build(frame, BIG))
        assert spool.health.size <= 1 << 20
        found = drained(spool)
        dropped = spool.health.dropped
    (gone, *events) = [entry for _, entry in found]
    assert isinstance(gone, Gone)
    assert (gone.first, gone.reason, gone.count) == (0, "spool full", dropped)
    assert all(isinstance(one, Data) for one in events), "what left is one entry"
    assert list(numbers_of(found).values()) == [list(range(100))]
    assert 15 < len(events) < 26


def test_over_its_size_through_several_epochs(path: Path) -> None:
    found = []
    for run in range(3):
        with Spool(config(path, max_bytes=1 << 20)) as spool:
            for i in range(15):
                spool.append(build(100 * run + i, BIG))
            if run == 2:
                found = drained(spool)
    assert list(numbers_of(found).values()) == [list(range(15))] * 3
    assert frames_of(found)[-15:] == list(range(200, 215))


def test_what_is_on_its_way_may_leave_and_its_acknowledgement_still_counts(path: Path) -> None:
    with Spool(config(path, max_bytes=1 << 20)) as spool:
        for frame in range(20):
            spool.append(build(frame, BIG))
        epoch = spool.stream().epoch
        assert len(spool.read(epoch, 0, 10, 1 << 30)) == 10  # sent
        for frame in range(20, 60):
            spool.append(build(frame, BIG))
        gone = spool.read(epoch, 0, 1, 1)[0]
        assert isinstance(gone, Gone)
        assert gone.last > 20
        spool.forget(epoch, 10)  # what was sent has arrived
        assert spool.stream().first == 10
        assert spool.read(epoch, 10, 1, 1) == [Gone(first=10, last=gone.last, reason="spool full")]
        assert spool.waiting() == 60 - gone.last
    with Spool(config(path, max_bytes=1 << 20)) as spool:
        assert spool.read(epoch, 10, 1, 1) == [Gone(first=10, last=gone.last, reason="spool full")]


def test_what_is_too_old_leaves(path: Path) -> None:
    with Spool(config(path)) as spool:
        for frame in range(5):
            spool.append(build(frame))
    with closing(sqlite3.connect(path)) as database:
        (newest,) = database.execute("SELECT max(queued) FROM entries").fetchone()
    with Journal(path) as journal:  # an entry from later: the clock goes on from there
        journal.begin()
        journal.append(encode(build(5)(Stamp(journal.epoch, 0))), newest + 1000.0)
    with Spool(config(path, max_age_s=500)) as spool:
        eventually(lambda: spool.waiting() == 2, "the old ones to leave")
        found = drained(spool)
    assert next(entry for _, entry in found) == Gone(first=0, last=4, reason="too old")
    assert frames_of(found) == [5]


# --- power cuts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", ["event", "interval"])
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_takes_nothing_that_the_policy_promised(tmp_path: Path, path: Path, fsync: str, seed: int) -> None:
    chance = random.Random(seed)
    log = Path(f"{path}-wal")
    with Spool(config(path, fsync=fsync, fsync_ms=3_600_000 if fsync == "event" else 10)) as spool:
        count = chance.randrange(1, 60)
        for frame in range(count):
            spool.append(build(frame, chance.choice([0, 3000])))
        if fsync == "interval":
            eventually(lambda: spool.synced, "the disk")
        promised, length = count, log.stat().st_size
        for frame in range(count, count + 20):
            spool.append(build(frame, 3000))
        cut = killed(path, tmp_path / "cut")
    if fsync == "event":
        promised, length = count + 20, log_length(cut)
    with Path(f"{cut}-wal").open("r+b") as file:  # of what was not synced any part may be there, or garbage
        file.seek(length)
        rest = bytearray(file.read())
        for _ in range(len(rest) // 500):
            rest[chance.randrange(len(rest))] = chance.randrange(256)
        file.seek(length)
        file.write(rest[: chance.randrange(len(rest) + 1)])
        file.truncate()
    with Spool(config(cut)) as spool:
        live = spool.stream().epoch
        found = drained(spool)
        assert spool.stream().epoch != live, "an epoch is never gone on with"
    assert frames_of(found)[:promised] == list(range(promised))
    assert frames_of(found) == list(range(len(found)))


def log_length(path: Path) -> int:
    return Path(f"{path}-wal").stat().st_size


# --- damage -------------------------------------------------------------------------------------------------------


def filled(path: Path, count: int = 120, size: int = 2000) -> int:
    """A spool on disk with `count` events; its epoch."""
    with Spool(config(path)) as spool:
        for frame in range(count):
            spool.append(build(frame, size))
        return spool.stream().epoch


def check_what_comes_out(path: Path, epoch: int, count: int) -> tuple[list[int], list[str]]:
    """Open a damaged spool, use it, and hold what comes out against what went in: frames, and the notices."""
    with Spool(config(path)) as spool:
        spool.append(build(4000))
        end, quiet_since = time.monotonic() + DEADLINE, time.monotonic()
        found: list[tuple[int, Data | Gone]] = []
        while time.monotonic() - quiet_since < 1.5 or list(path.parent.glob("*.damaged-*[0-9]")):
            assert time.monotonic() < end
            if more := drained(spool):
                found, quiet_since = found + more, time.monotonic()
            time.sleep(0.02)
        spool.append(build(5000))
        found += drained(spool)
    notices = [text for _, one in found if isinstance(one, Data) for text in decode(one.frames).header.notices]
    old = [(e, entry) for e, entry in found if e == epoch]
    for entry in (entry for _, entry in old if isinstance(entry, Gone)):
        assert entry.reason == "damaged on disk"
    new = [(e, entry) for e, entry in found if e != epoch]
    assert {4000, 5000} <= set(frames_of(new)), "the box goes on"
    numbers = numbers_of(old).get(epoch, [])
    assert set(numbers) <= set(range(count))
    seen = frames_of(old)
    assert set(seen) <= set(range(count))
    return sorted(set(seen)), notices


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_cost_what_they_hit_and_no_more(path: Path, seed: int) -> None:
    epoch, chance = filled(path), random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 3])):
        data[chance.randrange(4096, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    seen, notices = check_what_comes_out(path, epoch, 120)
    assert len(seen) >= 60, "most of it is read"
    if len(seen) < 120:
        assert any("damaged" in text for text in notices)
        assert list(path.parent.glob("spool.db.kept-*[0-9]")), "the damaged file stays"


@pytest.mark.parametrize("size", [0, 1000, 4096 * 3 + 17, -1000])
def test_a_torn_file_is_set_aside_and_the_box_goes_on(path: Path, size: int) -> None:
    epoch = filled(path)
    with path.open("r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)
    _, notices = check_what_comes_out(path, epoch, 120)
    if size:
        assert any("damaged" in text for text in notices)


def test_a_file_of_garbage_is_set_aside(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(50_000))
    seen, notices = check_what_comes_out(path, 0, 0)
    assert seen == []
    assert any("set aside as spool.db.damaged-0001" in text for text in notices)
    assert (path.parent / "spool.db.kept-0001").stat().st_size >= 50_000


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, path: Path) -> None:
    """The file has its new name, its log not yet: the log belongs to it, not to the fresh file."""
    with Spool(config(path)) as spool:
        for frame in range(50):
            spool.append(build(frame))
        epoch = spool.stream().epoch
        cut = killed(path, tmp_path / "cut")
    cut.rename(cut.with_name("spool.db.damaged-0001"))
    seen, _ = check_what_comes_out(cut, epoch, 50)
    assert seen == list(range(50))


def test_an_epoch_whose_place_was_changed_is_not_delivered_under_other_numbers(path: Path) -> None:
    epoch = filled(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE epochs SET base = base + 3 WHERE epoch = ?", (epoch,))
    seen, notices = check_what_comes_out(path, epoch, 120)
    assert len(seen) == 120
    assert any("damaged" in text for text in notices)


# --- what is no spool ---------------------------------------------------------------------------------------------


def test_one_process_at_a_time(path: Path) -> None:
    with Spool(config(path)), pytest.raises(ConfigError, match="another process uses it"):
        Spool(config(path))
    with Spool(config(path)) as spool:
        assert spool.waiting() == 0


def test_a_folder_another_programs_file_and_a_newer_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        Spool(config(tmp_path))
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE notes (text)")
    with pytest.raises(ConfigError, match="another program's SQLite file"):
        Spool(config(other))
    newer = tmp_path / "newer.db"
    filled(newer, 1)
    with closing(sqlite3.connect(newer)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(ConfigError, match="newer lookout"):
        Spool(config(newer))


SCHEMA_1 = """
PRAGMA application_id = 1280267088;
PRAGMA user_version = 1;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    epoch INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    queued REAL NOT NULL, crc INTEGER NOT NULL, reason TEXT, body BLOB
);
CREATE INDEX gone ON entries (id) WHERE body IS NULL;
CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, start INTEGER NOT NULL, base INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO epochs VALUES (77, 1, -1);
INSERT INTO entries VALUES (2, 77, 0, 3, 1.5, 2878589070, 'spool full', NULL);
INSERT INTO entries VALUES (3, 77, 4, 4, 2.5, 2517460784, NULL, X'78016364606048640412490002C100C6');
"""


def test_a_spool_of_schema_1_opens_and_keeps_its_data(path: Path) -> None:
    """As 0.2 wrote it, byte for byte: what comes after must still read it."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(SCHEMA_1)
    with Spool(config(path)) as spool:
        assert drained(spool) == [(77, Gone(first=0, last=3, reason="spool full")), (77, Data(4, (b"a", b"b")))]


def test_no_clock_that_anybody_sets_has_a_say(root: Path) -> None:
    for name in ("journal", "spool"):
        tree = ast.parse((root / f"edge/{name}.py").read_text(encoding="utf-8"))
        calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not calls & {"time.time", "time.time_ns", "datetime.now", "time.localtime", "time.gmtime"}


def test_opening_counting_and_reading_scan_nothing(path: Path) -> None:
    """A day's events cost an opening no more than none."""
    with Journal(path) as journal:
        journal.begin()
        for number in range(3000):
            journal.append([b"x" * 10], float(number))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    with Journal(path) as journal:
        journal._db.set_progress_handler(count, 100)  # every 100 steps of SQLite's machine
        journal.head()
        journal.newest()
        journal.begin()
        journal.waiting()
        journal.size()
        journal.read(journal.epoch, 0, 10, 10)
    assert steps < 20


# --- disks that refuse --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def test_a_full_disk_stops_nothing_and_loses_nothing(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_000_000))
    notices: list[str] = []

    def noting(frame: int) -> Callable[[Stamp], Event]:
        def event(stamp: Stamp) -> Event:
            notices.extend(stamp.notices)
            return build(frame, BIG)(stamp)

        return event

    path = small_disk / "spool.db"
    with Spool(config(path)) as spool:
        for frame in range(60):
            spool.append(noting(frame))
        assert spool.health.in_memory
        assert "full" in spool.health.trouble
        assert any("kept in memory" in text for text in notices)
        assert spool.waiting() == 60
        stream = spool.stream()
        first = spool.read(stream.epoch, 0, 5, 1 << 30)
        spool.forget(stream.epoch, 5)  # delivery goes on
        ballast.unlink()
        eventually(lambda: not spool.health.in_memory, "the disk")
        spool.append(noting(60))
        assert any("takes events again" in text for text in notices)
        cut = killed(path, small_disk.parent / "cut")
    with Spool(config(cut)) as spool:
        found = [(stream.epoch, one) for one in first] + drained(spool)
    assert sorted(set(frames_of(found))) == list(range(61)), "what was in memory is on the disk now"


def test_a_disk_that_turns_read_only_and_back(small_disk: Path) -> None:
    path = small_disk / "spool.db"
    with Spool(config(path)) as spool:
        for frame in range(5):
            spool.append(build(frame))
        # a file open for writing forbids the remount of a whole file system, as a failing disk would do it: the file
        # is put out of reach by its size instead, below; here only what waits is delivered from a disk that refuses
    remount(small_disk, "ro")
    try:
        with Spool(config(path)) as spool:
            assert spool.health.in_memory
            spool.append(build(5))
            assert spool.waiting() >= 1
            remount(small_disk, "rw")
            eventually(lambda: not spool.health.in_memory, "the disk")
            assert frames_of(drained(spool)).count(5) == 1
    finally:
        remount(small_disk, "rw")


def test_a_disk_that_is_read_only_at_the_start_loses_nothing_of_before(small_disk: Path) -> None:
    path = small_disk / "spool.db"
    with Spool(config(path)) as spool:
        for frame in range(5):
            spool.append(build(frame))
    remount(small_disk, "ro")
    with Spool(config(path)) as spool:
        spool.append(build(5))
        remount(small_disk, "rw")
        eventually(lambda: not spool.health.in_memory, "the disk")
        eventually(lambda: spool.waiting() == 6, "the events of before")
        assert sorted(frames_of(drained(spool))) == list(range(6))


LIMITED = """
import resource, sys
from pathlib import Path
from edge.config import SpoolConfig
from edge.spool import Spool
from tests.unit.test_spool import build, drained, frames_of
with Spool(SpoolConfig(path=Path(sys.argv[1]))) as spool:
    for frame in range(3):
        spool.append(build(frame, 1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    for frame in range(3, 30):
        spool.append(build(frame, 20_000))
    assert spool.health.in_memory, spool.health
    assert frames_of(drained(spool)) == list(range(30))
print("all there")
"""


def test_a_quota_is_a_full_disk(path: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "all there\n", done.stderr


def test_memory_is_bounded_and_what_leaves_is_told(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2_900_000))
    with Spool(config(small_disk / "spool.db")) as spool:
        for frame in range(60):
            spool.append(build(frame, 1_000_000))
        assert spool.health.in_memory
        found = drained(spool)
    gone = [entry for _, entry in found if isinstance(entry, Gone)]
    assert [one.reason for one in gone] == ["memory full"]
    assert sum(len(numbers) for numbers in numbers_of(found).values()) == 60
    assert 25 < len(frames_of(found)) < 40


FAILING = """
import sys
from pathlib import Path
from edge.config import SpoolConfig
from edge.spool import Spool
from tests.unit.test_spool import build
with Spool(SpoolConfig(path=Path(sys.argv[1]))) as spool:
    for frame in range(5):
        spool.append(build(frame))
        print(frame, flush=True)
    spool.forget(spool.stream().epoch, 2)
    print("forgotten", flush=True)
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("box.before-append:3", [0, 1]),
        ("box.after-append:3", [0, 1, 2]),
        ("box.before-forget:1", [0, 1, 2, 3, 4]),
        ("box.after-forget:1", [2, 3, 4]),
    ],
)
def test_killed_at_each_line_that_matters(path: Path, root: Path, point: str, left: list[int]) -> None:
    words = [sys.executable, "-c", FAILING, str(path)]
    env = {"LOOKOUT_FAILPOINT": point, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    with Spool(config(path)) as spool:
        assert frames_of(drained(spool)) == left


def test_the_log_of_a_spool_that_is_written_without_a_pause_does_not_fill_the_disk(path: Path) -> None:
    with Spool(config(path)) as spool:
        most = 0
        for frame in range(1500):
            spool.append(build(frame, 100_000))
            most = max(most, log_length(path))
    assert most < 100 << 20, "150 MB went through it"
