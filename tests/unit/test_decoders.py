"""Which program decodes an rtsp:// camera, where GStreamer is and where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge import gstreamer
from edge.decoders import Decoders
from edge.errors import CaptureError
from edge.opencv import OpenCv

JETSON = "# R36 (release), REVISION: 4.4, GCID: 1, BOARD: generic, EABI: aarch64\n"
# In a Python of its own, which has no gi whatever this one has.
PROGRAM = """
import json, logging, sys
from pathlib import Path
sys.modules["gi"] = None
from edge.decoders import Decoders
from edge.errors import ConfigError
logging.basicConfig(format="%(levelname)s %(message)s", level="INFO")
try:
    decoders = Decoders(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps([decoders.of("a", source).__name__ for source in sys.argv[3:]]))
except ConfigError as error:
    print(error)
"""


def without_gstreamer(decoder: str, root: Path, *sources: str) -> tuple[str, list[str]]:
    command = [sys.executable, "-c", PROGRAM, decoder, str(root), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip(), done.stderr.splitlines()


def test_auto_without_gstreamer_is_ffmpeg(tmp_path: Path) -> None:
    said, log = without_gstreamer("auto", tmp_path, "rtsp://me:secret@host/x", "http://host/x", "0")
    assert json.loads(said) == ["OpenCv"] * 3
    assert log == ["INFO camera 'a': decoded by FFmpeg, through OpenCV"], "once per rtsp:// camera"


def test_on_a_jetson_that_is_a_warning_once(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(JETSON)
    said, log = without_gstreamer("auto", tmp_path, "rtsp://host/x", "rtsp://host/y")
    assert json.loads(said) == ["OpenCv"] * 2
    warnings = [line for line in log if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING rtsp:// cameras are decoded by the CPU, not by this Jetson's decoder: ")
    assert "gi" in warnings[0]
    assert without_gstreamer("ffmpeg", tmp_path, "rtsp://host/x")[1] == [log[-1]], "chosen, so no warning"


def test_gstreamer_asked_for_where_it_is_not_is_a_mistake_with_a_remedy(tmp_path: Path) -> None:
    said, _ = without_gstreamer("gstreamer", tmp_path, "rtsp://host/x")
    assert said.startswith("runtime.decoder: gstreamer cannot be used here: ")
    for package in ("python3-gi", "gir1.2-gst-plugins-base-1.0", "gstreamer1.0-plugins-good", "gstreamer1.0-libav"):
        assert package in said
    assert json.loads(without_gstreamer("gstreamer", tmp_path, "http://host/x")[0]) == ["OpenCv"], "not for this one"


def test_what_is_chosen_where_gstreamer_is(tmp_path: Path) -> None:
    if lacking := gstreamer.lacking():
        pytest.skip(f"GStreamer in this Python: {lacking}")
    assert Decoders("gstreamer", tmp_path).of("a", "rtsp://host/x") is gstreamer.GStreamer
    assert Decoders("gstreamer", tmp_path).of("a", "http://host/x") is OpenCv
    assert Decoders("ffmpeg", tmp_path).of("a", "rtsp://host/x") is OpenCv
    auto = gstreamer.GStreamer if gstreamer.on_chip() else OpenCv
    assert Decoders("auto", tmp_path).of("a", "rtsps://host/x") is auto


@pytest.mark.parametrize(
    ("encoding", "chip", "chain"),
    [
        ("H264", True, ("rtph264depay", "h264parse", "nvv4l2decoder", "nvvidconv")),
        ("H265", True, ("rtph265depay", "h265parse", "nvv4l2decoder", "nvvidconv")),
        ("H264", False, ("rtph264depay", "h264parse", "avdec_h264", "videoconvert")),
        ("H265", False, ("rtph265depay", "h265parse", "avdec_h265", "videoconvert")),
        ("JPEG", True, ("rtpjpegdepay", "jpegdec", "videoconvert")),
        ("JPEG", False, ("rtpjpegdepay", "jpegdec", "videoconvert")),
    ],
)
def test_the_elements_for_an_encoding(encoding: str, chip: bool, chain: tuple[str, ...]) -> None:
    assert gstreamer.chain_of(encoding, chip) == chain


def test_an_encoding_that_is_not_known() -> None:
    with pytest.raises(CaptureError, match="its encoding is VP8: expected H264 or H265 or JPEG"):
        gstreamer.chain_of("VP8", False)
