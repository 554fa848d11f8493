"""Finds the sample video: 80 s of people crossing a campus (PETS09-S2L1), which OpenCV ships as vtest.avi.

Tried in order: the path the user names, the cache, the installed package opencv-doc, that package fetched with apt-get
(no root needed, nothing installed), OpenCV's repository. Whatever the way, the sha256 decides.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from edge.bundle import sha256_of
from edge.errors import CaptureError, ConfigError, LookoutError
from export.debian import file_from_package
from export.weights import Source, fetch

VTEST = Source(  # 768x576 px, 10 frames/s, 795 frames
    "vtest.avi",
    "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
    "https://raw.githubusercontent.com/opencv/opencv/4.x/samples/data/vtest.avi",
    8_131_690,
)

_PACKAGE = "opencv-doc"
_FOLDER = "usr/share/doc/opencv-doc/examples/data"  # in the package; the video lies there as it is, not gzipped

Step = Callable[[Source, Path, Path], Path]  # (sample, cache folder, root of the file system) -> the checked file


def find_sample(path: Path | None = None, *, cache: Path, sample: Source = VTEST, root: Path = Path("/")) -> Path:
    """Returns a file that is the sample video by its sha256; what is downloaded is kept in `cache`.

    `root` is where installed packages lie. Raises ConfigError when `path` is another file, CaptureError when it cannot
    be read, or when no step finds the video: the message lists what each said.
    """
    if path is not None:
        return _named(path, sample)
    tried = []
    for name, step in STEPS:
        try:
            return step(sample, cache, root)
        except LookoutError as exc:
            tried.append(f"{name}: {exc.what}" + (f", got {exc.got}" if exc.got is not None else ""))
        except (OSError, tarfile.TarError) as exc:
            tried.append(f"{name}: {exc}")
    raise CaptureError(
        f"the sample video {sample.name} was not found ({'; '.join(tried)})",
        remedy="get it elsewhere and name its path",
    )


def _named(path: Path, sample: Source) -> Path:
    try:
        got = sha256_of(path)
    except OSError as exc:
        raise CaptureError(f"cannot read the sample video {path}", got=exc.strerror or exc) from exc
    if got != sample.sha256:
        raise ConfigError(
            f"{path} is another video than {sample.name}",
            expected=f"sha256 {sample.sha256}",
            got=got,
            remedy="name a copy of that one, or no path to have it found",
        )
    return path


def _checked(path: Path, sample: Source) -> Path:
    if not path.is_file():
        raise CaptureError(f"no {path}")
    if (got := sha256_of(path)) != sample.sha256:
        raise CaptureError(f"{path} is another file", got=f"sha256 {got}")
    return path


def _from_cache(sample: Source, cache: Path, root: Path) -> Path:
    return _checked(cache / sample.name, sample)


def _from_installed(sample: Source, cache: Path, root: Path) -> Path:
    return _checked(root / _FOLDER / sample.name, sample)


def _from_apt(sample: Source, cache: Path, root: Path) -> Path:
    member = f"{_FOLDER}/{sample.name}"
    with file_from_package(_PACKAGE, member, folder=cache, what="sample video", size="96 MB") as path:
        return _checked(path, sample).replace(cache / sample.name)


def _from_repository(sample: Source, cache: Path, root: Path) -> Path:
    _say("sample video: downloading from OpenCV's repository")
    return fetch(sample, mirror=None, cache=cache)


STEPS: tuple[tuple[str, Step], ...] = (
    ("cache", _from_cache),
    ("installed package", _from_installed),
    ("apt-get", _from_apt),
    ("repository", _from_repository),
)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
