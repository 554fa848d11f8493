"""Wheels for other Pythons and machines, from an index that is a folder: what fits, what is needed, what is missing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
from rich.console import Console

from appliance.image import wheel_sets
from appliance.wheels import TARGETS, Target, wheels_for
from edge.errors import ConfigError

OLD, NEW = (target for target in TARGETS if target.arch == "arm64")
Index = Callable[..., Path]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Puts a wheel into a folder, which is all that pip knows."""
    place = tmp_path / "index"
    place.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))

    def put(name: str, version: str = "1.0", tags: str = "py3-none-any", requires: Sequence[str] = ()) -> Path:
        wheel = place / f"{name}-{version}-{tags}.whl"
        info = f"{name}-{version}.dist-info"
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        lines += [f"Provides-Extra: {extra}" for extra in ("box", "more")]
        with ZipFile(wheel, "w") as file:
            file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
            file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
            file.writestr(f"{info}/RECORD", "")
        return wheel

    return put


def names(target: Target, project: Path, folder: Path) -> list[str]:
    found = wheels_for(target, project, "box", folder, lambda _: None)
    assert not found.missing
    assert {wheel.parent for wheel in found.wheels} == {folder}
    return [wheel.name for wheel in found.wheels]


def test_nothing_needed_is_the_project_alone(index: Index, tmp_path: Path) -> None:
    assert names(OLD, index("project"), tmp_path / "set") == ["project-1.0-py3-none-any.whl"]


def test_the_newest_that_its_python_machine_and_c_library_take(index: Index, tmp_path: Path) -> None:
    project = index("project", requires=["one>=1"])
    index("one", "1.1", "cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64")
    index("one", "1.2", "cp310-cp310-manylinux_2_36_aarch64")  # 22.04's C library is older
    index("one", "1.3", "cp310-cp310-manylinux_2_17_x86_64")
    index("one", "1.4", "cp312-cp312-manylinux_2_39_aarch64")
    index("one", "1.5", "cp313-cp313-manylinux_2_17_aarch64")
    index("one", "1.6", "cp312-cp312-musllinux_1_2_aarch64")
    assert (
        names(OLD, project, tmp_path / "old")[0]
        == "one-1.1-cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"
    )
    assert names(NEW, project, tmp_path / "new")[0] == "one-1.4-cp312-cp312-manylinux_2_39_aarch64.whl"


def test_one_wheel_for_several_pythons_is_taken_by_each(index: Index, tmp_path: Path) -> None:
    project, shared = index("project", requires=["one"]), index("one", "1.0", "cp37-abi3-manylinux2014_aarch64")
    assert names(OLD, project, tmp_path / "old")[0] == names(NEW, project, tmp_path / "new")[0] == shared.name


def test_markers_are_those_of_the_box(index: Index, tmp_path: Path) -> None:
    """Whatever Python builds: one that takes a requirement for its own does not take it for the box's."""
    project = index(
        "project",
        requires=[
            "older; python_version < '3.11'",
            "newer; python_version >= '3.12'",
            "arm; platform_machine == 'aarch64'",
            "intel; platform_machine == 'x86_64'",
            "extra; extra == 'box'",
            "unasked; extra == 'more'",
            "windows; sys_platform == 'win32'",
        ],
    )
    index("older", requires=["deeper; python_version < '3.11'"])
    for name in ("deeper", "newer", "arm", "intel", "extra", "unasked", "windows"):
        index(name)
    found = {
        target: {name.partition("-")[0] for name in names(target, project, tmp_path / str(target))}
        for target in TARGETS
    }
    always = {"project", "extra"}
    assert found[OLD] == always | {"arm", "older", "deeper"}
    assert found[NEW] == always | {"arm", "newer"}
    assert [found[target] for target in TARGETS if target.arch == "amd64"] == [
        always | {"intel", "older", "deeper"},
        always | {"intel"},
        always | {"intel", "newer"},
    ]


def test_a_version_is_the_one_for_the_box(index: Index, tmp_path: Path) -> None:
    """pip alone would take the one for the Python that builds: here of the project, and deeper."""
    ranges = [
        "{} <2; python_version < '3.11'",
        "{} >=2,<3; python_version == '3.11'",
        "{} >=3; python_version > '3.11'",
    ]
    project = index("project", requires=[*(one.format("near") for one in ranges), "between"])
    index("between", requires=["far", "far <2; python_version < '3.11'"])
    for name in ("near", "far"):
        for version in ("1.0", "2.0", "3.0"):
            index(name, version)
    for target in TARGETS:
        version = {"3.10": "1.0", "3.11": "2.0", "3.12": "3.0"}[target.python]
        found = names(target, project, tmp_path / str(target))
        assert [name[: -len("-py3-none-any.whl")] for name in found] == [
            "between-1.0", f"far-{'1.0' if target.python == '3.10' else '3.0'}", f"near-{version}", "project-1.0",
        ]  # fmt: skip


def test_extras_of_what_is_needed_are_followed(index: Index, tmp_path: Path) -> None:
    project = index("project", requires=["one[more]; python_version < '3.11'", "one; python_version >= '3.11'"])
    index("one", requires=["two; extra == 'more'"])
    index("two")
    assert [name.partition("-")[0] for name in names(OLD, project, tmp_path / "old")] == ["one", "project", "two"]
    assert [name.partition("-")[0] for name in names(NEW, project, tmp_path / "new")] == ["one", "project"]


def test_everything_without_a_wheel_is_listed(index: Index, tmp_path: Path) -> None:
    project = index("project", requires=["absent>=2,<3", "good", "source", "older; python_version < '3.11'"])
    good = index("good", requires=["deep!=1.5", "fine"])
    index("fine")
    index("absent", "1.0")
    index("older", tags="cp310-cp310-manylinux_2_17_x86_64")
    with tarfile.open(good.parent / "source-1.0.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("source-1.0/PKG-INFO")
        text = b"Metadata-Version: 2.1\nName: source\nVersion: 1.0\n"
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    said = io.StringIO()
    with pytest.raises(ConfigError, match="7 requirements of the box have no wheel"):
        wheel_sets([OLD, NEW], project, "box", tmp_path, Console(file=said, width=40))
    assert [line.strip() for line in said.getvalue().splitlines() if "wants it" in line] == [
        "absent <3,>=2 for arm64, Python 3.10; project wants it",
        "source (any version) for arm64, Python 3.10; project wants it",
        "older (any version) for arm64, Python 3.10; project wants it",
        "deep !=1.5 for arm64, Python 3.10; good wants it",
        "absent <3,>=2 for arm64, Python 3.12; project wants it",
        "source (any version) for arm64, Python 3.12; project wants it",
        "deep !=1.5 for arm64, Python 3.12; good wants it",
    ]


def test_wheels_that_exclude_each_other_are_no_missing_ones(index: Index, tmp_path: Path) -> None:
    project = index("project", requires=["one", "two<2"])
    index("one", requires=["two>=2"])
    index("two", "1.0")
    index("two", "2.0")
    with pytest.raises(ConfigError, match="pip found no wheels that fit together"):
        wheels_for(OLD, project, "box", tmp_path / "set", lambda _: None)


def test_an_index_that_is_not_reached_is_no_list(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = index("project", requires=["one"])
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_TIMEOUT", "2")
    with pytest.raises(ConfigError, match="pip could not ask for one"):
        wheels_for(OLD, project, "box", tmp_path / "set", lambda _: None)
