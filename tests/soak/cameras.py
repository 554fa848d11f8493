"""Four simulated cameras, real to the box: RTSP by GStreamer where that is here, MJPEG over HTTP, and their faults."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np

from edge.images import read_image
from edge.values import Image
from tests.chaos.proxy import Fault as WireFault
from tests.chaos.proxy import Proxy
from tests.rtsp_server import RtspServer

PICTURE = Path(__file__).parents[2] / "export/mini/pets-650.jpg"
SIZE, OTHER = (384, 288), (320, 240)  # px
FPS = 4
PICTURES = 40


class Camera(Protocol):
    """A context manager. kinds: the faults it knows; `begin` one for so many seconds, then `end` it."""

    kinds: tuple[str, ...]

    @property
    def url(self) -> str: ...

    def begin(self, kind: str, seconds: float) -> None: ...

    def end(self, kind: str) -> None: ...

    def __enter__(self) -> Camera: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def people_walking() -> list[Image]:
    """The golden picture, panned and noisy: people in every one, and no two alike."""
    picture, noise = cv2.resize(read_image(PICTURE), SIZE, interpolation=cv2.INTER_AREA), np.random.default_rng(0)
    shifted = (np.roll(picture, 4 * min(i, PICTURES - i), axis=1) for i in range(PICTURES))
    return [np.clip(one + noise.normal(0, 3, one.shape), 0, 255).astype(np.uint8) for one in shifted]


class HttpCamera:
    """MJPEG over HTTP, behind a proxy that cuts its connections."""

    kinds: tuple[str, ...] = ("stop", "stall", "freeze", "garbage", "size", "reset", "removed")

    def __init__(self, pictures: Sequence[Image]) -> None:
        encoded = [_jpeg(picture) for picture in pictures]
        others = [_jpeg(cv2.resize(picture, OTHER)) for picture in pictures]
        self._order = "flow"
        self._closing = threading.Event()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
                self.end_headers()
                shown = 0
                try:
                    while not camera._closing.wait(1 / FPS):
                        order = camera._order
                        if order != "freeze":
                            shown = int(time.monotonic() * FPS) % len(encoded)
                        jpeg = (others if order == "size" else encoded)[shown]
                        if order == "garbage":
                            jpeg = _damaged(jpeg)
                        if order != "stall":
                            head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                            self.wfile.write(head.encode() + jpeg + b"\r\n")
                except OSError:
                    pass  # the box has gone

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy = Proxy(int(self._server.server_address[1]))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._proxy.port}/video"

    def begin(self, kind: str, seconds: float) -> None:
        if kind == "stop":
            self._proxy.begin(WireFault("refuse", seconds=seconds))
        elif kind == "reset":
            self._proxy.begin(WireFault("reset"))
        elif kind != "removed":
            self._order = kind

    def end(self, kind: str) -> None:
        self._order = "flow"

    def __enter__(self) -> HttpCamera:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._proxy.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class RtspCamera:
    """H.264 over RTSP, from a process of its own."""

    kinds: tuple[str, ...] = ("stop", "stall", "garbage", "lossy", "size", "removed")

    def __init__(self, files: str) -> None:
        """files: a pattern of JPEG files, like "%02d.jpg"."""
        self._server = RtspServer({"/video": {"files": files, "size": SIZE, "fps": FPS}})

    @property
    def url(self) -> str:
        return self._server.url("/video")

    def begin(self, kind: str, seconds: float) -> None:
        if kind == "stop":
            self._server.stop()
        elif kind == "size":
            self._server.tell(f"size /video {OTHER[0]} {OTHER[1]}")
        elif kind != "removed":
            self._server.tell(f"{kind} /video")

    def end(self, kind: str) -> None:
        if kind == "stop":
            self._server.start()
        elif kind == "size":
            self._server.tell(f"size /video {SIZE[0]} {SIZE[1]}")
        elif kind != "removed":
            self._server.tell("flow /video")

    def __enter__(self) -> RtspCamera:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.__exit__()


def four_cameras(folder: Path, rtsp: bool, kept: ExitStack) -> dict[str, Camera]:
    """By name, started, and ended with `kept`."""
    pictures = people_walking()
    for i, picture in enumerate(pictures):
        (folder / f"{i:02}.jpg").write_bytes(_jpeg(picture))
    cameras: dict[str, Camera] = {}
    for i in (1, 2):
        cameras[f"rtsp-{i}" if rtsp else f"http-{i + 2}"] = (
            RtspCamera(str(folder / "%02d.jpg")) if rtsp else HttpCamera(pictures)
        )
        cameras[f"http-{i}"] = HttpCamera(pictures)
    for camera in cameras.values():
        kept.enter_context(camera)
    return cameras


def _jpeg(picture: Image) -> bytes:
    return cv2.imencode(".jpg", picture)[1].tobytes()


def _damaged(jpeg: bytes) -> bytes:
    data = bytearray(jpeg)
    for _ in range(len(data) // 20):
        data[random.randrange(2, len(data))] = random.randrange(256)
    return bytes(data)
