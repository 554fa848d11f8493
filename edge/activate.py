"""A release is tested, switched to and watched; what does not get ready on this box is taken back, without being asked.

Nothing is touched before engines, configuration and self-test are good with the new release's own programs. Then it
serves on trial (see releases). Exit codes are those of what refused: of the step where that was a program of the
release, BackendError's where the service did not get ready.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from edge.errors import BackendError, ConfigError, LookoutError
from edge.releases import Releases

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = Path("/etc/lookout/edge.toml")
STAY_S = 5.0  # how long a service has to stay ready
READY_S = 300.0  # systemd's own limit, the unit's TimeoutStartSec, comes first
LOOK_S = 0.2  # between two looks at it

Say = Callable[[str], None]


class Service(Protocol):
    """What runs the current release."""

    def restart(self) -> None:
        """Restart it; returns when it is ready. Raises BackendError."""

    def stays(self) -> None:
        """Watch it for a while. Raises BackendError where it does not stay ready."""

    def stop(self) -> None:
        """Have nothing run."""

    def last_words(self) -> Sequence[str]:
        """What it said at the end, one line each."""


@dataclass(frozen=True)
class Systemd:
    """A unit of systemd. With Type=notify, a restart is over when the program says that it is ready."""

    unit: str = "lookout.service"

    def restart(self) -> None:
        """See Service."""
        self._systemctl("daemon-reload")
        self._systemctl("reset-failed", self.unit)  # a release that failed often is no reason to refuse another
        if (code := self._systemctl("restart", self.unit)[0]) != 0:
            raise BackendError(f"{self.unit} did not get ready", got=self._state()["Result"] if code > 0 else "no end")

    def stays(self) -> None:
        """See Service."""
        until, first = time.monotonic() + STAY_S, self._state()["MainPID"]
        while time.monotonic() < until:
            now = self._state()
            if (now["ActiveState"], now["NRestarts"], now["MainPID"]) != ("active", "0", first):
                got = f"{now['ActiveState']}, {now['NRestarts']} restarts, {now['Result']}"
                raise BackendError(f"{self.unit} did not stay ready", expected=f"{STAY_S:.0f} s", got=got)
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """See Service."""
        self._systemctl("stop", self.unit)

    def last_words(self) -> Sequence[str]:
        """See Service."""
        words = ["journalctl", "--unit", self.unit, "--lines", "10", "--output", "cat", "--no-pager", "--quiet"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=30, check=False)
        return done.stdout.splitlines()

    def _state(self) -> dict[str, str]:
        names = "ActiveState,MainPID,NRestarts,Result"
        lines = self._systemctl("show", self.unit, f"--property={names}")[1].splitlines()
        return {**dict.fromkeys(names.split(","), ""), **dict(line.split("=", 1) for line in lines if "=" in line)}

    @staticmethod
    def _systemctl(*words: str) -> tuple[int, str]:
        """Its exit code, -1 where it did not end, and what it said."""
        try:
            done = subprocess.run(
                ["systemctl", *words], capture_output=True, text=True, errors="replace", timeout=READY_S, check=False
            )
        except subprocess.TimeoutExpired:
            return -1, ""
        return done.returncode, done.stdout


def systemd() -> Service | None:
    """What runs the releases of this machine; None in a container or a chroot, where nothing does."""
    return Systemd() if Path("/run/systemd/system").is_dir() else None


def builds_engines() -> bool:
    """Whether TensorRT and an NVIDIA GPU are here."""
    from edge.cuda import gpu_count

    return find_spec("tensorrt") is not None and gpu_count() > 0


@dataclass(frozen=True)
class Box:
    """One machine with releases. service: None where only the links are to change."""

    releases: Releases
    config: Path
    service: Service | None
    say: Say
    builds: Callable[[], bool] = field(default=builds_engines)


def activate(box: Box, name: str) -> None:
    """Have a release serve, or everything as it was before.

    Raises ConfigError, BundleError or BackendError: not activated, and what serves instead is told.
    """
    with box.releases.alone():
        _end_of_a_dead_trial(box)
        _activate(box, name)


def rollback(box: Box) -> None:
    """Have the release before serve again. Raises ConfigError where there is none; else as activate."""
    with box.releases.alone():
        _end_of_a_dead_trial(box)
        name, current = box.releases.previous, box.releases.current
        if name is None or name == current:
            raise ConfigError(f"{box.releases.home}: no release before {current} to go back to")
        _activate(box, name)


def _activate(box: Box, name: str) -> None:
    releases, before = box.releases, box.releases.current
    folder = releases.whole(name)
    box.say(f"release {name}; {before or 'nothing'} serves")
    bundle = _bundle(box, folder)
    edge = folder / "venv/bin/edge"
    if box.builds() and _has_graphs(bundle):
        _step(box, "engines", folder / "venv/bin/python", "-m", "export", "engines", bundle)
    _step(box, "check", edge, "check", box.config, "--bundle", bundle)
    _step(box, "self-test", edge, "selftest", "--bundle", bundle)
    try:
        releases.begin(name)
        box.say(f"current: {name}")
        if box.service is not None:
            box.service.restart()
            box.say(f"{name} is ready")
            box.service.stays()
    except BaseException as error:  # also Ctrl-C and a full disk: whatever it is, the trial is over
        began = time.monotonic()
        _tell(box, error)
        if before != name:  # else there is nothing to go back to
            _back(box, before, began)
        raise
    releases.confirm()
    if gone := releases.prune():
        box.say(f"removed: {', '.join(gone)}")
    box.say(f"{name} serves" + (f"; edge rollback returns to {releases.previous}" if releases.previous else ""))


def _back(box: Box, before: str | None, began: float) -> None:
    """After a trial that failed. Raises BackendError where not even the release before gets ready."""
    box.releases.go_back(before)
    box.say(f"back to {before or 'nothing'}")
    if box.service is None:
        return
    if before is None:
        box.service.stop()
        box.say("nothing serves")
        return
    try:
        box.service.restart()
        box.say(f"{before} serves again, after {time.monotonic() - began:.1f} s")
        box.service.stays()
    except BackendError as error:
        _tell(box, error)
        remedy = "see journalctl --unit lookout"
        raise BackendError(f"the release before, {before}, does not get ready either", remedy=remedy) from error


def _end_of_a_dead_trial(box: Box) -> None:
    """What an `edge activate` that was killed left behind: nobody watched that release."""
    if (before := box.releases.trial) is not None:
        box.say(f"an activation before this one was cut off: {box.releases.current} was still on trial")
        _back(box, before, time.monotonic())


def _tell(box: Box, error: BaseException) -> None:
    """What went wrong, and what the service itself said."""
    box.say(f"failed: {error if isinstance(error, (LookoutError, OSError)) else type(error).__name__}")
    if box.service is not None and isinstance(error, BackendError):
        for line in box.service.last_words():
            box.say(f"  {line}")


def _step(box: Box, what: str, *words: object) -> None:
    """One program of the release, its lines passed on. Raises the error of its exit code."""
    box.say(f"{what} …")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
        umask=0o022,  # the service, another user, reads what root's programs write, however strict root is
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            box.say(f"  {line.rstrip()}")
    if code := program.returncode:
        kinds = {kind.exit_code: kind for kind in LookoutError.__subclasses__()}
        serves = box.releases.current or "nothing"
        raise kinds.get(code, BackendError)(f"{what} failed, exit code {code}; {serves} serves as before")


def _bundle(box: Box, folder: Path) -> Path:
    """The bundle that the configuration names, as it will be once the release in `folder` is the current one."""
    try:
        named: Path = box.config.parent / tomllib.loads(box.config.read_text(encoding="utf-8"))["bundle"]
    except (OSError, ValueError, KeyError, TypeError):  # `edge check` says what is wrong with it
        return folder / "bundle"
    current = box.releases.home / "current"
    return folder / named.relative_to(current) if named.is_relative_to(current) else named


def _has_graphs(bundle: Path) -> bool:
    """Whether engines can be built of it; the self-test says what is wrong with a bundle."""
    try:
        return bool(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")).get("engine"))
    except (OSError, ValueError, AttributeError):
        return False
