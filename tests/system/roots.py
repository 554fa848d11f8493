"""Debian roots to install into: debootstrap makes one, which is kept; what a test writes lies above it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
PACKAGES = ("python3", "python3-gi", "systemd", "systemd-sysv", "dbus", "openssh-server", "sudo")
TOOLS = ("debootstrap", "dpkg-deb", "unshare", "ip")
ALONE = ("unshare", "--net", "--mount", "--pid", "--fork")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lookout"


def lacking() -> str | None:
    """Why there can be no root here."""
    if os.geteuid() != 0:
        return "only root can make a Debian root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not here: {', '.join(missing)}"
    tried = subprocess.run([*ALONE, "true"], capture_output=True, text=True, check=False)  # a container may not
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Root:
    """A folder with a Debian in it."""

    path: Path

    def run(self, *command: object, code: int | None = 0, timeout: float = 120, **env: str) -> str:
        """Run a command in it, as root, with no network but its own loopback and no process of others; what it said.

        code: the exit status that it has to have; None is any.
        """
        inner = 'ip link set lo up && exec chroot "$0" "$@"'
        done = subprocess.run(
            [*ALONE, f"--mount-proc={self.path}/proc", "sh", "-c", inner, str(self.path), *map(str, command)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert code is None or done.returncode == code, f"{command}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time: what several workers need is made by the first."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def debian() -> Path:
    """A root with systemd, Python and sshd, never installed into: made where it is not there yet, in a minute."""
    key = hashlib.sha256(f"{SUITE} {PACKAGES}".encode()).hexdigest()[:8]
    root = CACHE / f"root-{SUITE}-{key}"
    with alone(CACHE / "root.lock"):
        if not root.exists():
            part = root.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # of a test that was killed
            _run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(part)])
            for package in (part / "var/cache/apt/archives").glob("*.deb"):
                package.unlink()
            part.rename(root)
    return root


@contextmanager
def copied(root: Path, place: Path) -> Iterator[Root]:
    """A root that begins as a copy, and is gone at the end; what it writes is in memory."""
    memory = place.with_suffix(".memory")
    for folder in (place, memory):
        folder.mkdir()
    _run(["mount", "-t", "tmpfs", "tmpfs", str(memory)])
    try:
        for name in ("upper", "work"):
            (memory / name).mkdir()
        layers = f"lowerdir={root},upperdir={memory}/upper,workdir={memory}/work"
        _run(["mount", "-t", "overlay", "overlay", "-o", layers, str(place)])
        try:
            yield Root(place)
        finally:
            _run(["umount", str(place)])
    finally:
        _run(["umount", str(memory)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
