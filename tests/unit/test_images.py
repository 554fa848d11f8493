"""Still images good and bad, through real files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.errors import CaptureError
from edge.images import MAX_BYTES, image_files, read_image
from edge.values import Frame
from tests.pictures import (
    BAD,
    BMP,
    CMYK_JPEG,
    JPEG,
    PNG,
    PROGRESSIVE,
    RESTARTS,
    WEBP,
    encoded,
    exif,
    picture,
    png,
    png_chunk,
    with_jpeg_size,
)

ROWS_2X2 = (b"\0" + bytes([30, 20, 10] * 2)) * 2  # RGB


GOOD = {
    "jpeg": (JPEG, picture()),
    "progressive": (PROGRESSIVE, picture()),
    "restart markers": (RESTARTS, picture()),
    "after the end": (JPEG + b"garbage \xff\xd9", picture()),
    "thumbnail": (JPEG[:2] + exif(1, JPEG) + JPEG[2:], picture()),
    "fill bytes": (JPEG[:2] + b"\xff\xff" + JPEG[2:], picture()),
    "turned": (JPEG[:2] + exif(6) + JPEG[2:], np.rot90(picture(), -1)),
    "cmyk": (CMYK_JPEG, np.full((8, 8, 3), (0, 0, 255), np.uint8)),
    "grey jpeg": (encoded(".jpg", np.full((8, 9), 77, np.uint8)), np.full((8, 9, 3), 77, np.uint8)),
    "png": (PNG, picture()),
    "png after the end": (PNG + b"garbage", picture()),
    "16 bit": (encoded(".png", picture().astype(np.uint16) * 257), picture()),
    "grey": (encoded(".png", np.full((8, 9), 77, np.uint8)), np.full((8, 9, 3), 77, np.uint8)),
    "16 bit grey": (encoded(".png", np.full((8, 9), 77 * 257, np.uint16)), np.full((8, 9, 3), 77, np.uint8)),
    "alpha": (encoded(".png", np.dstack([picture(), np.full((48, 64), 9, np.uint8)])), picture()),
    "palette": (
        png(2, 1, 8, 3, b"\0\0\1", png_chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))),
        np.array([[[0, 0, 255], [255, 0, 0]]], np.uint8),
    ),
    "odd colour profile": (  # libpng warns of it on stderr
        png(2, 2, 8, 2, ROWS_2X2, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"none"))),
        np.full((2, 2, 3), (10, 20, 30), np.uint8),
    ),
    "bmp": (BMP, picture()),
    "os2 bmp": (
        b"BM" + struct.pack("<IHHIIHHHH", 34, 0, 0, 26, 12, 2, 1, 1, 24) + bytes([1, 2, 3, 4, 5, 6, 0, 0]),
        np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8),
    ),
    "bmp from the top": (
        BMP[:22] + struct.pack("<i", -48) + BMP[26:],
        picture()[::-1],
    ),
    "webp": (WEBP, picture()),
    "lossless webp": (encoded(".webp", picture(), cv2.IMWRITE_WEBP_QUALITY, 101), picture()),
    "webp with alpha": (
        encoded(".webp", np.dstack([picture(), np.full((48, 64), 200, np.uint8)]), cv2.IMWRITE_WEBP_QUALITY, 95),
        picture(),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_reads_what_cameras_and_people_store(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, expected = GOOD[name]
    path = tmp_path / "image.any"
    path.write_bytes(data)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 6  # what JPEG and WebP lose
    assert capfd.readouterr() == ("", "")


BOMBS = {
    "jpeg": with_jpeg_size(JPEG, 60000, 60000),
    "png": png(60000, 60000, 8, 2, bytes(9)),
    "bmp": BMP[:18] + struct.pack("<ii", 60000, -60000) + BMP[26:],
    "os2 bmp": b"BM" + struct.pack("<IHHIIHHHH", 34, 0, 0, 26, 12, 60000, 60000, 1, 24) + bytes(8),
    "webp": WEBP[:26] + struct.pack("<HH", 16383, 16383) + WEBP[30:],
    "lossless webp": b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(15),
    "extended webp": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xfe\xff\0\xfe\xff\0" + bytes(8),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image.any"
    path.write_bytes(BOMBS[name])
    with pytest.raises(CaptureError, match=r"image\.any: \d+ x \d+ pixels, more than 100000000$"):
        read_image(path)


@pytest.mark.parametrize("name", BAD)
def test_refuses_a_bad_image_in_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, problem = BAD[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(CaptureError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {problem}"
    assert capfd.readouterr() == ("", "")


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe.jpg", tmp_path / "large.jpg"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="embedded null") as null:
        Path("a\0b").stat()  # the words differ between versions of Python
    for path, problem in [
        (tmp_path, "not a file"),
        (pipe, "not a file"),
        (tmp_path / "gone.jpg", "No such file or directory"),
        (large, f"{MAX_BYTES + 1} bytes, more than {MAX_BYTES}"),
        (tmp_path / "a\0b.jpg", str(null.value)),
    ]:
        with pytest.raises(CaptureError) as caught:
            read_image(path)
        assert str(caught.value) == f"{path}: {problem}"


def test_permission_denied_is_said(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(JPEG)
    path.chmod(0)
    program = f"""
import os, pathlib
from edge.capture import Cameras
from edge.images import read_image
from edge.config import CameraConfig
from edge.errors import CaptureError
if os.geteuid() == 0:  # root may read everything
    os.setuid(65534)
path = pathlib.Path({str(path)!r})
for read in (lambda: read_image(path), lambda: Cameras([CameraConfig(name="door", source=str(path))])):
    try:
        read()
    except CaptureError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stderr == ""
    assert run.stdout == f"{path}: Permission denied\ncamera 'door': {path}: Permission denied\n"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_give_an_image_or_a_capture_error(data: st.DataObject, tmp_path: Path) -> None:
    original = data.draw(st.sampled_from([JPEG, PROGRESSIVE, RESTARTS, CMYK_JPEG, PNG, BMP, WEBP]))
    mutated = bytearray(original)
    places = st.integers(0, len(original) - 1)
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        mutated[at] = byte
    start, end = sorted(data.draw(st.tuples(places, places)))
    del mutated[start : data.draw(st.sampled_from([start, end]))]
    path = tmp_path / "image.jpg"
    path.write_bytes(mutated)
    try:
        image = read_image(path)
    except CaptureError:
        return
    Frame("door", 0, 0.0, image)  # checks dtype and shape


def test_image_files_are_sorted_by_name(tmp_path: Path) -> None:
    for name in ["b.JPG", "a.png", "c.txt", "d.jpeg", "e.WebP", "f.bmp", "jpg"]:
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.png", "b.JPG", "d.jpeg", "e.WebP", "f.bmp"]
    with pytest.raises(CaptureError, match="gone: No such file or directory"):
        image_files(tmp_path / "gone")
