"""A file out of a Debian package; the stand-ins for apt-get are scripts (test_samples.py has more of them)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edge.errors import CaptureError
from export.debian import file_from_package

PROGRAM = b"\x7fELF a program"
MEMBER = "usr/sbin/tool"


class Apt:
    """An apt-get that brings one package, made by the real dpkg-deb, and logs what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log, self.deb = folder / "bin", folder / "log", folder / "tool_1_all.deb"
        self.bin.mkdir()
        self.script("dpkg-deb", f'exec {shutil.which("dpkg-deb", path=os.defpath)} "$@"')
        self.script("apt-get", f'echo "$@" >> {self.log}\ncp {self.deb} .')

    def script(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\nPATH={os.defpath}\n{body}\n")
        (self.bin / name).chmod(0o755)

    def build(self, folder: Path, *options: str) -> None:
        (folder / "DEBIAN").mkdir(parents=True)
        (folder / "DEBIAN/control").write_text(
            "Package: tool\nVersion: 1\nArchitecture: all\nMaintainer: A <a@localhost>\nDescription: a test\n"
        )
        (folder / MEMBER).parent.mkdir(parents=True)
        (folder / MEMBER).write_bytes(PROGRAM)
        words = [str(self.bin / "dpkg-deb"), *options, "--root-owner-group", "--build", str(folder), str(self.deb)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"this dpkg-deb does not write {options}: {made.stderr.strip()}")


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not on this machine")
    apt = Apt(tmp_path)
    monkeypatch.setenv("PATH", str(apt.bin))
    return apt


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_the_file_is_there_while_it_is_used_and_can_be_kept(apt: Apt, tmp_path: Path, compression: str) -> None:
    apt.build(tmp_path / "tree", f"-Z{compression}")
    folder = tmp_path / "made/cache"
    with file_from_package("tool", MEMBER, folder=folder, what="the tool", size="1 kB") as path:
        assert path.read_bytes() == PROGRAM
        path.replace(folder / "kept")
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert apt.log.read_text() == "-o APT::Sandbox::User=root download tool\n"


def test_it_says_what_it_downloads(apt: Apt, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    apt.build(tmp_path / "tree")
    with file_from_package("tool", MEMBER, folder=tmp_path, what="the tool", size="1 kB"):
        pass
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ("the tool: downloading Debian's package tool (1 kB) with apt-get\nthe tool: unpacking tool\n")


def test_without_apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(CaptureError, match="no apt-get on this machine"),
        file_from_package("tool", MEMBER, folder=tmp_path / "cache", what="the tool", size="1 kB"),
    ):
        pass
    assert not (tmp_path / "cache").exists()


def test_a_package_without_the_file_leaves_nothing(apt: Apt, tmp_path: Path) -> None:
    apt.build(tmp_path / "tree")
    with (
        pytest.raises(CaptureError, match=r"no usr/sbin/other in tool_1_all\.deb"),
        file_from_package("tool", "usr/sbin/other", folder=tmp_path / "cache", what="the tool", size="1 kB"),
    ):
        pass
    assert not list((tmp_path / "cache").iterdir())


def test_what_apt_get_says_is_passed_on(apt: Apt, tmp_path: Path) -> None:
    apt.script("apt-get", "echo 'W: a warning' >&2; echo 'E: no such package tool' >&2; exit 100")
    with (
        pytest.raises(CaptureError, match="E: no such package tool"),
        file_from_package("tool", MEMBER, folder=tmp_path / "cache", what="the tool", size="1 kB"),
    ):
        pass
