"""One file out of a Debian package: no root needed, nothing installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from edge.errors import CaptureError

_PATIENCE = 1800  # s for one apt-get, so that a dead mirror cannot hold us for ever


@contextmanager
def file_from_package(package: str, member: str, *, folder: Path, what: str, size: str) -> Iterator[Path]:
    """The file `member` ("usr/sbin/…") of the newest `package` that apt-get finds; rename it to keep it.

    It lies in a folder of its own inside `folder`, gone when the context ends: the download lands on the disk that the
    user chose. `what` begins the lines that stderr gets, `size` is told before the download. Raises CaptureError where
    there is no apt-get, no network, no such package or file; OSError and tarfile.TarError from the disk.
    """
    if not shutil.which("apt-get"):
        raise CaptureError("no apt-get on this machine")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{package}-", dir=folder) as name:
        own = Path(name).resolve()  # apt-get runs in it, and is told of folders in it
        deb = _download(package, own, what, size)
        target = own / Path(member).name
        _say(f"{what}: unpacking {target.name}")
        _unpack(deb, member, target)
        yield target


def _download(package: str, folder: Path, what: str, size: str) -> Path:
    _say(f"{what}: downloading Debian's package {package} ({size}) with apt-get")
    try:
        _apt_get(folder, "download", package)
    except CaptureError:  # no package lists yet, or stale ones; fresh ones of our own need no root
        lists, archives = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True)
        (archives / "archives" / "partial").mkdir(parents=True)
        private = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}")
        _say(f"{what}: apt-get has no usable package lists, fetching them (about 10 MB)")
        with suppress(CaptureError):  # one dead third-party source fails the update; the download has the last word
            _apt_get(folder, *private, "update")
        _say(f"{what}: downloading {package} ({size})")
        _apt_get(folder, *private, "download", package)
    packages = list(folder.glob("*.deb"))
    if not packages:
        raise CaptureError("apt-get brought no package")
    return packages[0]


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
