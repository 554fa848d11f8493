"""The files beside a spool: what is damaged is set aside under another name, and never deleted.

Beside a spool lie its <path>.lock, held while it is open; <path>.damaged-NNNN, still to be read; <path>.rescued-NNNN,
what was read, until it is delivered; and <path>.kept-NNNN, damaged files that were read, for a person. Each of them
may have its -wal and -shm.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edge import disk
from edge.errors import ConfigError
from edge.wal import read_log

FORMS = ("", "-wal", "-shm")  # of a database's name
_KIND = re.compile(r"\.(damaged|rescued|kept)-(\d{4,})")  # what is behind the spool's own name


def claimed(path: Path) -> int:
    """A descriptor that tells other processes that this spool is taken. Raises ConfigError when it is, OSError."""
    claim = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY | os.O_CREAT, 0o644)  # works on a read-only disk
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(claim)
        if not isinstance(error, BlockingIOError):
            raise
        remedy = "stop the other box, or give this one a spool.path of its own"
        raise ConfigError(f"spool {path}: another process uses it", remedy=remedy) from error
    return claim


def beside(path: Path, kind: str) -> list[Path]:
    """`path`.kind-NNNN, oldest first. Raises OSError."""
    found = [
        (int(match[2]), file) for match, file in _all_beside(path) if match[1] == kind and file.name.endswith(match[0])
    ]
    return [file for _, file in sorted(found)]


def next_name(path: Path, kind: str) -> Path:
    """`path`.kind-NNNN with a number above all that are there. Raises OSError."""
    number = max((int(match[2]) for match, _ in _all_beside(path)), default=0) + 1
    return path.with_name(f"{path.name}.{kind}-{number:04}")


def _all_beside(path: Path) -> Iterator[tuple[re.Match[str], Path]]:
    for file in path.parent.iterdir():
        if file.name.startswith(path.name) and (match := _KIND.match(file.name, len(path.name))):
            yield match, file


def set_aside(path: Path, spool: Path) -> Path:
    """Rename a damaged file of this spool that is not open, to be read later. Raises OSError."""
    path.touch()  # there may be no more than its log
    return rename(path, next_name(spool, "damaged"))


def finish_setting_aside(path: Path) -> None:
    """A kill between two renames leaves the log of a file that has another name already. Raises OSError."""
    asides = beside(path, "damaged")
    if asides and not path.exists() and not Path(f"{asides[-1]}-wal").exists():
        rename(path, asides[-1])


def keep(aside: Path) -> Path:
    """The damaged file was read. Raises OSError."""
    return rename(aside, aside.with_name(aside.name.replace(".damaged-", ".kept-")))


def rename(path: Path, to: Path) -> Path:
    """A database by all its names; the file itself first: what a kill leaves behind is then not taken for whole."""
    for form in FORMS:
        with suppress(FileNotFoundError):
            Path(f"{path}{form}").rename(f"{to}{form}")
    disk.sync(path.parent)
    return to


def unlink(path: Path) -> None:
    """All of a database. Raises OSError."""
    for form in FORMS:
        Path(f"{path}{form}").unlink(missing_ok=True)


def log_is_damaged(path: Path) -> bool:
    """Whether SQLite would delete what a write-ahead log holds, without a word. Raises OSError."""
    log = Path(f"{path}-wal")
    if not log.exists() or not (content := log.read_bytes()):
        return False
    return not path.exists() or not path.stat().st_size or read_log(content).damaged
