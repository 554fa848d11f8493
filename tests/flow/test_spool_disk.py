"""A spool on real disks that refuse: full, read-only, cut off from power; and in processes that are killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.aside import beside
from edge.link import last_of
from edge.protocol import Data
from edge.spool import Spool
from tests.spools import Numbers, append, as_killed, drain, opened, until

ROOT = Path(__file__).parents[2]


def sh(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout.strip()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted("tmpfs", "-o", "size=8m")`: a folder on which a file system is mounted until the end of the test."""
    folders: list[Path] = []

    def mount(kind: str, *words: object, what: object = "none") -> Path:
        folder = tmp_path / f"disk-{len(folders)}"
        folder.mkdir()
        try:
            sh("mount", "-t", kind, *words, what, folder)
        except OSError as error:
            pytest.skip(f"no {kind} can be mounted here, which takes root: {error}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def texts(spool: Spool) -> str:
    """The notices that the next event carries."""
    return " | ".join(append(spool, 10**6).notices)


def until_full(spool: Spool, size: int = 20_000) -> Numbers:
    """Append until the disk is full, and ten more."""
    written: Numbers = {}
    more = 10
    while more:
        mark = len(written)
        stamp = append(spool, mark, size)
        written[stamp.epoch, stamp.seq] = mark
        more -= spool.health.in_memory
        assert mark < 5000, "it never was full"
    return written


def test_a_full_disk(mounted: Callable[..., Path]) -> None:
    disk = mounted("tmpfs", "-o", "size=8m")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(5 << 20))
    with opened(disk / "spool.db") as spool:
        written = until_full(spool)
        notice = "spool spool.db: database or disk is full: events are kept in memory, up to 32 MiB of them"
        stamp = append(spool, 5000)
        written[stamp.epoch, stamp.seq] = 5000
        health = spool.health
        assert (health.in_memory, health.waiting, health.dropped) == (True, len(written), 0)
        assert "full" in health.trouble
        # what waits is delivered all the while
        stream = spool.stream()
        assert [last_of(entry) for entry in spool.read(stream.epoch, 0, 5, 10**6)] == list(range(5))
        spool.forget(stream.epoch, 5)
        assert spool.stream().first == 5
        assert spool.waiting() == len(written) - 5
        noticed = notices_of(spool, written, stream.epoch)
        assert noticed == [notice]
        # and when there is room
        ballast.unlink()
        epochs = {epoch for epoch, _ in written}
        said: list[str] = []

        def on_disk() -> bool:
            stamp = append(spool, 5000 + len(written))  # events go on all the while
            written[stamp.epoch, stamp.seq] = 5000 + len(written)
            said.extend(stamp.notices)
            return not spool.health.in_memory

        until("return to the disk", on_disk, otherwise=lambda: spool.health)
        assert spool.health.trouble == ""
        stamp = append(spool, 100_000)
        assert [*said, *stamp.notices] == ["spool spool.db: the disk takes events again"]
        assert stamp.epoch not in epochs
        written[stamp.epoch, stamp.seq] = 100_000
        killed = as_killed(disk / "spool.db", disk.parent / "killed" / "spool.db")
        for path in beside(disk / "spool.db", "rescued"):
            as_killed(path, killed.with_name(path.name))
        left = dict(list(written.items())[5:])
        with opened(killed) as copy:  # without what was in memory
            survived = drain(copy)
        assert survived.items() >= left.items(), "it was on the disk by then"
        assert drain(spool).items() == left.items()


def notices_of(spool: Spool, written: Numbers, disk_epoch: int) -> list[str]:
    """Of the first event in memory."""
    from edge.events import decode

    memory = next(epoch for epoch, _ in written if epoch != disk_epoch)
    (entry,) = spool.read(memory, 0, 1, 1)
    assert isinstance(entry, Data)
    return list(decode(entry.frames).header.notices)


def test_a_disk_that_the_spool_itself_has_filled_is_empty_when_all_is_delivered(mounted: Callable[..., Path]) -> None:
    """A full disk does not even let anybody delete from a database."""
    disk = mounted("tmpfs", "-o", "size=6m")
    with opened(disk / "spool.db") as spool:
        written = until_full(spool)
        assert drain(spool) == written
        until("return to the disk", lambda: not spool.health.in_memory, otherwise=lambda: spool.health)
        assert spool.health.size < 100_000
        again = until_full(spool)
        assert len(again) > 50
        assert drain(spool) == again


def test_a_damaged_file_on_a_full_disk_waits_for_room(mounted: Callable[..., Path]) -> None:
    disk = mounted("tmpfs", "-o", "size=4m")
    with opened(disk / "spool.db") as spool:
        written = {(stamp.epoch, stamp.seq): mark for mark in range(50) for stamp in [append(spool, mark, 20_000)]}
    with (disk / "spool.db").open("r+b") as file:
        file.write(bytes(4096))
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
    with opened(disk / "spool.db") as spool:
        stamp = append(spool, 100)
        assert "set aside as spool.db.damaged-0001" in stamp.notices[0]
        assert "kept in memory" in stamp.notices[1]
        assert spool.health.in_memory
        assert drain(spool) == {(stamp.epoch, 0): 100}
    (disk / "ballast").unlink()
    with opened(disk / "spool.db") as spool:
        until("rescue", lambda: spool.waiting() == 50)
        assert drain(spool) == written
        assert (disk / "spool.db.kept-0001").exists()


def test_memory_has_a_bound(mounted: Callable[..., Path]) -> None:
    disk = mounted("tmpfs", "-o", "size=4m")
    with opened(disk / "spool.db") as spool:
        written = until_full(spool, 1 << 20)
        for mark in range(100, 140):
            stamp = append(spool, mark, 1 << 20)
            written[stamp.epoch, stamp.seq] = mark
        dropped = spool.health.dropped
        assert 15 < dropped < 30
        out = drain(spool, size=1 << 30)
    assert list(out) == list(written)
    assert [what for what in out.values() if isinstance(what, str)] == ["memory full"] * dropped
    assert all(out[number] in (mark, "memory full") for number, mark in written.items())


def test_a_start_on_a_read_only_disk(mounted: Callable[..., Path]) -> None:
    disk = mounted("tmpfs", "-o", "size=8m")
    written: Numbers = {}
    for _ in range(2):
        with opened(disk / "spool.db") as spool:
            for mark in range(10):
                stamp = append(spool, mark)
                written[stamp.epoch, stamp.seq] = mark
    sh("mount", "-o", "remount,ro", disk)
    with opened(disk / "spool.db") as spool:
        stamp = append(spool, 100)
        assert "events are kept in memory" in " ".join(stamp.notices)
        written[stamp.epoch, stamp.seq] = 100
        assert spool.health.in_memory
        assert spool.waiting() == 21
        stream = spool.stream()
        spool.forget(stream.epoch, 3)
        assert spool.waiting() == 18
        sh("mount", "-o", "remount,rw", disk)
        until("return to the disk", lambda: not spool.health.in_memory, otherwise=lambda: spool.health)
        assert "the disk takes events again" in texts(spool)
    with opened(disk / "spool.db") as spool:
        assert drain(spool).items() >= dict(list(written.items())[3:]).items()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(48 << 20)
    try:
        sh("mkfs.ext4", "-q", "-F", path)
    except OSError as error:
        pytest.skip(f"no mkfs.ext4: {error}")
    return path


def test_a_disk_that_becomes_read_only(mounted: Callable[..., Path], image: Path) -> None:
    """As ext4 does when it finds an error."""
    disk = mounted("ext4", "-o", "loop,errors=remount-ro", what=image)
    trigger = Path("/sys/fs/ext4", Path(sh("findmnt", "-no", "SOURCE", disk)).name, "trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel's ext4 does not make errors on demand")
    with opened(disk / "spool.db") as spool:
        written: Numbers = {}
        for mark in range(30):
            if mark == 20:
                os.sync()
                trigger.write_text("test")
            stamp = append(spool, mark)
            written[stamp.epoch, stamp.seq] = mark
            assert spool.health.in_memory == (mark >= 20)
        stream = spool.stream()
        assert len(spool.read(stream.epoch, 0, 100, 10**6)) == 20
        spool.forget(stream.epoch, 5)
        assert spool.waiting() == 25
    with opened(disk / "spool.db") as spool:  # a restart helps nobody
        assert spool.health.in_memory
        stamp = append(spool, 100)
        assert "events are kept in memory" in " ".join(stamp.notices)
        out = drain(spool)
        assert out.pop((stamp.epoch, 0)) == 100
        assert list(out.values()) == list(range(20))
    sh("umount", disk)
    sh("mount", "-t", "ext4", "-o", "loop", image, disk)
    with opened(disk / "spool.db") as spool:
        assert drain(spool) == dict(list(written.items())[:20])
        assert not spool.health.in_memory


@pytest.mark.parametrize("policy", ["event", "interval"])
def test_a_power_cut(mounted: Callable[..., Path], image: Path, policy: str) -> None:
    """What is on the disk is what is in the image: the system holds back its writes for ten minutes here."""
    disk = mounted("ext4", "-o", "loop,commit=600", what=image)
    with opened(disk / "spool.db", fsync=policy, fsync_ms=50) as spool:
        written: Numbers = {}

        def survive() -> Numbers:
            cut = image.with_name("cut.img")
            cut.write_bytes(image.read_bytes())
            folder = mounted("ext4", "-o", "loop", what=cut)
            with opened(folder / "spool.db") as copy:
                out = drain(copy)
            sh("umount", folder)
            return out

        for mark in range(50):
            stamp = append(spool, mark, 500)
            written[stamp.epoch, stamp.seq] = mark
            if mark == 25 and policy == "event":
                assert survive() == written
        if policy == "interval":
            until("write to the disk", lambda: survive() == written, 4.0)
        assert survive() == written


# --- in processes of their own ----------------------------------------------------------------------------------------


def python(code: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code that begins with what every such process needs; its words are sys.argv[1:]."""
    head = "import sys\nfrom pathlib import Path\nfrom tests.spools import append, drain, opened, until\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


LIMITED = """
import resource
signs = []
with opened(Path(sys.argv[1])) as spool:
    written = {}
    for mark in range(100):
        if mark == 30:  # from here on not even an empty database can be written
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, resource.RLIM_INFINITY))
        stamp = append(spool, mark, 20_000)
        written[stamp.epoch, stamp.seq] = mark
        signs += stamp.notices
    assert spool.health.in_memory, spool.health
    assert spool.waiting() == 100
    stream = spool.stream()
    assert len(spool.read(stream.epoch, 0, 10, 10**6)) == 10
    spool.forget(stream.epoch, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until("return to the disk", lambda: not spool.health.in_memory, otherwise=lambda: spool.health)
    signs += append(spool, 100).notices
    spool.forget(stream.epoch, 11)  # what was refused before is done now
with opened(Path(sys.argv[1])) as spool:
    out = drain(spool)
assert [number for number in written if number not in out] == list(written)[:11]
assert all(out[number] == written[number] for number in list(written)[11:])
print(*signs, sep="\\n")
"""


def test_a_limit_of_file_sizes_is_like_a_full_disk(tmp_path: Path) -> None:
    done = python(LIMITED, tmp_path / "spool.db")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.endswith("disk I/O error: events are kept in memory, up to 32 MiB of them")
    assert last == "spool spool.db: the disk takes events again"


KILLED = """
with opened(Path(sys.argv[1])) as spool:
    for mark in range(100):
        print("begin", mark, flush=True)
        stamp = append(spool, mark)
        print("done", mark, stamp.epoch, stamp.seq, flush=True)
        if mark % 5 == 4:
            stream = spool.stream()
            spool.forget(stream.epoch, stream.first + 2)
            print("forgot", stream.epoch, stream.first + 2, flush=True)
"""


@pytest.mark.parametrize(
    ("point", "kept", "forgotten"),  # marks on the disk, and how many of the first are forgotten
    [
        ("box.before-append:18", 17, 6),
        ("box.after-append:18", 18, 6),
        ("box.before-forget:4", 20, 6),
        ("box.after-forget:4", 20, 8),
    ],
)
def test_kill_9_between_two_lines(tmp_path: Path, point: str, kept: int, forgotten: int) -> None:
    done = python(KILLED, tmp_path / "spool.db", LOOKOUT_FAILPOINT=point)
    assert done.returncode == -9, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    written = {(int(line[2]), int(line[3])): int(line[1]) for line in said if line[0] == "done"}
    with opened(tmp_path / "spool.db") as spool:
        stamp = append(spool, 1000)
        assert (stamp.notices, stamp.seq) == ((), 0)
        assert stamp.epoch not in {epoch for epoch, _ in written}
        out = drain(spool)
    assert list(out.values()) == [*range(forgotten, kept), 1000]
    assert all(out[number] == mark for number, mark in written.items() if mark >= forgotten)


def test_two_processes_do_not_share_a_spool(tmp_path: Path) -> None:
    code = "from edge.errors import ConfigError\ntry:\n    opened(Path(sys.argv[1])).close()\n"
    code += "except ConfigError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    with opened(tmp_path / "spool.db") as spool:
        append(spool, 1)
        done = python(code, tmp_path / "spool.db")
        assert (done.returncode, done.stderr) == (78, "")
        assert "another process uses it; stop the other box, or give this one a spool.path of its own" in done.stdout
        append(spool, 2)
    assert python(code, tmp_path / "spool.db").returncode == 0
    with opened(tmp_path / "spool.db") as spool:
        assert list(drain(spool).values()) == [1, 2]
