"""A machine to flash: a root folder booted by systemd-nspawn, with systemd and sshd, in a network of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

BOOT_S = 60.0
LOOK_S = 0.1
USER = "engineer"  # may use sudo, as the first user of a Jetson may
GUEST = "guest"  # may not
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_PROGRAMS = ("systemd-nspawn", "nsenter", "ip", "ssh", "ssh-keygen", "mount")


def missing() -> str | None:
    """Why no machine can be booted here; None: one can."""
    if os.geteuid() != 0:
        return "machines are booted as root"
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"not here: {', '.join(lacking)}" if lacking else None


class Machine:
    """`with Machine(base, folder) as machine:` boots a copy of `base`; everything it changes lies in `folder`.

    base: a root with systemd, sshd, sudo and python3, which stays as it is. With $PATH set to machine.path, ssh reaches
    it as engineer@box, in a network namespace that has nothing else in it.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self._base, self._folder = base, folder
        self.root = folder / "root"
        self._network = f"lookout-{os.getpid()}-{folder.name}"[-60:]

    def __enter__(self) -> Machine:
        try:
            self._lay()
            self._keys()
            subprocess.run(["ip", "netns", "add", self._network], check=True)
            subprocess.run(["ip", "-n", self._network, "link", "set", "lo", "up"], check=True)
            self.boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def boot(self) -> None:
        """Switch it on; it may have been before. Returns when ssh answers."""
        self._log = (self._folder / "console").open("ab")
        self._process = subprocess.Popen(
            [
                *("systemd-nspawn", f"--directory={self.root}", "--boot", "--register=no", "--keep-unit", "--quiet"),
                *(f"--network-namespace-path=/run/netns/{self._network}", "--resolv-conf=off", "--timezone=off"),
                "--console=pipe",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.wait("ssh", lambda: self._ssh("true").returncode == 0, BOOT_S)
        self.wait("systemd", lambda: self._ssh("systemctl is-system-running --wait").stdout != "", BOOT_S)

    def cut(self) -> None:
        """A power cut: nobody is asked, and nothing is told."""
        for child in _below(self._process.pid):
            _kill(child)
        _kill(self._process.pid)
        self._process.wait()
        self._log.close()

    def run(self, command: str, *, code: int | None = 0) -> str:
        """What a shell command says there, as root."""
        words = ["nsenter", f"--target={self._leader()}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]
        done = subprocess.run(
            [*words, "/bin/sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, what: str, good: Callable[[], bool], seconds: float) -> float:
        """Until it is so -> the seconds it took."""
        start = time.monotonic()
        while not good():
            if time.monotonic() - start > seconds or self._process.poll() is not None:
                console = (self._folder / "console").read_text(errors="replace")[-3000:]
                raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{console}")
            time.sleep(LOOK_S)
        return time.monotonic() - start

    @contextmanager
    def network(self) -> Iterator[None]:
        """Within it, the sockets that this thread makes are in the machine's network."""
        with Path("/proc/thread-self/ns/net").open() as before, Path("/run/netns", self._network).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def beside(self, *words: object) -> list[str]:
        """The words that start a program of this side in the machine's network."""
        return ["nsenter", f"--net=/run/netns/{self._network}", *map(str, words)]

    @property
    def path(self) -> str:
        """$PATH with an `ssh` that goes into the machine's network, with its key."""
        return f"{self._folder / 'bin'}:{os.environ['PATH']}"

    def destination(self, user: str = USER) -> str:
        """What ssh takes."""
        return f"{user}@box"

    def _lay(self) -> None:
        """The root: what `base` holds, and above it what this machine writes."""
        for name in ("root", "upper", "work", "bin"):
            (self._folder / name).mkdir()
        layers = f"lowerdir={self._base},upperdir={self._folder / 'upper'},workdir={self._folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        for user in (USER, GUEST):
            if f"\n{user}:" not in (self.root / "etc/passwd").read_text():
                self._chroot("useradd", "--create-home", "--shell", "/bin/sh", user)
        (self.root / "etc/sudoers.d/engineer").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
        (self.root / "etc/hostname").write_text("box\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost box\n")
        sshd = self.root / "etc/ssh/sshd_config.d/test.conf"  # a machine in a test may be slow to answer
        sshd.write_text("UseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n")

    def _keys(self) -> None:
        """A key for this test alone, and the `ssh` that uses it."""
        key = self._folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        for home in ("root", f"home/{USER}", f"home/{GUEST}"):
            folder = self.root / home / ".ssh"
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / "authorized_keys").write_text((self._folder / "key.pub").read_text())
            owner = folder.parent.stat()
            for path in (folder, folder / "authorized_keys"):
                os.chown(path, owner.st_uid, owner.st_gid)
        (self._folder / "ssh_config").write_text(
            f"Host box\n  HostName 127.0.0.1\nHost *\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
            f"  StrictHostKeyChecking no\n  UserKnownHostsFile {self._folder / 'known_hosts'}\n"
        )
        ssh = self._folder / "bin/ssh"
        config = self._folder / "ssh_config"
        ssh.write_text(
            f'#!/bin/sh\nexec nsenter --net=/run/netns/{self._network} {shutil.which("ssh")} -F {config} "$@"\n'
        )
        ssh.chmod(0o755)

    def _ssh(self, command: str) -> subprocess.CompletedProcess[str]:
        words = [str(self._folder / "bin/ssh"), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "root@box", command]
        return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=BOOT_S)

    def _chroot(self, *words: str) -> None:
        subprocess.run(["chroot", str(self.root), *words], check=True, capture_output=True)

    def _leader(self) -> int:
        """The machine's process 1, as it is called outside."""
        (leader,) = _children(self._process.pid)
        return leader

    def _end(self) -> None:
        if hasattr(self, "_process") and self._process.poll() is None:
            self.cut()
        if Path("/run/netns", self._network).exists():
            subprocess.run(["ip", "netns", "del", self._network], check=False)
        if os.path.ismount(self.root):
            subprocess.run(["umount", "--recursive", "--lazy", str(self.root)], check=False)
        for name in ("upper", "work"):  # a gigabyte; of what it said the console is kept
            shutil.rmtree(self._folder / name, ignore_errors=True)


def _enter(network: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(network, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _below(process: int) -> list[int]:
    return [each for child in _children(process) for each in (*_below(child), child)]


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
