"""A Cuda whose device memory is the host's: what reads or writes an address does so for real, in this process."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from edge.cuda import Gpu, out_of_memory
from edge.errors import BackendError

ALIGNMENT = 256
_GUARD = 0xFD  # follows each allocation: a kernel that writes too far is found when the memory is freed
_FRESH = 0xCD  # device memory holds anything but zeros

_streams: dict[int, FakeCuda] = {}


def on_stream(handle: int) -> FakeCuda:
    """Whose stream this is: for other fakes that are given the handle alone, as TensorRT is."""
    return _streams[handle]


@dataclass
class Graph:
    """What was recorded. replays: how often it ran."""

    actions: list[Callable[[], None]] = field(default_factory=list)
    replays: int = 0


class FakeCuda:
    """An edge.cuda.Cuda of `capacity` bytes.

    Work happens when it is asked for, with two exceptions that show a caller who does not wait: a download reaches its
    array in `synchronize`, and an array that changed between its upload and `synchronize` fails there.

    live: size of every allocation that was not freed. pinned: likewise. log: (verb, bytes or name) of every call.
    A caller's mistake (free of what is no allocation, a copy beyond one, another thread) is an AssertionError; what can
    befall a correct caller is the BackendError that a real one raises.
    """

    def __init__(self, capacity: int = 1 << 30, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu("Fake", "8.7", capacity)
        self.about, self.driver = "a fake", "12.6"
        self.capacity = capacity
        self.live: dict[int, int] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.log: list[tuple[str, int | str]] = []
        self.closed = 0
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        self._downloads: list[tuple[NDArray[Any], bytes]] = []
        self._uploads: list[tuple[NDArray[Any], int]] = []
        self._recording: Graph | None = None
        self._thread = threading.get_ident()
        self.stream = id(self)
        _streams[self.stream] = self

    def count(self, verb: str) -> int:
        """How often it was asked for."""
        return sum(name == verb for name, _ in self.log)

    def enqueue(self, action: Callable[[], None]) -> None:
        """What happens on the stream: now, or at each replay of the graph being recorded."""
        if self._recording is None:
            action()
        else:
            self._recording.actions.append(action)

    def free_memory(self) -> int:
        self._asked("free_memory", 0)
        return self.capacity - sum(self.live.values())

    def allocate(self, size: int) -> int:
        self._asked("allocate", size, recordable=False)
        free = self.capacity - sum(self.live.values())
        if size > free:
            raise out_of_memory(size, free, self.capacity)
        buffer = np.full(size + 3 * ALIGNMENT, _FRESH, np.uint8)
        address = -(-buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
        start = address - buffer.ctypes.data
        buffer[start + size :] = _GUARD
        self._buffers[address], self.live[address] = buffer, size
        return address

    def free(self, address: int) -> None:
        self._asked("free", self.live.get(address, 0), recordable=False)
        assert address in self.live, f"{address:#x} is no allocation: {self.live}"
        size, buffer = self.live.pop(address), self._buffers.pop(address)
        beyond = buffer[address - buffer.ctypes.data + size :]
        assert (beyond == _GUARD).all(), f"written beyond an allocation of {size} bytes"

    def pin(self, size: int) -> NDArray[np.uint8]:
        self._asked("pin", size, recordable=False)
        array = np.full(size, _FRESH, np.uint8)
        self.pinned[array.ctypes.data] = array
        return array

    def unpin(self, array: NDArray[np.uint8]) -> None:
        self._asked("unpin", array.nbytes, recordable=False)
        assert self.pinned.pop(array.ctypes.data, None) is not None, "no array of pin()"

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._asked("upload", array.nbytes)
        assert array.flags.c_contiguous, "an upload takes a C-contiguous array"
        self._inside(address, array.nbytes)

        def action() -> None:
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
            self._uploads.append((array, crc32(array.tobytes())))

        self.enqueue(action)

    def download(self, array: NDArray[Any], address: int) -> None:
        self._asked("download", array.nbytes)
        assert array.flags.c_contiguous, "a download takes a C-contiguous array"
        self._inside(address, array.nbytes)
        self.enqueue(lambda: self._downloads.append((array, ctypes.string_at(address, array.nbytes))))

    def copy(self, to: int, source: int, size: int) -> None:
        self._asked("copy", size)
        self._inside(to, size)
        self._inside(source, size)
        self.enqueue(lambda: ctypes.memmove(to, source, size) and None)

    def synchronize(self) -> None:
        self._asked("synchronize", 0, recordable=False)
        uploads, downloads = self._uploads, self._downloads
        self._uploads, self._downloads = [], []
        for array, before in uploads:
            assert crc32(array.tobytes()) == before, "an uploaded array changed before synchronize"
        for array, data in downloads:
            ctypes.memmove(array.ctypes.data, data, len(data))

    def compile(self, source: str, kernel: str) -> object:
        """By g++ behind tests/cuda_shim.h. Raises BackendError for what it refuses, or a name the source lacks."""
        self._asked("compile", kernel, recordable=False)
        from tests.kernels import compiled

        try:
            return kernel, getattr(compiled(source), f"run_{kernel}")
        except AttributeError as error:
            raise BackendError(f"no kernel {kernel}") from error

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[np.generic]
    ) -> None:
        name, function = kernel
        self._asked("launch", name)
        assert min(*grid, *block) > 0, f"an empty launch is an error of CUDA: {grid} {block}"
        assert block[0] * block[1] * block[2] <= 1024, f"a block has at most 1024 threads: {block}"
        assert max(grid[1:]) <= 65535, f"y and z of a grid end at 65535: {grid}"
        values = [np.array([argument]) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))

        def action() -> None:
            function(*(ctypes.c_int(size) for size in (*grid, *block)), pointers)
            assert values  # alive as long as the graph

        self.enqueue(action)

    def record(self, work: Callable[[], None]) -> Graph:
        self._asked("record", 0, recordable=False)
        self._recording = graph = Graph()
        try:
            work()
        finally:
            self._recording = None
        return graph

    def replay(self, graph: object) -> None:
        assert isinstance(graph, Graph)
        self._asked("replay", len(graph.actions))
        graph.replays += 1
        for action in graph.actions:
            action()

    def event(self) -> object:
        self._asked("event", 0)
        return len(self.log)

    def milliseconds(self, start: object, end: object) -> float:
        """A millisecond for each call between them."""
        self._asked("milliseconds", 0)
        assert isinstance(start, int)
        assert isinstance(end, int)
        return float(end - start)

    def close(self) -> None:
        """leaked: what was left over is in `live` and `pinned` still, for a test to see."""
        self.closed += 1
        _streams.pop(self.stream, None)

    def _asked(self, verb: str, detail: int | str, *, recordable: bool = True) -> None:
        if self.closed:
            raise BackendError("the GPU was given back", remedy="open it again")
        assert threading.get_ident() == self._thread, f"{verb} from another thread than the one that opened the GPU"
        assert recordable or self._recording is None, f"{verb} while a graph is recorded"
        self.log.append((verb, detail))

    def _inside(self, address: int, size: int) -> None:
        fits = any(start <= address and address + size <= start + length for start, length in self.live.items())
        assert fits or not size, f"{size} bytes at {address:#x} are in no allocation: {self.live}"
