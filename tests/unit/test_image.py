"""The package's tree: what lies where with which modes, the name of its release, and two builds that are the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from appliance.image import PAYLOAD, pack, payload_id, source_date, write_tree
from appliance.wheels import TARGETS, WheelSet
from edge.config import read_edge_config

DAY = 1_700_000_000  # seconds since 1970
SHARED = "one-1.0-py3-none-any.whl"


@pytest.fixture
def sets(tmp_path: Path) -> list[WheelSet]:
    """Two Pythons of arm64, which share a wheel."""
    found = []
    for target in TARGETS[:2]:
        folder = tmp_path / target.python
        folder.mkdir()
        own = f"two-1.0-cp{target.python.replace('.', '')}-none-manylinux2014_aarch64.whl"
        for name in (SHARED, own):
            (folder / name).write_text(name, encoding="utf-8")
        found.append(WheelSet(target, (folder / SHARED, folder / own)))
    return found


@pytest.fixture
def pip(tmp_path: Path) -> Path:
    (tmp_path / "pip-1.0-py3-none-any.whl").write_text("pip", encoding="utf-8")
    return tmp_path / "pip-1.0-py3-none-any.whl"


def test_a_wheel_lies_there_once_and_each_python_has_its_list(
    tmp_path: Path, sets: list[WheelSet], bundle_folder: Path, pip: Path
) -> None:
    write_tree(tree := tmp_path / "tree", "arm64", "1.2.3", sets, bundle_folder, pip)
    payload = tree / PAYLOAD
    assert {wheel.name for wheel in (payload / "wheels").iterdir()} == {
        wheel.name for one in sets for wheel in one.wheels
    }
    for one in sets:
        listed = (payload / f"python{one.target.python}.txt").read_text(encoding="utf-8").split()
        assert listed == [f"./{wheel.name}" for wheel in one.wheels]
    assert (payload / "release").read_text(encoding="utf-8").startswith("1.2.3-")
    assert {file.name for file in (payload / "bundle").iterdir()} == {file.name for file in bundle_folder.iterdir()}
    control = (tree / "DEBIAN/control").read_text(encoding="utf-8")
    assert "\nVersion: 1.2.3\nArchitecture: arm64\n" in control
    assert not [
        file.name
        for file in (tree / "DEBIAN").iterdir()
        if "@" in file.read_text(encoding="utf-8").replace("lookout@localhost", "")
    ]


def test_a_release_is_named_after_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1", encoding="utf-8")
    names = {payload_id("1.0", tmp_path), payload_id("1.1", tmp_path)}
    (tmp_path / "b").write_text("", encoding="utf-8")
    names.add(payload_id("1.0", tmp_path))
    (tmp_path / "b").rename(tmp_path / "c")
    names.add(payload_id("1.0", tmp_path))
    (tmp_path / "a").write_text("2", encoding="utf-8")
    names.add(payload_id("1.0", tmp_path))
    assert len(names) == 5


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here")
def test_two_builds_are_the_same_file(tmp_path: Path, sets: list[WheelSet], bundle_folder: Path, pip: Path) -> None:
    packages = []
    for number in (1, 2):
        write_tree(tree := tmp_path / f"tree{number}", "arm64", "1.2.3", sets, bundle_folder, pip)
        (tree / "etc/lookout/edge.toml").chmod(0o600 + number * 0o11)  # whatever umask there is
        pack(tree, tmp_path / f"{number}.deb", DAY, Console(quiet=True))
        packages.append((tmp_path / f"{number}.deb").read_bytes())
    assert packages[0] == packages[1]
    said = subprocess.run(["dpkg-deb", "--contents", tmp_path / "1.deb"], capture_output=True, text=True, check=True)
    modes = {line.split()[5]: (line.split()[0], line.split()[1]) for line in said.stdout.splitlines()}
    assert {owner for _, owner in modes.values()} == {"root/root"}
    assert modes["./etc/lookout/edge.toml"][0] == "-rw-r-----"
    assert modes["./lib/systemd/system/lookout.service"][0] == "-rw-r--r--"


def test_the_configuration_of_a_new_box_is_one(root: Path) -> None:
    config = read_edge_config(root / "appliance/edge.toml")
    assert str(config.bundle) == "/opt/lookout/current/bundle"
    assert str(config.spool.path) == "/var/lib/lookout/spool.db"


@pytest.mark.parametrize("script", ["preinst", "postinst", "prerm", "postrm"])
def test_maintainer_scripts_are_sh(root: Path, script: str) -> None:
    subprocess.run(["sh", "-n", root / "appliance/debian" / script], check=True)


def test_the_moment_of_a_build_is_told_or_the_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(DAY))
    assert source_date() == DAY
