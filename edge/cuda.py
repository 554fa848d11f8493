"""What the box asks of an NVIDIA GPU, in a few verbs, and the choice of the Python binding that answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError

INSTALL = (
    'install one: `pip install "cuda-bindings<13"` on JetPack 6 and CUDA 12, `pip install "cuda-bindings>=13"` on '
    "JetPack 7 and CUDA 13, or `pip install pycuda`, which needs nvcc"
)
NO_DRIVER = (
    "a Jetson's comes with JetPack, a desktop's is NVIDIA's (`nvidia-smi` shows it; containers need --gpus or "
    '--runtime nvidia); without a GPU set backend = "onnxruntime"'
)
_DRIVERS = ("libcuda.so.1", "libcuda.so")


@dataclass(frozen=True)
class Gpu:
    """name: as its driver says it, "Orin". compute_capability: "8.7". memory: bytes, on a Jetson the whole board's.

    multiprocessors: boards of one name differ in how many there are; 0: not known.
    """

    name: str
    compute_capability: str
    memory: int
    multiprocessors: int = 0

    @property
    def model(self) -> str:
        """What tells it from others that an engine is not for: "Orin, 8 multiprocessors"."""
        return f"{self.name}, {self.multiprocessors} multiprocessors" if self.multiprocessors else self.name


class Cuda(Protocol):
    """One GPU and one stream, on which everything that is asked for happens in order.

    Its context is current on the thread that opened it, and only that thread may call it: the box runs its networks
    in one. `upload`, `download`, `copy`, `launch` and `replay` return before they happened; what they touch must live
    until `synchronize`. Every method raises BackendError with CUDA's own name of what went wrong, which may be told
    by a later call than the one it happened in; use after `close` is a BackendError too.

    about: which binding, "cuda.bindings 12.9.0". driver: the CUDA version that it supports, "12.6". stream: its handle,
    for TensorRT.
    """

    @property
    def gpu(self) -> Gpu: ...

    @property
    def about(self) -> str: ...

    @property
    def driver(self) -> str: ...

    @property
    def stream(self) -> int: ...

    def free_memory(self) -> int:
        """Bytes."""
        ...

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, at least 256-byte aligned. Raises BackendError with wanted, free and total."""
        ...

    def free(self, address: int) -> None: ...

    def pin(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, (size,): copies from and to it do not wait."""
        ...

    def unpin(self, array: NDArray[np.uint8]) -> None:
        """Give back an array of `pin`: the very one, which nothing may touch any more."""
        ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """C-contiguous array to the device."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None:
        """From the device into a C-contiguous array."""
        ...

    def copy(self, to: int, source: int, size: int) -> None:
        """Bytes from device to device."""
        ...

    def synchronize(self) -> None:
        """Wait for everything asked for. Raises what went wrong since."""
        ...

    def compile(self, source: str, kernel: str) -> object:
        """The kernel of this name (`extern "C"`) of a CUDA C++ source, for this GPU; seconds, so once at start."""
        ...

    def launch(
        self,
        kernel: object,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
    ) -> None:
        """arguments: typed as the kernel's parameters are: addresses np.uint64, sizes np.int32."""
        ...

    def record(self, work: Callable[[], None]) -> object | None:
        """A CUDA graph of what `work` asks for, which does not happen now; None: this cannot be recorded.

        `work` may raise; nothing is recorded then, and the exception goes on.
        """
        ...

    def replay(self, graph: object) -> None: ...

    def event(self) -> object:
        """A mark in the stream, reached when everything asked for before it has happened."""
        ...

    def milliseconds(self, start: object, end: object) -> float:
        """Between two events, after `synchronize`."""
        ...

    def close(self) -> None:
        """Release graphs, modules, events, the stream, memory left over and the context, in this order; twice is once.

        Also after an error: whatever refuses to be released, the rest is; then the first refusal is raised.
        """
        ...


def open_cuda() -> Cuda:
    """Device 0 by cuda.bindings where it is installed, else by pycuda.

    CUDA_VISIBLE_DEVICES chooses another. Raises BackendError: no binding, no driver, no GPU, or one that refuses.
    """
    from edge.cuda_bindings import BindingsCuda
    from edge.cuda_pycuda import PycudaCuda

    if BindingsCuda.installed():
        return BindingsCuda()
    if PycudaCuda.installed():
        return PycudaCuda()
    raise BackendError("no Python binding for CUDA here", expected="cuda-bindings or pycuda", remedy=INSTALL)


def gpu_count() -> int:
    """GPUs that the driver of this machine offers, by its library alone; 0 where there is none, or it refuses."""
    for name in _DRIVERS:
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def out_of_memory(wanted: int, free: int, total: int, *, kind: str = "GPU") -> BackendError:
    """The one sentence for it, whichever binding refused. All in bytes."""
    return BackendError(
        f"out of {kind} memory",
        expected=f"{_mib(wanted)} free",
        got=f"{_mib(free)} of {_mib(total)}",
        remedy="close what else uses the GPU, or build engines for smaller batches ([engine] of the recipe)",
    )


def _mib(size: int) -> str:
    return f"{size} bytes ({size / 2**20:.1f} MiB)"
