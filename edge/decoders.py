"""Which program decodes a camera: GStreamer of the system, with a Jetson's own decoder, or FFmpeg of OpenCV."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edge import gstreamer, jetson
from edge.config import Decoder
from edge.errors import ConfigError
from edge.live import Reader
from edge.opencv import OpenCv

logger = logging.getLogger(__name__)

Call = Callable[[str, float], Reader]  # source, timeout in seconds


class Decoders:
    """Answers once per camera, and says so in the log."""

    def __init__(self, wanted: Decoder, root: Path = Path("/")) -> None:
        """root: where it is looked whether this is a Jetson."""
        self._wanted, self._root = wanted, root
        self._gstreamer: bool | None = None  # None: not looked for yet, as that takes a moment

    def of(self, name: str, source: str) -> Call:
        """How camera `name` is called. Raises ConfigError where GStreamer is asked for and not here."""
        if not source.startswith(("rtsp://", "rtsps://")):
            return OpenCv
        if self._gstreamer is None:
            self._gstreamer = self._wanted != "ffmpeg" and self._by_gstreamer()
        about = gstreamer.about() if self._gstreamer else OpenCv.about
        logger.info("camera %r: decoded by %s", name, about, extra={"camera": name})
        return gstreamer.GStreamer if self._gstreamer else OpenCv

    def _by_gstreamer(self) -> bool:
        if self._wanted == "gstreamer":
            if lacking := gstreamer.lacking():
                packages = f"{gstreamer.PACKAGES} gstreamer1.0-libav"
                remedy = f"`sudo apt install {packages}`, and a virtual environment that sees the system's packages"
                raise ConfigError(f"runtime.decoder: gstreamer cannot be used here: {lacking}", remedy=remedy)
            return True
        why = gstreamer.off_chip()
        if why and jetson.l4t(self._root):
            logger.warning("rtsp:// cameras are decoded by the CPU, not by this Jetson's decoder: %s", why)
        return not why
