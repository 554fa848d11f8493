"""http:// cameras, each of which shows one picture for ever: MJPEG, as cheap cameras send it.

The standard library alone, so that it also runs as a program on a machine that a test has made:
`python3 http_camera.py FOLDER PORT`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RATE = 4.0  # pictures a second


@contextmanager
def http_camera(folder: Path, port: int = 0) -> Iterator[str]:
    """A camera for each NAME.jpg of the folder, at /NAME of this address."""
    jpegs = {f"/{file.stem}": file.read_bytes() for file in folder.glob("*.jpg")}
    closing = threading.Event()

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            jpeg = jpegs[self.path]
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
            self.end_headers()
            try:
                while not closing.wait(1 / RATE):
                    head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
            except OSError:
                pass  # the box has gone

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Camera) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            closing.set()
            server.shutdown()
            thread.join()


def quiet_scenes(folder: Path) -> Path:
    """dark.jpg and empty.jpg, made in this folder."""
    import cv2
    import numpy as np

    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "dark.jpg"), np.zeros((288, 384, 3), np.uint8))
    grey = np.tile(np.linspace(90, 160, 384, dtype=np.uint8)[None, :, None], (288, 1, 3))
    cv2.imwrite(str(folder / "empty.jpg"), grey)
    return folder


if __name__ == "__main__":
    with http_camera(Path(sys.argv[1]), int(sys.argv[2])):
        threading.Event().wait()
