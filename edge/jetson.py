"""What the files of a Linux machine, above all of a Jetson, say of it: board, software, power, clocks, heat, memory.

Every function takes the root folder ("/", or a made-up tree) and answers None, or nothing, where a file is absent,
unreadable or says something else than expected. Nothing is run, and nothing needs root.

Where they are: NVIDIA, Jetson Linux Developer Guide, "Platform Power and Performance", and the kernel's documentation
of thermal zones and devfreq in sysfs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# L4T -> JetPack, https://developer.nvidia.com/embedded/jetpack-archive; an L4T that is not here tells the first number
JETPACKS = {
    "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.5.0": "6.2.2",
    "38.2.0": "7.0", "38.2.1": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
}  # fmt: skip
MAJORS = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}
PYTHONS = {"4": (3, 6), "5": (3, 8), "6": (3, 10), "7": (3, 12)}  # of the Ubuntu that a JetPack is


def version(text: str | None) -> tuple[int, ...]:
    """The numbers with which a version begins: (10, 3, 0) of "10.3.0.30-1+cuda12.5"; () of None or "unknown"."""
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def read(path: Path) -> str | None:
    """A small file's text, without the NUL that ends one of the device tree."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace").strip("\0\n ")
    except OSError:  # also of a sensor that sleeps
        return None


def number(path: Path) -> int | None:
    text = read(path)
    return int(text) if text and re.fullmatch(r"-?\d{1,18}", text) else None


def board(root: Path) -> str | None:
    """ "NVIDIA Jetson Orin Nano Developer Kit"; None on machines without a device tree."""
    return read(root / "proc/device-tree/model") or None


def l4t(root: Path) -> str | None:
    """Jetson Linux's version, "36.4.3"; None where this is none."""
    found = re.match(r"#? ?R(\d+) \(release\), REVISION: (\d+(?:\.\d+)?)", read(root / "etc/nv_tegra_release") or "")
    return ".".join([found[1], *found[2].split("."), "0"][:3]) if found else None


def jetpack(root: Path) -> str | None:
    """ "6.2", as its package says, else as its L4T has it; "6" where only that much is known."""
    if installed := package(root, "nvidia-jetpack"):
        return ".".join(map(str, version(installed))) or None
    linux = l4t(root)
    return (JETPACKS.get(linux) or MAJORS.get(version(linux)[0])) if linux else None


def package(root: Path, name: str) -> str | None:
    """The version of an installed Debian package."""
    try:
        with (root / "var/lib/dpkg/status").open(encoding="utf-8", errors="replace") as lines:
            inside = installed = False
            for line in lines:
                key, _, value = line.rstrip().partition(": ")
                if key == "Package":
                    inside, installed = value == name, False
                elif inside and key == "Status":
                    installed = value.endswith(" installed")
                elif inside and installed and key == "Version":
                    return value
    except OSError:
        pass
    return None


def driver(root: Path) -> str | None:
    """The version of NVIDIA's kernel driver, "540.4.0"."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", read(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def toolkits(root: Path) -> tuple[str, ...]:
    """Versions of CUDA toolkits below /usr/local, "12.6"; /usr/local/cuda only links to one of them."""
    try:
        names = [path.name for path in (root / "usr/local").iterdir()]
    except OSError:
        return ()
    return tuple(sorted((name[5:] for name in names if re.fullmatch(r"cuda-\d+\.\d+", name)), key=version))


def power_mode(root: Path) -> tuple[int, dict[int, str]] | None:
    """The number of the chosen power mode, and the names of all: 0, {0: "15W", 1: "25W", 2: "MAXN_SUPER"}."""
    status = re.search(r"pmode:(\d+)", read(root / "var/lib/nvpmodel/status") or "")
    modes = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read(root / "etc/nvpmodel.conf") or "", re.M)
    return (int(status[1]), {int(number): name for number, name in modes}) if status else None


@dataclass(frozen=True)
class Clock:
    """Of a Jetson's GPU, Hz. `jetson_clocks` makes least and most equal."""

    now: int
    least: int
    most: int


def gpu_clock(root: Path) -> Clock | None:
    """Of the devfreq device that is the GPU."""
    for folder in _gpus(root):
        now, least, most = (number(folder / f"{name}_freq") for name in ("cur", "min", "max"))
        if now is not None and least is not None and most is not None:
            return Clock(now, least, most)
    return None


def _gpus(root: Path) -> list[Path]:
    """The devfreq devices that are the GPU: "17000000.gpu" of an Orin, "gpu-gpc-0" of a Thor."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    return [folder for folder in folders if re.search(r"gpu(?!-nvd)|\.g[abpv]\d\db$", folder.name)]


def gpu_load(root: Path) -> float | None:
    """How busy the GPU is, 0..1. NVIDIA's driver gives it in thousandths; that of a Thor, and of a PC, has no file.

    tegrastats reads the same file (github.com/rbonghi/jetson_stats/issues/360).
    """
    for path in [*(gpu / "device/load" for gpu in _gpus(root)), root / "sys/devices/platform/gpu.0/load"]:
        if (load := number(path)) is not None and 0 <= load <= 1000:
            return load / 1000
    return None


def temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius by the zone's name; zones that sleep are absent."""
    zones = {}
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, now = read(folder / "type"), number(folder / "temp")
        if name and now is not None and now > -100_000:  # less is a sensor's way to say nothing
            zones[name] = now / 1000
    return zones


def throttled(root: Path) -> tuple[str, ...]:
    """What a Jetson slows down because it is too hot: "cpu", "gpu", "soc0" …"""
    folders = sorted((root / "sys/class/thermal").glob("cooling_device*"))
    names = [read(folder / "type") or "" for folder in folders if (number(folder / "cur_state") or 0) > 0]
    return tuple(name.removesuffix("-throttle-alert") for name in names if name.endswith("-throttle-alert"))


def memory(root: Path) -> tuple[int, int, int] | None:
    """Bytes in all, bytes that can be had, bytes of swap. A Jetson's GPU lives in the same, but not in swap."""
    text = read(root / "proc/meminfo") or ""
    found = [re.search(rf"^{key}:\s+(\d+) kB", text, re.M) for key in ("MemTotal", "MemAvailable", "SwapTotal")]
    total, free, swap = (1024 * int(one[1]) if one else None for one in found)
    return None if total is None or free is None else (total, free, swap or 0)
