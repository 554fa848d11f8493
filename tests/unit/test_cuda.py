"""edge/cuda.py: which binding is taken, what is said where there is none; and the fake that other tests stand on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge.cuda import Cuda, gpu_count, open_cuda, out_of_memory
from edge.errors import BackendError
from tests.fake_cuda import ALIGNMENT, FakeCuda, on_stream


def test_without_a_binding_both_are_named_with_their_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError) as caught:
        open_cuda()
    for command in ('`pip install "cuda-bindings<13"`', '`pip install "cuda-bindings>=13"`', "`pip install pycuda`"):
        assert command in str(caught.value)


def test_a_count_needs_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    assert gpu_count() >= 0


def test_out_of_memory_has_the_numbers() -> None:
    told = str(out_of_memory(2 << 20, 5, 3 << 20))
    assert "out of GPU memory: expected 2097152 bytes (2.0 MiB) free, got 5 bytes (0.0 MiB) of 3145728 bytes" in told


# --- FakeCuda


def test_the_fake_is_a_cuda() -> None:
    cuda: Cuda = FakeCuda()
    assert cuda.gpu.compute_capability == "8.7"


@pytest.mark.parametrize("size", [0, 1, 255, 4096])
def test_memory_is_aligned_counted_and_holds_what_was_copied(size: int) -> None:
    cuda = FakeCuda()
    first, second = cuda.allocate(size), cuda.allocate(size)
    assert first % ALIGNMENT == second % ALIGNMENT == 0
    assert first != second
    assert cuda.live == {first: size, second: size}
    assert cuda.free_memory() == cuda.capacity - 2 * size
    array, back = np.random.default_rng(size).integers(0, 256, size, np.uint8), np.zeros(size, np.uint8)
    cuda.upload(first, array)
    cuda.copy(second, first, size)
    cuda.download(back, second)
    cuda.synchronize()
    np.testing.assert_array_equal(back, array)
    cuda.free(first)
    cuda.free(second)
    assert cuda.live == {}
    assert cuda.log.count(("upload", size)) == cuda.count("upload") == 1


def test_a_download_has_not_happened_before_synchronize() -> None:
    cuda = FakeCuda()
    address, back = cuda.allocate(1), np.zeros(1, np.uint8)
    cuda.upload(address, np.ones(1, np.uint8))
    cuda.download(back, address)
    assert back[0] == 0
    cuda.upload(address, np.full(1, 2, np.uint8))
    cuda.synchronize()
    assert back[0] == 1, "what was there when it was asked for"


def test_fresh_memory_is_not_zero() -> None:
    cuda = FakeCuda()
    back = np.zeros(3, np.uint8)
    cuda.download(back, cuda.allocate(3))
    cuda.synchronize()
    assert back.all()


def test_a_source_that_changes_too_early_is_found() -> None:
    cuda = FakeCuda()
    array = np.zeros(4, np.uint8)
    cuda.upload(cuda.allocate(4), array)
    array[0] = 1
    with pytest.raises(AssertionError, match="changed before synchronize"):
        cuda.synchronize()
    array[0] = 2
    cuda.synchronize()


def test_memory_is_as_large_as_it_is() -> None:
    cuda = FakeCuda(capacity=1000)
    kept = cuda.allocate(600)
    with pytest.raises(BackendError, match=r"401 bytes .* free, got 400 bytes .* of 1000 bytes"):
        cuda.allocate(401)
    cuda.free(kept)
    cuda.allocate(1000)


MISTAKES: list[tuple[str, Callable[[FakeCuda, int], object], str]] = [
    ("free twice", lambda cuda, address: (cuda.free(address), cuda.free(address)), "no allocation"),
    ("free inside", lambda cuda, address: cuda.free(address + 1), "no allocation"),
    ("upload beyond", lambda cuda, address: cuda.upload(address + 1, np.zeros(10, np.uint8)), "in no allocation"),
    ("download beyond", lambda cuda, address: cuda.download(np.zeros(11, np.uint8), address), "in no allocation"),
    ("copy from beyond", lambda cuda, address: cuda.copy(address, address - 1, 1), "in no allocation"),
    ("copy to beyond", lambda cuda, address: cuda.copy(address + 10, address, 1), "in no allocation"),
    ("not contiguous", lambda cuda, address: cuda.upload(address, np.zeros((4, 4), np.uint8)[:, :1]), "contiguous"),
    ("unpin what is not", lambda cuda, address: cuda.unpin(np.zeros(1, np.uint8)), "no array of pin"),
    ("empty grid", lambda cuda, address: cuda.launch(("k", None), (0, 1, 1), (1, 1, 1), []), "empty launch"),
    ("wide block", lambda cuda, address: cuda.launch(("k", None), (1, 1, 1), (64, 64, 1), []), "1024 threads"),
    ("tall grid", lambda cuda, address: cuda.launch(("k", None), (1, 1, 65536), (1, 1, 1), []), "65535"),
    ("wait in a graph", lambda cuda, address: cuda.record(cuda.synchronize), "while a graph is recorded"),
    ("allocate in a graph", lambda cuda, address: cuda.record(lambda: cuda.allocate(1) and None), "while a graph"),
]


@pytest.mark.parametrize(("call", "told"), [(c, t) for _, c, t in MISTAKES], ids=[name for name, *_ in MISTAKES])
def test_a_callers_mistake_is_found(call: Callable[[FakeCuda, int], object], told: str) -> None:
    cuda = FakeCuda()
    with pytest.raises(AssertionError, match=told):
        call(cuda, cuda.allocate(10))


def test_a_write_beyond_an_allocation_is_found_when_it_is_freed() -> None:
    import ctypes

    cuda = FakeCuda()
    address = cuda.allocate(10)
    ctypes.memset(address + 10, 0, 1)
    with pytest.raises(AssertionError, match="written beyond"):
        cuda.free(address)


def test_another_thread_is_found() -> None:
    cuda, found = FakeCuda(), []

    def ask() -> None:
        try:
            cuda.allocate(1)
        except AssertionError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(timeout=10)
    assert found == ["allocate from another thread than the one that opened the GPU"]


def test_a_graph_happens_when_it_is_replayed() -> None:
    cuda = FakeCuda()
    source, to, back = cuda.allocate(1), cuda.allocate(1), np.zeros(1, np.uint8)
    cuda.upload(to, np.zeros(1, np.uint8))
    graph = cuda.record(lambda: cuda.copy(to, source, 1))
    for value in (5, 6):
        cuda.upload(source, np.full(1, value, np.uint8))
        cuda.download(back, to)
        cuda.synchronize()
        assert back[0] == (0 if value == 5 else 5), "recorded, or replayed before"
        cuda.replay(graph)
    assert graph.replays == 2


def test_a_graph_whose_work_fails_is_none_and_recording_ends() -> None:
    cuda = FakeCuda()

    def work() -> None:
        raise BackendError("enqueue failed")

    with pytest.raises(BackendError, match="enqueue failed"):
        cuda.record(work)
    cuda.synchronize()


def test_after_close_nothing_is_answered() -> None:
    cuda = FakeCuda()
    assert on_stream(cuda.stream) is cuda
    array = cuda.pin(3)
    assert list(cuda.pinned) == [array.ctypes.data]
    cuda.close()
    cuda.close()
    with pytest.raises(BackendError, match="given back"):
        cuda.allocate(1)
    with pytest.raises(KeyError):
        on_stream(cuda.stream)


def test_events_count_calls() -> None:
    cuda = FakeCuda()
    start = cuda.event()
    cuda.allocate(1)
    assert cuda.milliseconds(start, cuda.event()) == 2
