"""A real RTSP server, GStreamer's: cameras of H.264 that stall, freeze, change their size and damage what they send.

Runs in a process of its own, by a Python that has the system's `gi`, as one camera each:

    python3 tests/rtsp_server.py '{"port": 0, "cameras": {"/door": {"pattern": "ball"}}}'

It prints its port, then obeys lines on stdin, "stall /door", and answers each with a line. `RtspServer` does all that.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from typing import Any

if __package__:  # within the tests; on its own it needs nothing but gi
    from tests.chaos.proxy import held_port

PYTHON = "/usr/bin/python3"
MODULES = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
PACKAGES = "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-rtsp gstreamer1.0-plugins-{base,good,bad,ugly}"
DIGEST = 2  # of GstRtspAuthMethod
ORDERS = ("flow", "stall", "garbage", "lossy")  # what becomes of a camera's stream from now on


def missing() -> str | None:
    """Why there can be no server here."""
    try:
        done = subprocess.run([PYTHON, "-c", MODULES], capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        return str(error)
    return f"a server needs {PACKAGES}: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else None


class RtspServer:
    """Cameras on a port of 127.0.0.1 that stays the same when it is stopped and started; a context manager.

    cameras: by mount, with pattern (of videotestsrc) or files (a pattern of JPEGs, shown in turn), size, fps,
    codec ("x264", "x265" or "jpeg"), gop (frames from one key frame to the next).
    login: (user, password, "basic" or "digest") without which it refuses.
    """

    def __init__(self, cameras: dict[str, dict[str, Any]], login: tuple[str, str, str] | None = None) -> None:
        self._held = held_port()
        self.port: int = self._held.getsockname()[1]
        self._facts = {"port": self.port, "cameras": cameras, "login": login}
        self._process: subprocess.Popen[str] | None = None

    def url(self, mount: str, login: str = "") -> str:
        return f"rtsp://{login}127.0.0.1:{self.port}{mount}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [PYTHON, __file__, json.dumps(self._facts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == str(self.port)

    def stop(self) -> None:
        """As a power cut does it, but that its system says so to those connected."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def tell(self, order: str) -> None:
        """One of ORDERS, "size" with width and height, "pattern" with a name: "stall /door", "size /door 320 240"."""
        assert self._process is not None
        assert self._process.stdin is not None
        print(order, file=self._process.stdin, flush=True)
        assert self._answer() == "done", order

    def _answer(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> RtspServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._held.close()


# ---- all below runs by the system's Python


class Camera:
    """One mount: what is sent, and what becomes of it on the way."""

    def __init__(self, gst: Any, pattern: str = "ball", files: str = "", **facts: Any) -> None:
        width, height = facts.get("size", (160, 120))
        fps, codec = facts.get("fps", 10), facts.get("codec", "x264")
        gop = facts.get("gop", fps)
        self.order = "flow"
        self._gst, self._pattern, self._size = gst, pattern, f"video/x-raw,format=I420,width={width},height={height}"
        self._fps, self._media = f"framerate={fps}/1", None
        self._random, self._pushing = random.Random(0), False
        source = "videotestsrc name=source is-live=true"
        if files:
            source = f"multifilesrc name=source location={files} loop=true caps=image/jpeg,{self._fps} ! jpegdec"
        encoder = {
            "x264": f"x264enc name=encoder tune=zerolatency speed-preset=ultrafast key-int-max={gop} bitrate=600"
            " ! video/x-h264,profile=baseline ! rtph264pay name=pay0 pt=96 config-interval=-1",
            "x265": f"x265enc name=encoder tune=zerolatency speed-preset=ultrafast key-int-max={gop} bitrate=600"
            " ! rtph265pay name=pay0 pt=96 config-interval=-1",
            "jpeg": "jpegenc name=encoder ! rtpjpegpay name=pay0 pt=26",
        }[codec]
        self.launch = f"( {source} ! videoconvert ! videoscale ! capsfilter name=size ! {encoder} )"

    def made(self, _: object, media: Any) -> None:
        """The pipeline is there, for the first client."""
        element = media.get_element()
        self._source, self._filter = element.get_by_name("source"), element.get_by_name("size")
        self.size(self._size)
        self.pattern(self._pattern)
        coded, packets = element.get_by_name("encoder"), element.get_by_name("pay0")
        kinds = self._gst.PadProbeType
        coded.get_static_pad("src").add_probe(kinds.BUFFER, self._coded)
        packets.get_static_pad("src").add_probe(kinds.BUFFER | kinds.BUFFER_LIST, self._packets)
        self._media = media

    def size(self, caps: str) -> None:
        self._size = caps
        self._filter.set_property("caps", self._gst.Caps.from_string(f"{caps},{self._fps}"))

    def pattern(self, name: str) -> None:
        self._pattern = name
        if self._source.find_property("pattern"):
            self._gst.util_set_object_arg(self._source, "pattern", name)

    def _coded(self, pad: Any, info: Any) -> Any:
        """Of the encoder's pictures: stop them all, or write nonsense into them."""
        if self.order == "stall":
            return self._gst.PadProbeReturn.DROP
        buffer = info.get_buffer()
        if self.order != "garbage" or self._pushing or buffer.get_size() < 16:
            return self._gst.PadProbeReturn.OK
        data = bytearray(buffer.extract_dup(0, buffer.get_size()))
        for _ in range(1 + len(data) // 50):
            data[self._random.randrange(5, len(data))] = self._random.randrange(256)
        bad = self._gst.Buffer.new_wrapped(bytes(data))
        bad.pts, bad.dts, bad.duration = buffer.pts, buffer.dts, buffer.duration
        self._pushing = True  # the probe sees what it pushes, too
        pad.push(bad)
        self._pushing = False
        return self._gst.PadProbeReturn.DROP

    def _packets(self, _: object, __: object) -> Any:
        lost = self.order == "lossy" and self._random.random() < 0.3
        return self._gst.PadProbeReturn.DROP if lost else self._gst.PadProbeReturn.OK


def serve(facts: dict[str, Any]) -> None:
    """Until stdin ends."""
    import gi

    for name in ("Gst", "GstRtspServer"):
        gi.require_version(name, "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(facts["port"]))
    if facts["login"]:
        user, password, kind = facts["login"]
        server.set_auth(auth := GstRtspServer.RTSPAuth())
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        if kind == "digest":
            auth.set_supported_methods(DIGEST)
            auth.add_digest(user, password, token)
        else:
            auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    cameras = {}
    for mount, options in facts["cameras"].items():
        camera = cameras[mount] = Camera(Gst, **options)
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(camera.launch)
        factory.set_shared(True)
        factory.connect("media-configure", camera.made)
        if facts["login"]:
            permissions = GstRtspServer.RTSPPermissions()
            for what in ("access", "construct"):
                permissions.add_permission_for_role("viewer", f"media.factory.{what}", True)
            factory.set_permissions(permissions)
        server.get_mount_points().add_factory(mount, factory)
    server.attach(None)
    loop = GLib.MainLoop()
    print(server.get_bound_port(), flush=True)

    def obey() -> None:
        for line in sys.stdin:
            order, mount, *rest = line.split()
            if order == "size":
                cameras[mount].size(f"video/x-raw,format=I420,width={rest[0]},height={rest[1]}")
            elif order == "pattern":
                cameras[mount].pattern(rest[0])
            elif order in ORDERS:
                cameras[mount].order = order
            else:
                raise ValueError(line)
            print("done", flush=True)
        loop.quit()

    threading.Thread(target=obey, daemon=True).start()
    loop.run()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
