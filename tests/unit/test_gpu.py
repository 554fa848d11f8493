"""edge/gpu.py: its kernels, run on this machine, against the host's pictures; what crosses, and what stays."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest

from edge.backend import Imaging, OnDevice
from edge.bank import Look
from edge.errors import BackendError
from edge.gpu import CudaImaging
from edge.imaging import HostImaging
from edge.placement import REGIONS
from edge.values import Floats, Frame, Image, Region
from tests.fake_cuda import FakeCuda
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS, frame

SIZES = [(48, 64), (33, 17), (200, 120), (1, 1), (7, 300)]  # height, width, px
REGION_NAMES: list[Region] = list(REGIONS)
LOOKS = [Look(), Look("squash"), Look("crop", 0.1), Look("pad", -0.2), Look("pad", 0.5)]
ENCODER = ENCODER_FACTS.model_copy(update={"size": 24})


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def imaging(cuda: FakeCuda) -> Iterator[CudaImaging]:
    """Nothing of it is left when the test is over."""
    opened = CudaImaging(cuda)
    yield opened
    opened.close()
    assert (cuda.live, cuda.pinned) == ({}, {})
    cuda.close()


def image_of(pictures: OnDevice) -> Image:
    """What lies there: a fake's device memory is the host's."""
    size = int(np.prod(pictures.shape))
    return np.frombuffer(ctypes.string_at(pictures.address, size), np.uint8).reshape(pictures.shape)


def boxes(count: int, height: int, width: int, seed: int = 0) -> Floats:
    """(count, 4) px x1 y1 x2 y2 inside the frame, some of no more than a pixel, some of all of it."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (count, 2, 2)) * (width, height)
    found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    found[: count // 8] = (0, 0, width, height)
    tiny = slice(count // 8, count // 4)
    found[tiny, 2:] = np.minimum(found[tiny, :2] + np.float32(0.3), (width, height))
    return found


def assert_same(made: OnDevice, expected: Image) -> None:
    """Within a grey level on 99.9 % of the pixels, and nowhere far off."""
    assert made.shape == expected.shape
    apart = np.abs(image_of(made).astype(int) - expected) if len(made) else np.zeros(1)
    assert (apart <= 1).mean() >= 0.999
    assert apart.max() <= 2


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("count", range(len(SIZES) + 1))
def test_frames_of_any_size_are_fitted_as_on_the_host(imaging: CudaImaging, resize: str, count: int) -> None:
    facts = DETECTOR_FACTS.model_copy(update={"resize": resize})
    frames = [frame(height, width, seed) for seed, (height, width) in enumerate(SIZES[:count])]
    assert_same(imaging.fit(frames, facts), HostImaging().fit(frames, facts))


@pytest.mark.parametrize(("look", "region"), list(product(LOOKS, REGION_NAMES)))
def test_crops_of_every_look_and_region_are_the_hosts(imaging: CudaImaging, look: Look, region: Region) -> None:
    frames = [frame(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    parts = [(one, boxes(9, one.height, one.width, one.number)) for one in frames]
    imaging.fit(frames, DETECTOR_FACTS)
    assert_same(imaging.crop(parts, ENCODER, look, region), HostImaging().crop(parts, ENCODER, look, region))


@pytest.mark.parametrize("counts", [(), (0,), (1,), (64,), (0, 3, 0, 1), (64, 0, 2)])
def test_any_number_of_people_in_any_number_of_frames(imaging: CudaImaging, counts: Sequence[int]) -> None:
    parts = [(frame(90, 70, seed), boxes(count, 90, 70, seed)) for seed, count in enumerate(counts)]
    imaging.fit([one for one, _ in parts], DETECTOR_FACTS)
    made = imaging.crop(parts, ENCODER, Look(), "whole")
    assert len(made) == sum(counts)
    assert_same(made, HostImaging().crop(parts, ENCODER, Look(), "whole"))
    mirrored = imaging.mirror(made)
    assert mirrored.shape == made.shape
    if len(made):
        np.testing.assert_array_equal(image_of(mirrored), image_of(made)[:, :, ::-1])


def test_it_is_an_imaging(imaging: CudaImaging) -> None:
    seam: Imaging = imaging
    assert len(seam.fit([], DETECTOR_FACTS)) == 0


def test_a_frame_crosses_once_and_no_picture_comes_back(imaging: CudaImaging, cuda: FakeCuda) -> None:
    frames = [frame(61, 83, seed) for seed in range(3)]
    parts = [(one, boxes(5, 61, 83)) for one in frames]
    for batch in range(2):
        imaging.fit([*frames, frames[0]], DETECTOR_FACTS)
        imaging.mirror(imaging.crop(parts, ENCODER, Look(), "whole"))
        imaging.crop(parts, ENCODER, Look("crop"), "head")
        sizes = [size for verb, size in cuda.log if verb == "upload"]
        assert sizes.count(frames[0].image.nbytes) == 3 * (batch + 1)
        small = [size for size in sizes if size != frames[0].image.nbytes]
        assert small == [4 * 32, 15 * 32, 15 * 32] * (batch + 1), "a row of eight numbers per picture"
    assert cuda.count("download") == 0


def test_the_very_frame_is_meant_and_not_its_likeness(imaging: CudaImaging, cuda: FakeCuda) -> None:
    first, second = frame(20, 30, 1), frame(20, 30, 2)
    imaging.fit([first], DETECTOR_FACTS)
    for one in (first, second):
        parts = [(one, boxes(2, 20, 30))]
        assert_same(imaging.crop(parts, ENCODER, Look(), "whole"), HostImaging().crop(parts, ENCODER, Look(), "whole"))
    assert [size for verb, size in cuda.log if verb == "upload"].count(first.image.nbytes) == 2


def test_a_new_batch_forgets_the_frames_of_the_last(imaging: CudaImaging, cuda: FakeCuda) -> None:
    """Even of a frame whose array was written to: a source may reuse its own."""
    one = frame(20, 30)
    imaging.fit([one], DETECTOR_FACTS)
    cuda.synchronize()
    one.image[:] = 7
    assert_same(imaging.fit([one], DETECTOR_FACTS), HostImaging().fit([one], DETECTOR_FACTS))


def test_a_part_of_an_array_is_a_frame_too(imaging: CudaImaging) -> None:
    whole = frame(40, 60).image
    views = [Frame("door", 0, 0.0, whole[3:30, 10:50]), Frame("door", 1, 0.0, whole[::-1, ::2])]
    assert_same(imaging.fit(views, DETECTOR_FACTS), HostImaging().fit(views, DETECTOR_FACTS))


def test_pictures_of_one_batch_do_not_disturb_each_other(imaging: CudaImaging, cuda: FakeCuda) -> None:
    one = frame(90, 70)
    parts, made = [(one, boxes(6, 90, 70))], []
    made.append((imaging.fit([one], DETECTOR_FACTS), HostImaging().fit([one], DETECTOR_FACTS)))
    for look, region in product(LOOKS, REGION_NAMES):
        made.append((imaging.crop(parts, ENCODER, look, region), HostImaging().crop(parts, ENCODER, look, region)))
    cuda.synchronize()  # no staged upload was written over
    for pictures, expected in made:
        assert_same(pictures, expected)


def test_memory_grows_to_one_batch_and_stays(imaging: CudaImaging, cuda: FakeCuda) -> None:
    def batch(people: int) -> None:
        one = frame(90, 70)
        imaging.fit([one], DETECTOR_FACTS)
        imaging.crop([(one, boxes(people, 90, 70))], ENCODER, Look(), "whole")

    batch(10)
    batch(10)
    grown, asked = dict(cuda.live), cuda.count("allocate")
    assert len(grown) == len(cuda.pinned) == 1, "one chunk"
    for people in (10, 3, 0, 10):
        batch(people)
    assert (dict(cuda.live), cuda.count("allocate")) == (grown, asked)
    batch(30)
    batch(30)
    assert len(cuda.live) == len(cuda.pinned) == 1
    assert sum(cuda.live.values()) > sum(grown.values())


def test_pictures_of_the_host_are_not_taken(imaging: CudaImaging) -> None:
    with pytest.raises(TypeError, match="got an array"):
        imaging.mirror(np.zeros((1, 2, 2, 3), np.uint8))


@pytest.mark.parametrize("capacity", [0, 4_000, 6_300, 12_700, 19_000, 19_300, 25_700, 30_000])
def test_out_of_memory_anywhere_leaks_nothing_and_the_next_batch_goes_on(capacity: int) -> None:
    """Frame, table, pictures, crops: whichever of them finds no room."""
    cuda, one = FakeCuda(capacity), frame(90, 70)
    imaging, parts = CudaImaging(cuda), [(one, boxes(4, 90, 70))]

    def batch() -> None:
        made = imaging.fit([one], DETECTOR_FACTS)
        assert_same(made, HostImaging().fit([one], DETECTOR_FACTS))
        made = imaging.crop(parts, ENCODER, Look(), "whole")
        assert_same(made, HostImaging().crop(parts, ENCODER, Look(), "whole"))

    for _ in range(2):
        with pytest.raises(BackendError, match=f"of {capacity} bytes"):
            batch()
    cuda.capacity = 1 << 20
    batch()
    imaging.close()
    imaging.close()
    assert (cuda.live, cuda.pinned) == ({}, {})


class Stubborn(FakeCuda):
    """Refuses to give back the first allocation it is asked about, and to wait."""

    refused = 0

    def free(self, address: int) -> None:
        super().free(address)
        if not self.refused:
            self.refused += 1
            raise BackendError("CUDA: CUDA_ERROR_ILLEGAL_ADDRESS")

    def synchronize(self) -> None:
        super().synchronize()
        if self.live:
            raise BackendError("CUDA: CUDA_ERROR_LAUNCH_FAILED")


def test_close_goes_on_after_a_refusal_and_tells_the_first() -> None:
    cuda = Stubborn()
    imaging, one = CudaImaging(cuda), frame(90, 70)
    imaging.fit([one], DETECTOR_FACTS)
    imaging.crop([(one, boxes(4, 90, 70))], ENCODER, Look(), "whole")
    assert len(cuda.live) > 2
    with pytest.raises(BackendError, match="LAUNCH_FAILED"):
        imaging.close()
    assert (cuda.live, cuda.pinned, cuda.refused) == ({}, {}, 1)
    imaging.close()


def test_a_kernel_that_is_wrong_would_be_seen(imaging: CudaImaging) -> None:
    """The comparison can fail: of a picture turned upside down, it does."""
    one = frame(90, 70)
    made = imaging.fit([one], DETECTOR_FACTS)
    with pytest.raises(AssertionError):
        assert_same(made, HostImaging().fit([one], DETECTOR_FACTS)[:, ::-1])
