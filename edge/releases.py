"""The releases on a box: whole programs in folders beside each other, and which one serves; a power cut leaves one.

    HOME/releases/<id>/   venv, bundle, and `complete`, which the package writes last
    HOME/current          -> releases/<id>: what serves
    HOME/previous         -> releases/<id>: what served before it
    HOME/trial            -> releases/<id>: there while `current` is on trial, what to go back to

Every change is one rename of a link, and then a sync of HOME: a reader, or a kill, finds the link as it was or as it
is to be. `trial` is on disk before `current` changes. Renamed to `previous` it confirms the new release, renamed to
`current` it takes it back: whichever of the two happens, happens at once. Who works on releases holds HOME's lock,
which the system opens when that process dies; so a `trial` without a lock is one whose `edge activate` is gone, as
after a power cut, and the unit goes back to it before it starts anything (ExecStartPre of lookout.service).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge import disk
from edge.errors import BackendError, BundleError, ConfigError
from edge.failpoints import failpoint

HOME = Path("/opt/lookout")
COMPLETE = "complete"
KEPT = 3  # releases: what serves, what served, and one more
_GONE = ".gone-"  # begins the name of a release that is being removed


@dataclass(frozen=True)
class Releases:
    """The releases under one folder. Whatever changes them is called within `alone()`; raises OSError besides."""

    home: Path = HOME

    @property
    def current(self) -> str | None:
        """What serves; None where nothing does."""
        return self._named("current")

    @property
    def previous(self) -> str | None:
        """What served before."""
        return self._named("previous")

    @property
    def trial(self) -> str | None:
        """What to go back to, while `current` is on trial."""
        return self._named("trial")

    def all(self) -> list[str]:
        """The whole ones, the newest first."""
        marks = [(mark.stat().st_mtime_ns, mark.parent.name) for mark in self._folder.glob(f"[!.]*/{COMPLETE}")]
        return [name for _, name in sorted(marks, reverse=True)]

    def whole(self, name: str) -> Path:
        """The folder of a release. Raises ConfigError where there is none, BundleError where it is not whole."""
        here = ", ".join(self.all()) or "none"
        if name[:1] in ("", ".") or "/" in name or not (self._folder / name).is_dir():
            raise ConfigError(f"{self._folder}: no release {name!r}", expected=f"one of those here: {here}")
        if not self._is_whole(name):
            raise BundleError(f"{self._folder / name}: not wholly installed", remedy="install its package again")
        return self._folder / name

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One change at a time. Raises ConfigError where there is no such folder or it may not be changed, BackendError
        while another is at work."""
        if not self.home.is_dir():
            raise ConfigError(f"{self.home}: no releases on this machine", remedy="install Lookout's package")
        if not os.access(self.home, os.W_OK):
            raise ConfigError(f"{self.home}: may not be changed by you", remedy="run it with sudo")
        handle = os.open(self.home, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                busy = f"{self.home}: another release is being activated"
                raise BackendError(busy, remedy="wait for its end") from error
            yield
        finally:
            os.close(handle)

    def begin(self, name: str) -> None:
        """Make a whole release the current one, on trial if another one served."""
        self.whole(name)
        before = self.current
        if before is not None and before != name:
            self._link("trial", before)
        failpoint("release.on-trial")
        self._link("current", name)
        failpoint("release.switched")

    def confirm(self) -> None:
        """The trial is over: what served before is the previous one."""
        if self.trial is not None:
            self._rename("trial", "previous")
        failpoint("release.confirmed")

    def go_back(self, before: str | None) -> None:
        """The trial failed: what served before is the current one; where that is None, nothing is."""
        if self.trial is not None:
            self._rename("trial", "current")
        elif before is None:
            (self.home / "current").unlink(missing_ok=True)
            disk.sync(self.home)
        failpoint("release.back")

    def prune(self) -> list[str]:
        """Remove all but the newest three; never one that a link names. -> what went"""
        named = [name for name in (self.current, self.previous, self.trial) if name is not None]
        kept = list(dict.fromkeys([*named, *self.all()]))[: max(KEPT, len(set(named)))]
        gone = [name for name in self.all() if name not in kept]
        for name in gone:
            (self._folder / name).rename(self._folder / f"{_GONE}{name}")  # at once: no half one is taken for whole
            failpoint("release.gone")
        for left in self._folder.glob(f"{_GONE}*"):  # also of a prune that was killed
            shutil.rmtree(left)
        return gone

    @property
    def _folder(self) -> Path:
        return self.home / "releases"

    def _is_whole(self, name: str) -> bool:
        return (self._folder / name / COMPLETE).is_file()

    def _named(self, link: str) -> str | None:
        """The whole release that a link names."""
        try:
            name = (self.home / link).readlink().name
        except OSError:
            return None
        return name if self._is_whole(name) else None

    def _link(self, link: str, name: str) -> None:
        part = self.home / f".{link}.part"
        part.unlink(missing_ok=True)
        part.symlink_to(Path("releases", name))
        failpoint("release.link-made")
        part.replace(self.home / link)
        disk.sync(self.home)

    def _rename(self, old: str, new: str) -> None:
        (self.home / old).replace(self.home / new)
        disk.sync(self.home)
