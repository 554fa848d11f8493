"""The GPU's pictures against the CPU's: the kernels run behind a C++ compiler, and compile for every GPU served.

A picture may differ from OpenCV's by one grey level where both round a tie, or nearly one, to different sides: OpenCV
does so itself, from one CPU's code to another's.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bank import Look, SquareMode
from edge.imaging import GREY, HostImaging, resized, stretched
from edge.placement import REGIONS, Placement, cropped, fitted
from edge.values import Frame, Image, Region
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS
from tests.kernels import PIXELS, compiled

F32 = np.float32
SOURCE = PIXELS.read_text(encoding="utf-8")
PETS = PIXELS.parent.parent / "export/mini/pets-650.jpg"
MODES: list[SquareMode] = ["pad", "squash", "crop"]
LINEAR, CUBIC = 0, 1
HOST: dict[int, Callable[[Image, int, int], Image]] = {LINEAR: stretched, CUBIC: resized}
GPUS = ["87", "89", "90", "110"]  # Orin; Ada; Hopper; Thor


@pytest.fixture(autouse=True)
def _opencv_by_itself() -> Iterator[None]:
    """Without Intel's library, whose bicubic is another and which an ARM machine has not."""
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    yield
    cv2.ipp.setUseIPP(before)


@pytest.fixture(scope="module")
def photo() -> Image:
    return np.asarray(cv2.imread(str(PETS)), np.uint8)


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def launch(source: str, kernel: str, pictures: int, width: int, height: int, *arguments: np.generic) -> None:
    """As CUDA launches it, one thread per pixel of each picture; none for none, which is an error of CUDA."""
    if pictures:
        values = [np.array([argument]) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        run = getattr(compiled(source), f"run_{kernel}")
        run(-(-width // 32), -(-height // 8), pictures, 32, 8, 1, addresses)


def placed(
    image: Image,
    placement: Placement,
    width: int,
    height: int,
    fill: tuple[int, int, int],
    mode: int,
    source: str = SOURCE,
) -> Image:
    """(n, height, width, 3) by the kernel; what lies around frame, table and pictures in memory stays as it is."""
    frame, table = np.ascontiguousarray(image), placement.table
    before = frame.tobytes(), table.tobytes()
    size = len(table) * height * width * 3
    memory = np.full(size + 128, 171, np.uint8)
    launch(
        source,
        "resize_boxes",
        len(table),
        width,
        height,
        np.uint64(frame.ctypes.data),
        np.int32(image.shape[1]),
        np.uint64(table.ctypes.data),
        np.uint64(memory.ctypes.data + 64),
        np.int32(width),
        np.int32(height),
        np.int32(fill[0] | fill[1] << 8 | fill[2] << 16),
        np.int32(mode),
    )
    assert (frame.tobytes(), table.tobytes()) == before
    assert (memory[:64] == 171).all()
    assert (memory[64 + size :] == 171).all()
    return memory[64 : 64 + size].reshape(-1, height, width, 3)


def whole(image: Image, width: int, height: int, mode: int, source: str = SOURCE) -> Image:
    """The whole image, resized by the kernel."""
    edges = np.array([[0, 0, image.shape[1], image.shape[0]]], np.int32)
    placement = Placement(edges, np.array([[0, 0, width, height]], np.int32))
    return np.asarray(placed(image, placement, width, height, (0, 0, 0), mode, source)[0], np.uint8)


@dataclass
class Compared:
    """How much of two pictures is equal, and nearly."""

    exact: int = 0
    near: int = 0  # one grey level
    total: int = 0

    def add(self, one: Image, other: Image) -> None:
        assert one.shape == other.shape
        differences = np.abs(one.astype(int) - other)
        self.exact += int((differences == 0).sum())
        self.near += int((differences <= 1).sum())
        self.total += differences.size

    def same(self, exact: float = 0.999) -> bool:
        """Whether all is within one grey level and at least this share exact."""
        total = max(self.total, 1)
        print(f"exact {self.exact / total:.6f}, within one grey level {self.near / total:.6f}")
        return self.near == self.total and self.exact >= exact * self.total


# ---- resizing ----

SIZES = {  # (height, width) of the image and of the picture
    "a pixel": ((1, 1), (16, 16)),
    "to a pixel": ((40, 30), (1, 1)),
    "a row": ((1, 200), (30, 64)),
    "a column": ((200, 1), (64, 30)),
    "as it is": ((48, 64), (48, 64)),
    "half": ((64, 96), (32, 48)),
    "a third": ((96, 144), (32, 48)),
    "a quarter and half": ((128, 96), (32, 48)),
    "half and as wide": ((64, 48), (32, 48)),
    "a 49th": ((490, 98), (10, 2)),
    "twice": ((32, 48), (64, 96)),
    "larger": ((61, 37), (224, 224)),
    "a little larger": ((60, 60), (61, 63)),
    "smaller": ((300, 217), (224, 97)),
    "a little smaller": ((225, 226), (224, 224)),
    "much smaller": ((700, 900), (13, 17)),
    "narrower and higher": ((100, 300), (224, 224)),
    "wider and lower": ((300, 100), (224, 224)),
    "half and twice": ((32, 96), (64, 48)),
    "a thin person": ((600, 30), (224, 224)),
}


@pytest.mark.parametrize("mode", [LINEAR, CUBIC])
@pytest.mark.parametrize(("before", "after"), SIZES.values(), ids=SIZES)
def test_resizing_is_opencvs(before: tuple[int, int], after: tuple[int, int], mode: int, photo: Image) -> None:
    compared = Compared()
    height, width = after
    for image in (noise(*before), photo[: before[0], : before[1]]):
        compared.add(whole(image, width, height, mode), HOST[mode](image, width, height))
    assert compared.same()


sides = st.integers(1, 90)


@settings(max_examples=150)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.sampled_from([LINEAR, CUBIC]), st.integers(0, 9))
def test_resizing_is_opencvs_for_any_size(
    before: tuple[int, int], after: tuple[int, int], mode: int, seed: int
) -> None:
    image, (height, width) = noise(*before, seed), after
    compared = Compared()
    compared.add(whole(image, width, height, mode), HOST[mode](image, width, height))
    assert compared.same(exact=0.98)  # of a few pixels, one is much


@pytest.mark.parametrize("mode", [LINEAR, CUBIC])
def test_a_hundred_parts_of_a_photo(mode: int, photo: Image) -> None:
    random, compared = np.random.default_rng(7), Compared()
    for _ in range(100):
        x, y = (int(random.integers(0, side - 1)) for side in photo.shape[1::-1])
        width, height = (int(side) for side in random.integers(1, 260, 2))
        image = photo[y : y + int(random.integers(1, 400)), x : x + int(random.integers(1, 400))]
        compared.add(whole(image, width, height, mode), HOST[mode](image, width, height))
    assert compared.same(exact=0.9999)


@pytest.mark.parametrize("mode", [LINEAR, CUBIC])
def test_what_the_cpu_does_with_every_library_it_has_is_within_a_grey_level(mode: int, photo: Image) -> None:
    """On Intel's CPUs its own bicubic, which does not round its weights."""
    cv2.ipp.setUseIPP(True)
    compared = Compared()
    for before, (height, width) in SIZES.values():
        image = photo[: before[0], : before[1]]
        compared.add(whole(image, width, height, mode), HOST[mode](image, width, height))
    assert compared.same(exact=0.95)


@pytest.mark.parametrize("mode", [LINEAR, CUBIC])
def test_edges_do_not_leave_the_range_of_grey(mode: int) -> None:
    """Bicubic overshoots at black and white, and must end there."""
    image = np.zeros((12, 12, 3), np.uint8)
    image[4:8, 4:8] = 255
    compared = Compared()
    compared.add(whole(image, 97, 61, mode), HOST[mode](image, 97, 61))
    assert compared.same()


# ---- the networks' pictures ----


def corners(n: int, width: int, height: int) -> NDArray[np.float32]:
    """n boxes: first those that are special, then any; also turned inside out and beyond the frame."""
    special = [
        (0, 0, width, height),
        (0, 0, 1, 1),
        (width - 1, height - 1, width, height),
        (10, 10, 10, 10),
        (width - 30, 5, width + 80, height + 9),
        (-50, -50, 40, 90),
        (-90, -90, -20, -20),
        (5, 0, 6, height),
        (0, 7, width, 8),
        (20, 20, 244, 244),
        (30, 30, 478, 478),
        (60, 30, 20, 10),
    ]
    random = np.random.default_rng(n)
    starts = random.uniform(-20, (width, height), (max(n - len(special), 0), 2))
    ends = starts + random.uniform(1, (width / 2, height), starts.shape)
    return np.concatenate([np.array(special), np.concatenate([starts, ends], axis=1)]).astype(F32)[:n]


@pytest.mark.parametrize("n", [0, 1, 12])
@pytest.mark.parametrize("square", MODES)
@pytest.mark.parametrize(("margin", "region"), [(0.0, "whole"), (0.2, "upper"), (-0.3, "head"), (1.0, "feet")], ids=str)
def test_crops_are_the_hosts(n: int, square: SquareMode, margin: float, region: Region, photo: Image) -> None:
    frame, look = Frame("door", 0, 0.0, photo), Look(square, margin)
    boxes, size = corners(n, frame.width, frame.height), 224
    facts = ENCODER_FACTS.model_copy(update={"size": size, "fill_bgr": (104, 116, 124)})
    placement = cropped(boxes, frame.width, frame.height, facts, look, region)
    crops = placed(photo, placement, size, size, facts.fill_bgr, CUBIC)
    compared = Compared()
    compared.add(crops, HostImaging().crop([(frame, boxes)], facts, look, region))
    assert len(crops) == n
    assert compared.same()


def test_a_crowd_in_one_launch(photo: Image) -> None:
    frame, look = Frame("door", 0, 0.0, photo), Look("pad", 0.1)
    facts = ENCODER_FACTS.model_copy(update={"size": 64, "fill_bgr": (1, 2, 253)})
    boxes = corners(64, frame.width, frame.height)
    for region in REGIONS:
        placement = cropped(boxes, frame.width, frame.height, facts, look, region)
        crops = placed(photo, placement, 64, 64, facts.fill_bgr, CUBIC)
        compared = Compared()
        compared.add(crops, HostImaging().crop([(frame, boxes)], facts, look, region))
        assert compared.same()


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize(("width", "height"), [(416, 416), (608, 320), (32, 64)])
def test_the_detectors_picture_is_the_hosts(resize: str, width: int, height: int, photo: Image) -> None:
    facts = DETECTOR_FACTS.model_copy(update={"resize": resize, "width": width, "height": height})
    compared = Compared()
    for image in (photo, np.ascontiguousarray(photo[:200]), noise(30, 40), noise(1, 999), noise(999, 1), noise(1, 1)):
        placement = fitted(image.shape[1], image.shape[0], facts)
        pictures = placed(image, placement, width, height, GREY, LINEAR)
        compared.add(pictures, HostImaging().fit([Frame("door", 0, 0.0, image)], facts))
    assert compared.same()


@pytest.mark.parametrize("n", [0, 1, 64])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 33), (7, 1)])
def test_mirror_images_are_the_hosts(n: int, height: int, width: int) -> None:
    pictures = noise(n * height, width).reshape(n, height, width, 3)
    memory = np.full(pictures.size + 64, 171, np.uint8)
    addresses = np.uint64(pictures.ctypes.data), np.uint64(memory.ctypes.data)
    launch(SOURCE, "mirror", n, width, height, *addresses, np.int32(width), np.int32(height))
    assert (memory[: pictures.size].reshape(pictures.shape) == HostImaging().mirror(pictures)).all()
    assert (memory[pictures.size :] == 171).all()


# ---- a mistake is found ----

MISTAKES = {
    "a bicubic of another slope": (CUBIC, "a = -0.75f", "a = -0.5f"),
    "no average": (CUBIC, "int across = min(width, part.width)", "int across = part.width"),
    "a mean rounded down": (CUBIC, "return (Byte)min(max(__float2int_rn(level)", "return (Byte)min(max((int)(level)"),
    "an overshoot that wraps": (CUBIC, "(Byte)min(max(__float2int_rn(level), 0), 255)", "(Byte)__float2int_rn(level)"),
    "weights of whole 64ths": (LINEAR, "int weight(float share) { return", "int weight(float share) { return ~31 &"),
    "corners instead of middles": (LINEAR, "(2 * to + 1) * length - many", "2 * to * length"),
    "the pixel to the left": (LINEAR, "clamped(left + 1, part.width)", "clamped(left, part.width)"),
    "rounded down": (LINEAR, ">> 16) + 2) >> 2", ">> 16)) >> 2"),
}


@pytest.mark.parametrize(("mode", "right", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_a_planted_mistake_is_found(mode: int, right: str, wrong: str, photo: Image) -> None:
    assert SOURCE.count(right) == 1
    source, compared = SOURCE.replace(right, wrong), Compared()
    steps = np.zeros((40, 40, 3), np.uint8)
    steps[10:30, 10:30] = 255
    for image in (photo[:100, :300], photo[:70, :90], steps):
        compared.add(whole(image, 224, 224, mode, source), HOST[mode](image, 224, 224))
    assert not compared.same()


def test_a_wrong_colour_around_a_picture_is_found(photo: Image) -> None:
    source = SOURCE.replace("fill >> 8 * c", "fill >> (16 - 8 * c)")
    assert source != SOURCE
    placement = Placement(np.array([[0, 0, 9, 9]], np.int32), np.array([[2, 3, 5, 6]], np.int32))
    wanted, wrong = (placed(photo, placement, 16, 16, (1, 2, 253), LINEAR, text)[0] for text in (SOURCE, source))
    outside = np.ones((16, 16), bool)
    outside[3:9, 2:7] = False
    assert (wanted[outside] == (1, 2, 253)).all()
    assert (wrong[outside] == (253, 2, 1)).all()
    assert (wanted[~outside] == wrong[~outside]).all()


# ---- the compilers of CUDA ----


@pytest.mark.parametrize("gpu", GPUS)
def test_nvcc_compiles_it(gpu: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc of the CUDA toolkit is not installed")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=True).stdout
    if f"sm_{gpu}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{gpu}: it is of another CUDA")
    made = tmp_path / "pixels.cubin"
    command = [nvcc, "-Werror", "all-warnings", f"-arch=sm_{gpu}", "-cubin", "-o", made, PIXELS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in made.read_bytes() for name in (b"resize_boxes", b"mirror"))


@pytest.mark.parametrize("gpu", GPUS)
def test_nvrtc_compiles_it_and_says_what_is_wrong(gpu: str) -> None:
    """As the box does, where there may be no file and no include."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        code, *_, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as error:
        pytest.skip(f"the library of NVRTC is not installed: {error}")
    assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS
    if int(gpu) not in list(known):
        pytest.skip(f"this NVRTC does not know sm_{gpu}: it is of another CUDA")
    for source, fine in ((SOURCE, True), (SOURCE.replace("Byte grey(", "Bite grey("), False)):
        _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"pixels.cu", 0, [], [])
        (code,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{gpu}".encode()])
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        assert (code == nvrtc.nvrtcResult.NVRTC_SUCCESS) is fine, log.decode()
        if fine:
            assert log.strip(b"\0 \n") == b"", "no warning"
            assert nvrtc.nvrtcGetCUBINSize(program)[1] > 0
        else:
            assert b"Bite" in log
        nvrtc.nvrtcDestroyProgram(program)
