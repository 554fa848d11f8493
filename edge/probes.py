"""What is here: one small function per fact, from a root folder and from what the libraries told, to a Finding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge import jetson
from edge.bundle import Platform
from edge.clock import judged
from edge.gstreamer import PACKAGES
from edge.jetson import version

State = Literal["good", "note", "warning", "bad"]
UNKNOWN = "unknown"
# An estimate, not measured: 1 GiB of workspace ([engine] of the recipe), the fp32 graphs once in ONNX Runtime and once
# in TensorRT's parser (0.6 GB each for the full models), and what CUDA and TensorRT load.
BUILDING = 3 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: good; note, worth knowing; warning, the box works, but less well than it could; bad, it does not work so.
    say: what it means and what to do; None where there is nothing to say.
    """

    name: str
    value: str
    state: State = "good"
    say: str | None = None


@dataclass(frozen=True)
class Seen:
    """What only libraries and the system itself can tell; "" and None: not there, or not told.

    python: "3.10.12". apart: in a virtual environment that does not see the system's packages. gpus: how many the
    driver offers. gpu and the next two, memory in bytes: of the first, where it could be opened; refused: why not.
    binding: "cuda.bindings 12.9.0". cuda: what the driver supports. here: GPU and TensorRT together, as an engine's
    fingerprint names them. synchronised: whether the kernel holds its clock to be right. off_chip: why NVIDIA's decoder
    of video is out of GStreamer's reach; None where it is not.
    """

    architecture: str = ""
    python: str = ""
    apart: bool = False
    tensorrt: str = ""
    gpus: int = 0
    gpu: str = ""
    compute_capability: str = ""
    memory: int = 0
    binding: str = ""
    cuda: str = ""
    refused: str = ""
    here: Platform | None = None
    synchronised: bool | None = None
    off_chip: str | None = ""


def machine(root: Path, seen: Seen) -> Finding:
    name = jetson.board(root) or jetson.read(root / "sys/class/dmi/id/product_name") or UNKNOWN
    return Finding("machine", f"{name}, {seen.architecture or UNKNOWN}")


def jetpack(root: Path) -> Finding | None:
    """None: no Jetson."""
    linux, pack = jetson.l4t(root), jetson.jetpack(root)
    if linux is None and pack is None:
        return None
    good = (pack or "").partition(".")[0] in ("6", "7")
    say = None if good else "Lookout is written for JetPack 6 and 7"
    return Finding("JetPack", f"{pack or UNKNOWN} (Jetson Linux {linux or UNKNOWN})", "good" if good else "note", say)


def driver(root: Path, seen: Seen) -> Finding:
    found = jetson.driver(root)
    if found is None and not seen.gpus:
        return Finding("NVIDIA driver", "none", "note")
    cuda = f", for CUDA {seen.cuda}" if seen.cuda else ""
    return Finding("NVIDIA driver", f"{found or UNKNOWN}{cuda}")


def gpu(root: Path, seen: Seen) -> Finding:
    if seen.gpu:
        sm = seen.compute_capability.replace(".", "")
        return Finding("GPU", f"{seen.gpu}, sm_{sm}, {gib(seen.memory)}, through {seen.binding}")
    if seen.gpus:
        return Finding("GPU", f"{seen.gpus}, not opened", "warning", seen.refused or None)
    if jetson.l4t(root) or jetson.driver(root):
        remedy = "look into `dmesg`; the user may have to be in the groups video and render"
        return Finding("GPU", "none, in spite of its driver", "warning", remedy)
    return Finding("GPU", "none", "note", "the CPU runs the networks, by ONNX Runtime")


def tensorrt(root: Path, seen: Seen) -> Finding:
    packaged = jetson.package(root, "python3-libnvinfer")
    if seen.tensorrt:
        return Finding("TensorRT", seen.tensorrt)
    if not seen.gpus and not packaged:
        return Finding("TensorRT", "none", "note", "not needed without a GPU")
    if packaged and seen.apart:
        remedy = "make this virtual environment anew with `python3 -m venv --system-site-packages .venv`"
        return Finding("TensorRT", f"{packaged.split('-')[0]} of the system, out of sight", "warning", remedy)
    if packaged:
        remedy = "the system's is for the system's own Python; make the virtual environment with that one"
        return Finding("TensorRT", f"{packaged.split('-')[0]} of the system, not for this Python", "warning", remedy)
    command = "sudo apt install nvidia-jetpack" if jetson.l4t(root) else "pip install tensorrt"
    return Finding("TensorRT", "none", "warning", f"`{command}`")


def python(root: Path, seen: Seen) -> Finding:
    pack = (jetson.jetpack(root) or "").partition(".")[0]
    wanted = jetson.PYTHONS.get(pack)
    if wanted and version(seen.python)[:2] != wanted and not seen.tensorrt:
        say = f"JetPack {pack}'s TensorRT is for Python {wanted[0]}.{wanted[1]}: make the virtual environment with that"
        return Finding("Python", seen.python or UNKNOWN, "warning", say)
    return Finding("Python", seen.python or UNKNOWN)


def decoding(root: Path, seen: Seen) -> Finding:
    """Of rtsp:// cameras, as `[runtime] decoder = "auto"` chooses."""
    if seen.off_chip is None:
        return Finding("video decoding", "GStreamer, by NVIDIA's decoder")
    if not jetson.l4t(root):
        return Finding("video decoding", "FFmpeg, by the CPU")
    say = (
        f"this Jetson's own decoder is out of reach: {seen.off_chip or UNKNOWN}; `sudo apt install {PACKAGES} "
        "nvidia-l4t-gstreamer`, and a virtual environment that sees the system's packages"
    )
    return Finding("video decoding", "FFmpeg, by the CPU", "warning", say)


def power(root: Path) -> Finding | None:
    if (found := jetson.power_mode(root)) is None:
        return Finding("power mode", UNKNOWN, "note") if jetson.l4t(root) else None
    chosen, names = found
    fastest = [number for number, name in names.items() if name.startswith("MAXN")]
    value = f"{chosen} ({names.get(chosen, UNKNOWN)})"
    if fastest and chosen not in fastest:
        number = fastest[-1]
        say = f"{names[number]} is faster, and hotter: `sudo nvpmodel -m {number}`"
        return Finding("power mode", value, "note", say)
    return Finding("power mode", value)


def clocks(root: Path) -> Finding | None:
    if (clock := jetson.gpu_clock(root)) is None:
        return Finding("GPU clock", UNKNOWN, "note") if jetson.l4t(root) else None
    value = f"{clock.now / 1e6:.0f} MHz of {clock.least / 1e6:.0f} to {clock.most / 1e6:.0f}"
    if clock.least < clock.most:
        say = "it follows the load; `sudo jetson_clocks` holds it at the top, for steady times and for measuring"
        return Finding("GPU clock", value, "note", say)
    return Finding("GPU clock", value)


def temperature(root: Path) -> Finding:
    zones, slow = jetson.temperatures(root), jetson.throttled(root)
    hottest = max(zones, key=lambda name: zones[name], default=None)
    value = f"{zones[hottest]:.0f} °C ({hottest})" if hottest else UNKNOWN
    if slow:
        say = "it slows down because of heat: give it air, a fan, or a smaller power mode"
        return Finding("temperature", f"{value}, throttled: {', '.join(slow)}", "warning", say)
    return Finding("temperature", value, "good" if hottest else "note")


def memory(root: Path) -> Finding:
    if (found := jetson.memory(root)) is None:
        return Finding("memory", UNKNOWN, "note")
    total, free, swap = found
    value = f"{gib(free)} free of {gib(total)}, {gib(swap)} of swap"
    if jetson.l4t(root) and free < BUILDING:
        say = (
            f"building engines of the full models may want {gib(BUILDING)} (an estimate), and swap is no memory for "
            "the GPU: stop the desktop (`sudo systemctl isolate multi-user.target`) and other programs first"
        )
        return Finding("memory", value, "warning", say)
    return Finding("memory", value)


def clock(root: Path, seen: Seen) -> Finding:
    right = judged(root, seen.synchronised)
    if right is None:
        return Finding("clock", UNKNOWN, "note")
    if right:
        return Finding("clock", "synchronised")
    say = "events carry the time of their frame: `sudo timedatectl set-ntp true`, or whatever sets the time here"
    return Finding("clock", "not synchronised", "warning", say)


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
