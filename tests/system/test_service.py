"""The unit under a real systemd: the box runs in its cage, a hang ends in a restart, and a quiet scene does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.flow.conftest import PICTURE
from tests.http_camera import quiet_scenes
from tests.system.machine import Machine, missing

WATCHDOG = 9  # s, of the drop-ins here; that of the unit is 60
PATIENCE = 90.0  # s
DROP_IN = "/run/systemd/system/lookout.service.d/test.conf"
CAMERA = Path(__file__).parents[1] / "http_camera.py"
CONFIG = """
device = "box"
bundle = "/opt/lookout/current/bundle"
[spool]
path = "/var/lib/lookout/spool.db"
[publish]
address = "tcp://127.0.0.1:1"
"""
SOURCES = {
    "dark": "http://127.0.0.1:8000/dark",
    "empty": "http://127.0.0.1:8000/empty",
    "people": "http://127.0.0.1:8000/people",
    "away": "rtsp://user:secret@127.0.0.1:1/",
}


class Box:
    """A machine on which Lookout is installed."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.run = machine, machine.run

    def show(self, name: str, unit: str = "lookout.service") -> str:
        return self.run(f"systemctl show --value --property={name} {unit}").strip()

    def seconds(self, name: str) -> float:
        """A timestamp of systemd's, since the machine was switched on."""
        return int(self.show(name)) / 1e6

    def until(self, what: str, name: str, value: str) -> float:
        """Until the unit's property has this value -> the seconds it took."""
        return self.machine.wait(what, lambda: self.show(name) == value, PATIENCE)

    def journal(self, *words: str) -> list[dict[str, object]]:
        lines = self.run(f"journalctl --boot --output=json --all {' '.join(words)}").splitlines()
        return [json.loads(line) for line in lines]

    @contextmanager
    def with_lines(self, *lines: str) -> Iterator[None]:
        """Serving with these lines in the unit's [Service]; and then as before."""
        self.write(DROP_IN, "\n".join(["[Service]", *lines, ""]))
        self.run("systemctl daemon-reload && systemctl reset-failed lookout.service; systemctl restart lookout.service")
        try:
            yield
        finally:
            (self.machine.root / DROP_IN[1:]).unlink(missing_ok=True)
            self.run(f"rm -f {DROP_IN}; systemctl daemon-reload; systemctl stop lookout.service")
            self.run("systemctl reset-failed lookout.service", code=None)

    def write(self, path: str, text: str) -> None:
        """By a shell of the machine, as /run is its own."""
        self.run(f"mkdir -p {Path(path).parent} && cat > {path} <<'END'\n{text}\nEND")

    def configure(self, *cameras: str) -> None:
        tables = "".join(f'[[camera]]\nname = "{name}"\nsource = "{SOURCES[name]}"\n' for name in cameras)
        self.write("/etc/lookout/edge.toml", CONFIG + tables)


@pytest.fixture(scope="module")
def box(debian_root: Path, deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    if reason := missing():
        pytest.skip(reason)
    with Machine(debian_root, tmp_path_factory.mktemp("service")) as machine:
        box, home = Box(machine), machine.root / "root"
        shutil.copy(deb, home / "lookout.deb")
        shutil.copy(CAMERA, home)
        shutil.copy(PICTURE, quiet_scenes(home / "pictures") / "people.jpg")
        box.run("systemd-run --unit=camera /usr/bin/python3 /root/http_camera.py /root/pictures 8000")
        box.run("LOOKOUT_ACTIVATE=no dpkg --install /root/lookout.deb && rm /root/lookout.deb")
        box.configure("dark", "empty", "away")
        box.run("edge=$(echo /opt/lookout/releases/*/venv/bin/edge) && $edge activate $(ls /opt/lookout/releases)")
        yield box


@pytest.fixture(scope="module")
def quiet(box: Box) -> Iterator[Box]:
    """Serving, before cameras that show nothing, with limits as short as they get."""
    box.configure("dark", "empty", "away")
    with box.with_lines(f"WatchdogSec={WATCHDOG}"):
        yield box


def test_it_serves_in_its_cage(quiet: Box) -> None:
    began, ready = (
        quiet.seconds(name) for name in ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    )
    print(f"\nstart to ready under systemd: {ready - began:.1f} s")
    pid = quiet.show("MainPID")
    status = dict(line.split(":\t", 1) for line in quiet.run(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapBnd"], 16) == 0
    assert quiet.run(f"stat --format=%U /proc/{pid}").strip() == "lookout"
    assert quiet.run("stat --format='%U %a' /var/lib/lookout/spool.db").strip() == "lookout 600"
    assert "adjtimex" in quiet.show("SystemCallFilter"), "asked whether the clock is right"
    said = quiet.run("journalctl --boot --unit=lookout --output=cat")
    assert not re.search("denied|not permitted|read-only", said, re.IGNORECASE), (
        "nothing that the cage forbids is missed"
    )


def test_the_journal_has_fields(quiet: Box) -> None:
    for words in ("CAMERA=dark PRIORITY=6", "CAMERA=away PRIORITY=4"):
        quiet.machine.wait(words, lambda words=words: len(quiet.journal(words)) > 0, PATIENCE)
        entry = quiet.journal(words)[0]
        assert str(entry["LOGGER"]).startswith("edge.")
        assert entry["_SYSTEMD_UNIT"] == "lookout.service"
    assert "secret" not in quiet.run("journalctl --boot --all --output=export")


def test_nothing_to_see_is_no_hang(quiet: Box) -> None:
    """For longer than any limit of the loop and of a camera that shows something."""
    ready = quiet.seconds("ActiveEnterTimestampMonotonic")
    quiet.machine.wait("time", lambda: float(quiet.run("cat /proc/uptime").split()[0]) > ready + 25, PATIENCE)
    assert (quiet.show("NRestarts"), quiet.show("ActiveState")) == ("0", "active")
    assert quiet.seconds("ActiveEnterTimestampMonotonic") == ready


def test_a_reload_is_heard(quiet: Box) -> None:
    """By the unit's ExecReload, in its cage, without a new start."""
    pid = quiet.show("MainPID")
    quiet.configure("dark", "away")
    quiet.run("systemctl reload lookout")
    quiet.machine.wait("reloaded", lambda: "in force: 2 camera(s)" in quiet.run("journalctl -b -u lookout"), PATIENCE)
    assert quiet.until("ready", "ActiveState", "active") < PATIENCE
    assert quiet.show("MainPID") == pid


def test_a_hang_ends_in_a_restart_and_the_journal_says_where(box: Box) -> None:
    box.configure("people")
    with box.with_lines(f"WatchdogSec={WATCHDOG}", "Environment=LOOKOUT_FAILPOINT=box.detect:20:hang"):
        pid = box.show("MainPID")
        hung = "the loop hangs in 'detect'"
        seconds = box.machine.wait("told", lambda: hung in box.run("journalctl --boot --unit=lookout"), PATIENCE)
        killed = box.machine.wait("killed", lambda: box.show("MainPID") != pid, PATIENCE)
        ready = box.until("ready again", "ActiveState", "active")
        print(f"\nWatchdogSec={WATCHDOG}: told {seconds:.1f} s after the start, killed {killed:.1f} s later,"
              f" ready again {ready:.1f} s later")  # fmt: skip
        assert int(box.show("NRestarts")) >= 1
        journal = box.run("journalctl --boot --unit=lookout")
        assert "Watchdog timeout" in journal
        assert "failpoints.py" in journal, "the stack of the thread that hangs"
        assert killed < 2 * WATCHDOG


def test_what_fails_too_often_is_tried_again_for_ever(box: Box) -> None:
    """A wrong configuration: failed at once; put right by somebody, the box serves again without being started."""
    box.write("/run/systemd/system/lookout-retry.service.d/test.conf", "[Service]\nExecStart=\nExecStart=/bin/sleep 2\n"
              "ExecStart=/bin/systemctl reset-failed lookout.service\n"
              "ExecStart=/bin/systemctl --no-block start lookout.service\n")  # fmt: skip
    box.configure()
    box.run("systemctl daemon-reload; systemctl stop lookout; systemctl reset-failed lookout", code=None)
    box.run("systemctl start lookout", code=None)
    assert box.show("ActiveState") == "failed"
    assert (box.show("ExecMainStatus"), box.show("NRestarts")) == ("78", "0")
    box.machine.wait("again", lambda: box.run("journalctl --boot -u lookout").count("status=78") > 1, PATIENCE)
    box.configure("dark")
    seconds = box.until("serves", "ActiveState", "active")
    print(f"\na configuration put right serves after {seconds:.1f} s")


def test_whoever_stops_it_has_it_stopped(box: Box) -> None:
    """And whoever restarts it again and again has not."""
    box.configure()
    box.run("rm -r /run/systemd/system/lookout-retry.service.d; systemctl daemon-reload")
    box.run("for each in 1 2 3 4 5 6 7 8; do systemctl restart lookout; done", code=1)
    box.machine.wait("pause", lambda: box.show("ActiveState", "lookout-retry.service") == "activating", PATIENCE)
    box.run("systemctl stop lookout")
    box.machine.wait("stopped", lambda: box.show("ActiveState", "lookout-retry.service") == "inactive", PATIENCE)
