"""A spool whose files are damaged: at the start, while it runs, and when a kill comes in the midst of the rescue."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from edge.aside import beside
from edge.events import Stamp, encode
from edge.journal import Journal, checkpoint
from edge.leaves import LOST, readable
from edge.records import PAGE, event_record
from edge.spool import Spool
from tests.spools import Numbers, append, as_killed, drain, event, opened, quick_folder, until


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a spool's file, in a folder of its own."""
    folder = quick_folder()
    yield folder / "spool.db"
    shutil.rmtree(folder)


def scratch(path: Path, page: int, pages: int = 1) -> None:
    """Overwrite pages of a file, numbered from 1, that this process may have open."""
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(b"\xa5" * PAGE * pages)


def all_out(path: Path, spool: Spool, out: Numbers | None = None) -> Numbers:
    """Everything that comes out until nothing is damaged any more, each number once."""
    out = out or {}
    while spool.waiting() or beside(path, "damaged"):
        more = drain(spool)
        assert not out.keys() & more.keys(), "twice"
        out |= more
        until("rescue", lambda: not beside(path, "damaged"))
    return out


def kept(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if ".kept-" in file.name)


def fill(spool: Spool, count: int = 60, size: int = 3000) -> Numbers:
    stamps = [append(spool, mark, size) for mark in range(count)]
    return {(stamp.epoch, stamp.seq): mark for mark, stamp in enumerate(stamps)}


def filled(path: Path) -> Numbers:
    """Of a spool that is closed again."""
    with opened(path) as spool:
        return fill(spool)


def lost(written: Numbers, out: Numbers) -> list[int]:
    """The marks of what did not come out. In the midst of what did, they must be gone with the right reason."""
    assert list(out) == [number for number in written if number in out], "other numbers, or another order"
    assert all(out[number] in (mark, LOST) for number, mark in written.items() if number in out)
    missing = [at for at, number in enumerate(written) if number not in out]
    assert all(at < 10 or at >= len(written) - 10 for at in missing), "missing, and not said to be gone"
    return [int(mark) for number, mark in written.items() if out.get(number) != mark]


def test_damage_found_at_the_start(path: Path) -> None:
    written = filled(path)
    scratch(path, 1)  # SQLite knows nothing of it any more
    content = path.read_bytes()
    with opened(path) as spool:
        stamp = append(spool, 100)
        out = all_out(path, spool)
        assert [text.removeprefix("spool spool.db: ") for text in (*stamp.notices, *append(spool, 101).notices)] == [
            "damaged: file is not a database; set aside as spool.db.damaged-0001, and what can be read is sent",
            "60 entries were read of spool.db.damaged-0001, 0 numbers between are lost; kept as spool.db.kept-0001",
        ]
        assert spool.health.trouble == ""
    assert out.pop((stamp.epoch, 0)) == 100
    assert out == written
    assert kept(path) == ["spool.db.kept-0001"]
    assert path.with_name("spool.db.kept-0001").read_bytes() == content


@pytest.mark.parametrize("page", [6, 20, 40, 60])
def test_damage_in_the_midst_is_found_when_it_is_read(path: Path, page: int) -> None:
    written = filled(path)
    scratch(path, page)
    with opened(path) as spool:
        out = all_out(path, spool)
        notices = append(spool, 100).notices
    assert 0 < len(lost(written, out)) <= 4
    assert "set aside as spool.db.damaged-0001" in notices[0]
    assert kept(path) == ["spool.db.kept-0001"]


def test_a_flip_anywhere_in_sqlites_header_stops_no_box(path: Path) -> None:
    written = filled(path)
    content = path.read_bytes()
    for at in range(100):
        copy = path.parent / f"flip-{at}" / "spool.db"
        copy.parent.mkdir()
        copy.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with opened(copy) as spool:
            stamp = append(spool, 100)
            assert not spool.health.in_memory, f"byte {at}"
            out = all_out(copy, spool)
            assert out.pop((stamp.epoch, 0)) == 100
            assert out == written, f"byte {at}"


@pytest.mark.parametrize("size", [1000, 4096, 20 * PAGE + 17, -1, -PAGE])
def test_a_torn_file_gives_what_is_left_of_it(path: Path, size: int) -> None:
    written = filled(path)
    whole = path.stat().st_size
    os.truncate(path, size if size > 0 else whole + size)
    with opened(path) as spool:
        stamp = append(spool, 100)
        out = all_out(path, spool)
        assert "set aside" in " ".join((*stamp.notices, *append(spool, 101).notices))
    del out[stamp.epoch, 0]
    assert list(out.items()) == list(written.items())[: len(out)]
    assert len(out) >= 60 * size // whole - 4 if size > 0 else len(out) >= 56


def test_a_file_of_noise_is_kept(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(50_000))
    with opened(path) as spool:
        append(spool, 100)
        assert list(all_out(path, spool).values()) == [100]
    assert path.with_name("spool.db.kept-0001").stat().st_size == 50_000


def test_a_file_that_was_cut_to_nothing_has_still_its_log(path: Path) -> None:
    """Which SQLite deletes when it opens the file."""
    with opened(path) as spool:
        written = fill(spool)
        copy = as_killed(path, path.with_name("killed.db"))
    copy.write_bytes(b"")
    with opened(copy) as spool:
        assert "set aside as killed.db.damaged-0001" in append(spool, 100).notices[0]
        out = all_out(copy, spool)
    assert list(out.values()) == [100, *written.values()] or list(out.values()) == [*written.values(), 100]


def test_a_damaged_log_hides_nothing(path: Path) -> None:
    """SQLite would take the first wrong frame for its end, and say nothing."""
    with opened(path) as spool:
        written = fill(spool)
        copy = as_killed(path, path.with_name("killed.db"))
    log = copy.with_name("killed.db-wal")
    content = bytearray(log.read_bytes())
    content[len(content) // 3] ^= 1
    log.write_bytes(content)
    with opened(copy) as spool:
        stamp = append(spool, 100)
        assert "damaged: its write-ahead log; set aside as killed.db.damaged-0001" in stamp.notices[0]
        out = all_out(copy, spool)
    del out[stamp.epoch, 0]
    assert len(lost(written, out)) <= 1
    assert kept(copy) == ["killed.db.kept-0001", "killed.db.kept-0001-wal"]
    assert copy.with_name("killed.db.kept-0001-wal").read_bytes() == content


def large(path: Path, spool: Spool) -> Numbers:
    """More than SQLite keeps in its cache, all of it in the file."""
    written = fill(spool, 600, 8000)
    checkpoint(path)
    stamp = append(spool, 600)  # the log begins anew, and hides the file no longer
    return {**written, (stamp.epoch, stamp.seq): 600}


def test_damage_found_while_it_runs_is_set_aside_and_events_go_on(path: Path) -> None:
    with opened(path) as spool:
        written = large(path, spool)
        scratch(path, 700, 20)
        out = drain(spool)
        stamp = append(spool, 700)
        assert "set aside as spool.db.damaged-0001" in stamp.notices[0]
        out = all_out(path, spool, out)
        assert out.pop((stamp.epoch, 0)) == 700
        assert stamp.epoch not in {epoch for epoch, _ in written}
        assert 3 < len(lost(written, out)) < 20
        assert "numbers between are lost; kept as spool.db.kept-0001" in append(spool, 1).notices[0]


def test_damage_found_in_append(path: Path) -> None:
    """In the list of free pages, of which the next event wants one."""
    with opened(path) as spool:
        large(path, spool)
        stream = spool.stream()
        spool.forget(stream.epoch, 300)
        checkpoint(path)
        append(spool, 601)
        spool.read(stream.epoch, 301, 300, 10**9)  # other pages into the cache
        scratch(path, int.from_bytes(path.read_bytes()[32:36], "big"))
        stamps = [append(spool, mark, 8000) for mark in range(700, 720)]
        fresh = [stamp for stamp in stamps if stamp.epoch != stream.epoch]
        assert fresh[0].seq == 0
        assert "set aside as spool.db.damaged-0001" in fresh[0].notices[0]
        out = all_out(path, spool)
    assert set(range(300, 602)) | set(range(700, 720)) == set(out.values()) - {LOST}


def test_what_was_acknowledged_while_it_was_set_aside_is_not_sent_again(path: Path) -> None:
    written = filled(path)
    ((epoch, _),) = list(written)[:1]
    scratch(path, 60)
    with opened(path) as spool:
        assert len(spool.read(epoch, 0, 10, 10**6)) == 10  # sent
        while not kept(path):
            spool.read(epoch, 10, 100, 10**6)
            spool.forget(epoch, 10)
        assert spool.stream().first == 10
        assert spool.waiting() > 45


# --- states in which a kill may leave the files while a damaged one is set aside and read -----------------------------


def before(path: Path) -> None:
    """Not yet set aside."""


def between_renames(path: Path) -> None:
    path.rename(f"{path}.damaged-0001")


def renamed(path: Path) -> None:
    between_renames(path)
    Path(f"{path}-wal").rename(f"{path}.damaged-0001-wal")


def fresh_file(path: Path) -> None:
    renamed(path)
    Journal(path).close()


def half_read(path: Path) -> None:
    fresh_file(path)
    with Journal(path.with_name("spool.db.rescued-0002")) as journal:
        journal.copy(list(islice(readable(path.with_name("spool.db.damaged-0001")), 20)))


def all_read(path: Path) -> None:
    fresh_file(path)
    with Journal(path.with_name("spool.db.rescued-0002")) as journal:
        journal.copy(list(readable(path.with_name("spool.db.damaged-0001"))))


def half_kept(path: Path) -> None:
    all_read(path)
    path.with_name("spool.db.damaged-0001").rename(f"{path}.kept-0001")


def twice(path: Path) -> None:
    """The file that followed is damaged, too."""
    fresh_file(path)
    path.write_bytes(b"no database" * 1000)


STATES = [before, between_renames, renamed, fresh_file, half_read, all_read, half_kept, twice]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_kill_while_a_file_is_set_aside_or_read_loses_nothing(path: Path, state: Callable[[Path], None]) -> None:
    with opened(path) as spool:
        written = fill(spool)
        checkpoint(path)
        written |= {(stamp.epoch, stamp.seq): 60 for stamp in [append(spool, 60)]}
        killed = as_killed(path, path.parent / "killed" / "spool.db")
    scratch(killed, 20)
    state(killed)
    content = [file.read_bytes() for file in killed.parent.iterdir()]
    with opened(killed) as spool:
        out = all_out(killed, spool)
        assert not spool.health.in_memory
    assert 0 < len(lost(written, out)) <= 4
    assert kept(killed)
    if state is not before:  # for then it was written to, until the damage was found
        files = [killed.with_name(name) for name in kept(killed)]
        assert all(file.read_bytes() in content for file in files)


def test_a_damaged_rescued_file_is_rescued(path: Path) -> None:
    with Journal(path.with_name("spool.db.rescued-0005")) as journal:
        journal.copy([event_record(7, n, 1.0, encode(event(n, Stamp(7, n), 3000))) for n in range(30)])
    scratch(path.with_name("spool.db.rescued-0005"), 12)
    with opened(path) as spool:
        out = all_out(path, spool)
        assert 0 < len(lost({(7, n): n for n in range(30)}, out)) <= 4
        assert kept(path) == ["spool.db.kept-0006"]
        until("removal of what is delivered", lambda: not beside(path, "rescued"))


def test_names_of_other_files_beside_it_do_not_matter(path: Path) -> None:
    others = ["spool.db.damaged-0001.bak", "spool.db.damaged-", "spool.db2.damaged-0001", "spool.db.rescued-0001-wal"]
    for name in others:
        path.with_name(name).write_bytes(b"?")
    with opened(path) as spool:
        fill(spool, 3)
        assert spool.waiting() == 3
    assert all(path.with_name(name).read_bytes() == b"?" for name in others)
    assert beside(path, "damaged") == beside(path, "rescued") == []
