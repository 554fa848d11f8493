"""edge/cuda_pycuda.py on a small pycuda that keeps a diary and, like the real one, releases what is forgotten."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.cuda import open_cuda
from edge.cuda_pycuda import PycudaCuda
from edge.errors import BackendError


class Error(Exception):
    """pycuda.driver.Error, of which the others are subclasses."""


class OutOfMemoryError(Error):
    """pycuda.driver.MemoryError."""


class LogicError(Error):
    """pycuda.driver.LogicError."""


class CompileError(Error):
    """pycuda.driver.CompileError."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(message)
        self.stderr = stderr


class Kept:
    """Something of the driver's: its end is in the diary, by `free` or with the last reference."""

    def __init__(self, driver: Driver, name: str, address: int = 0) -> None:
        self.driver, self.name, self.address, self.gone = driver, name, address, False

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        self.driver.note(f"free {self.name}")
        self.gone = True

    def __del__(self) -> None:
        if not self.gone:
            self.driver.diary.append(f"gone {self.name}")


class Stream(Kept):
    handle = 4096

    def synchronize(self) -> None:
        self.driver.note("synchronize")


class CapturingStream(Stream):
    """As a pycuda with graphs would have it."""

    def begin_capture(self) -> None:
        self.driver.note("begin capture")

    def end_capture(self) -> CapturingStream:
        self.driver.note("end capture")
        return self

    def instantiate(self) -> Graph:
        return Graph(self.driver, "graph")


class Graph(Kept):
    def launch(self, stream: Stream) -> None:
        self.driver.note(f"launch graph on {stream.handle}")


class Module(Kept):
    def get_function(self, name: str) -> Callable[..., None]:
        self.driver.note(f"function {name}")
        return lambda *given, **named: self.driver.note(f"call {given} {named['grid']} {named['block']}")


class Event(Kept):
    def record(self, stream: Stream) -> Event:
        self.driver.note(f"event on {stream.handle}")
        return self

    def time_till(self, _: Event) -> float:
        return 1.5


class Context:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def push(self) -> None:
        self.driver.note("push")

    def pop(self) -> None:
        self.driver.note("pop")

    def detach(self) -> None:
        self.driver.note("detach")


class PageLocked(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array whose base owns the memory, as pagelocked_empty gives it."""

    owner: Kept

    @property
    def base(self) -> Any:
        return self.owner


class Driver(ModuleType):
    """pycuda.driver, as far as it is used. refuse: a word of the diary -> what is raised instead."""

    Error, MemoryError, LogicError, CompileError = Error, OutOfMemoryError, LogicError, CompileError

    def __init__(self, stream: type[Stream] = Stream, count: int = 1) -> None:
        super().__init__("pycuda.driver")
        self.diary: list[str] = []
        self.refuse: dict[str, Error] = {}
        self.devices = count
        self._stream = stream
        self.Device.driver = self

    device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT="multiprocessors")

    class Device:
        driver: Driver

        def __init__(self, number: int) -> None:
            self.driver.note(f"device {number}")

        @classmethod
        def count(cls) -> int:
            return cls.driver.devices

        def compute_capability(self) -> tuple[int, int]:
            return 8, 7

        def name(self) -> str:
            return "Orin"

        def get_attribute(self, which: str) -> int:
            return {"multiprocessors": 16}[which]

        def total_memory(self) -> int:
            return 8 << 30

        def retain_primary_context(self) -> Context:
            self.driver.note("retain")
            return Context(self.driver)

    def note(self, text: str) -> None:
        for word, error in self.refuse.items():
            if word in text:
                raise error
        self.diary.append(text)

    def init(self) -> None:
        self.note("init")

    def get_driver_version(self) -> int:
        return 12060

    def Stream(self) -> Stream:  # noqa: N802
        self.note("stream")
        return self._stream(self, "stream")

    def Event(self) -> Event:  # noqa: N802
        return Event(self, "event")

    def mem_get_info(self) -> tuple[int, int]:
        return 3 << 20, 8 << 30

    def mem_alloc(self, size: int) -> Kept:
        self.note(f"alloc {size}")
        return Kept(self, "memory", 4096 + size)

    def pagelocked_empty(self, size: int, dtype: type[np.uint8]) -> NDArray[np.uint8]:
        self.note(f"pin {size}")
        array = np.empty(size, dtype).view(PageLocked)
        array.owner = Kept(self, "pinned")
        return array

    def memcpy_htod_async(self, to: int, array: NDArray[Any], stream: Stream) -> None:
        self.note(f"upload {array.nbytes} to {to} on {stream.handle}")

    def memcpy_dtoh_async(self, array: NDArray[Any], source: int, stream: Stream) -> None:
        self.note(f"download {array.nbytes} from {source} on {stream.handle}")

    def memcpy_dtod_async(self, to: int, source: int, size: int, stream: Stream) -> None:
        self.note(f"copy {size} from {source} to {to} on {stream.handle}")

    def module_from_buffer(self, code: bytes) -> Module:
        self.note(f"module {code!r}")
        return Module(self, "module")


class Compiler(ModuleType):
    """pycuda.compiler."""

    def __init__(self) -> None:
        super().__init__("pycuda.compiler")

    def compile(self, source: str, *, no_extern_c: bool, arch: str) -> bytes:
        assert no_extern_c, "the kernel says so itself"
        if "absent" in source:
            raise FileNotFoundError("error invoking 'nvcc --version'")
        if "wrong" in source:
            raise CompileError("nvcc compilation failed", "kernel.cu(1): error: what is wrong?")
        return arch.encode()


Install = Callable[..., Driver]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put the fake in place of pycuda, and nothing in place of cuda.bindings."""

    def installed(stream: type[Stream] = Stream, count: int = 1) -> Driver:
        package, driver, compiler = ModuleType("pycuda"), Driver(stream, count), Compiler()
        vars(package).update(VERSION_TEXT="2025.1", driver=driver, compiler=compiler, __path__=[])
        for module in (package, driver, compiler):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(sys.modules, "cuda", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        return driver

    return installed


def test_it_says_what_it_opened(install: Install) -> None:
    driver = install()
    cuda = open_cuda()
    assert isinstance(cuda, PycudaCuda)
    assert (cuda.about, cuda.driver, cuda.stream) == ("pycuda 2025.1", "12.6", 4096)
    assert (cuda.gpu.name, cuda.gpu.compute_capability, cuda.gpu.memory) == ("Orin", "8.7", 8 << 30)
    assert cuda.gpu.model == "Orin, 16 multiprocessors"
    assert driver.diary == ["init", "device 0", "retain", "push", "stream"]
    cuda.close()


def test_everything_is_released_in_order_and_once(install: Install) -> None:
    driver = install(CapturingStream)
    cuda = PycudaCuda()
    cuda.allocate(100)
    cuda.pin(10)
    cuda.compile("void k() {}", "k")
    cuda.record(lambda: None)
    del driver.diary[:]
    cuda.close()
    cuda.close()
    assert driver.diary == [
        "synchronize",
        "gone graph",
        "gone module",
        "gone stream",
        "free memory",
        "free pinned",
        "pop",
        "detach",
    ]


@pytest.mark.parametrize("refused", ["synchronize", "free memory", "free pinned", "pop"])
def test_what_refuses_to_be_released_keeps_nothing_else(install: Install, refused: str) -> None:
    driver = install()
    cuda = PycudaCuda()
    cuda.allocate(100)
    cuda.pin(10)
    driver.refuse[refused] = LogicError("cuSomething failed: an illegal memory access was encountered")
    with pytest.raises(BackendError, match="illegal memory access"):
        cuda.close()
    assert driver.diary[-1] == "detach"
    left = [step for step in ("synchronize", "free memory", "free pinned", "pop") if step not in driver.diary]
    assert left == [refused]


@pytest.mark.parametrize("refused", ["init", "device", "retain", "push"])
def test_what_fails_to_open_is_told(install: Install, refused: str) -> None:
    driver = install()
    driver.refuse[refused] = LogicError("cuInit failed: no CUDA-capable device is detected")
    with pytest.raises(BackendError, match="no CUDA-capable device"):
        PycudaCuda()
    assert "pop" not in driver.diary


def test_a_stream_that_cannot_be_made_gives_the_context_back(install: Install) -> None:
    driver = install()
    driver.refuse["stream"] = OutOfMemoryError("cuStreamCreate failed: out of memory")
    with pytest.raises(BackendError, match="cuStreamCreate failed"):
        PycudaCuda()
    assert driver.diary[-2:] == ["pop", "detach"]


def test_no_gpu_is_a_sentence(install: Install) -> None:
    install(count=0)
    with pytest.raises(BackendError, match=r"no GPU here.*onnxruntime"):
        PycudaCuda()


def test_without_the_drivers_library_pycuda_does_not_load(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    del sys.modules["pycuda"].driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(BackendError, match=r"^no CUDA driver here"):
        open_cuda()


@pytest.mark.parametrize(("verb", "word"), [("allocate", "alloc"), ("pin", "pin")])
def test_out_of_memory_has_the_numbers(install: Install, verb: str, word: str) -> None:
    driver = install()
    cuda = PycudaCuda()
    driver.refuse[word] = OutOfMemoryError("cuMemAlloc failed: out of memory")
    with pytest.raises(BackendError) as caught:
        getattr(cuda, verb)(12345678)
    for number in (12345678, 3 << 20, 8 << 30):
        assert str(number) in str(caught.value)


CALLS: list[tuple[str, Callable[[Any], object]]] = [
    ("alloc", lambda cuda: cuda.allocate(1)),
    ("pin", lambda cuda: cuda.pin(1)),
    ("upload", lambda cuda: cuda.upload(1, np.zeros(1))),
    ("download", lambda cuda: cuda.download(np.zeros(1), 1)),
    ("copy", lambda cuda: cuda.copy(1, 2, 3)),
    ("synchronize", lambda cuda: cuda.synchronize()),
    ("module", lambda cuda: cuda.compile("", "k")),
    ("function", lambda cuda: cuda.compile("", "k")),
    ("event", lambda cuda: cuda.event()),
]


@pytest.mark.parametrize(("word", "call"), CALLS, ids=[word for word, _ in CALLS])
def test_every_refusal_is_translated_and_use_after_close_told(
    install: Install, word: str, call: Callable[[Any], object]
) -> None:
    driver = install()
    cuda = PycudaCuda()
    driver.refuse[word] = LogicError("cuSomething failed: invalid argument")
    with pytest.raises(BackendError, match="cuSomething failed: invalid argument"):
        call(cuda)
    driver.refuse.clear()
    cuda.close()
    with pytest.raises(BackendError, match="given back"):
        call(cuda)


def test_arguments_copies_and_memory_reach_pycuda(install: Install) -> None:
    driver = install()
    cuda = PycudaCuda()
    address, pinned = cuda.allocate(100), cuda.pin(8)
    kernel = cuda.compile("void k() {}", "k")
    cuda.launch(kernel, (3, 2, 1), (16, 8, 1), [np.uint64(9), np.int32(-5)])
    cuda.upload(address, pinned)
    cuda.upload(address, pinned[:0])
    cuda.download(pinned, address)
    cuda.copy(1, 2, 3)
    cuda.unpin(pinned)
    cuda.free(address)
    assert "module b'sm_87'" in driver.diary
    assert f"call {(np.uint64(9), np.int32(-5))} (3, 2, 1) (16, 8, 1)" in driver.diary
    assert [text for text in driver.diary if " on " in text] == [
        f"upload 8 to {address} on 4096",
        f"download 8 from {address} on 4096",
        "copy 3 from 2 to 1 on 4096",
    ]
    del driver.diary[:]
    cuda.close()
    assert not [text for text in driver.diary if text.startswith("free")], "given back before"


def test_a_source_that_does_not_compile_says_why(install: Install) -> None:
    install()
    cuda = PycudaCuda()
    with pytest.raises(BackendError, match=r"sm_87: kernel.cu\(1\): error: what is wrong\?"):
        cuda.compile("wrong", "k")
    with pytest.raises(BackendError, match=r"nvcc does not run.*PATH"):
        cuda.compile("absent", "k")


def test_graphs_are_recorded_where_pycuda_has_them(install: Install) -> None:
    install()
    assert PycudaCuda().record(lambda: pytest.fail("nothing to record it with")) is None
    driver = install(CapturingStream)
    cuda = PycudaCuda()
    graph = cuda.record(lambda: cuda.copy(1, 2, 3))
    cuda.replay(graph)
    assert driver.diary[-4:] == ["begin capture", "copy 3 from 2 to 1 on 4096", "end capture", "launch graph on 4096"]

    def work() -> None:
        raise BackendError("enqueue failed")

    with pytest.raises(BackendError, match="enqueue failed"):
        cuda.record(work)
    assert driver.diary[-1] == "end capture"


def test_events_measure(install: Install) -> None:
    install()
    cuda = PycudaCuda()
    assert cuda.milliseconds(cuda.event(), cuda.event()) == 1.5


def test_importing_opens_nothing(root: Path) -> None:
    modules = "edge.cuda, edge.cuda_bindings, edge.cuda_pycuda, edge.gpu"
    code = f"import sys, {modules}\nassert not {{'pycuda', 'cuda'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
    for name in ("cuda_pycuda", "cuda_bindings", "cuda", "gpu"):
        assert "import pycuda.auto" not in (root / f"edge/{name}.py").read_text(encoding="utf-8")
