"""rtsp:// cameras through the system's GStreamer: a Jetson's own decoder, or one in software.

    rtspsrc ─▶ depay ─▶ parse ─▶ nvv4l2decoder ─▶ nvvidconv    ─▶ appsink (BGRx; keeps the newest picture)
                                 avdec_h264 …     videoconvert

An address never becomes part of a pipeline's text: it would be read as one, and shown. Only here `gi` is imported,
which is the system's package for the system's own Python.
"""

from __future__ import annotations

import time
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import cv2
import numpy as np

from edge.address import parted
from edge.errors import CaptureError
from edge.knock import knock
from edge.values import Image

SLICE = 0.2  # s; the longest that grab() waits
LATENCY = 200  # ms that packets out of order are waited for
ON_CHIP = ("nvv4l2decoder", "nvvidconv")
# By the name in a stream's description: what unpacks and what decodes it, with NVIDIA's decoder and without.
CHAINS = {
    "H264": ("rtph264depay", "h264parse", "avdec_h264"),
    "H265": ("rtph265depay", "h265parse", "avdec_h265"),
    "JPEG": ("rtpjpegdepay", "jpegdec"),
}
PACKAGES = "python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good gstreamer1.0-plugins-bad"  # of Debian
NEEDED = ("rtspsrc", "appsink", "videoconvert", *(name for chain in CHAINS.values() for name in chain))


@lru_cache(maxsize=1)
def load() -> Any:
    """The module Gst, ready. Raises ImportError or ValueError where it is not here."""
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")  # gives appsink its methods
    from gi.repository import Gst, GstApp

    Gst.init(None)
    if not hasattr(GstApp, "AppSink"):
        raise ImportError("GstApp has no AppSink")
    return Gst


def lacking() -> str | None:
    """What is not here of what it takes, in words; None where nothing is."""
    try:
        gst = load()
    except Exception as error:  # gi raises of all kinds, also where a library is of another version
        return " ".join(f"{error}".split())
    software = {name for chain in CHAINS.values() for name in chain[-1:]}
    missing = [name for name in NEEDED if not (on_chip() and name in software) and not gst.ElementFactory.find(name)]
    return f"no element {', '.join(missing)}" if missing else None


def on_chip() -> bool:
    """Whether NVIDIA's decoder can be used. Raises as load() does."""
    return all(load().ElementFactory.find(name) for name in ON_CHIP)


def off_chip() -> str | None:
    """Why NVIDIA's decoder is out of reach; None where it is not. Raises nothing."""
    missing = lacking()
    if not missing and not on_chip():
        missing = f"GStreamer has no {' or no '.join(ON_CHIP)}"
    return missing


def about() -> str:
    """Who decodes, for the log. Raises as load() does."""
    return f"GStreamer, with {ON_CHIP[0] if on_chip() else 'software'}"


def chain_of(encoding: str, chip: bool) -> tuple[str, ...]:
    """The elements between rtspsrc and appsink. Raises CaptureError for an encoding that is not known."""
    if encoding not in CHAINS:
        raise CaptureError(f"its encoding is {encoding}", expected=" or ".join(CHAINS))
    chain = CHAINS[encoding]
    if chip and encoding != "JPEG":
        return (*chain[:-1], *ON_CHIP)
    return (*chain, "videoconvert")


class GStreamer:
    """Reads one camera; a Reader of edge/live.py."""

    def __init__(self, source: str, timeout: float) -> None:
        """timeout: seconds for the first answer, and between pictures, after which it is given up."""
        gst = self._gst = load()
        self._url, self._timeout = source, timeout
        self._latest: float | None = None  # monotonic; of the call, then of the latest picture
        self._sample: Any = None
        self._problem = ""  # in words, perhaps found by a thread of GStreamer's
        address = parted(source)
        self._pipeline = gst.Pipeline.new(None)
        self._source, self._sink = _made(gst, "rtspsrc"), _made(gst, "appsink")
        self._source.set_property("location", address.url)
        if address.user or address.password:
            self._source.set_property("user-id", address.user)
            self._source.set_property("user-pw", address.password)
        gst.util_set_object_arg(self._source, "protocols", "tcp")
        # Cameras sign their certificates themselves, and FFmpeg does not ask either.
        gst.util_set_object_arg(self._source, "tls-validation-flags", "0")
        self._source.set_property("latency", LATENCY)
        self._source.set_property("tcp-timeout", int(timeout * 1e6))  # us
        self._sink.set_property("caps", gst.Caps.from_string("video/x-raw,format=BGRx"))
        self._sink.set_property("max-buffers", 1)
        self._sink.set_property("drop", True)
        self._sink.set_property("sync", False)
        self._pipeline.add(self._source)
        self._pipeline.add(self._sink)
        self._handlers = [
            self._source.connect("select-stream", lambda _, __, caps: _is_video(caps)),
            self._source.connect("pad-added", self._linked),
        ]
        self._bus = self._pipeline.get_bus()

    def grab(self) -> bool:
        """True when a picture has come, False when none has for a moment.

        Raises CaptureError where the camera cannot be called, breaks off, or has sent nothing for `timeout` seconds.
        """
        if self._latest is None:
            knock(self._url, self._timeout)
            self._pipeline.set_state(self._gst.State.PLAYING)
            self._latest = time.monotonic()
            return False
        sample = self._sink.try_pull_sample(int(SLICE * self._gst.SECOND))
        while (
            message := self._bus.pop()
        ) is not None:  # with each picture, or they would gather: some come each second
            self._heard(message)
        if sample is not None:
            self._sample, self._latest = sample, time.monotonic()
            return True
        if self._problem:
            raise CaptureError(self._problem)
        if time.monotonic() - self._latest > self._timeout:
            raise CaptureError(f"no picture for {self._timeout:g} s")
        return False

    def retrieve(self) -> Image | None:
        """The picture that has come; None where its size is not what it says."""
        facts = self._sample.get_caps().get_structure(0)
        (known, width), (too, height) = facts.get_int("width"), facts.get_int("height")
        buffer = self._sample.get_buffer()
        good, memory = buffer.map(self._gst.MapFlags.READ)  # extract_dup() takes 14 ms for 1080p, this 1 ms
        if not good:
            return None
        try:
            data = np.frombuffer(memory.data, np.uint8)
            if not (known and too and width > 0 and height > 0) or len(data) % height or len(data) < 4 * width * height:
                return None
            rows = data.reshape(height, -1)[:, : 4 * width]  # they may be longer than their pixels
            return cast(Image, cv2.cvtColor(rows.reshape(height, width, 4), cv2.COLOR_BGRA2BGR))
        finally:
            buffer.unmap(memory)

    def close(self) -> None:
        """Within a moment, also where the camera no longer answers."""
        for handler in self._handlers:
            self._source.disconnect(handler)
        self._pipeline.set_state(self._gst.State.NULL)
        self._bus.set_flushing(True)
        self._sample = None

    def _linked(self, _: object, pad: Any) -> None:
        """rtspsrc knows what comes: append what unpacks and decodes it. Called by a thread of GStreamer's."""
        try:
            caps = pad.get_current_caps() or pad.query_caps(None)
            if not _is_video(caps) or self._sink.get_static_pad("sink").is_linked():
                return
            encoding = caps.get_structure(0).get_string("encoding-name") or "unknown"
            elements = [_made(self._gst, name) for name in chain_of(encoding, on_chip())]
            for element in elements:
                self._pipeline.add(element)
            good = all(one.link(other) for one, other in pairwise([*elements, self._sink]))
            for element in reversed(elements):
                element.sync_state_with_parent()
            if not good or pad.link(elements[0].get_static_pad("sink")) != self._gst.PadLinkReturn.OK:
                raise CaptureError(f"GStreamer cannot decode its {encoding}")
        except CaptureError as error:
            self._problem = str(error)

    def _heard(self, message: Any) -> None:
        """What the pipeline tells. Only the first error counts: those behind it are its consequences.

        Never in its own words, as they may hold the address.
        """
        if message.type == self._gst.MessageType.EOS:
            self._problem = self._problem or "broke off"
        elif message.type == self._gst.MessageType.ERROR and not self._problem:
            self._problem = self._in_words(message.parse_error()[0])

    def _in_words(self, error: Any) -> str:
        codes = self._gst.ResourceError
        if error.matches(codes.quark(), codes.NOT_AUTHORIZED):
            return "cannot be opened: it refuses this user and password"
        if error.matches(codes.quark(), codes.NOT_FOUND):
            return "cannot be opened: it has no such stream"
        return "broke off" if self._sample is not None else "cannot be opened"


def _made(gst: Any, name: str) -> Any:
    element = gst.ElementFactory.make(name, None)
    if element is None:
        raise CaptureError(f"GStreamer has no {name} here")
    return element


def _is_video(caps: Any) -> bool:
    return bool(caps.get_structure(0).get_string("media") == "video")
