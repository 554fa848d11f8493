"""Boxes get a release over ssh: copied, installed, tested, switched to; what fails is taken back by the box itself."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from appliance.packages import Image, field_of
from appliance.ssh import LOST, Ssh
from appliance.wheels import TARGETS
from edge.errors import BackendError, ConfigError, LookoutError

Say = Callable[[str], None]

AT_ONCE = 4  # boxes: the rest wait, as the line to them is mostly one
BACK_S = 120.0  # how long a box whose connection went is called again
_RETRY_S = 2.0
_ERROR = re.compile(r"\s*(?:[\d.]+ s\s+|dpkg: )?(?:error|ERROR): (.*)")  # of edge, dpkg or pip
RELEASE = 500.0  # MB of the wheels for one Python, unpacked; measured 443; the bundle is links to the package's

# What a box is asked first. A folder that is not there yet is asked about where it will be.
NAMES = ("arch", "python", "uid", "sudo", "current", "free_copy", "free_package", "free_release")
FACTS = r"""
export LC_ALL=C
there() { p=$1; while [ ! -d "$p" ]; do p=$(dirname "$p"); done; echo "$p"; }
free() { df -Pk "$(there "$2")" | tail -n 1 | { read -r _ _ _ kib _ mount; echo "free_$1=$kib $mount"; }; }
echo "arch=$(dpkg --print-architecture 2>/dev/null)"
echo "python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
echo "uid=$(id -u)"
echo "sudo=$(sudo -n true >/dev/null 2>&1 && echo yes)"
echo "current=$(basename "$(readlink /opt/lookout/current)")"
free copy /var/tmp
free package /usr
free release /opt/lookout
"""
# After an activation: until it is over, whoever started it, and then what serves.
SERVES = r"""
export LC_ALL=C
[ ! -d /opt/lookout ] || flock /opt/lookout true
current=$(readlink /opt/lookout/current) || { echo nothing; exit 0; }
[ -d /run/systemd/system ] && state=$(systemctl is-active lookout.service)
[ "$state" = active ] && state=
echo "$(basename "$current")${state:+, but it is $state}"
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one box. before, after: what served, "?" where nobody could be asked; seconds it took."""

    box: str
    before: str
    after: str
    seconds: float
    good: bool
    said: str


def boxes_of(file: Path) -> list[str]:
    """One ssh destination per line; # begins a comment. Raises ConfigError for none or one twice, OSError."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    boxes = [line for line in lines if line]
    if not boxes:
        raise ConfigError(f"{file}: no box", expected="lines like user@host")
    if twice := sorted({box for box in boxes if boxes.count(box) > 1}):
        raise ConfigError(f"{file}: {', '.join(twice)} more than once")
    return boxes


def flash_all(boxes: Sequence[str], image: Image, say: Say) -> list[Outcome]:
    """Flash several boxes, four at a time; a line of one begins with its name."""
    width = max(map(len, boxes))

    def one(box: str) -> Outcome:
        return flash(box, image, say if len(boxes) == 1 else lambda text: say(f"{box:{width}} {text}"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, boxes))


def flash(box: str, image: Image, say: Say) -> Outcome:
    """Bring a box the release of `image`; whatever goes wrong is in the outcome."""
    began, visit = time.monotonic(), _Visit(box)

    def timed(text: str) -> None:
        say(f"{time.monotonic() - began:7.1f} s  {text}")

    try:
        said, good = visit.make(image, timed), True
    except (LookoutError, OSError, subprocess.SubprocessError) as error:
        said, good = str(error), False
    timed(f"{'done' if good else 'failed'}: {said}")
    return Outcome(box, visit.before, visit.after, time.monotonic() - began, good, said)


def heard(ssh: Ssh, command: str, say: Say) -> tuple[int, str]:
    """Run it, its lines passed on -> its exit code, and the first error among them, the cause of all others."""
    errors = list[str]()

    def listen(line: str) -> None:
        say(line)
        if found := _ERROR.match(line):
            errors.append(found[1])

    code = ssh.stream(command, listen)
    return code, f": {errors[0]}" if errors else ""


class _Visit:
    """One box, step by step. before, after: what served."""

    def __init__(self, box: str) -> None:
        self.box, self.before, self.after = box, "?", "?"

    def make(self, image: Image, say: Say) -> str:
        """-> what is to be said in the end. Raises LookoutError, OSError."""
        with Ssh(self.box) as ssh:
            told = dict(line.split("=", 1) for line in ssh.ask(FACTS).splitlines() if "=" in line)
            facts = {**dict.fromkeys(NAMES, ""), **told}
            self.before = self.after = facts["current"] or "nothing"
            say(f"{facts['arch'] or 'no Debian'}, Python {facts['python'] or 'none'}, {self.before} serves")
            sudo = self._checked(facts)
            deb = image(facts["arch"])
            self._check_space(facts, deb)
            place = ssh.ask("mktemp -d /var/tmp/lookout.XXXXXX").strip()
            try:
                there = f"{place}/{deb.name}"
                say(f"copying {deb.name}, {deb.stat().st_size / 1e6:.0f} MB")
                ssh.copy(deb, there, say)
                say("installing it beside what serves")
                self._install(ssh, sudo, there, say)
            finally:
                with suppress(BackendError):  # what stopped the rest says more
                    ssh.ask(f"rm -rf {shlex.quote(place)}")
            release = ssh.ask("cat /usr/lib/lookout/payload/release").strip()
            say(f"activating {release}")
            command = f"{sudo}/opt/lookout/releases/{release}/venv/bin/edge activate {release}"
            code, why = heard(ssh, f"{command} 2>&1", say)
            if code != LOST:
                self.after = ssh.ask(SERVES, seconds=None).strip()
        if code == LOST:
            say("the connection is gone; the box goes on by itself, and is called again")
            self.after = "?"
            self.after = self._called_again(say)
            code = self.after != release
        if code:
            raise BackendError(f"{release} was not activated{why}; {self.after} serves")
        return f"{self.after} serves"

    def _checked(self, facts: dict[str, str]) -> str:
        """What makes a command root's there. Raises ConfigError for a box that no package can be installed on."""
        arch, python = facts["arch"], facts["python"]
        known = [target for target in TARGETS if target.arch == arch]
        if not known:
            archs = " or ".join(sorted({target.arch for target in TARGETS}))
            raise ConfigError(f"{self.box} is no box for Lookout", expected=f"Debian or Ubuntu for {archs}", got=arch)
        if python not in (pythons := [target.python for target in known]):
            raise ConfigError(
                f"{self.box}: /usr/bin/python3", expected=" or ".join(pythons), got=python or "none there"
            )
        if facts["uid"] == "0":
            return ""
        if facts["sudo"] != "yes":
            remedy = "log in as root, or allow this user NOPASSWD in /etc/sudoers.d"
            raise ConfigError(f"{self.box}: sudo -n refuses this user", remedy=remedy)
        return "sudo -n "

    def _check_space(self, facts: dict[str, str], deb: Path) -> None:
        """Raises BackendError where a disk of the box is too small for what is to come."""
        installed = int(field_of(deb, "Installed-Size")) / 1000 * 1.024  # MB
        wanted = {"copy": deb.stat().st_size / 1e6, "package": installed, "release": RELEASE}
        need, free = dict[str, float](), dict[str, float]()
        for what, size in wanted.items():
            kib, _, mount = facts[f"free_{what}"].partition(" ")
            if not kib.isdigit():
                raise BackendError(f"{self.box}: df does not say how much is free", got=facts[f"free_{what}"])
            free[mount] = int(kib) / 1000 * 1.024
            need[mount] = need.get(mount, 0.0) + size
        for mount, size in need.items():
            if free[mount] < size:
                where = f"{self.box}: the disk at {mount} is too full"
                raise BackendError(where, expected=f"{size:.0f} MB free", got=f"{free[mount]:.0f} MB")

    def _install(self, ssh: Ssh, sudo: str, deb: str, say: Say) -> None:
        """Its wheels and bundle beside those that serve. Raises BackendError."""
        # whoever changed the configuration keeps it, and nobody is there to be asked
        options = "--force-confdef --force-confold"
        quiet = "env LOOKOUT_ACTIVATE=no DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8"
        code, why = heard(ssh, f"{sudo}{quiet} dpkg --install {options} {shlex.quote(deb)} 2>&1", say)
        if code == LOST:
            raise BackendError(f"{self.box}: the connection went while it was installed", remedy="flash it again")
        if code:
            raise BackendError(f"{self.box}: dpkg failed, exit code {code}{why}; {self.before} serves as before")

    def _called_again(self, say: Say) -> str:
        """What serves, of a box whose connection went. Raises BackendError where it stays away."""
        until = time.monotonic() + BACK_S
        while True:
            try:
                with Ssh(self.box) as ssh:
                    say("it answers again")
                    until = time.monotonic() + BACK_S
                    return ssh.ask(SERVES, seconds=None).strip()
            except BackendError:
                if time.monotonic() > until:
                    raise
                time.sleep(_RETRY_S)
