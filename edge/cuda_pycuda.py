"""A Cuda by pycuda, for those who have it: the same driver, and nvcc to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.cuda import NO_DRIVER, Gpu, out_of_memory
from edge.errors import BackendError


class PycudaCuda:
    """Device 0, its primary context (which TensorRT shares), one stream of its own; pycuda.autoinit has no part in it.

    pycuda raises what went wrong, and releases what is no longer referred to: modules, graphs, events, the stream.
    """

    @staticmethod
    def installed() -> bool:
        try:
            import pycuda  # noqa: F401
        except ImportError:
            return False
        return True

    def __init__(self) -> None:
        import pycuda

        try:
            import pycuda.driver as driver
        except ImportError as error:  # it is linked against the driver's library
            raise BackendError(f"no CUDA driver here: {error}", remedy=NO_DRIVER) from error
        self._driver: Any = driver
        self.about = f"pycuda {pycuda.VERSION_TEXT}"
        self._modules: list[Any] = []
        self._graphs: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._context: Any = None
        self._stream: Any = None
        with self._asked("no GPU here", NO_DRIVER):
            driver.init()
            version = driver.get_driver_version()
            count = driver.Device.count()
        self.driver = f"{version // 1000}.{version % 1000 // 10}"
        if not count:
            raise BackendError("no GPU here: the CUDA driver offers none", remedy=NO_DRIVER)
        with self._asked():
            device = driver.Device(0)
            major, minor = device.compute_capability()
            multiprocessors = device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
            self.gpu = Gpu(device.name(), f"{major}.{minor}", int(device.total_memory()), int(multiprocessors))
            context = device.retain_primary_context()
        try:
            with self._asked():
                context.push()
                self._context = context
                self._stream = driver.Stream()
        except BackendError:
            self.close()
            raise
        self.stream = int(self._stream.handle)

    def free_memory(self) -> int:
        with self._asked() as driver:
            return int(driver.mem_get_info()[0])

    def allocate(self, size: int) -> int:
        with self._asked() as driver:
            try:
                memory = driver.mem_alloc(max(1, size))
            except driver.MemoryError as error:
                raise out_of_memory(size, *driver.mem_get_info()) from error
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        with self._asked():
            self._memory.pop(address).free()

    def pin(self, size: int) -> NDArray[np.uint8]:
        with self._asked() as driver:
            try:
                array = driver.pagelocked_empty(max(1, size), np.uint8)
            except driver.MemoryError as error:
                raise out_of_memory(size, *driver.mem_get_info(), kind="page-locked") from error
        self._pinned[array.ctypes.data] = array.base  # pycuda's own object, which owns the memory
        return np.asarray(array[:size], np.uint8)

    def unpin(self, array: NDArray[np.uint8]) -> None:
        with self._asked():
            self._pinned.pop(array.ctypes.data).free()

    def upload(self, address: int, array: NDArray[Any]) -> None:
        if array.nbytes:
            with self._asked() as driver:
                driver.memcpy_htod_async(address, array, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        if array.nbytes:
            with self._asked() as driver:
                driver.memcpy_dtoh_async(array, address, self._stream)

    def copy(self, to: int, source: int, size: int) -> None:
        with self._asked() as driver:
            driver.memcpy_dtod_async(to, source, size, self._stream)

    def synchronize(self) -> None:
        with self._asked():
            self._stream.synchronize()

    def compile(self, source: str, kernel: str) -> object:
        major, _, minor = self.gpu.compute_capability.partition(".")
        with self._asked() as driver:
            from pycuda.compiler import compile as by_nvcc

            try:
                code = by_nvcc(source, no_extern_c=True, arch=f"sm_{major}{minor}")
            except driver.CompileError as error:
                raise BackendError(f"nvcc cannot compile for sm_{major}{minor}: {error.stderr}") from error
            except OSError as error:  # pytools' ExecError
                remedy = "put CUDA's bin folder on PATH: `export PATH=/usr/local/cuda/bin:$PATH`"
                raise BackendError(f"nvcc does not run: {error}", remedy=remedy) from error
            module = driver.module_from_buffer(code)
            self._modules.append(module)
            function: object = module.get_function(kernel)
        return function

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
    ) -> None:
        with self._asked():
            kernel(*arguments, grid=grid, block=block, stream=self._stream)

    def record(self, work: Callable[[], None]) -> object | None:
        """None where this pycuda has no graphs, as releases up to 2026.1 have none."""
        with self._asked():
            if not hasattr(self._stream, "begin_capture"):
                return None
            self._stream.begin_capture()
            try:
                work()
            except BaseException:
                self._stream.end_capture()
                raise
            graph: object = self._stream.end_capture().instantiate()
        self._graphs.append(graph)
        return graph

    def replay(self, graph: Any) -> None:
        with self._asked():
            graph.launch(self._stream)

    def event(self) -> object:
        with self._asked() as driver:
            return driver.Event().record(self._stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        with self._asked():
            return float(start.time_till(end))

    def close(self) -> None:
        if self._driver is None:
            return
        memory = [owner.free for owner in (*self._memory.values(), *self._pinned.values())]
        context = [self._context.pop, self._context.detach] if self._context is not None else []
        refused = None
        for step in [self._wait, self._forget, *memory, *context]:
            try:
                with self._asked():
                    step()
            except BackendError as error:
                refused = refused or error
        self._memory, self._pinned, self._context, self._driver = {}, {}, None, None
        if refused is not None:
            raise refused

    def _wait(self) -> None:
        """Nothing is taken away under running work; not in `close`, where a bound method would keep the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def _forget(self) -> None:
        """Each of these releases itself when its last reference goes."""
        self._graphs.clear()
        self._modules.clear()
        self._stream = None

    @contextmanager
    def _asked(self, what: str = "CUDA", remedy: str | None = None) -> Iterator[Any]:
        """pycuda's driver; what it raises as a BackendError. pycuda says "cuMemAlloc failed: out of memory"."""
        if self._driver is None:
            raise BackendError("the GPU was given back", remedy="open it again")
        try:
            yield self._driver
        except self._driver.Error as error:
            raise BackendError(f"{what}: {error}", remedy=remedy) from error
