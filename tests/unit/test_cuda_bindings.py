"""edge/cuda_bindings.py on a small driver that keeps a diary, and its names in the real cuda.bindings."""

from __future__ import annotations

import ast
import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge.cuda import open_cuda
from edge.cuda_bindings import BindingsCuda, cubin
from edge.errors import BackendError


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class NvrtcResult(IntEnum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


OK = CUresult.CUDA_SUCCESS
# what each function gives besides its code; every other gives nothing
VALUES: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (12060,),
    "cuDeviceGetCount": (1,),
    "cuDeviceGet": (0,),
    "cuDeviceGetName": (b"Orin" + b"\0" * 252,),
    "cuDeviceTotalMem": (8 << 30,),
    "cuDevicePrimaryCtxRetain": (77,),
    "cuCtxPopCurrent": (77,),
    "cuStreamCreate": (4096,),
    "cuMemGetInfo": (3 << 20, 8 << 30),
    "cuModuleLoadData": (501,),
    "cuModuleGetFunction": (502,),
    "cuStreamEndCapture": (601,),
    "cuGraphInstantiate": (602,),
    "cuEventCreate": (701,),
    "cuEventElapsedTime": (1.5,),
}


class Driver(ModuleType):
    """cuda.bindings.driver, as far as it is used: every call goes into the diary, and answers a tuple.

    refuse: function -> the code it answers with, instead of doing anything.
    """

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="multiprocessors",
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.diary: list[tuple[Any, ...]] = []
        self.refuse: dict[str, CUresult] = {}
        self.buffers: dict[int, Any] = {}
        self.arguments: list[bytes] = []
        self.sizes: tuple[int, ...] = ()

    @property
    def calls(self) -> list[str]:
        return [name for name, *_ in self.diary]

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*given: Any) -> tuple[Any, ...]:
            self.diary.append((name, *given))
            count = len(VALUES.get(name, ())) or int(name in ("cuDeviceGetAttribute", "cuMemAlloc", "cuMemHostAlloc"))
            if name in self.refuse:
                return (self.refuse[name], *[None] * count)
            return (OK, *self._answer(name, *given))

        return function

    def _answer(self, name: str, *given: Any) -> tuple[Any, ...]:
        if name == "cuDeviceGetAttribute":
            return ({"major": 8, "minor": 7, "multiprocessors": 16}[given[0]],)
        if name in ("cuMemAlloc", "cuMemHostAlloc"):
            buffer = ctypes.create_string_buffer(given[0])
            self.buffers[ctypes.addressof(buffer)] = buffer
            return (ctypes.addressof(buffer),)
        if name == "cuLaunchKernel":  # reads what the pointers point at, as the driver does, while it is called
            pointers = (ctypes.c_void_p * len(self.sizes)).from_address(given[9])
            self.arguments = [ctypes.string_at(p or 0, size) for p, size in zip(pointers, self.sizes, strict=True)]
        return VALUES.get(name, ())


class Nvrtc(ModuleType):
    """cuda.bindings.nvrtc: compiles anything that does not hold the word "wrong"."""

    LOG = b"kernel.cu(1): error: what is wrong?\n\0"

    def __init__(self) -> None:
        super().__init__("cuda.bindings.nvrtc")
        self.options: list[bytes] = []
        self.living = 0

    def nvrtcCreateProgram(self, source: bytes, *_: Any) -> tuple[Any, ...]:  # noqa: N802
        self.living += 1
        return NvrtcResult.NVRTC_SUCCESS, source

    def nvrtcCompileProgram(self, program: bytes, count: int, options: list[bytes]) -> tuple[Any, ...]:  # noqa: N802
        assert len(options) == count
        self.options = options
        return (NvrtcResult.NVRTC_ERROR_COMPILATION if b"wrong" in program else NvrtcResult.NVRTC_SUCCESS,)

    def nvrtcGetProgramLogSize(self, _: bytes) -> tuple[Any, ...]:  # noqa: N802
        return NvrtcResult.NVRTC_SUCCESS, len(self.LOG)

    def nvrtcGetProgramLog(self, _: bytes, log: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._write(log, self.LOG)

    def nvrtcGetCUBINSize(self, _: bytes) -> tuple[Any, ...]:  # noqa: N802
        return NvrtcResult.NVRTC_SUCCESS, 5

    def nvrtcGetCUBIN(self, _: bytes, code: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._write(code, b"\x7fELF!")

    def nvrtcDestroyProgram(self, _: bytes) -> tuple[Any, ...]:  # noqa: N802
        self.living -= 1
        return (NvrtcResult.NVRTC_SUCCESS,)

    @staticmethod
    def _write(into: bytes, data: bytes) -> tuple[Any, ...]:
        assert len(into) == len(data)
        # into the bytes object itself, as the real one does: its characters begin before its ending zero
        ctypes.memmove(id(into) + sys.getsizeof(into) - len(data) - 1, data, len(data))
        return (NvrtcResult.NVRTC_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The fake in place of the real binding, whether or not there is one."""
    package, bindings, fake, nvrtc = ModuleType("cuda"), ModuleType("cuda.bindings"), Driver(), Nvrtc()
    vars(bindings).update(__version__="12.9.0", driver=fake, nvrtc=nvrtc)
    vars(package).update(bindings=bindings, __path__=[])
    for module in (package, bindings, fake, nvrtc):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def test_it_says_what_it_opened(driver: Driver) -> None:
    cuda = open_cuda()
    assert isinstance(cuda, BindingsCuda)
    assert (cuda.about, cuda.driver, cuda.stream) == ("cuda.bindings 12.9.0", "12.6", 4096)
    assert (cuda.gpu.name, cuda.gpu.compute_capability, cuda.gpu.memory) == ("Orin", "8.7", 8 << 30)
    assert cuda.gpu.model == "Orin, 16 multiprocessors"
    assert driver.calls[0] == "cuInit"
    assert "cuCtxCreate" not in driver.calls, "the primary context is shared with TensorRT"
    cuda.close()


def test_everything_is_released_in_order_and_once(driver: Driver) -> None:
    cuda = BindingsCuda()
    address, pinned = cuda.allocate(100), cuda.pin(10)
    cuda.compile("void k() {}", "k")
    assert cuda.record(lambda: None) == 602
    cuda.event()
    del driver.diary[:]
    cuda.close()
    cuda.close()
    assert driver.diary == [
        ("cuStreamSynchronize", 4096),
        ("cuGraphExecDestroy", 602),
        ("cuModuleUnload", 501),
        ("cuEventDestroy", 701),
        ("cuStreamDestroy", 4096),
        ("cuMemFree", address),
        ("cuMemFreeHost", pinned.ctypes.data),
        ("cuCtxPopCurrent",),
        ("cuDevicePrimaryCtxRelease", 0),
    ]


def test_what_was_freed_is_not_freed_again(driver: Driver) -> None:
    cuda = BindingsCuda()
    cuda.free(cuda.allocate(100))
    cuda.unpin(cuda.pin(100))
    cuda.close()
    assert driver.calls.count("cuMemFree") == driver.calls.count("cuMemFreeHost") == 1


@pytest.mark.parametrize(
    "refused",
    ["cuStreamSynchronize", "cuGraphExecDestroy", "cuModuleUnload", "cuStreamDestroy", "cuMemFree", "cuCtxPopCurrent"],
)
def test_what_refuses_to_be_released_keeps_nothing_else(driver: Driver, refused: str) -> None:
    cuda = BindingsCuda()
    cuda.allocate(100)
    cuda.compile("void k() {}", "k")
    cuda.record(lambda: None)
    driver.refuse[refused] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.close()
    assert driver.calls[-1] == "cuDevicePrimaryCtxRelease"
    assert {"cuGraphExecDestroy", "cuModuleUnload", "cuStreamDestroy", "cuMemFree"} <= set(driver.calls)
    cuda.close()


@pytest.mark.parametrize(
    ("refused", "released"),
    [
        ("cuInit", []),
        ("cuDeviceGetName", []),
        ("cuDevicePrimaryCtxRetain", []),
        ("cuCtxPushCurrent", ["cuDevicePrimaryCtxRelease"]),
        ("cuStreamCreate", ["cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]),
    ],
)
def test_what_fails_to_open_gives_back_what_it_had(driver: Driver, refused: str, released: list[str]) -> None:
    driver.refuse[refused] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(BackendError, match="CUDA_ERROR_NO_DEVICE"):
        BindingsCuda()
    assert driver.calls[driver.calls.index(refused) + 1 :] == released


def test_no_gpu_is_a_sentence(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "cuDeviceGetCount", (0,))
    with pytest.raises(BackendError, match=r"no GPU here.*onnxruntime"):
        BindingsCuda()


@pytest.mark.parametrize(("verb", "function"), [("allocate", "cuMemAlloc"), ("pin", "cuMemHostAlloc")])
def test_out_of_memory_has_the_numbers(driver: Driver, verb: str, function: str) -> None:
    cuda = BindingsCuda()
    driver.refuse[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError) as caught:
        getattr(cuda, verb)(12345678)
    for number in (12345678, 3 << 20, 8 << 30):
        assert str(number) in str(caught.value)


CALLS: list[tuple[str, str, Callable[[Any], object]]] = [
    ("free_memory", "cuMemGetInfo", lambda cuda: cuda.free_memory()),
    ("allocate", "cuMemAlloc", lambda cuda: cuda.allocate(1)),
    ("free", "cuMemFree", lambda cuda: cuda.free(1)),
    ("pin", "cuMemHostAlloc", lambda cuda: cuda.pin(1)),
    ("unpin", "cuMemFreeHost", lambda cuda: cuda.unpin(np.zeros(1, np.uint8))),
    ("upload", "cuMemcpyHtoDAsync", lambda cuda: cuda.upload(1, np.zeros(1))),
    ("download", "cuMemcpyDtoHAsync", lambda cuda: cuda.download(np.zeros(1), 1)),
    ("copy", "cuMemcpyDtoDAsync", lambda cuda: cuda.copy(1, 2, 3)),
    ("synchronize", "cuStreamSynchronize", lambda cuda: cuda.synchronize()),
    ("load", "cuModuleLoadData", lambda cuda: cuda.compile("", "k")),
    ("find", "cuModuleGetFunction", lambda cuda: cuda.compile("", "k")),
    ("launch", "cuLaunchKernel", lambda cuda: cuda.launch(1, (1, 1, 1), (1, 1, 1), [])),
    ("record", "cuStreamBeginCapture", lambda cuda: cuda.record(lambda: None)),
    ("instantiate", "cuGraphInstantiate", lambda cuda: cuda.record(lambda: None)),
    ("replay", "cuGraphLaunch", lambda cuda: cuda.replay(1)),
    ("event", "cuEventRecord", lambda cuda: cuda.event()),
    ("milliseconds", "cuEventElapsedTime", lambda cuda: cuda.milliseconds(1, 2)),
]


@pytest.mark.parametrize(("function", "call"), [(f, c) for _, f, c in CALLS], ids=[name for name, _, _ in CALLS])
def test_every_refusal_has_cudas_name(driver: Driver, function: str, call: Callable[[Any], object]) -> None:
    cuda = BindingsCuda()
    driver.refuse[function] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        call(cuda)
    driver.refuse.clear()
    cuda.close()


@pytest.mark.parametrize("call", [call for *_, call in CALLS], ids=[name for name, _, _ in CALLS])
def test_use_after_close_is_told(driver: Driver, call: Callable[[Any], object]) -> None:
    cuda = BindingsCuda()
    cuda.close()
    before = len(driver.diary)
    with pytest.raises(BackendError, match="given back"):
        call(cuda)
    assert len(driver.diary) == before, "nothing reaches the driver"


def test_arguments_are_packed_in_their_own_size(driver: Driver) -> None:
    cuda = BindingsCuda()
    arguments = [np.uint64(1 << 40), np.int32(-5), np.float32(0.5), np.uint64(7)]
    driver.sizes = (8, 4, 4, 8)
    cuda.launch("kernel", (3, 2, 1), (16, 8, 1), arguments)
    assert driver.arguments == [argument.tobytes() for argument in arguments]
    _, *given = next(call for call in driver.diary if call[0] == "cuLaunchKernel")
    assert given[:9] == ["kernel", 3, 2, 1, 16, 8, 1, 0, 4096]


def test_copies_say_where_how_much_and_on_which_stream(driver: Driver) -> None:
    cuda = BindingsCuda()
    array = np.arange(6, dtype=np.int32)
    cuda.upload(1000, array)
    cuda.download(array, 2000)
    cuda.copy(3000, 4000, 5)
    assert driver.diary[-3:] == [
        ("cuMemcpyHtoDAsync", 1000, array.ctypes.data, 24, 4096),
        ("cuMemcpyDtoHAsync", array.ctypes.data, 2000, 24, 4096),
        ("cuMemcpyDtoDAsync", 3000, 4000, 5, 4096),
    ]


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_pinned_memory_is_an_array(driver: Driver, size: int) -> None:
    cuda = BindingsCuda()
    array = cuda.pin(size)
    array[:] = 7
    assert (array.shape, array.dtype) == ((size,), np.uint8)
    assert bytes(driver.buffers[array.ctypes.data])[:size] == b"\7" * size
    cuda.unpin(array)
    cuda.close()
    assert driver.calls.count("cuMemFreeHost") == 1


def test_a_graph_is_recorded_and_replayed(driver: Driver) -> None:
    cuda = BindingsCuda()
    graph = cuda.record(lambda: cuda.copy(1, 2, 3))
    cuda.replay(graph)
    assert driver.calls[-6:] == [
        "cuStreamBeginCapture",
        "cuMemcpyDtoDAsync",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphLaunch",
    ]


def test_what_cannot_be_captured_is_none(driver: Driver) -> None:
    cuda = BindingsCuda()
    driver.refuse["cuStreamEndCapture"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    assert cuda.record(lambda: None) is None
    assert "cuGraphInstantiate" not in driver.calls


@pytest.mark.parametrize("valid", [True, False])
def test_an_error_while_recording_ends_the_recording_and_goes_on(driver: Driver, valid: bool) -> None:
    cuda = BindingsCuda()
    if not valid:
        driver.refuse["cuStreamEndCapture"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED

    def work() -> None:
        raise BackendError("enqueue failed")

    with pytest.raises(BackendError, match="enqueue failed"):
        cuda.record(work)
    assert driver.calls[-2:] == (
        ["cuStreamEndCapture", "cuGraphDestroy"] if valid else ["cuStreamBeginCapture", "cuStreamEndCapture"]
    )


def test_a_kernel_is_compiled_for_this_gpu(driver: Driver) -> None:
    cuda = BindingsCuda()
    assert cuda.compile("void k() {}", "k") == 502
    nvrtc = sys.modules["cuda.bindings.nvrtc"]
    assert isinstance(nvrtc, Nvrtc)
    assert nvrtc.options == [b"--gpu-architecture=sm_87"]
    assert ("cuModuleLoadData", b"\x7fELF!") in driver.diary
    assert ("cuModuleGetFunction", 501, b"k") in driver.diary
    with pytest.raises(BackendError, match=r"sm_87: NVRTC_ERROR_COMPILATION: kernel.cu\(1\): error: what is wrong\?$"):
        cuda.compile("wrong", "k")
    assert nvrtc.living == 0


# --- the real binding, where one is installed; none of this needs a GPU

REAL = "needs cuda-bindings: `pip install cuda-bindings`"


def names_used(source: str) -> set[str]:
    """Attributes that are names of CUDA."""
    found = (node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return {name for name in found if name.startswith(("cu", "CU", "nvrtc", "NVRTC"))}


def test_every_name_exists_in_the_real_binding(root: Path) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason=REAL)
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason=REAL)
    enums = [
        driver.CUresult,
        driver.CUdevice_attribute,
        driver.CUstream_flags,
        driver.CUevent_flags,
        driver.CUstreamCaptureMode,
    ]
    names = names_used((root / "edge/cuda_bindings.py").read_text(encoding="utf-8"))
    assert len(names) > 40
    assert [name for name in sorted(names) if not any(hasattr(place, name) for place in (driver, nvrtc, *enums))] == []
    assert names_used("driver.cuMemAllocate(1)\nx.other") == {"cuMemAllocate"}
    assert not hasattr(driver, "cuMemAllocate")


def test_without_a_gpu_the_real_binding_is_a_sentence() -> None:
    from edge.cuda import gpu_count

    pytest.importorskip("cuda.bindings.driver", reason=REAL)
    if gpu_count():
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match=r"^no (CUDA driver|GPU) here") as caught:
        open_cuda()
    assert caught.value.remedy


@pytest.mark.parametrize("architecture", ["sm_87", "sm_89", "sm_90"])
def test_the_real_nvrtc_compiles_without_a_gpu(architecture: str) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason=REAL)
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("needs NVRTC: `pip install nvidia-cuda-nvrtc`")
    code = cubin(nvrtc, 'extern "C" __global__ void twice(int* a) { a[threadIdx.x] *= 2; }', architecture)
    assert code.startswith(b"\x7fELF")
    assert b"twice" in code
    with pytest.raises(BackendError, match=r"NVRTC_ERROR_COMPILATION: kernel.cu\(1\): error"):
        cubin(nvrtc, "this is no C++", architecture)
    with pytest.raises(BackendError, match="sm_1"):
        cubin(nvrtc, "", "sm_1")
