"""What a box keeps until it is delivered: against a plain model, over its bounds, after kills, cuts and damage."""

from __future__ import annotations

import ast
import random
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge.errors import ConfigError
from edge.journal import Journal
from edge.link import Stream, last_of
from edge.protocol import Data, Gone
from edge.records import event_record
from edge.spool import Spool
from tests.spools import Numbers, append, as_killed, drain, event, mark_of, opened, quick_folder, until


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a spool's file, in a folder of its own."""
    folder = quick_folder()
    yield folder / "spool.db"
    shutil.rmtree(folder)


class Model(RuleBasedStateMachine):
    """A spool against a list of the numbers that were appended and not forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = quick_folder()
        self.opened = self.appended = 0
        self.kept: list[tuple[int, int, int]] = []  # epoch, number, mark
        self.begun: dict[int, int] = {}  # epoch -> the next number

    @initialize(policy=st.sampled_from(["interval", "event", "never"]))
    def open(self, policy: str) -> None:
        self.policy = policy
        self.spool = opened(self.path, fsync=policy)
        self.epoch = -1  # not known before its first event

    @property
    def path(self) -> Path:
        return self.folder / str(self.opened) / "spool.db"

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 300, 5000]))
    def append(self, count: int, size: int) -> None:
        for _ in range(count):
            stamp = append(self.spool, self.appended, size)
            if self.epoch < 0:
                assert stamp.epoch not in self.begun, "an old epoch was written to"
                self.epoch = stamp.epoch
            assert stamp.epoch == self.epoch
            assert stamp.seq == self.begun.get(stamp.epoch, 0), "a number twice, or none"
            assert not stamp.notices
            self.begun[stamp.epoch] = stamp.seq + 1
            self.kept.append((stamp.epoch, stamp.seq, self.appended))
            self.appended += 1

    @rule(share=st.floats(0, 0.99), events=st.integers(1, 5), size=st.sampled_from([1, 10**6]))
    def read(self, share: float, events: int, size: int) -> None:
        stream = self.spool.stream()
        at = stream.first + int(share * (stream.end - stream.first))
        found = self.spool.read(stream.epoch, at, events, size)
        wanted = [one for one in self.kept if one[0] == stream.epoch and one[1] >= at]
        assert [(stream.epoch, one.seq, mark_of(stream.epoch, one)) for one in found] == wanted[: len(found)]
        assert len(found) == min(len(wanted), events if size > 1 else 1)

    @rule(share=st.floats(0, 1))
    def forget(self, share: float) -> None:
        stream = self.spool.stream()
        end = stream.first + round(share * (stream.end - stream.first))
        self.spool.forget(stream.epoch, end)
        self.kept = [one for one in self.kept if one[0] != stream.epoch or one[1] >= end]

    @rule(killed=st.booleans())
    def reopen(self, killed: bool) -> None:
        """After a kill, or after it was closed."""
        before, folder = self.path, self.path.parent
        self.opened += 1
        if killed:
            as_killed(before, self.path)
            self.spool.close()
        else:
            self.spool.close()
            folder.rename(self.path.parent)
        self.open(self.policy)

    @invariant()
    def waits(self) -> None:
        assert self.spool.waiting() == self.spool.health.waiting == len(self.kept)
        if self.kept:
            epoch, first, _ = self.kept[0]
            assert self.spool.stream() == Stream(epoch, first, self.begun[epoch])
        else:
            stream = self.spool.stream()
            assert stream.first == stream.end

    def teardown(self) -> None:
        out = drain(self.spool)
        assert [(*number, mark) for number, mark in out.items()] == self.kept
        self.spool.close()
        shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


# --- bounds -----------------------------------------------------------------------------------------------------------


def runs(out: Numbers) -> list[tuple[int | str, int]]:
    """(reason, count) of what is gone, ("kept", count) of the rest."""
    return [
        (kind, len(list(group)))
        for kind, group in groupby(what if isinstance(what, str) else "kept" for what in out.values())
    ]


def test_the_age_of_what_waits_is_in_running_time(path: Path) -> None:
    with opened(path) as spool:
        assert spool.health.oldest_s is None
        before = time.monotonic()
        stamp = append(spool, 0)
        append(spool, 1)
    with opened(path) as spool:  # the time between is nobody's
        age = spool.health.oldest_s
        assert age is not None
        assert 0 <= age <= time.monotonic() - before
        spool.forget(stamp.epoch, 2)
        assert spool.health.oldest_s is None


def test_over_its_bytes_the_oldest_leave_and_every_number_is_accounted_for(path: Path) -> None:
    with opened(path, max_bytes=1 << 20) as spool:
        stamps = [append(spool, mark, 10_000) for mark in range(300)]
        health = spool.health
        assert health.size <= 1 << 20
        assert health.dropped > 150
        out = drain(spool)
        assert list(out) == [(stamp.epoch, stamp.seq) for stamp in stamps]
        assert runs(out) == [("spool full", health.dropped), ("kept", 300 - health.dropped)]
        assert [mark for mark in out.values() if isinstance(mark, int)] == list(range(health.dropped, 300))


def test_bounds_hold_over_epochs_and_in_flight_events_are_dropped_too(path: Path) -> None:
    written: list[tuple[int, int]] = []
    for _ in range(3):
        with opened(path, max_bytes=1 << 20) as spool:
            for mark in range(20):
                stamp = append(spool, mark, 10_000)
                written.append((stamp.epoch, stamp.seq))
    with opened(path, max_bytes=1 << 20) as spool:
        flight = spool.read(spool.stream().epoch, 0, 10, 10**6)  # sent, and not acknowledged
        assert [one.seq for one in flight if isinstance(one, Data)] == list(range(10))
        for mark in range(70):
            stamp = append(spool, mark, 10_000)
            written.append((stamp.epoch, stamp.seq))
        oldest = spool.stream()
        assert (oldest.epoch, oldest.first) == written[0]
        spool.forget(oldest.epoch, 10)  # it arrived before it was dropped
        out = drain(spool)
        assert list(out) == written[10:]
        dropped = spool.health.dropped
        assert runs(out) == [("spool full", dropped - 10), ("kept", len(out) - dropped + 10)]


def test_what_is_too_old_leaves_by_the_clock_of_the_spool(path: Path) -> None:
    """Its age is that of events before the spool was opened last; ten seconds of it are no time for a test."""
    with Journal(path) as journal:
        journal.copy([event_record(7, number, 100.0 * number, [b"old"]) for number in range(9)])
    with opened(path, max_age_s=350) as spool:
        until("drop", lambda: spool.health.dropped == 5)
        stream = spool.stream()
        assert stream == Stream(7, 0, 9)
        entries = spool.read(7, 0, 9, 9000)
        assert entries[0] == Gone(first=0, last=4, reason="too old")
        assert [last_of(entry) for entry in entries] == [4, 5, 6, 7, 8]


def test_age_goes_on_where_it_was_after_all_kinds_of_restart(path: Path) -> None:
    with Journal(path) as journal:
        journal.copy([event_record(7, 0, 5000.0, [b"old"]), event_record(7, 1, 5000.0, [b"old"])])
    with opened(path) as spool:
        append(spool, 1)
    with Journal(path) as journal:
        assert 5000 <= journal.newest < 5060


def test_a_gone_that_was_half_acknowledged(path: Path) -> None:
    with opened(path, max_bytes=1 << 20) as spool:
        for mark in range(200):
            append(spool, mark, 10_000)
        stream = spool.stream()
        (gone,) = spool.read(stream.epoch, 0, 1, 1)
        assert isinstance(gone, Gone)
        spool.forget(stream.epoch, gone.last - 1)
        assert spool.read(stream.epoch, gone.last - 1, 1, 1) == [gone.model_copy(update={"first": gone.last - 1})]
        spool.forget(stream.epoch, gone.last + 3)
        assert spool.stream().first == gone.last + 3
        assert spool.waiting() == 200 - gone.last - 3


def test_the_log_does_not_fill_the_disk_though_nobody_pauses(path: Path) -> None:
    with opened(path) as spool:
        most = 0
        for _ in range(600):
            spool.append(lambda stamp: event(7, stamp, 100_000))
            most = max(most, Path(f"{path}-wal").stat().st_size)
    assert most < 40 << 20, "60 MB went through it"


# --- power cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_takes_nothing_that_was_on_the_disk(path: Path, seed: int) -> None:
    """Whatever is in the log behind the place up to which it was synced."""
    chance = random.Random(seed)
    written: Numbers = {}
    with opened(path, fsync="never") as spool:
        for mark in range(chance.randint(1, 40)):
            stamp = append(spool, mark, chance.choice((0, 500, 5000)))
            written[stamp.epoch, stamp.seq] = mark
        synced = Path(f"{path}-wal").stat().st_size
        more = {append(spool, mark, 500).seq: mark for mark in range(100, 100 + chance.randint(1, 40))}
        log = as_killed(path, path.with_name("cut.db")).with_name("cut.db-wal")
    content = log.read_bytes()
    at = chance.randrange(synced, len(content))
    torn = chance.choice((b"", bytes(len(content) - at), chance.randbytes(len(content) - at)))
    log.write_bytes(content[:at] + torn)
    with opened(path.with_name("cut.db"), fsync="never") as spool:
        stamp = append(spool, 999)
        assert not stamp.notices, "a power cut is nothing to speak of"
        assert stamp.seq == 0
        assert stamp.epoch not in {epoch for epoch, _ in written}
        out = drain(spool)
    assert out.pop((stamp.epoch, 0)) == 999
    assert list(out.items())[: len(written)] == list(written.items())
    rest = [mark for number, mark in out.items() if number not in written]
    assert rest == list(more.values())[: len(rest)], "the rest is a beginning of what came later"


# --- clocks and threads -----------------------------------------------------------------------------------------------


def test_clocks_that_jump_by_a_day_change_no_order(path: Path) -> None:
    clocks = [1.7e9, 1.7e9 + 86_400, 1.7e9 - 86_400, 0.0, 1.7e9 + 1]
    with opened(path, max_age_s=3600) as spool:
        for mark, captured_at in enumerate(clocks):
            spool.append(lambda stamp, mark=mark, at=captured_at: event(mark, stamp, captured_at=at))
        spool.append(lambda stamp: event(9, stamp))
        assert list(drain(spool).values()) == [0, 1, 2, 3, 4, 9]
        assert spool.health.dropped == 0


@pytest.mark.parametrize("name", ["spool", "shelf", "journal", "records", "leaves", "aside", "wal"])
def test_no_clock_that_anybody_can_set_has_a_say(root: Path, name: str) -> None:
    tree = ast.parse((root / f"edge/{name}.py").read_text())
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name | ast.alias)}
    clocks = ("time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime", "st_mtime", "strftime")
    assert not [one for one in named for clock in clocks if clock in one]


def test_one_thread_appends_and_one_delivers_over_a_reopening(path: Path) -> None:
    events = 20_000
    written: list[tuple[int, int]] = []
    out: Numbers = {}

    def produce(spool: Spool, marks: range) -> None:
        for mark in marks:
            stamp = append(spool, mark)
            written.append((stamp.epoch, stamp.seq))

    for half in range(2):
        with opened(path) as spool:
            marks = range(half * events // 2, (half + 1) * events // 2)
            thread = threading.Thread(target=produce, args=(spool, marks))
            thread.start()
            while thread.is_alive() or (half and spool.waiting()):
                stream = spool.stream()
                entries = spool.read(stream.epoch, stream.first, 64, 1 << 20)
                for entry in entries:
                    assert (stream.epoch, last_of(entry)) not in out, "twice"
                    out[stream.epoch, last_of(entry)] = mark_of(stream.epoch, entry)
                if entries:
                    spool.forget(stream.epoch, last_of(entries[-1]) + 1)
            thread.join()
    assert list(out) == written
    assert list(out.values()) == list(range(events))


def test_a_notice_leaves_with_the_next_event(path: Path) -> None:
    with opened(path) as spool:
        for i in range(25):
            spool.say(f"{i} " + "x" * 600)
        told = append(spool, 0).notices
        assert [int(one.split()[0]) for one in told] == list(range(5, 25)), "the newest twenty"
        assert {len(one) for one in told} == {500}
        assert append(spool, 1).notices == (), "once"


def test_notices_may_come_from_any_thread(path: Path) -> None:
    said = [[f"{thread}-{number}" for number in range(200)] for thread in range(4)]
    heard: list[str] = []
    with opened(path) as spool:
        threads = [threading.Thread(target=lambda own=own: [spool.say(text) for text in own]) for own in said]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            heard += append(spool, 0).notices
        heard += append(spool, 0).notices
        for thread in threads:
            thread.join()
        heard += append(spool, 0).notices
    assert len(heard) == len(set(heard)) > 0, "none twice"
    for own in said:
        assert [text for text in own if text in heard] == [text for text in heard if text in own], "in order"


# --- paths that cannot be ---------------------------------------------------------------------------------------------


def test_a_folder_is_no_spool(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder: expected a file") as caught:
        opened(path.parent)
    assert caught.value.exit_code == 78


def test_a_file_is_no_folder(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="expected a file in a folder"):
        opened(path / "spool.db")
    with pytest.raises(ConfigError, match="expected a file in a folder"):
        opened(path / "deep" / "spool.db")


def test_a_spool_that_is_taken_says_so(path: Path) -> None:
    with opened(path) as spool:
        append(spool, 1)
        with pytest.raises(ConfigError, match=r"another process uses it; stop the other box, or give this one"):
            opened(path)
        append(spool, 2)
    with opened(path) as spool:
        assert list(drain(spool).values()) == [1, 2]


def test_the_folder_is_made_where_it_is_missing(path: Path) -> None:
    with opened(path.parent / "a" / "b" / "spool.db") as spool:
        append(spool, 1)
    with opened(path.parent / "a" / "b" / "spool.db") as spool:
        assert spool.waiting() == 1
