"""edge/cuda.py by each binding, and the kernels of edge/gpu.py, on a real GPU.

Written on machines without one: whatever says otherwise, this has been tried with stand-ins alone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bank import Look
from edge.cuda import Cuda
from edge.errors import BackendError
from edge.gpu import CudaImaging
from edge.imaging import HostImaging
from edge.placement import REGIONS
from edge.values import Floats, Frame, Image, Region
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS, frame
from tests.gpu.conftest import ROOT, downloaded, free_now

ADD = """
extern "C" __global__ void add(const int *from, int *to, int count, int by) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) to[at] = from[at] + by;
}
"""
WILD = """
extern "C" __global__ void add(const int *from, int *to, int count, int by) { *(volatile int *)16 = by; }
"""
MIB = 1 << 20
COUNT = 10_007  # no multiple of a block

# height, width, px: small, odd, tall, wide, and two cameras'
SIZES = [(48, 64), (33, 17), (1, 1), (7, 300), (720, 1280), (1080, 1920)]
LOOKS = [Look(), Look("squash"), Look("crop", 0.1), Look("pad", -0.2), Look("pad", 0.5)]
REGION_NAMES: list[Region] = list(REGIONS)
ENCODER = ENCODER_FACTS.model_copy(update={"size": 224})
DETECTOR = DETECTOR_FACTS.model_copy(update={"height": 416, "width": 416})


def numbers(count: int = COUNT) -> NDArray[np.int32]:
    return np.random.default_rng(count).integers(-(2**30), 2**30, count).astype(np.int32)


def launched(cuda: Cuda, kernel: object, source: int, target: int, by: int, count: int = COUNT) -> None:
    """target[i] = source[i] + by."""
    arguments = np.uint64(source), np.uint64(target), np.int32(count), np.int32(by)
    cuda.launch(kernel, (-(-count // 256), 1, 1), (256, 1, 1), arguments)


# --- the verbs ------------------------------------------------------------------------------------------------------


def test_what_it_is(cuda: Cuda) -> None:
    major, minor = cuda.gpu.compute_capability.split(".")
    assert cuda.gpu.name
    assert (int(major), int(minor)) >= (5, 0)
    assert 0 < cuda.free_memory() <= cuda.gpu.memory
    assert int(cuda.driver.split(".")[0]) >= 11
    assert cuda.stream


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("size", [1, 255, 4097, 6_220_800])
def test_bytes_come_back_as_they_went(cuda: Cuda, size: int, pinned: bool) -> None:
    first, second = cuda.allocate(size), cuda.allocate(size)
    assert first % 256 == second % 256 == 0
    array, back = (cuda.pin(size), cuda.pin(size)) if pinned else (np.empty(size, np.uint8), np.zeros(size, np.uint8))
    array[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    back[:] = ~array
    cuda.upload(first, array)
    cuda.copy(second, first, size)
    cuda.download(back, second)
    cuda.synchronize()
    np.testing.assert_array_equal(back, array)
    for address in (first, second):
        cuda.free(address)
    if pinned:
        cuda.unpin(array)
        cuda.unpin(back)


def test_a_copy_of_a_part_touches_that_part_alone(cuda: Cuda) -> None:
    array, back = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    address, other = cuda.allocate(100), cuda.allocate(100)
    cuda.upload(address, array)
    cuda.upload(other, np.zeros(100, np.uint8))
    cuda.copy(other + 30, address + 10, 20)
    cuda.download(back, other)
    cuda.synchronize()
    np.testing.assert_array_equal(back, [*[0] * 30, *range(10, 30), *[0] * 50])


def test_out_of_memory_has_the_numbers_and_harms_nothing(cuda: Cuda) -> None:
    wanted = 4 * cuda.gpu.memory
    with pytest.raises(BackendError, match=rf"out of GPU memory: expected {wanted} bytes .* free, got \d+ bytes"):
        cuda.allocate(wanted)
    array, back = numbers(), np.zeros(COUNT, np.int32)
    address = cuda.allocate(array.nbytes)
    cuda.upload(address, array)
    cuda.download(back, address)
    cuda.synchronize()
    np.testing.assert_array_equal(back, array)


def test_memory_that_is_given_back_is_free_again(cuda: Cuda) -> None:
    cuda.free(cuda.allocate(64 * MIB))
    before = free_now(cuda)
    for _ in range(50):
        cuda.free(cuda.allocate(64 * MIB))
    assert before - free_now(cuda) < 64 * MIB, "50 times as much would have stayed"


def test_a_kernel_computes(cuda: Cuda) -> None:
    kernel, array, back = cuda.compile(ADD, "add"), numbers(), np.zeros(COUNT, np.int32)
    source, target = cuda.allocate(array.nbytes), cuda.allocate(array.nbytes)
    cuda.upload(source, array)
    launched(cuda, kernel, source, target, 7)
    cuda.download(back, target)
    cuda.synchronize()
    np.testing.assert_array_equal(back, array + 7)


def test_a_source_that_is_wrong_and_a_kernel_that_is_not_there(cuda: Cuda) -> None:
    with pytest.raises(BackendError):
        cuda.compile(ADD, "subtract")
    assert cuda.compile(ADD, "add") is not None


def test_a_graph_replays_what_was_recorded_on_what_is_there_now(cuda: Cuda) -> None:
    kernel, array, back = cuda.compile(ADD, "add"), numbers(), np.zeros(COUNT, np.int32)
    source, target = cuda.allocate(array.nbytes), cuda.allocate(array.nbytes)

    def work() -> None:
        launched(cuda, kernel, source, target, 1)
        launched(cuda, kernel, target, target, 10)

    cuda.upload(target, np.zeros(COUNT, np.int32))
    cuda.synchronize()
    graph = cuda.record(work)
    if graph is None:
        pytest.skip(f"{cuda.about} records no CUDA graphs")
    cuda.download(back, target)
    cuda.synchronize()
    assert not back.any(), "recording does nothing yet"
    for round_ in range(3):
        cuda.upload(source, array + round_)
        cuda.replay(graph)
        cuda.download(back, target)
        cuda.synchronize()
        np.testing.assert_array_equal(back, array + round_ + 11)


def test_a_recording_that_fails_leaves_the_stream_usable(cuda: Cuda) -> None:
    kernel, array, back = cuda.compile(ADD, "add"), numbers(), np.zeros(COUNT, np.int32)
    source, target = cuda.allocate(array.nbytes), cuda.allocate(array.nbytes)

    def work() -> None:
        launched(cuda, kernel, source, target, 1)
        raise ValueError("in the middle")

    try:
        if cuda.record(lambda: launched(cuda, kernel, source, target, 1)) is None:
            pytest.skip(f"{cuda.about} records no CUDA graphs")
        with pytest.raises(ValueError, match="in the middle"):
            cuda.record(work)
    finally:
        cuda.upload(source, array)
        cuda.copy(target, source, array.nbytes)
        cuda.download(back, target)
        cuda.synchronize()
    np.testing.assert_array_equal(back, array)


def test_events_measure_what_lies_between_them(cuda: Cuda) -> None:
    kernel, size = cuda.compile(ADD, "add"), 4 * MIB
    source, target = cuda.allocate(4 * size), cuda.allocate(4 * size)
    marks = [cuda.event()]
    for times in (1, 200):
        for _ in range(times):
            launched(cuda, kernel, source, target, 1, size)
        marks.append(cuda.event())
    cuda.synchronize()
    one, many = (cuda.milliseconds(start, end) for start, end in pairwise(marks))
    assert 0 < one < many, "200 launches take longer than one"
    assert cuda.milliseconds(marks[0], marks[-1]) >= many


def test_close_is_once_whatever_is_left_open(binding: Callable[[], Cuda]) -> None:
    with_watch = binding()
    before = free_now(with_watch)
    for _ in range(3):
        other = binding()
        other.allocate(128 * MIB)
        other.pin(MIB)
        kernel = other.compile(ADD, "add")
        address = other.allocate(4 * COUNT)
        other.record(lambda a=address, k=kernel, o=other: launched(o, k, a, a, 1))  # type: ignore[misc]
        other.event()
        other.close()
        other.close()
        with pytest.raises(BackendError, match="given back"):
            other.allocate(1)
    assert before - free_now(with_watch) < 128 * MIB, "what was left over was given back"
    with_watch.close()


def test_a_kernel_that_writes_anywhere_is_told_by_synchronize(cuda: Cuda) -> None:
    """In a process of its own: it spoils the whole process's context."""
    script = (
        "from tests.gpu.test_device import WILD, launched\n"
        f"from {type(cuda).__module__} import {type(cuda).__name__} as Opened\n"
        "from edge.errors import BackendError\n"
        "cuda = Opened()\n"
        "kernel, address = cuda.compile(WILD, 'add'), cuda.allocate(64)\n"
        "try:\n"
        "    launched(cuda, kernel, address, address, 1, 4)\n"
        "    cuda.synchronize()\n"
        "except BackendError as error:\n"
        "    print('told:', error)\n"
        "try:\n"
        "    cuda.close()\n"
        "except BackendError:\n"
        "    print('close tells it again')\n"
        "cuda.close()\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "told: CUDA" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def imaging(cuda: Cuda) -> Iterator[CudaImaging]:
    opened = CudaImaging(cuda)
    yield opened
    opened.close()


def boxes(count: int, height: int, width: int, seed: int = 0) -> Floats:
    """(count, 4) px x1 y1 x2 y2 inside the frame; of 64 some are all of it and some less than a pixel."""
    corners = np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)) * (width, height)
    found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    found[: count // 16] = (0, 0, width, height)
    tiny = slice(count // 16, count // 8)
    found[tiny, 2:] = np.minimum(found[tiny, :2] + np.float32(0.3), (width, height))
    return found


def assert_same(made: Image, expected: Image) -> None:
    """Within a grey level on 99.9 % of the pixels, and nowhere far off."""
    assert made.shape == expected.shape
    if made.size:
        apart = np.abs(made.astype(np.int16) - expected)
        assert (apart <= 1).mean() >= 0.999
        assert apart.max() <= 2


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [*SIZES, None], ids=str)
def test_frames_are_fitted_as_on_the_host(
    cuda: Cuda, imaging: CudaImaging, resize: str, size: tuple[int, int] | None
) -> None:
    """None: all sizes in one batch."""
    facts = DETECTOR.model_copy(update={"resize": resize})
    frames = [frame(*one, seed) for seed, one in enumerate(SIZES if size is None else [size])]
    assert_same(downloaded(cuda, imaging.fit(frames, facts)), HostImaging().fit(frames, facts))


@pytest.mark.parametrize(("look", "region"), list(product(LOOKS, REGION_NAMES)), ids=str)
def test_crops_of_every_look_and_region_are_the_hosts(
    cuda: Cuda, imaging: CudaImaging, look: Look, region: Region
) -> None:
    frames = [frame(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    parts = [(one, boxes(5, one.height, one.width, one.number)) for one in frames]
    imaging.fit(frames, DETECTOR)
    made = downloaded(cuda, imaging.crop(parts, ENCODER, look, region))
    assert_same(made, HostImaging().crop(parts, ENCODER, look, region))


@pytest.mark.parametrize("counts", [(), (0,), (1,), (64,), (0, 3, 0, 1), (64, 0, 2)], ids=str)
def test_any_number_of_people_in_any_number_of_frames(cuda: Cuda, imaging: CudaImaging, counts: Sequence[int]) -> None:
    parts = [(frame(576, 768, seed), boxes(count, 576, 768, seed)) for seed, count in enumerate(counts)]
    for _ in range(2):  # the second batch finds the memory of the first
        imaging.fit([one for one, _ in parts], DETECTOR)
        pictures = imaging.crop(parts, ENCODER, Look(), "whole")
        mirrored = imaging.mirror(pictures)
        made = downloaded(cuda, pictures)
        assert len(made) == sum(counts)
        assert_same(made, HostImaging().crop(parts, ENCODER, Look(), "whole"))
        np.testing.assert_array_equal(downloaded(cuda, mirrored), made[:, :, ::-1])


def test_the_comparison_can_fail(cuda: Cuda, imaging: CudaImaging) -> None:
    one: Frame = frame(90, 70)
    made = downloaded(cuda, imaging.fit([one], DETECTOR))
    with pytest.raises(AssertionError):
        assert_same(made, HostImaging().fit([one], DETECTOR)[:, ::-1])
