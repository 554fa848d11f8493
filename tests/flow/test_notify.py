"""What systemd hears of a real box: ready after its self-test, alive while it goes on, silence when it hangs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from edge.bundle import GOLDEN, MANIFEST, open_bundle, sha256_of
from edge.failpoints import HANGS
from edge.golden import Golden
from tests.flow.conftest import PICTURE, ROOT, starter
from tests.http_camera import http_camera, quiet_scenes

WATCHDOG = 9.0  # s
DEADLINE = 90.0  # s


class Systemd:
    """A $NOTIFY_SOCKET and what came in: (seconds, monotonic; message)."""

    def __init__(self, path: Path) -> None:
        self.path, self.heard = path, list[tuple[float, str]]()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self.heard.append((time.monotonic(), message.decode()))

    def times(self, message: str) -> list[float]:
        return [at for at, heard in list(self.heard) if heard.partition("\n")[0] == message]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()


class Box:
    """A real `edge run`, watched."""

    def __init__(self, folder: Path, bundle: Path, sources: dict[str, str], failpoint: str = "") -> None:
        folder.mkdir()
        config, self.log = folder / "edge.toml", folder / "log"
        cameras = "".join(f'[[camera]]\nname = "{name}"\nsource = "{source}"\n' for name, source in sources.items())
        rest = '[publish]\naddress = "tcp://127.0.0.1:1"\nlinger_ms = 0\n[health]\naddress = ""\n'
        config.write_text(f'device = "box"\nbundle = "{bundle}"\n{cameras}{rest}')
        self.systemd = Systemd(folder / "notify")
        env = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.systemd.path),
            "WATCHDOG_USEC": str(int(WATCHDOG * 1e6)),
            "LOOKOUT_FAILPOINT": failpoint,
        }
        env.pop("WATCHDOG_PID", None)
        words = [sys.executable, *starter("edge.cli"), "run", "--config", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)

    def wait(self, what: str, met: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not met():
            late = time.monotonic() > end or self.process.poll() is not None
            assert not late, f"{what}: {self.systemd.heard}\n{self.log.read_text()}"
            time.sleep(0.02)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.systemd.close()


@pytest.fixture(scope="module")
def boxes(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Box]]:
    """One that is well and sees nothing, and one per stage that hangs, by its name; all at once, as each takes long."""
    folder = tmp_path_factory.mktemp("boxes")
    pictures = quiet_scenes(folder / "pictures")
    shutil.copy(PICTURE, pictures / "people.jpg")
    with ExitStack() as stack:
        address = stack.enter_context(http_camera(pictures))
        quiet = {"dark": f"{address}/dark", "empty": f"{address}/empty", "away": "rtsp://127.0.0.1:1/"}
        found = {"quiet": Box(folder / "quiet", mini, quiet)}
        stack.callback(found["quiet"].close)
        for point in sorted(HANGS):
            found[point] = Box(folder / point, mini, {"gate": f"{address}/people"}, f"{point}:5:hang")
            stack.callback(found[point].close)
        yield found


@pytest.mark.parametrize("point", sorted(HANGS))
def test_a_stage_that_hangs_is_not_called_alive(boxes: dict[str, Box], point: str) -> None:
    box = boxes[point]
    box.wait("ready", lambda: box.systemd.times("READY=1"))
    said = "'gate': its thread" if point == "box.capture" else f"the loop hangs in '{point.removeprefix('box.')}'"
    box.wait("told", lambda: said in box.log.read_text())
    noticed = time.monotonic()
    box.wait("no feed for its time", lambda: time.monotonic() - box.systemd.times("WATCHDOG=1")[-1] > WATCHDOG)
    assert box.systemd.times("WATCHDOG=1")[-1] <= noticed, "and not fed again"
    assert not box.systemd.times("STOPPING=1")


def test_nothing_to_see_is_no_hang(boxes: dict[str, Box]) -> None:
    """Longer than any limit of the loop and of a camera that shows something."""
    box = boxes["quiet"]
    box.wait("ready", lambda: box.systemd.times("READY=1"))
    (ready,) = box.systemd.times("READY=1")
    box.wait("time", lambda: time.monotonic() > ready + 25)
    fed = [ready, *box.systemd.times("WATCHDOG=1"), time.monotonic()]
    assert max(after - before for before, after in pairwise(fed)) < WATCHDOG, fed
    log = box.log.read_text()
    assert "hang" not in log
    assert "sign of life" not in log
    box.process.send_signal(signal.SIGTERM)
    assert box.process.wait(DEADLINE) == 0, log
    assert [message for _, message in box.systemd.heard][-1] == "STOPPING=1"
    said = box.log.read_text()
    assert "camera dark: " in said
    assert "camera dark: 0 frames" not in said
    assert "camera empty: 0 frames" not in said
    assert "camera away: 0 frames" in said


def test_a_box_that_fails_its_self_test_never_says_that_it_is_ready(mini: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini, bundle)
    golden = Golden.read(bundle / GOLDEN)
    replace(golden, embeddings=-golden.embeddings).write(bundle / GOLDEN)
    manifest = open_bundle(mini).manifest
    files = {**manifest.files, GOLDEN: sha256_of(bundle / GOLDEN)}
    (bundle / MANIFEST).write_text(manifest.model_copy(update={"files": files}).to_json())
    box = Box(tmp_path / "box", bundle, {"pictures": str(PICTURE.parent)})
    try:
        assert box.process.wait(DEADLINE) == 72, box.log.read_text()
        assert "differ" in box.log.read_text()
    finally:
        box.close()
    assert not box.systemd.times("READY=1")
