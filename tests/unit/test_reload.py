"""A configuration read again: what changes, what is refused by name, and that a bad one changes nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from edge.config import EdgeConfig, read_edge_config
from edge.errors import CaptureError
from edge.reload import FIXED, Reloader, fixed_changes

GOOD = 'device = "box"\nbundle = "b"\n[[camera]]\nname = "door"\nsource = "rtsp://me:secret@127.0.0.1/"\n'


class Box:
    """A box that takes what it is given, unless it refuses; and what it told."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked = path, threading.Event()
        self.refuses: CaptureError | None = None
        self.taken: list[tuple[EdgeConfig, EdgeConfig]] = []
        self.told: list[str] = []
        self.write("")
        self.reloader = Reloader(path, read_edge_config(path), self.asked, self.take, self.told.append)

    def write(self, more: str, start: str = GOOD) -> None:
        self.path.write_text(start + more, encoding="utf-8")

    def take(self, wanted: EdgeConfig, running: EdgeConfig) -> None:
        if self.refuses:
            raise self.refuses
        self.taken.append((wanted, running))

    def reload(self) -> bool:
        self.asked.set()
        return self.reloader.turn()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path / "edge.toml")


def test_nothing_is_read_unasked(box: Box) -> None:
    box.write("[detect]\nthreshold = 0.7\n")
    assert not box.reloader.turn()
    assert not box.taken
    assert not box.told


def test_what_may_change_does_and_once(box: Box) -> None:
    more = "[detect]\nthreshold = 0.7\n[match]\ntop_k = 1\n[crop]\nmin_height = 50\n[track]\nlost_s = 1.0\n"
    box.write(more + "[motion]\nenabled = true\n[load]\nmax_fps = 2.0\n")
    assert box.reload()
    ((wanted, before),) = box.taken
    assert (before.detect.threshold, wanted.detect.threshold) == (0.5, 0.7)
    assert box.reloader.running is wanted
    assert box.told == ["a new configuration is in force"]
    assert not box.reloader.turn(), "asked once"


def test_cameras_may_come_and_go(box: Box) -> None:
    box.write('[[camera]]\nname = "gate"\nsource = "0"\n')
    assert box.reload()
    assert [camera.name for camera in box.reloader.running.camera] == ["door", "gate"]


def test_what_wants_a_restart_is_refused_by_name(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    before = box.reloader.running
    changed = '[publish]\naddress = "tcp://127.0.0.1:5999"\ncrops = true\n[runtime]\nthreads = 1\n[match]\ntop_k = 1\n'
    box.write(changed, GOOD.replace('"box"', '"other"'))
    assert not box.reload()
    names = "device, publish.address, publish.crops, runtime.threads"
    assert f"cannot change while the box runs: {names};" in caplog.text
    assert "systemctl restart lookout" in caplog.text
    assert names in box.told[0]
    assert box.reloader.running is before
    assert not box.taken, "also what may change stays: all or nothing"


@pytest.mark.parametrize("text", ["not toml", GOOD + "[detect]\nthreshold = 7\n", GOOD + "[quux]\n"])
def test_a_file_that_is_wrong_changes_nothing(box: Box, text: str, caplog: pytest.LogCaptureFixture) -> None:
    before = box.reloader.running
    box.write("", text)
    assert not box.reload()
    assert box.reloader.running is before
    assert str(box.path) in caplog.text
    assert "the configuration in force stays" in caplog.text
    box.write("[detect]\nthreshold = 0.6\n")
    assert box.reload(), "a mended one is taken"


def test_a_file_that_is_gone_changes_nothing(box: Box) -> None:
    box.path.unlink()
    assert not box.reload()
    assert box.told[0].startswith("configuration refused, the one in force stays: ")


def test_what_the_box_cannot_take_changes_nothing(box: Box) -> None:
    before = box.reloader.running
    box.refuses = CaptureError("camera 'door': gone.avi: no such file")
    assert not box.reload()
    assert box.reloader.running is before
    assert "camera 'door': gone.avi" in box.told[0]


def test_every_section_is_reloaded_or_named_as_fixed() -> None:
    """A new section has to choose."""
    taken = {"camera", "detect", "track", "crop", "match", "motion", "load"}
    assert set(EdgeConfig.model_fields) == taken | set(FIXED)


@pytest.mark.parametrize("section", [name for name in FIXED if name not in ("device", "bundle")])
def test_every_key_of_a_fixed_section_is_found(box: Box, section: str) -> None:
    running = box.reloader.running
    model = getattr(running, section)
    assert isinstance(model, BaseModel)
    for key in type(model).model_fields:
        other = running.model_copy(update={section: model.model_copy(update={key: "something else"})})
        assert fixed_changes(running, other) == [f"{section}.{key}"]
    assert fixed_changes(running, running) == []
