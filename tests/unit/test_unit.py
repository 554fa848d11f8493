"""The unit file as systemd reads it: nothing unknown in it, shut as far as it says, in step with the program."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge.activate import READY_S
from edge.watchdog import Limits

EXPOSURE = 2.0  # of 10: what `systemd-analyze security` says of it
UNITS = ("lookout.service", "lookout-retry.service")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


@pytest.fixture
def unit(root: Path) -> dict[str, str]:
    """Keys that stand there once."""
    lines = (root / "appliance/lookout.service").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Za-z]+=", line))


def analyze(*words: object) -> str:
    done = subprocess.run(
        ["systemd-analyze", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_systemd
def test_systemd_finds_nothing_to_say(root: Path, tmp_path: Path) -> None:
    """But that the program of a box is not here."""
    for name in UNITS:
        text = (root / "appliance" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("/opt/lookout/current/venv/bin/edge run", "/bin/true run"))
    assert analyze("verify", "--man=no", *(tmp_path / name for name in UNITS)) == ""
    (tmp_path / UNITS[0]).write_text((tmp_path / UNITS[0]).read_text() + "\n[Service]\nProtectSystm=strict\n")
    assert "ProtectSystm" in analyze("verify", "--man=no", tmp_path / UNITS[0]), "a slip would be found"


@needs_systemd
def test_it_is_shut_as_far_as_it_says(root: Path) -> None:
    said = analyze("security", "--offline=true", "--no-pager", root / "appliance/lookout.service")
    exposure = re.search(r"exposure level for lookout.service: ([\d.]+) (\w+)", said)
    assert exposure, said
    assert float(exposure[1]) <= EXPOSURE, said
    assert exposure[2] == "OK"


def test_every_hole_has_its_reason(root: Path) -> None:
    """What is left open on purpose stands in a paragraph that says so."""
    paragraphs = (root / "appliance/lookout.service").read_text(encoding="utf-8").split("\n\n")
    left_open = re.compile(r"^(\w+=no|DeviceAllow=.*|ProcSubset=all|RestrictAddressFamilies=.*)$", re.MULTILINE)
    holes = [paragraph for paragraph in paragraphs if left_open.search(paragraph)]
    assert len(holes) == 3, "devices, network, processes"
    assert all("hole" in paragraph.lower() for paragraph in holes)


def test_the_attempt_after_the_last_has_no_limit(root: Path) -> None:
    assert "\nStartLimitIntervalSec=0\n" in (root / "appliance/lookout-retry.service").read_text()


def test_the_times_of_unit_and_program_go_together(unit: dict[str, str]) -> None:
    watchdog, abort = float(unit["WatchdogSec"]), float(unit["TimeoutAbortSec"])
    limits = Limits.of(watchdog, 10.0)
    assert limits.reading < watchdog, "a camera's thread has come back before"
    assert float(unit["TimeoutStartSec"]) < READY_S, "systemd gives up before `edge activate` does"
    burst = int(unit["StartLimitBurst"]) * (float(unit["RestartSec"]) + limits.stage + watchdog + abort)
    assert unit["StartLimitIntervalSec"] == "10min"
    assert burst < 600, "a box that always hangs reaches the limit, too, and its pause"
