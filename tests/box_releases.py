"""Releases made of shell scripts in a folder of a test, and what stands in for systemd there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge.activate import Box
from edge.errors import BackendError
from edge.releases import Releases

# what `edge` of a release does: it says how it was called, and fails where a file of that step's name lies beside it
EDGE = """#!/bin/sh
echo "edge $*"
release=$(dirname "$0")/../..
if [ -e "$release/$1-fails" ]; then echo "error: $1 is not good" >&2; exit "$(cat "$release/$1-fails")"; fi
"""
PYTHON = """#!/bin/sh
echo "python $*"
echo "umask $(umask)"
"""


def install(home: Path, name: str, *, ready: bool = True, fails: dict[str, int] | None = None, age: int = 0) -> Path:
    """As the package does: a release's folder. fails: step -> its exit code. age: seconds since it was installed."""
    folder = home / "releases" / name
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "bundle").mkdir()
    for program, text in (("edge", EDGE), ("python", PYTHON)):
        path = folder / "venv/bin" / program
        path.write_text(text)
        path.chmod(0o755)
    for step, code in (fails or {}).items():
        (folder / f"{step}-fails").write_text(str(code))
    if not ready:
        (folder / "never-ready").touch()
    mark = folder / "complete"
    mark.touch()
    os.utime(mark, (1_700_000_000 - age, 1_700_000_000 - age))
    return folder


@dataclass
class Unit:
    """A service that gets ready where the current release does; remembers what it ran."""

    home: Path
    ran: list[str | None] = field(default_factory=list)

    def restart(self) -> None:
        current = Releases(self.home).current
        self.ran.append(current)
        if current is None or (self.home / "releases" / current / "never-ready").exists():
            raise BackendError("the unit did not get ready")

    def stays(self) -> None:
        current = Releases(self.home).current
        if current is not None and (self.home / "releases" / current / "dies").exists():
            raise BackendError("the unit did not stay ready")

    def stop(self) -> None:
        self.ran.append(None)

    def last_words(self) -> Sequence[str]:
        return [f"last words of {self.ran[-1]}"]


def box(home: Path, said: list[str] | None = None, *, unit: Unit | None = None, gpu: bool = False) -> Box:
    """A machine with the releases in `home`."""
    config = home / "edge.toml"
    if not config.exists():
        config.write_text(f'bundle = "{home}/current/bundle"\n')
    lines = said if said is not None else []
    return Box(Releases(home), config, unit if unit is not None else Unit(home), lines.append, lambda: gpu)


def links(home: Path) -> dict[str, str]:
    """The links there are, and the names they hold."""
    there: Iterable[Path] = (home / name for name in ("current", "previous", "trial"))
    return {link.name: link.readlink().name for link in there if link.is_symlink()}
