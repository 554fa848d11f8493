"""Every wheel that a box needs, for one Python of one architecture; or the list of those that nobody made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import Path as ZipPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from edge.errors import ConfigError

Tell = Callable[[str], object]  # gets a line at a time
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}  # Debian's name of an architecture, and the name that wheels have


@dataclass(frozen=True)
class Target:
    """One Python of the boxes, and the C library that comes with it."""

    arch: str
    python: str
    glibc: int  # the 35 of 2.35

    def __str__(self) -> str:
        return f"{self.arch}, Python {self.python}"

    @property
    def pip_options(self) -> list[str]:
        """Which wheels pip may take. It knows no range of platforms: each one that this C library covers is named."""
        machine, short = MACHINES[self.arch], self.python.replace(".", "")
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(self.glibc, 16, -1)]
        platforms.append(f"manylinux2014_{machine}")  # the old name of manylinux_2_17
        return [
            *("--only-binary", ":all:", "--implementation", "cp", "--python-version", self.python),
            *(word for abi in (f"cp{short}", "abi3", "none") for word in ("--abi", abi)),
            *(word for platform in platforms for word in ("--platform", platform)),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """What a requirement's marker is asked about."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": MACHINES[self.arch],
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


TARGETS = (
    Target("arm64", "3.10", 35),  # JetPack 6, which is Ubuntu 22.04
    Target("arm64", "3.12", 39),  # JetPack 7, which is Ubuntu 24.04
    Target("amd64", "3.10", 35),
    Target("amd64", "3.11", 36),  # Debian 12
    Target("amd64", "3.12", 39),
)


@dataclass(frozen=True)
class Missing:
    """A requirement that no wheel meets."""

    requirement: Requirement
    wanted_by: str
    target: Target

    def __str__(self) -> str:
        versions = self.requirement.specifier or "(any version)"
        return f"{self.requirement.name} {versions} for {self.target}; {self.wanted_by} wants it"


@dataclass(frozen=True)
class WheelSet:
    """What a box with this Python installs; where something is missing, there are no wheels."""

    target: Target
    wheels: tuple[Path, ...] = ()
    missing: tuple[Missing, ...] = ()


def wheels_for(target: Target, project: Path, extra: str, folder: Path, tell: Tell) -> WheelSet:
    """Gather `project`, a wheel, with its `extra` and all that they need in `folder`, which is made.

    Raises ConfigError where pip fails and no wheel is missing.
    """
    own = {name_of(project): project}
    start = Requirement(f"{name_of(project)}[{extra}]")
    # pip asks markers about the machine and the Python that it runs on: what the box's need is told it in words
    asked = [_without_marker(one) for one, _ in _walk(target, start, own)][1:]
    while True:
        with TemporaryDirectory(dir=folder.parent) as place:
            code, said = _download(target, asked, Path(place), tell) if asked else (0, "")
            if code:
                if missing := _missing(target, project, start, Path(place), tell):
                    return WheelSet(target, missing=missing)
                raise ConfigError(f"{target}: pip found no wheels that fit together", got=last_words(said))
            found = {**own, **{name_of(wheel): wheel for wheel in Path(place).iterdir()}}
            needed = [requirement for requirement, _ in _walk(target, start, found)]
            unmet = [_without_marker(one) for one in needed if not _meets(found, one)]
            if not unmet:
                folder.mkdir()
                names = sorted({canonicalize_name(one.name) for one in needed})
                return WheelSet(target, tuple(_copied(found[name], folder) for name in names))
            asked += unmet


def name_of(wheel: Path) -> str:
    """The normalised name of what a wheel holds."""
    return parse_wheel_filename(wheel.name)[0]


def _missing(target: Target, project: Path, start: Requirement, place: Path, tell: Tell) -> tuple[Missing, ...]:
    """pip stops at the first requirement that nothing meets; this asks for one after another."""
    found, missing = {name_of(project): project}, list[Missing]()
    for requirement, wanted_by in _walk(target, start, found):
        if canonicalize_name(requirement.name) in found:
            continue
        code, said = _download(target, ["--no-deps", _without_marker(requirement)], place, tell)
        if code == 0:
            found.update({name_of(wheel): wheel for wheel in place.iterdir()})
        elif "No matching distribution" in said and "Retrying" not in said:
            missing.append(Missing(requirement, wanted_by, target))
        else:
            raise ConfigError(f"{target}: pip could not ask for {requirement.name}", got=last_words(said))
    return tuple(missing)


def _walk(target: Target, start: Requirement, wheels: Mapping[str, Path]) -> Iterator[tuple[Requirement, str]]:
    """Every requirement that follows from `start` on the target, and who has it. It goes on behind each that has a
    wheel in `wheels`, which the caller may add to on the way."""
    queue, seen = deque([(start, "the box")]), set[str]()
    while queue:
        requirement, wanted_by = queue.popleft()
        if _without_marker(requirement) in seen:
            continue
        seen.add(_without_marker(requirement))
        yield requirement, wanted_by
        name = canonicalize_name(requirement.name)
        if name not in wheels:
            continue
        for text in _requires(wheels[name]):
            one = Requirement(text)
            extras = ["", *requirement.extras]
            if one.marker is None or any(one.marker.evaluate({**target.environment, "extra": it}) for it in extras):
                queue.append((one, name))


def _meets(wheels: Mapping[str, Path], requirement: Requirement) -> bool:
    wheel = wheels.get(canonicalize_name(requirement.name))
    return wheel is not None and requirement.specifier.contains(parse_wheel_filename(wheel.name)[1], prereleases=True)


def _copied(wheel: Path, folder: Path) -> Path:
    return Path(shutil.copyfile(wheel, folder / wheel.name))


def _requires(wheel: Path) -> Sequence[str]:
    (info,) = (part for part in ZipPath(wheel).iterdir() if part.name.endswith(".dist-info"))
    return PathDistribution(info).requires or []


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _download(target: Target, words: Sequence[str], place: Path, tell: Tell) -> tuple[int, str]:
    return run_pip(["download", "--dest", str(place), *target.pip_options, *words], tell)


def run_pip(words: Sequence[str], tell: Tell, **env: str) -> tuple[int, str]:
    """Run pip to its end: its exit status, and what it said; `tell` gets the lines as they come."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            tell(line.strip())
    return process.returncode, "".join(lines)


def last_words(said: str) -> str:
    """What pip said of its failure."""
    errors = [line for line in said.splitlines() if line.startswith(("ERROR:", "WARNING: Retrying"))]
    return " ".join(errors[-3:]) or said[-500:]
