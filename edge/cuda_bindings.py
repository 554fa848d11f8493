"""A Cuda by NVIDIA's own cuda.bindings: the driver's functions, and NVRTC to compile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.cuda import NO_DRIVER, Gpu, out_of_memory
from edge.errors import BackendError

_NO_NVRTC = (
    "it comes with the CUDA toolkit (cuda-nvrtc), or `pip install nvidia-cuda-nvrtc-cu12` on CUDA 12, "
    "`pip install nvidia-cuda-nvrtc` on CUDA 13"
)


class BindingsCuda:
    """Device 0, its primary context (which TensorRT and other users of the process share), one stream of its own.

    Every function of the binding returns (code, value, …): `_did` makes a value or a BackendError of it.
    """

    @staticmethod
    def installed() -> bool:
        try:
            import cuda.bindings  # noqa: F401
        except ImportError:
            return False
        return True

    def __init__(self) -> None:
        import cuda.bindings
        from cuda.bindings import driver, nvrtc

        self._driver: Any = driver
        self._nvrtc: Any = nvrtc
        self.about = f"cuda.bindings {cuda.bindings.__version__}"
        try:
            code = driver.cuInit(0)
        except Exception as error:  # a driver's library that is not there is a RuntimeError of its own kind
            raise BackendError(f"no CUDA driver here: {error}", remedy=NO_DRIVER) from error
        self._did(code, "no GPU here", NO_DRIVER)
        self._modules: list[Any] = []
        self._graphs: list[Any] = []
        self._events: list[Any] = []
        self._memory: set[int] = set()
        self._pinned: set[int] = set()
        version = self._did(driver.cuDriverGetVersion())
        self.driver = f"{version // 1000}.{version % 1000 // 10}"
        if not self._did(driver.cuDeviceGetCount()):
            raise BackendError("no GPU here: the CUDA driver offers none", remedy=NO_DRIVER)
        device = self._device = self._did(driver.cuDeviceGet(0))
        kind = driver.CUdevice_attribute
        major, minor, multiprocessors = (
            self._did(driver.cuDeviceGetAttribute(which, device))
            for which in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        name = self._did(driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
        memory = int(self._did(driver.cuDeviceTotalMem(device)))
        self.gpu = Gpu(name, f"{major}.{minor}", memory, int(multiprocessors))
        context = self._did(driver.cuDevicePrimaryCtxRetain(device))
        self._stream: Any = None
        self._context: list[tuple[Any, ...]] = [(driver.cuDevicePrimaryCtxRelease, device)]  # how it is given back
        try:
            self._did(driver.cuCtxPushCurrent(context))
            self._context.insert(0, (driver.cuCtxPopCurrent,))
            self._stream = self._did(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BackendError:
            self.close()
            raise
        self.stream = int(self._stream)

    def free_memory(self) -> int:
        return int(self._did(self._cuda.cuMemGetInfo())[0])

    def allocate(self, size: int) -> int:
        driver = self._cuda
        answer = driver.cuMemAlloc(max(1, size))
        if answer[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise out_of_memory(size, *self._did(driver.cuMemGetInfo()))
        address = int(self._did(answer))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._did(self._cuda.cuMemFree(address))
        self._memory.discard(address)

    def pin(self, size: int) -> NDArray[np.uint8]:
        driver = self._cuda
        answer = driver.cuMemHostAlloc(max(1, size), 0)
        if answer[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise out_of_memory(size, *self._did(driver.cuMemGetInfo()), kind="page-locked")
        address = int(self._did(answer))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address))[:size]

    def unpin(self, array: NDArray[np.uint8]) -> None:
        self._did(self._cuda.cuMemFreeHost(array.ctypes.data))
        self._pinned.discard(array.ctypes.data)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._did(self._cuda.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    def download(self, array: NDArray[Any], address: int) -> None:
        self._did(self._cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))

    def copy(self, to: int, source: int, size: int) -> None:
        self._did(self._cuda.cuMemcpyDtoDAsync(to, source, size, self._stream))

    def synchronize(self) -> None:
        self._did(self._cuda.cuStreamSynchronize(self._stream))

    def compile(self, source: str, kernel: str) -> object:
        driver = self._cuda
        major, _, minor = self.gpu.compute_capability.partition(".")
        module = self._did(driver.cuModuleLoadData(cubin(self._nvrtc, source, f"sm_{major}{minor}")))
        self._modules.append(module)
        return self._did(driver.cuModuleGetFunction(module, kernel.encode()))

    def launch(
        self,
        kernel: object,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
    ) -> None:
        values = [np.array([argument]) for argument in arguments]  # each where the driver can read it in its own size
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        # no shared memory beyond the kernel's own; read while it is called, so both may go afterwards
        self._did(self._cuda.cuLaunchKernel(kernel, *grid, *block, 0, self._stream, pointers.ctypes.data, 0))

    def record(self, work: Callable[[], None]) -> object | None:
        driver, stream = self._cuda, self._stream
        # other threads may go on to allocate meanwhile, which the stricter mode would refuse
        self._did(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            code, graph = driver.cuStreamEndCapture(stream)
            if code == driver.CUresult.CUDA_SUCCESS:
                self._did(driver.cuGraphDestroy(graph))
            raise
        code, graph = driver.cuStreamEndCapture(stream)
        if code != driver.CUresult.CUDA_SUCCESS:
            return None
        try:
            ready = self._did(driver.cuGraphInstantiate(graph, 0))
        finally:
            self._did(driver.cuGraphDestroy(graph))
        self._graphs.append(ready)
        return ready  # type: ignore[no-any-return]

    def replay(self, graph: object) -> None:
        self._did(self._cuda.cuGraphLaunch(graph, self._stream))

    def event(self) -> object:
        driver = self._cuda
        event = self._did(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DEFAULT))
        self._events.append(event)
        self._did(driver.cuEventRecord(event, self._stream))
        return event

    def milliseconds(self, start: object, end: object) -> float:
        return float(self._did(self._cuda.cuEventElapsedTime(start, end)))

    def close(self) -> None:
        if self._driver is None:
            return
        driver, self._driver = self._driver, None
        stream = [] if self._stream is None else [self._stream]
        steps: list[tuple[Any, ...]] = [
            *((driver.cuStreamSynchronize, handle) for handle in stream),  # nothing is taken away under running work
            *((driver.cuGraphExecDestroy, graph) for graph in self._graphs),
            *((driver.cuModuleUnload, module) for module in self._modules),
            *((driver.cuEventDestroy, event) for event in self._events),
            *((driver.cuStreamDestroy, handle) for handle in stream),
            *((driver.cuMemFree, address) for address in sorted(self._memory)),
            *((driver.cuMemFreeHost, address) for address in sorted(self._pinned)),
            *self._context,
        ]
        refused = None
        for function, *arguments in steps:
            try:
                self._did(function(*arguments))
            except BackendError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    @property
    def _cuda(self) -> Any:
        if self._driver is None:
            raise BackendError("the GPU was given back", remedy="open it again")
        return self._driver

    def _did(self, answer: tuple[Any, ...], what: str = "CUDA", remedy: str | None = None) -> Any:
        """The value of (code, value), the values of (code, value, value), None of (code,)."""
        code, *values = answer
        if int(code):
            raise BackendError(f"{what}: {getattr(code, 'name', code)}", remedy=remedy)
        return values[0] if len(values) == 1 else values or None


def cubin(nvrtc: Any, source: str, architecture: str) -> bytes:
    """A CUDA C++ source as machine code of "sm_87": needs no GPU. nvrtc: the binding.

    Raises BackendError: no NVRTC here, or what it says of the source.
    """
    try:
        code, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    except Exception as error:  # its library is looked for at the first call
        raise BackendError(f"no NVRTC here: {error}", remedy=_NO_NVRTC) from error
    _compiled(code)
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
        if int(code):
            log = b" " * _compiled(*nvrtc.nvrtcGetProgramLogSize(program))
            _compiled(*nvrtc.nvrtcGetProgramLog(program, log))
            _compiled(code, said=log.strip(b" \0\n").decode(errors="replace"), architecture=architecture)
        code_of_gpu = b" " * _compiled(*nvrtc.nvrtcGetCUBINSize(program))  # NVRTC writes into it, as its examples do
        _compiled(*nvrtc.nvrtcGetCUBIN(program, code_of_gpu))
        return bytes(code_of_gpu)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compiled(code: Any, value: Any = None, *, said: str = "", architecture: str = "") -> Any:
    if int(code):
        place = f" for {architecture}" if architecture else ""
        raise BackendError(f"NVRTC cannot compile{place}: {getattr(code, 'name', code)}{': ' if said else ''}{said}")
    return value
