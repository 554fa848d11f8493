"""Which boxes are flashed with which package, and what a copy over ssh says; the rest is among the system tests."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from appliance.cli import main
from appliance.flash import boxes_of, flash_all, heard
from appliance.packages import building, field_of, given
from appliance.ssh import Ssh
from edge.errors import BackendError, BundleError, ConfigError, LookoutError


def test_boxes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "boxes"
    file.write_text("\n# the yard\nuser@a\n  ssh://user@b:2222  # in the shed\n#user@c\nd")
    assert boxes_of(file) == ["user@a", "ssh://user@b:2222", "d"]


@pytest.mark.parametrize(("text", "said"), [("", "no box"), ("# none\n", "no box"), ("a\nb\na # again", "a more than")])
def test_a_file_of_no_use_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "boxes").write_text(text)
    with pytest.raises(ConfigError, match=said):
        boxes_of(tmp_path / "boxes")


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """Packages with nothing in them, by name."""
    made = {}
    for name, arch in (("arm", "arm64"), ("pc", "amd64"), ("pc2", "amd64")):
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: lookout\nVersion: 1\nArchitecture: {arch}\nInstalled-Size: 12\n"
            "Maintainer: nobody <nobody@localhost>\nDescription: nothing\n"
        )
        made[name] = tmp_path / f"{name}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, made[name]], check=True, capture_output=True)
    return made


def test_each_box_gets_the_package_of_its_architecture(packages: dict[str, Path]) -> None:
    image = given([packages["arm"], packages["pc"]])
    assert (image("arm64"), image("amd64")) == (packages["arm"], packages["pc"])
    with pytest.raises(ConfigError, match="no package for this box: expected armhf, got arm64 and amd64"):
        image("armhf")
    with pytest.raises(ConfigError, match="are both for amd64"):
        given([packages["pc"], packages["pc2"]])
    assert field_of(packages["pc"], "Installed-Size") == "12"


@pytest.mark.parametrize("content", [None, b"", b"no package"])
def test_what_is_no_package_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.deb"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="is no package for a box"):
        given([file])


def test_a_build_that_fails_is_not_tried_for_each_box(tmp_path: Path) -> None:
    image = building(tmp_path / "no-bundle", tmp_path / "out", Console())
    errors = []
    for _ in range(2):
        with pytest.raises(BundleError) as caught:
            image("amd64")
        errors.append(caught.value)
    assert errors[0] is errors[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bundle", "b"], "no box is named"),
        (["--box", "a"], "either --bundle or --image"),
        (["--box", "a", "--bundle", "b", "--image", "c"], "either --bundle or --image"),
    ],
)
def test_half_a_command_line_is_refused(words: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["flash", *words])
    assert done.exit_code == 78
    assert said in done.output


# --- ssh --------------------------------------------------------------------------------------------------------------

# what stands in for ssh: a master that makes its socket's file and stays; a command is run here
SSH = r"""#!/bin/bash
while [ "$1" != -- ]; do
    case "$1" in ControlPath=*) socket=${1#ControlPath=} ;; -M) master=yes ;; esac
    shift
done
if [ "$2" = gone ]; then echo "ssh: connect to host gone: No route to host" >&2; exit 255; fi
if [ "$master" ]; then touch "$socket"; exec sleep 60; fi
exec sh -c "$3"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A destination that is this machine."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return "here"


def test_questions_streams_and_copies(here: str, tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4096)
    with Ssh(here) as ssh:
        assert ssh.ask("echo 'a  b'; echo \"$0\"") == "a  b\nsh\n"
        assert ssh.stream("echo out; echo err >&2; exit 3", said.append) == 3
        ssh.copy(tmp_path / "file", f"{tmp_path}/a 'copy'", said.append)
        with pytest.raises(BackendError, match=r"here: it is so$"):
            ssh.ask("echo no; echo it is so >&2; exit 1")
    assert said[:2] == ["  out", "  err"]
    assert said[-1] == "  copied 1 of 1 MB, 100 %"
    assert (tmp_path / "a 'copy'").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("   3.2 s  error: no release 'x'", ": no release 'x'"),
        ("error: no GPU", ": no GPU"),
        (
            "dpkg: error: dpkg frontend lock was locked by another process",
            ": dpkg frontend lock was locked by another process",
        ),
        ("ERROR: [Errno 28] No space left on device", ": [Errno 28] No space left on device"),
        ("dpkg: error processing package lookout (--install):", ""),
        ("0 errors: good", ""),
    ],
)
def test_the_first_error_is_the_reason(here: str, line: str, why: str) -> None:
    said = list[str]()
    with Ssh(here) as ssh:
        command = f"echo begin; echo {shlex.quote(line)}; {'echo error: 2;' if why else ''} exit 3"
        assert heard(ssh, command, said.append) == (3, why)
    assert said[:2] == ["  begin", f"  {line}"]


def test_an_empty_file_is_copied(here: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Ssh(here) as ssh:
        ssh.copy(tmp_path / "file", str(tmp_path / "copy"), print)
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_disk_that_gets_full_is_said(here: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with (
        Ssh(here) as ssh,
        pytest.raises(BackendError, match=r"/dev/full was not written: got .*No space left on device"),
    ):
        ssh.copy(tmp_path / "file", "/dev/full", print)


def test_a_box_that_cannot_be_reached(here: str) -> None:
    with (
        pytest.raises(BackendError, match="gone cannot be reached: got ssh: connect to host gone: No route"),
        Ssh("gone"),
    ):
        pass
    (outcome,) = flash_all(["gone"], given([]), print)
    assert (outcome.before, outcome.after, outcome.good) == ("?", "?", False)


@pytest.mark.parametrize("destination", ["", " ", "-oProxyCommand=sh"])
def test_an_option_is_no_destination(destination: str) -> None:
    with pytest.raises(LookoutError, match="is no ssh destination"):
        Ssh(destination)
