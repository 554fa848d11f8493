"""Video files and folders as cameras, through real files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.capture import Cameras
from edge.config import CameraConfig
from edge.errors import CaptureError
from edge.values import Frame
from tests.pictures import (
    BAD,
    BMP,
    JPEG,
    PNG,
    WEBP,
    picture,
)

SECONDS = 10.0  # the deadline of whatever should happen at once


def cameras(*sources: Path | str) -> Cameras:
    """Named a, b, … in this order."""
    return Cameras([CameraConfig(name=chr(ord("a") + i), source=str(source)) for i, source in enumerate(sources)])


def batches(open_cameras: Cameras) -> Iterator[list[Frame]]:
    """What next() gives until the sources are done."""
    deadline = time.monotonic() + SECONDS
    while not open_cameras.done:
        assert time.monotonic() < deadline, f"sources not done in {SECONDS} s: {open_cameras.states}"
        if frames := open_cameras.next(1.0):
            yield frames


def frames_of(open_cameras: Cameras) -> list[Frame]:
    return [frame for frames in batches(open_cameras) for frame in frames]


def write_video(path: Path, frames: int, codec: str = "MJPG") -> Path:
    """10 frames a second of 64 x 48, grainy so that all take some bytes; frame i has brightness 25 + 5 i."""
    grain = np.random.default_rng(0)
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (64, 48))
    assert video.isOpened()
    for i in range(frames):
        video.write(grain.integers(5 * i, 5 * i + 51, (48, 64, 3), np.uint8))
    video.release()
    return path


def test_a_relative_path_with_a_colon_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "door:1.avi", 3)
    monkeypatch.chdir(tmp_path)
    with cameras("door:1.avi") as opened:
        assert len(frames_of(opened)) == 3


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "mp4v")])
def test_every_frame_of_a_video_in_order(
    name: str, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / name, 30, codec)
    before = time.time()
    with cameras(path) as opened:
        frames = frames_of(opened)
        assert opened.failures == []
        assert [(s.connected, s.frames, s.dropped, s.error) for s in opened.states] == [(False, 30, 0, None)]
        assert opened.next(60.0) == []  # at once
    assert [frame.number for frame in frames] == list(range(30))
    assert [frame.image.mean() for frame in frames] == pytest.approx([25 + 5 * i for i in range(30)], abs=2.5)
    assert {(frame.camera, frame.image.shape) for frame in frames} == {("a", (48, 64, 3))}
    assert before <= frames[0].captured_at < before + SECONDS  # the start of the reading …
    assert [frame.captured_at - frames[0].captured_at for frame in frames] == pytest.approx(  # … plus the position
        [i / 10 for i in range(30)], abs=1e-3
    )
    assert caplog.records == []


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "MJPG"), (".mkv", "mp4v")])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_a_video_that_breaks_off_is_read_to_there_and_reported(
    suffix: str,
    codec: str,
    share: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = cut(write_video(tmp_path / f"a{suffix}", 40, codec), share)
    with cameras(path) as opened:
        frames = frames_of(opened)
        (failure,) = opened.failures
        assert opened.states[0].error == str(failure)
    assert 0.2 * 40 * share < len(frames) < 40
    assert [frame.number for frame in frames] == list(range(len(frames)))
    message = f"camera 'a': {path}: the video breaks off: expected 40 frames, got {len(frames)}"
    assert str(failure) == message
    assert caplog.record_tuples == [("edge.capture", logging.WARNING, message)]
    assert capfd.readouterr() == ("", "")


def test_a_video_without_a_length_is_not_suspected(tmp_path: Path) -> None:
    path = tmp_path / "a.mjpg"
    path.write_bytes(JPEG * 20)  # no header at all, and no times
    with cameras(path) as opened:
        assert len(frames_of(opened)) == 20
        assert opened.failures == []


def test_a_source_that_cannot_be_read_fails_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, empty, folder = tmp_path / "text.avi", tmp_path / "empty.avi", tmp_path / "folder"
    text.write_text("no video")
    empty.touch()
    folder.mkdir()
    header_only = cut(write_video(tmp_path / "header.avi", 40), 0.05)
    no_index = cut(write_video(tmp_path / "no_index.mp4", 40, "mp4v"), 0.9)
    no_video = "no video: expected a video file, a folder of images, a URL or a device number"
    no_address = "unknown kind of address: expected rtsp:// or rtsps:// or http:// or https://"
    with pytest.raises(ValueError, match="embedded null") as null:
        Path("a\0b").stat()  # the words differ between versions of Python
    for source, problem in [
        *((path, f"{path}: {no_video}") for path in (text, empty, header_only, no_index)),
        ("/dev/null", f"/dev/null: {no_video}"),
        (tmp_path / "gone.avi", f"{tmp_path}/gone.avi: No such file or directory"),
        (f"{tmp_path}/a\0b", f"{tmp_path}/a\0b: {null.value}"),
        (folder, f"{folder}: no images: expected files named .bmp .jpeg .jpg .png .webp"),
        ("ftp://me:secret@host/x", f"ftp://me:***@host: {no_address}"),
        ("RTSP://me:secret@host/x", f"RTSP://me:***@host: {no_address}"),  # FFmpeg, too, wants lower case
    ]:
        with pytest.raises(CaptureError) as caught:
            cameras(source)
        assert str(caught.value) == f"camera 'a': {problem}"
    assert capfd.readouterr() == ("", "")


def test_a_folder_gives_its_readable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, (data, _) in enumerate(BAD.values()):
        (tmp_path / f"{2 * i:02}.jpg").write_bytes(data)
    good = {"01.PNG": PNG, "03.bmp": BMP, "99.webp": WEBP}
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "98.jpg").mkdir()
    (tmp_path / "notes.txt").write_text("skipped")
    before = time.time()
    with cameras(tmp_path) as opened:
        frames = frames_of(opened)
        (state,) = opened.states
        assert opened.failures == []
    assert [frame.number for frame in frames] == [0, 1, 2]
    assert all(before <= frame.captured_at <= time.time() for frame in frames)
    assert np.array_equal(frames[0].image, picture())
    assert (state.frames, state.dropped) == (3, len(BAD) + 1)
    assert state.error == f"{tmp_path}/98.jpg: not a file"
    assert len(caplog.records) == len(BAD) + 1
    assert caplog.messages[0] == f"camera 'a': {tmp_path}/00.jpg: an empty file"
    assert all("\n" not in message for message in caplog.messages)


def test_a_folder_without_one_readable_image_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.jpg").write_text("text")
    with cameras(tmp_path) as opened:
        assert frames_of(opened) == []
        assert [str(error) for error in opened.failures] == [
            f"camera 'a': {tmp_path}: none of its 2 images can be read"
        ]


def test_two_cameras_come_as_one_batch(tmp_path: Path) -> None:
    long, short = write_video(tmp_path / "long.avi", 12), write_video(tmp_path / "short.avi", 5)
    with cameras(long, short) as opened:
        got = list(batches(opened))
    assert all(len({frame.camera for frame in frames}) == len(frames) for frames in got)
    by_name = {name: [f.number for frames in got for f in frames if f.camera == name] for name in "ab"}
    assert by_name == {"a": list(range(12)), "b": list(range(5))}


def test_a_batch_holds_what_is_there(tmp_path: Path) -> None:
    with cameras(write_video(tmp_path / "a.avi", 3), write_video(tmp_path / "b.avi", 3)) as opened:
        deadline = time.monotonic() + SECONDS
        while 0 in [state.frames for state in opened.states]:
            assert time.monotonic() < deadline, f"first frames not read in {SECONDS} s: {opened.states}"
        # Counted and put down under one lock, so both are there.
        assert [(frame.camera, frame.number) for frame in opened.next(0.0)] == [("a", 0), ("b", 0)]


def test_a_video_waits_for_its_taker_and_close_frees_it(tmp_path: Path) -> None:
    with cameras(write_video(tmp_path / "a.avi", 30)) as opened:
        assert [frame.number for frame in opened.next(SECONDS)] == [0]
        deadline = time.monotonic() + SECONDS
        while opened.states[0].frames < 3:  # one in the box, one in hand
            assert time.monotonic() < deadline, f"no frame read ahead in {SECONDS} s: {opened.states}"
        assert not opened.done
        start = time.monotonic()
        opened.close()
        assert time.monotonic() - start < 1
        assert opened.next(60.0) == []
        assert opened.done
        assert opened.states[0].frames == 3
        assert opened.failures == []


def test_no_cameras_are_done() -> None:
    with Cameras([]) as opened:
        assert opened.done
        assert opened.next(60.0) == []


def test_whatever_stops_a_thread_is_a_failure() -> None:
    def no_clock() -> datetime:
        raise OverflowError("no such day")

    config = CameraConfig(name="a", source="rtsp://127.0.0.1:1/", schedule=("22:00-06:00",))
    with Cameras([config], today=no_clock) as opened:
        assert frames_of(opened) == []
        assert [str(error) for error in opened.failures] == ["camera 'a': OverflowError: no such day"]


# ---- a reload


def named(**sources: Path | str) -> list[CameraConfig]:
    return [CameraConfig(name=name, source=str(source)) for name, source in sources.items()]


def test_after_a_reload_those_that_are_as_before_go_on(tmp_path: Path) -> None:
    one, two, three = (write_video(tmp_path / f"{name}.avi", 6) for name in ("one", "two", "three"))
    with Cameras(named(a=one, b=two)) as opened:
        until_read(opened, 1)
        assert {(frame.camera, frame.number) for frame in opened.next(SECONDS)} == {("a", 0), ("b", 0)}
        until_read(opened, 2)
        opened.replace(named(c=three, a=one))
        assert [state.name for state in opened.states] == ["c", "a"]
        frames = frames_of(opened)
    assert [frame.number for frame in frames if frame.camera == "a"] == [1, 2, 3, 4, 5]
    assert [frame.number for frame in frames if frame.camera == "c"] == [0, 1, 2, 3, 4, 5]
    assert len(frames) == 11, "and none of b"


def until_read(opened: Cameras, frames: int) -> None:
    """So many frames were read of each."""
    deadline = time.monotonic() + SECONDS
    while min(state.frames for state in opened.states) < frames:
        assert time.monotonic() < deadline, opened.states


def test_another_source_under_the_same_name_begins_anew(tmp_path: Path) -> None:
    one, two = write_video(tmp_path / "one.avi", 30), write_video(tmp_path / "two.avi", 4)
    with Cameras(named(a=one)) as opened:
        until_read(opened, 1)
        opened.replace(named(a=two))
        assert [frame.number for frame in frames_of(opened)] == [0, 1, 2, 3]
        assert opened.states[0].frames == 4


def test_a_reload_with_a_source_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    one, two = write_video(tmp_path / "one.avi", 5), write_video(tmp_path / "two.avi", 4)
    with Cameras(named(a=one)) as opened:
        with pytest.raises(CaptureError, match=r"camera 'c': .*gone\.avi: No such file"):
            opened.replace(named(b=two, c=tmp_path / "gone.avi"))
        assert [frame.camera for frame in frames_of(opened)] == ["a"] * 5


def test_a_reload_to_no_cameras_ends_all(tmp_path: Path) -> None:
    with Cameras(named(a=write_video(tmp_path / "a.avi", 30))) as opened:
        until_read(opened, 1)
        opened.replace([])
        assert opened.done
        assert opened.states == []
        assert opened.next(60.0) == []


def test_files_have_neither_pace_nor_schedule(tmp_path: Path) -> None:
    never = CameraConfig(name="a", source=str(write_video(tmp_path / "a.avi", 30)), schedule=("Mon 00:00-00:01",))
    with Cameras([never], today=lambda: datetime(2024, 1, 2, 12)) as opened:  # a Tuesday
        opened.pace(0.1)
        assert len(frames_of(opened)) == 30
