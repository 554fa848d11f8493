"""The package, from install to purge, in a Debian without a network; and its wheels on other Pythons."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from appliance.flash import RELEASE
from appliance.image import EXTRA, PAYLOAD, wheel_sets
from appliance.wheels import TARGETS
from edge.errors import ConfigError
from tests.flow.conftest import ROOT
from tests.system.conftest import release_of
from tests.system.roots import Root

CONFIG = "etc/lookout/edge.toml"
HOME = "opt/lookout"
# as the unit runs it
AS_LOOKOUT = ("setpriv", "--reuid=lookout", "--regid=lookout", "--init-groups")
RUN = "edge run --config /etc/lookout/edge.toml"
COLLECT = f"""
collector run --bind ipc:///var/lib/lookout/collector --store /var/lib/lookout/store.db & collector=$!
{RUN}
kill -TERM $collector; wait $collector
"""
# what dpkg keeps of every package that it ever had, and copies of the files that useradd changes
DPKG = re.compile(r"var/lib/dpkg/|var/log/(dpkg|alternatives)\.log|etc/(passwd|group|shadow|gshadow)-|tmp/|proc/|run/")


@pytest.fixture(scope="session")
def older(deb: Path, shared: Path) -> Path:
    """The same package under an older version, with another release and another configuration."""
    tree, package = shared / "older", shared / "older.deb"
    if not package.exists():
        subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
        for file, change in (
            (tree / "DEBIAN/control", ("Version: ", "Version: 0.1~")),
            (tree / PAYLOAD / "release", ("", "0.1-")),
            (tree / CONFIG, ("[spool]", "# as it was\n[spool]")),
        ):
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(*change, 1), encoding="utf-8")
        subprocess.run(["dpkg-deb", "-Znone", "--build", tree, package], check=True, capture_output=True)
        shutil.rmtree(tree)
    return package


def snapshot(root: Root) -> dict[str, str]:
    """Every path of a root but dpkg's own, and what is in /etc."""
    found = {}
    for path in root.path.rglob("*"):
        name = str(path.relative_to(root.path))
        if not DPKG.match(name):
            text = path.read_bytes().hex() if name.startswith("etc/") and path.is_file() else ""
            found[name] = f"{path.lstat().st_mode:o} {text}"
    return found


def install(root: Root, deb: Path, *, code: int | None = 0) -> str:
    """As `make flash` does, and apt where nobody is there to be asked."""
    shutil.copyfile(deb, root.path / "tmp/lookout.deb")
    return root.run("dpkg", "--install", "--force-confdef", "--force-confold", "/tmp/lookout.deb", code=code)


def current(root: Root) -> str:
    return (root.path / HOME / "current").readlink().name


def enabled(root: Root) -> bool:
    return (root.path / "etc/systemd/system/multi-user.target.wants/lookout.service").is_symlink()


def configure(root: Root, video: Path) -> str:
    """What an operator changes: the camera, and the collector. -> the file's text"""
    shutil.copyfile(video, root.path / "var/lib/lookout/pan.avi")
    file = root.path / CONFIG
    text = re.sub(r'source = "[^"]+"', 'source = "/var/lib/lookout/pan.avi"', file.read_text(encoding="utf-8"))
    text = text.replace("tcp://127.0.0.1:5577", "ipc:///var/lib/lookout/collector")
    file.write_text(text + '\n[health]\naddress = ""\n', encoding="utf-8")
    return file.read_text(encoding="utf-8")


def runs(root: Root) -> list[int]:
    """How many events of each run lie in the collector's store, none of them missing."""
    with closing(sqlite3.connect(f"file:{root.path}/var/lib/lookout/store.db?mode=ro", uri=True)) as store:
        rows = store.execute(
            "SELECT count(*), max(seq) - min(seq) + 1 FROM events GROUP BY epoch ORDER BY min(rowid)"
        ).fetchall()
    assert all(count == span for count, span in rows), rows
    return [count for count, _ in rows]


def test_a_box_from_its_first_install_to_its_purge(box: Root, deb: Path, older: Path, video: Path) -> None:
    before = snapshot(box)

    said = install(box, older)
    first = release_of(older)
    assert current(box) == first
    assert f"{first} serves" in said
    assert box.run("edge", "selftest", "--bundle", "/opt/lookout/current/bundle").count("ONNX Runtime") >= 2
    assert enabled(box)
    venv = box.path / HOME / "releases" / first / "venv"
    assert sum(512 * file.lstat().st_blocks for file in venv.rglob("*")) < RELEASE * 1e6, "what a flash asks for"
    modes = box.run("stat", "--format=%A %U %G %n", "/etc/lookout", f"/{CONFIG}", "/var/lib/lookout").splitlines()
    assert modes == [
        "drwxr-x--- root lookout /etc/lookout",
        f"-rw-r----- root lookout /{CONFIG}",
        "drwxr-x--- lookout lookout /var/lib/lookout",
    ]

    edited = configure(box, video)
    said = box.run(*AS_LOOKOUT, *RUN.split())  # and no collector: what was seen waits
    assert "20 frames" in said

    said = install(box, deb)  # an edited configuration meets a new one, and stays
    second = release_of(deb)
    assert current(box) == second != first
    assert (box.path / CONFIG).read_text(encoding="utf-8") == edited
    box.run(*AS_LOOKOUT, "sh", "-c", COLLECT)
    here = runs(box)
    assert here[0] >= 20
    assert here == [here[0]] * 2, "one run from before the upgrade, one from after it"

    box.run("edge", "rollback")
    assert current(box) == first
    box.run(*AS_LOOKOUT, "sh", "-c", COLLECT)
    assert runs(box) == [here[0]] * 3
    box.run("edge", "rollback")
    assert current(box) == second

    box.run("dpkg", "--remove", "lookout")
    assert not (box.path / HOME).exists()
    assert not (box.path / "usr/bin/edge").is_symlink()
    assert not enabled(box)
    install(box, deb)
    assert current(box) == second
    assert enabled(box)
    assert (box.path / CONFIG).read_text(encoding="utf-8") == edited
    assert runs(box) == [here[0]] * 3

    box.run("dpkg", "--purge", "lookout")
    after = snapshot(box)
    assert {name: after.get(name) for name in {*before, *after} if before.get(name) != after.get(name)} == {}


def test_what_stopped_halfway_is_finished_and_what_is_whole_is_left(box: Root, deb: Path) -> None:
    releases = box.path / HOME / "releases"
    releases.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", releases], check=True)
    try:
        assert "No space left on device" in install(box, deb, code=1)
        assert list(releases.iterdir()) == [], "the spool needs the room"
    finally:
        subprocess.run(["umount", releases], check=True)

    (releases / "0.1-cut-off/venv").mkdir(parents=True)  # by a power cut, and never installed again
    (box.path / CONFIG).write_text("device = 1\n", encoding="utf-8")
    said = install(box, deb, code=1)
    assert f"/{CONFIG}: device: " in said
    assert not (box.path / HOME / "current").is_symlink(), "what fails does not serve"
    assert [folder.name for folder in releases.iterdir()] == [release_of(deb)]

    shutil.copyfile(ROOT / "appliance/edge.toml", box.path / CONFIG)
    box.run("dpkg", "--configure", "lookout")
    assert current(box) == release_of(deb)
    release = releases / current(box)
    made = (release / "complete").stat().st_mtime_ns
    box.run("systemctl", "disable", "lookout.service")
    once = snapshot(box)

    install(box, deb)
    assert (release / "complete").stat().st_mtime_ns == made
    assert snapshot(box) == once

    (release / "complete").unlink()
    shutil.rmtree(release / "venv/lib")
    (release / "rest").touch()
    install(box, deb)
    assert snapshot(box) == once


def test_a_python_without_wheels_is_told_before_anything_is_unpacked(box: Root, deb: Path) -> None:
    python = box.path / "usr/bin/python3"
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.13\n", encoding="utf-8")
    python.chmod(0o755)
    said = install(box, deb, code=1)
    assert "lookout: this package has wheels for Python 3.10 3.11 3.12; /usr/bin/python3 is 3.13\n" in said
    assert not (box.path / "usr/lib/lookout").exists()
    assert not (box.path / HOME).exists()


@pytest.fixture(scope="session")
def payload(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("payload")
    subprocess.run(["dpkg-deb", "--extract", deb, folder], check=True)
    yield folder / PAYLOAD
    shutil.rmtree(folder)


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine."""
    names = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"), f"/usr/bin/python{version}"]
    return next((str(name) for name in names if Path(name).exists()), None)


@pytest.mark.parametrize("version", [target.python for target in TARGETS if target.arch == "amd64"])
def test_wheels_install_and_load(version: str, payload: Path, tmp_path: Path) -> None:
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} here")
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (pip,) = payload.glob("pip-*.whl")
    words = ["--isolated", "install", "--no-index", "--no-deps", "--no-compile", "-r", f"../python{version}.txt"]
    inside = tmp_path / "venv/bin/python"
    subprocess.run([inside, pip / "pip", *words], cwd=payload / "wheels", check=True, capture_output=True)
    check = "import collector.cli, edge.cli, export.cli, cv2, lap, onnx, onnxruntime, zmq"
    subprocess.run([inside, "-c", check], check=True, cwd=tmp_path)
    subprocess.run([inside, pip / "pip", "check"], check=True, cwd=tmp_path)


def test_every_dependency_has_wheels_for_jetpack(payload: Path, tmp_path: Path) -> None:
    """What `make image ARCH=arm64` begins with."""
    (project,) = (payload / "wheels").glob("lookout-*.whl")
    jetpack = [target for target in TARGETS if target.arch == "arm64"]
    try:
        sets = wheel_sets(jetpack, project, EXTRA, tmp_path, Console(stderr=True))
    except ConfigError as error:
        if "Retrying" in str(error):
            pytest.skip("the package index is not reached")
        raise
    assert [one.target.python for one in sets] == ["3.10", "3.12"]
    for one in sets:
        assert {"numpy", "onnxruntime", "opencv_python_headless", "onnx"} <= {
            wheel.name.split("-")[0] for wheel in one.wheels
        }
