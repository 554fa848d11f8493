"""SIGHUP to a real box: what may change does, the rest is refused by name, and it never stops describing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.conftest import PICTURE, ROOT, starter
from tests.http_camera import http_camera, quiet_scenes

DEADLINE = 60.0  # s
NOWHERE = '[[camera.zone]]\nname = "a corner"\npolygon = [[0, 0], [0.01, 0], [0, 0.01]]\n'


class Box:
    """A real `edge run` before a camera with people, and what it says of itself."""

    def __init__(self, folder: Path, bundle: Path, address: str) -> None:
        self.config, self.log, self.address = folder / "edge.toml", folder / "log", address
        self._bundle = bundle
        self.write()
        words = [sys.executable, *starter("edge.cli"), "run", "--config", str(self.config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)

    def write(self, after_camera: str = "", rest: str = "", port: int = 1) -> None:
        self.config.write_text(
            f'device = "box"\nbundle = "{self._bundle}"\n[[camera]]\nname = "people"\n'
            f'source = "{self.address}/people"\n{after_camera}\n{rest}\n'
            f'[publish]\naddress = "tcp://127.0.0.1:{port}"\nlinger_ms = 0\n[health]\naddress = "127.0.0.1:0"\n'
        )

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def wait(self, what: str, met: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not met():
            assert time.monotonic() < end, f"{what}: not within {DEADLINE} s\n{self.log.read_text()}"
            assert self.process.poll() is None, f"{what}: it ended\n{self.log.read_text()}"
            time.sleep(0.05)

    def said(self, text: str, times: int = 1) -> bool:
        return self.log.read_text().count(text) >= times

    def cameras(self) -> dict[str, Any]:
        """By name, as /status has them; none before there is any."""
        if (found := re.search(r"health at (http://\S+)", self.log.read_text())) is None:
            return {}
        with urllib.request.urlopen(f"{found[1]}/status", timeout=DEADLINE) as answer:
            return {camera["name"]: camera for camera in json.load(answer)["cameras"]}

    def described(self) -> int:
        camera = self.cameras().get("people")
        return int(camera["described"]) if camera else 0

    def goes_on(self) -> None:
        now = self.described()
        self.wait("frames described", lambda: self.described() >= now + 3)

    def people(self) -> int:
        return int(self.cameras()["people"]["people"])


@pytest.fixture
def box(mini: Path, tmp_path: Path) -> Iterator[Box]:
    pictures = quiet_scenes(tmp_path / "pictures")
    shutil.copy(PICTURE, pictures / "people.jpg")
    with http_camera(pictures) as address:
        box = Box(tmp_path, mini, address)
        try:
            box.wait("people described", lambda: box.described() and box.people())
            yield box
        finally:
            box.process.kill()
            box.process.wait()


def test_a_running_box_takes_what_may_change_and_keeps_the_rest(box: Box) -> None:
    box.write(NOWHERE)
    box.reload()
    box.wait("the zone", lambda: box.said("is in force: 1 camera(s)"))
    box.goes_on()
    before = box.people()
    box.goes_on()
    assert box.people() == before, "whoever is outside is nobody"

    box.write(rest=f'[[camera]]\nname = "dark"\nsource = "{box.address}/dark"\n')
    box.reload()
    box.wait("the other camera", lambda: box.said("is in force: 2 camera(s)"))
    box.wait("its frames", lambda: box.cameras()["dark"]["described"])
    box.wait("people again", lambda: box.people() > before)

    box.config.write_text("device = 1\n")
    box.reload()
    box.wait("a file that is wrong", lambda: box.said("the configuration in force stays"))
    box.write(port=2)
    box.reload()
    box.wait("a key of the start", lambda: box.said("cannot change while the box runs: publish.address"))
    box.goes_on()
    assert set(box.cameras()) == {"people", "dark"}, "nothing of either was taken"

    box.write()
    box.reload()
    box.wait("back to one", lambda: set(box.cameras()) == {"people"})
    box.process.send_signal(signal.SIGTERM)
    assert box.process.wait(DEADLINE) == 0, box.log.read_text()
