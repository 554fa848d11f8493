"""Pictures from files: one clear refusal for whatever is none, and never a half-read one."""

from __future__ import annotations

import re
import stat
import zlib
from pathlib import Path
from typing import cast

import cv2
import numpy as np

from edge.errors import CaptureError
from edge.values import Image

# OpenCV prints lines of its own about bad files; what matters is said here. It moved this switch after 4.10.
getattr(cv2.utils, "logging", cv2).setLogLevel(0)

MAX_PIXELS = 100_000_000  # 300 MB decoded: no camera makes more, a decompression bomb does
MAX_BYTES = 1 << 30  # of an image file, which is read whole
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
JPEG_MARKER = re.compile(rb"\xff+[\x02-\xcf\xd8-\xfe]")  # those with a segment, and the picture's end
JPEG_END = 0xD9
JPEG_SIZE = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers whose segment holds height and width
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # over other chunks libpng only warns, on stderr


def read_image(path: Path) -> Image:
    """One JPEG, PNG, BMP or WebP file as (H, W, 3) uint8 BGR, turned as its EXIF orientation says.

    Grey, palette, 16-bit and CMYK pictures are converted; an alpha channel is dropped. Raises CaptureError where the
    file cannot be read, is no such image, is cut short or damaged, or has more than MAX_PIXELS.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        width, height, data = _checked(path.read_bytes())
        if not width or not height:
            raise ValueError("an image without pixels")
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CaptureError(f"{path}: {error}") from error
    except cv2.error as error:
        raise CaptureError(f"{path}: a damaged image") from error
    if image is None:
        raise CaptureError(f"{path}: a damaged image")
    return cast(Image, image)


def _checked(data: bytes) -> tuple[int, int, bytes]:
    """Width and height in pixels as the header says (0 where it is cut), and the bytes to decode. Raises ValueError.

    These looks ahead are needed because a decoder fills the missing part of a JPEG with grey, prints what ails a PNG,
    and allocates whatever a header asks for.
    """
    if data.startswith(b"\xff\xd8"):
        return *_jpeg_size(data), data
    if data.startswith(PNG_START):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), _png_pixels(data)
    if data.startswith(b"BM"):
        if len(data) < int.from_bytes(data[2:6], "little"):
            raise ValueError("a BMP cut short")
        size = 2 if data[14:15] == b"\x0c" else 4  # bytes of a number: OS/2 or Windows
        width, height = (int.from_bytes(data[at : at + size], "little", signed=size == 4) for at in (18, 18 + size))
        return width, abs(height), data  # negative: stored from the top
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return *_webp_size(data), data
    raise ValueError("not a JPEG, PNG, BMP or WebP image" if data else "an empty file")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG that is there to its end; bytes after the end are allowed. Raises ValueError.

    Segments, where a thumbnail may hold an end of its own, are stepped over; within pixels no marker can occur.
    """
    width, height, at = 0, 0, 2
    while marker := JPEG_MARKER.search(data, at):
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == JPEG_END:
            return width, height
        if kind in JPEG_SIZE:
            height, width = int.from_bytes(data[at + 3 : at + 5], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError("a JPEG cut short")


def _png_pixels(data: bytes) -> bytes:
    """The PNG with only the chunks that make its pixels. Raises ValueError where one is cut short or damaged."""
    kept, at, kind = [PNG_START], len(PNG_START), b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        if len(data) < end:
            raise ValueError("a PNG cut short")
        kind, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end], "big")
        if zlib.crc32(data[at + 4 : end - 4]) != checksum:
            raise ValueError("a damaged PNG")
        if kind in PNG_PIXELS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, numbers = data[12:16], int.from_bytes(data[20:30], "little")
    if kind == b"VP8X":
        return 1 + (numbers >> 32 & 0xFFFFFF), 1 + (numbers >> 56)
    if kind == b"VP8L":
        return 1 + (numbers >> 8 & 0x3FFF), 1 + (numbers >> 22 & 0x3FFF)
    return numbers >> 48 & 0x3FFF, numbers >> 64 & 0x3FFF


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder by their suffix, sorted by name. Raises CaptureError where it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise CaptureError(f"{folder}: {error.strerror}") from error
