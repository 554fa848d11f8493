"""Finds the sample video: 80 s of people crossing a campus (PETS09-S2L1), which OpenCV ships as vtest.avi.

Tried in order: the path the user names, the cache, the installed package opencv-doc, that package fetched with apt-get
(no root needed, nothing installed), OpenCV's repository. Whatever the way, the sha256 decides.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from edge.bundle import sha256_of
from edge.errors import CaptureError, ConfigError, LookoutError
from export.weights import Source, fetch

VTEST = Source(  # 768x576 px, 10 frames/s, 795 frames
    "vtest.avi",
    "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
    "https://raw.githubusercontent.com/opencv/opencv/4.x/samples/data/vtest.avi",
    8_131_690,
)

_PACKAGE = "opencv-doc"
_FOLDER = "usr/share/doc/opencv-doc/examples/data"  # in the package; the video lies there as it is, not gzipped
_PATIENCE = 1800  # s for one apt-get, so that a dead mirror cannot hold us for ever; the package is 96 MB

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
    if not shutil.which("apt-get"):
        raise CaptureError("not on this machine")
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the 96 MB land on the disk the user chose and the last step is a rename.
    with TemporaryDirectory(prefix=f".{_PACKAGE}-", dir=cache) as name:
        folder = Path(name).resolve()  # apt-get runs in it, and is told of folders in it
        _say(f"sample video: downloading Debian's package {_PACKAGE} (96 MB) with apt-get")
        try:
            _apt_get(folder, "download", _PACKAGE)
        except CaptureError:  # no package lists yet, or stale ones; fresh ones of our own need no root
            lists, archives = folder / "lists", folder / "cache"
            (lists / "partial").mkdir(parents=True)
            (archives / "archives" / "partial").mkdir(parents=True)
            private = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}")
            _say("sample video: apt-get has no usable package lists, fetching them (about 10 MB)")
            with suppress(CaptureError):  # one dead third-party source fails the update; the download has the last word
                _apt_get(folder, *private, "update")
            _say(f"sample video: downloading {_PACKAGE} (96 MB)")
            _apt_get(folder, *private, "download", _PACKAGE)
        packages = list(folder.glob("*.deb"))
        if not packages:
            raise CaptureError("apt-get brought no package")
        _say(f"sample video: unpacking {sample.name}")
        _unpack(packages[0], f"{_FOLDER}/{sample.name}", folder / sample.name)
        return _checked(folder / sample.name, sample).replace(cache / sample.name)


def _from_repository(sample: Source, cache: Path, root: Path) -> Path:
    _say("sample video: downloading from OpenCV's repository")
    return fetch(sample, mirror=None, cache=cache)


STEPS: tuple[tuple[str, Step], ...] = (
    ("cache", _from_cache),
    ("installed package", _from_installed),
    ("apt-get", _from_apt),
    ("repository", _from_repository),
)


def _apt_get(folder: Path, *args: str) -> None:
    """Runs apt-get in `folder`, its progress on our stderr. Raises CaptureError with apt's own first error line."""
    # Root's apt-get would download as the user _apt, who may not write here, and warn about it.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", *args]
    try:
        # Output to fd 2: on a terminal apt-get then draws its progress, and our stdout stays the caller's.
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise CaptureError(f"apt-get was not done after {_PATIENCE} s") from exc
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise CaptureError(errors[0] if errors else f"apt-get ended with {done.returncode}")


def _unpack(package: Path, member: str, target: Path) -> None:
    """Writes one file of a .deb to `target`. dpkg-deb, because Debian and Ubuntu compress packages differently."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        # Its complaint about the closed pipe, once we have what we came for, is nobody's concern.
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for entry in archive:
            if entry.name.removeprefix("./") == member and (source := archive.extractfile(entry)):
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                return
    raise CaptureError(f"no {member} in {package.name}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
