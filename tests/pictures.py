"""Small pictures in every file format, good ones and the parts to make bad ones from."""

from __future__ import annotations

import base64
import struct
import zlib

import cv2
import numpy as np

from edge.values import Image

# 8 x 8 of pure red as CMYK, stored inverted after Adobe's custom, as Pillow writes it.
CMYK_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAQCwwODAoQDg0OEhEQExgoGhgWFhgxIyUdKDozPTw5Mzg3QEhcTkBEV0U3OFBtUVdfYmdoZz5NcXlwZHhcZWdj"
    "/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABQAAQAAAAAAAAAAAAAAAAAAAAf/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/9oADgRDAE0AWQBLAAA/AEAfj8gP"
    "/9k="
)


def picture(height: int = 48, width: int = 64) -> Image:
    """Smooth, so that JPEG keeps it nearly; its left upper corner blue, its right side red."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(255, 0, width)
    image[..., 2] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


def encoded(suffix: str, image: np.ndarray, *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, image, options)[1])


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by hand. rows: each with its filter byte. chunks: those between header and pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, png_chunk(b"IEND", b"")])


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """A JPEG's APP1 segment that says only the orientation; `thumbnail` follows as real ones do."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0) + thumbnail
    return b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff


def with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


JPEG = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_QUALITY, 95)
PROGRESSIVE = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_RST_INTERVAL, 1)
PNG = encoded(".png", picture())
BMP = encoded(".bmp", picture())
WEBP = encoded(".webp", picture(), cv2.IMWRITE_WEBP_QUALITY, 95)

BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"this is no image", "not a JPEG, PNG, BMP or WebP image"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "a JPEG cut short"),
    "jpeg without its end": (JPEG[:-2], "a JPEG cut short"),
    "half a progressive jpeg": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "a JPEG cut short"),
    "half a jpeg with restart markers": (RESTARTS[: len(RESTARTS) // 2], "a JPEG cut short"),
    "jpeg cut after its thumbnail": ((JPEG[:2] + exif(1, JPEG) + JPEG[2:])[:-200], "a JPEG cut short"),
    "jpeg cut within its thumbnail": ((JPEG[:2] + exif(1, JPEG))[:-1], "a JPEG cut short"),
    "jpeg without rows": (with_jpeg_size(JPEG, 64, 0), "an image without pixels"),
    "jpeg of two bytes": (b"\xff\xd8", "a JPEG cut short"),
    "jpeg without content": (b"\xff\xd8\xff\xd9", "an image without pixels"),
    "jpeg without pixels": (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", "a damaged image"),
    "half a png": (PNG[: len(PNG) // 2], "a PNG cut short"),
    "png without its end": (PNG[:-12], "a PNG cut short"),
    "png of 8 bytes": (PNG[:8], "a PNG cut short"),
    "a changed byte": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "a damaged PNG"),
    "png without width": (png(0, 2, 8, 2, b"\0\0"), "an image without pixels"),
    "half a bmp": (BMP[: len(BMP) // 2], "a BMP cut short"),
    "bmp of two bytes": (b"BM", "an image without pixels"),
    "half a webp": (WEBP[: len(WEBP) // 2], "a damaged image"),
}
