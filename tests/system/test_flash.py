"""What `make flash` calls, against a real sshd and a real systemd: what serves in the end, and that nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import pytest

from appliance.image import PAYLOAD, payload_id
from collector.store import Store
from edge.bundle import GOLDEN, MANIFEST, Manifest, sha256_of
from edge.golden import Golden
from tests.flow.conftest import PICTURE, starter
from tests.system.conftest import release_of
from tests.system.machine import GUEST, Machine, missing

ROOT = Path(__file__).parents[2]
COLLECTOR = 5577
SOON = 20.0  # s
CONFIG = """
device = "box-1"
bundle = "/opt/lookout/current/bundle"
[[camera]]
name = "entrance"
source = "http://127.0.0.1:{camera}/"
[spool]
path = "/var/lib/lookout/spool.db"
[publish]
address = "tcp://127.0.0.1:{collector}"
[runtime]
threads = 1
[load]
max_fps = 5.0
"""


@dataclass(frozen=True)
class Packages:
    """Three releases: two good ones, and one whose hashes are right and whose self-test is not."""

    first: Path
    second: Path
    wrong: Path
    bundle: Path  # of the wrong one


def repacked(tree: Path, version: str, out: Path) -> Path:
    """The package again, with another version and what was changed in its payload."""
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", f"Version: {version}", control.read_text(), flags=re.MULTILINE))
    payload = tree / PAYLOAD
    (payload / "release").unlink()
    (payload / "release").write_text(payload_id(version, payload) + "\n")
    deb = out / f"lookout_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, deb], check=True, capture_output=True)
    return deb


@pytest.fixture(scope="module")
def packages(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    payload = tree / PAYLOAD
    wanted = {Path(line).name for line in (payload / "python3.11.txt").read_text().split()}
    for wheel in (payload / "wheels").iterdir():
        if wheel.name not in wanted:
            wheel.unlink()
    first, second = (repacked(tree, version, folder) for version in ("1.0.0", "1.1.0"))
    golden, manifest = payload / "bundle" / GOLDEN, payload / "bundle" / MANIFEST
    right = Golden.read(golden)
    replace(right, embeddings=-right.embeddings).write(golden)
    facts = Manifest.read(manifest)
    files = {**facts.files, GOLDEN: sha256_of(golden)}
    manifest.write_text(facts.model_copy(update={"files": files}).to_json())
    wrong = repacked(tree, "1.2.0", folder)
    bundle = (payload / "bundle").rename(folder / "bundle")
    shutil.rmtree(tree)
    yield Packages(first, second, wrong, bundle)
    shutil.rmtree(folder)


class Camera:
    """An MJPEG camera with people before it, in the network of a machine."""

    def __init__(self, machine: Machine) -> None:
        over = self._over = threading.Event()
        jpeg = cv2.imencode(".jpg", cv2.imread(str(PICTURE)))[1].tobytes()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
                try:
                    while not over.wait(0.2):
                        self.wfile.write(head + jpeg + b"\r\n")
                except OSError:
                    pass  # the box left

            def log_message(self, *_: object) -> None:
                pass

        with machine.network():
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Box:
    """The machine, and what is asked of it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def flash(self, *words: object, code: int | None = 0) -> str:
        """`python -m appliance flash …`, and what it said."""
        done = self.start(*words)
        said, _ = done.communicate(timeout=240)
        print(said)
        assert code is None or done.returncode == code, said
        assert "Traceback" not in said
        return said

    def start(self, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "appliance", "flash", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PATH": self.machine.path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def activate(self, release: str, *, code: int | None = 0, before: str = "") -> str:
        edge = "/opt/lookout/current/venv/bin/edge"
        said = self.machine.run(f"{before} {edge} activate {release} 2>&1", code=code)
        print(said)
        return said

    @property
    def current(self) -> str:
        return self.machine.run("basename $(readlink /opt/lookout/current)").strip()

    @property
    def previous(self) -> str:
        return self.machine.run("basename $(readlink /opt/lookout/previous || echo none)").strip()

    @property
    def active(self) -> bool:
        return self.machine.run("systemctl is-active lookout", code=None).strip() == "active"

    def status(self) -> Any:
        with self.machine.network(), urllib.request.urlopen("http://127.0.0.1:9477/status", timeout=5) as answer:
            return json.load(answer)

    def waiting(self) -> int:
        """Events in the spool; -1 while nobody says."""
        try:
            outlet = self.status()["outlet"]
        except OSError:
            return -1
        return int(outlet["spool"]["waiting"]) if outlet else -1

    def sees(self) -> int:
        """Wait until it puts events into its spool -> how many there are."""
        before = max(self.waiting(), 0)
        self.machine.wait("events", lambda: self.waiting() > before, SOON)
        return self.waiting()

    def derived(self, name: str, run: str) -> str:
        """A release on the box that is the current one but for what `edge run` does."""
        here = f"/opt/lookout/releases/{name}"
        self.machine.run(f"cp -al /opt/lookout/releases/{self.current} {here}; rm {here}/venv/bin/edge")
        edge = f"/opt/lookout/releases/{self.current}/venv/bin"
        script = self.machine.root / f"opt/lookout/releases/{name}/venv/bin/edge"
        script.write_text(f'#!/bin/sh\n[ "$1" = run ] || exec {edge}/edge "$@"\nexec {edge}/python -c \'{run}\'\n')
        script.chmod(0o755)
        return name


@pytest.fixture(scope="module")
def box(debian_root: Path, packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A machine with the first release, which watches a camera; no collector is there."""
    if reason := missing():
        pytest.skip(reason)
    with Machine(debian_root, tmp_path_factory.mktemp("machine")) as machine, Camera(machine) as camera:
        box = Box(machine)
        config = machine.root / "etc/lookout/edge.toml"
        config.parent.mkdir()
        config.write_text(CONFIG.format(camera=camera.port, collector=COLLECTOR))
        said = box.flash("--box", machine.destination(), "--image", packages.first)
        release = release_of(packages.first)
        assert "nothing serves" in said
        assert re.search(r"copied \d+ of \d+ MB, 100 %", said)
        assert f"activating {release}" in said
        assert re.search(
            r"image.onnx on ONNX Runtime .*: \d+ embeddings, smallest cosine", said
        )  # its output, as it comes
        assert said.rstrip().endswith(f"done: {release} serves")
        assert box.current == release
        assert box.active
        assert config.read_text() == CONFIG.format(camera=camera.port, collector=COLLECTOR)  # the owner's stays
        box.sees()
        yield box


def test_several_boxes_and_a_connection_that_goes(box: Box, packages: Packages, tmp_path: Path) -> None:
    """One box gets its second release though its connection is cut; one cannot be reached; one has no sudo."""
    good, guest = box.machine.destination(), box.machine.destination(GUEST)
    first, second = box.current, release_of(packages.second)
    before = box.sees()
    (tmp_path / "boxes").write_text(f"# all of them\n{good}\n\nengineer@gone # since Monday\n{guest}\n")
    said = []
    with box.start("--boxes", tmp_path / "boxes", "--image", packages.second) as flash:
        assert flash.stdout is not None
        for line in flash.stdout:
            said.append(line)
            if "self-test …" in line:
                box.machine.run("pkill -KILL -u engineer sshd")
    assert flash.returncode == 69
    table = "".join(said)
    print(table)
    assert "the connection is gone; the box goes on by itself" in table
    rows = {cells[0].strip(): [cell.strip() for cell in cells] for cells in rows_of(said)}
    assert rows[good][1:3] == [first, second]
    assert rows[good][4] == f"good: {second} serves"
    assert rows["engineer@gone"][1:3] == ["?", "?"]
    assert "cannot be reached" in rows["engineer@gone"][4]
    assert rows[guest][1:3] == [first, first]
    assert "sudo -n refuses this user" in " ".join(rows[guest])
    assert said[-1] == "error: 2 of 3 boxes failed\n"
    assert "…" not in "".join(rows[good][:3])
    assert (box.current, box.previous, box.active) == (second, first, True)
    assert box.sees() > before


def rows_of(lines: Sequence[str]) -> Iterator[list[str]]:
    """The cells of the table; a row that goes on below is put together."""
    row: list[str] = []
    for line in lines:
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip().strip("│").split("│")]
            if cells[0]:
                if row:
                    yield row
                row = cells
            else:
                row = [f"{above} {below}".strip() for above, below in zip(row, cells, strict=True)]
    if row:
        yield row


def test_a_release_that_fails_its_self_test_changes_nothing(box: Box, packages: Packages) -> None:
    current, previous, before = box.current, box.previous, box.sees()
    started = box.machine.run("systemctl show lookout --property=MainPID")
    # its programs are those that are there: the package, which finds a whole release, need not make them again
    wrong = release_of(packages.wrong)
    folder = f"/opt/lookout/releases/{wrong}"
    box.machine.run(f"cp -al /opt/lookout/releases/{current} {folder}; rm -r {folder}/bundle")
    shutil.copytree(packages.bundle, box.machine.root / folder.lstrip("/") / "bundle")
    said = box.flash("--box", box.machine.destination(), "--image", packages.wrong, code=69)
    assert "embeddings differ from" in said
    assert f"self-test failed, exit code 72; {current} serves as before" in said
    assert re.search(rf"{wrong} was not activated: .*embeddings differ from .*; {re.escape(current)} serves", said)
    assert (box.current, box.previous) == (current, previous)
    assert box.machine.run("systemctl show lookout --property=MainPID") == started  # it saw all the time
    assert box.sees() > before


DIES = 'raise SystemExit("no such camera")'
FALLS = "from edge import notify; import time; notify.ready(); time.sleep(1); raise SystemExit(1)"


@pytest.mark.parametrize(("run", "why"), [(DIES, "did not get ready"), (FALLS, "did not stay ready")])
def test_a_release_that_does_not_stay_ready_is_taken_back(
    box: Box, run: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    current, previous, before = box.current, box.previous, box.sees()
    name = box.derived(f"2.0.0-{len(run)}", run)
    said = box.activate(name, code=69)
    assert why in said
    found = re.search(rf"{re.escape(current)} serves again, after (\d+\.\d) s", said)
    assert found
    with capsys.disabled():
        print(f"\nthe old release serves again after {found[1]} s ({why})")
    assert float(found[1]) < SOON
    assert (box.current, box.previous, box.active) == (current, previous, True)
    if run == DIES:
        assert "no such camera" in said  # the service's own words
    assert box.sees() > before


def test_edge_rollback_goes_back_and_forth(box: Box) -> None:
    current, previous = box.current, box.previous
    said = box.machine.run("edge rollback 2>&1")
    assert said.splitlines()[-1].endswith(f"{previous} serves; edge rollback returns to {current}")
    assert (box.current, box.previous, box.active) == (previous, current, True)


def test_a_power_cut_on_trial_is_no_new_release(box: Box) -> None:
    current, previous, before = box.current, box.previous, box.sees()
    box.machine.run(f"cp -al /opt/lookout/releases/{current} /opt/lookout/releases/2.1.0-abc; sync")
    box.activate("2.1.0-abc", code=-9, before="LOOKOUT_FAILPOINT=release.switched exec")
    assert box.current == "2.1.0-abc"
    box.machine.cut()
    box.machine.boot()
    assert (box.current, box.previous) == (current, previous)
    box.machine.wait("the box", lambda: box.active, SOON)
    assert box.sees() > before  # of what was there before, too


def test_a_full_disk_is_told_before_anything_is_sent(box: Box, packages: Packages) -> None:
    current = box.current
    box.machine.run("mount -t tmpfs -o size=16m tmpfs /var/tmp")
    try:
        said = box.flash("--box", box.machine.destination(), "--image", packages.second, code=69)
    finally:
        box.machine.run("umount /var/tmp")
    assert re.search(r"the disk at /var/tmp is too full: expected \d+ MB free, got 1\d MB", said)
    assert "copying" not in said
    assert box.current == current


def test_at_last_nothing_was_lost(box: Box, tmp_path: Path) -> None:
    """All those events, through restarts, returns and a power cut, arrive without a gap."""
    assert box.waiting() > 0
    store = tmp_path / "results.db"
    words = ["run", "--bind", f"tcp://127.0.0.1:{COLLECTOR}", "--store", str(store)]
    collector = subprocess.Popen(
        box.machine.beside(sys.executable, *starter("collector.cli"), *words),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        box.machine.wait("an empty spool", lambda: 0 <= box.waiting() < 3, SOON)
    finally:
        collector.terminate()
        collector.wait()
    with Store(store) as kept:
        assert list(kept.gaps()) == []
        print(kept.stats())
