"""Combinations of versions that are known to go wrong, each with where that is told and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Version = tuple[int, ...]  # () is unknown, of which nothing is said


@dataclass(frozen=True)
class Versions:
    """Of what one machine has; () where it has none, or does not tell.

    packaged: of the system's TensorRT for Python, which another Python may not see. cuda: what the driver supports.
    toolkits: of CUDA below /usr/local. binding: "cuda.bindings" or "pycuda".
    """

    python: Version = ()
    tensorrt: Version = ()
    packaged: Version = ()
    compute_capability: Version = ()
    cuda: Version = ()
    l4t: Version = ()
    toolkits: tuple[Version, ...] = ()
    binding: str = ""
    binding_version: Version = ()

    @property
    def compiler(self) -> Version:
        """The CUDA that kernels are compiled with: NVRTC comes in the binding's number, nvcc with a toolkit."""
        return self.binding_version if self.binding == "cuda.bindings" else min(self.toolkits, default=())


@dataclass(frozen=True)
class KnownBad:
    """state: note where the box guards against it by itself."""

    name: str
    applies: Callable[[Versions], bool]
    state: Literal["note", "warning", "bad"]
    say: str
    source: str


def _within(low: Version, one: Version, below: Version) -> bool:
    return bool(one) and low <= one < below


GUARDED = "an engine that answers otherwise than ONNX Runtime is not packed, and the box compares again at each start"

KNOWN_BAD = (
    KnownBad(
        "TensorRT 10.3 to 10.7 and vision transformers",
        lambda has: _within((10, 3), has.tensorrt, (10, 8)),
        "note",
        f"some users got wrong answers; {GUARDED}. Where it refuses, take a newer TensorRT: JetPack 7.2 has 10.16",
        "https://github.com/NVIDIA/TensorRT/issues/4334, …/4723, …/4742, …/4419",
    ),
    KnownBad(
        "sm_120 and half-precision attention",
        lambda has: has.compute_capability == (12, 0) and _within((10,), has.tensorrt, (10, 17)),
        "note",
        f"a vision transformer's fused attention was wrong without an error; {GUARDED}",
        "https://github.com/NVIDIA/TensorRT/issues/4837",
    ),
    KnownBad(
        "TensorRT before 8.6",
        lambda has: _within((0,), has.tensorrt, (8, 6)),
        "bad",
        "it has no layer normalisation of its own, and nothing here was written for it: take JetPack 6 or 7, or set "
        'backend = "onnxruntime"',
        "https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/install-guide/index.html",
    ),
    KnownBad(
        "TensorRT 8 and Python 3.12 or newer",
        lambda has: _within((8,), has.packaged or has.tensorrt, (9,)) and has.python >= (3, 12),
        "warning",
        "its Python packages end at 3.11: make the virtual environment with the system's own Python",
        "https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/install-guide/index.html",
    ),
    KnownBad(
        "JetPack 5 and older",
        lambda has: _within((1,), has.l4t, (36,)),
        "warning",
        "their TensorRT is for Python 3.8 or 3.6, and Lookout needs 3.10: an Orin takes JetPack 6 or 7; Xavier, TX2 "
        "and Nano have nothing newer, and run the bundle on their CPU with a newer Python",
        "https://developer.nvidia.com/embedded/jetpack-archive",
    ),
    KnownBad(
        "GPUs before sm_75 and CUDA 13",
        # a driver for CUDA 13 still runs them (R580 does): it is the compiler that does not know them
        lambda has: _within((1,), has.compute_capability, (7, 5)) and has.compiler >= (13,),
        "bad",
        "CUDA 13 compiles nothing for them (Xavier is sm_72, TX2 sm_62, Nano sm_53): use CUDA 12 or older",
        "https://docs.nvidia.com/cuda/archive/13.0.0/cuda-toolkit-release-notes/",
    ),
    KnownBad(
        "cuda-bindings newer than the driver",
        lambda has: has.binding == "cuda.bindings" and bool(has.cuda) and has.binding_version[:1] > has.cuda[:1],
        "bad",
        'its first number is to be the driver\'s: `pip install "cuda-bindings<13"` on JetPack 6 and CUDA 12',
        "https://nvidia.github.io/cuda-python/cuda-bindings/latest/install.html",
    ),
    KnownBad(
        "pycuda among several CUDA toolkits",
        lambda has: has.binding == "pycuda" and len(has.toolkits) > 1,
        "note",
        "it was compiled against the toolkit whose nvcc was found first; after a change of toolkits, or where it does "
        "not load: `pip install --force-reinstall --no-cache-dir pycuda`",
        "https://documen.tician.de/pycuda/misc.html",
    ),
    KnownBad(
        "Jetson Linux since 36.4.7 and large allocations",
        lambda has: _within((36, 4, 7), has.l4t, (37,)),
        "note",
        "users report that some GB are refused while there is memory (NvMapMemAllocInternalTagged, error 12); where a "
        "build says so, restart the board and build before anything else runs",
        "https://github.com/ggml-org/llama.cpp/pull/23732",
    ),
)


def known_bad(has: Versions) -> list[KnownBad]:
    """Those that apply here."""
    return [one for one in KNOWN_BAD if one.applies(has)]
