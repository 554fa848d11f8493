"""Which package a box gets: one that is there, or one that is built when the first box of its architecture asks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

from rich.console import Console

from appliance.image import build_images
from edge.errors import ConfigError, LookoutError

Image = Callable[[str], Path]  # Debian's name of an architecture -> the package for it; raises LookoutError


def given(files: Sequence[Path]) -> Image:
    """Packages that were built before. Raises ConfigError for what is none, and for two of one architecture."""
    packages = dict[str, Path]()
    for file in files:
        if (arch := field_of(file, "Architecture")) in packages:
            raise ConfigError(f"{packages[arch]} and {file} are both for {arch}")
        packages[arch] = file

    def image(arch: str) -> Path:
        if arch not in packages:
            raise ConfigError("no package for this box", expected=arch, got=" and ".join(packages))
        return packages[arch]

    return image


def building(bundle: Path, out: Path, console: Console) -> Image:
    """Packages with a bundle; boxes of one architecture, also those that ask meanwhile, get the same one."""
    made, lock = dict[str, Path | LookoutError](), Lock()

    def image(arch: str) -> Path:
        with lock:
            if arch not in made:
                try:
                    (made[arch],) = build_images([arch], bundle, out, console)
                except LookoutError as error:
                    made[arch] = error
        if isinstance(it := made[arch], LookoutError):
            raise it
        return it

    return image


def field_of(deb: Path, name: str) -> str:
    """A field of a package. Raises ConfigError for what is none."""
    try:
        done = subprocess.run(["dpkg-deb", "--field", deb, name], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("dpkg-deb is not here", remedy="boxes are flashed from Debian or Ubuntu") from error
    if done.returncode or not done.stdout.strip():
        raise ConfigError(f"{deb} is no package for a box", got=done.stderr or f"no field {name}")
    return done.stdout.strip()
