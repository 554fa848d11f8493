"""The pictures that networks take, as the CPU makes them: pixels, and how they become a square."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backend import OnDevice
from edge.bank import Look, SquareMode
from edge.bundle import EncoderFacts, ResizeMode
from edge.imaging import HostImaging, crops_of, cut, fit, resized
from edge.placement import REGIONS, touched
from edge.values import Detections, Frame, Image, Region
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS, frame

F32 = np.float32
HEIGHT, WIDTH = 20, 30
FILL = ENCODER_FACTS.fill_bgr
MODES: list[SquareMode] = ["pad", "squash", "crop"]
STRETCH, LETTERBOX = DETECTOR_FACTS, DETECTOR_FACTS.model_copy(update={"resize": "letterbox"})  # both 64 x 32 px


def facts(square: SquareMode, size: int = 16) -> EncoderFacts:
    return ENCODER_FACTS.model_copy(update={"square": square, "size": size})


def chart(height: int = HEIGHT, width: int = WIDTH) -> Image:
    """Every pixel says where it is: (x, y, 7)."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([xs, ys, np.full_like(xs, 7)], axis=2).astype(np.uint8)


def box(*edges: float) -> NDArray[np.float32]:
    return np.array(edges, F32)


def grown(one: NDArray[np.float32], margin: float) -> Image:
    """What a box with a margin takes of the chart."""
    ((x1, y1, x2, y2),) = touched(one[None], WIDTH, HEIGHT, margin).tolist()
    return chart()[y1:y2, x1:x2]


def to_square(image: Image, facts: EncoderFacts) -> Image:
    """A picture that is one person, as the encoder takes it."""
    height, width = image.shape[:2]
    people = Detections(box(0, 0, width, height)[None], np.ones(1, F32))
    (square,) = crops_of(Frame("door", 0, 0.0, image), people, facts)
    return np.asarray(square, np.uint8)


# ---- cut ----


def test_cut_neither_copies_nor_changes() -> None:
    image, one = chart(), box(1.5, 1.5, 4, 4)
    assert np.shares_memory(cut(image, one), image)
    assert (cut(image, one) == chart()[1:4, 1:4]).all()
    assert (image == chart()).all()
    assert one.tolist() == [1.5, 1.5, 4, 4]


# ---- a person becomes a square ----

sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@given(sizes, st.sampled_from(MODES), st.sampled_from([1, 2, 15, 16]))
def test_a_plain_colour_stays_it_in_a_square(size: tuple[int, int], mode: SquareMode, side: int) -> None:
    crop = np.full((*size, 3), (200, 100, 50), np.uint8)
    before = crop.copy()
    square = to_square(crop, facts(mode, side))
    assert square.shape == (side, side, 3)
    assert square.dtype == np.uint8
    own = (square == (200, 100, 50)).all(axis=2)
    if mode == "pad":
        fill = (square == FILL).all(axis=2)
        assert (own | fill).all()
        height, width = (max(1, round(side * edge / max(size))) for edge in size)
        ys, xs = np.nonzero(own)
        assert (len(set(ys)), len(set(xs))) == (height, width), "the aspect ratio is kept"
        assert abs(ys.min() - (side - 1 - ys.max())) <= 1, "in the middle"
        assert abs(xs.min() - (side - 1 - xs.max())) <= 1
    else:
        assert own.all()
    assert (crop == before).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (1, 2), (16, 16), (17, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_every_crop_becomes_a_square(height: int, width: int, mode: SquareMode) -> None:
    assert to_square(frame(height, width).image, facts(mode)).shape == (16, 16, 3)


def person() -> Image:
    """Tall, with a blue head, a grey body and red shoes."""
    crop = np.full((64, 32, 3), 128, np.uint8)
    crop[:8], crop[-8:] = (255, 0, 0), (0, 0, 255)
    return crop


def test_pad_and_squash_keep_head_and_shoes_and_crop_loses_them() -> None:
    padded, squashed, cropped = (to_square(person(), facts(mode)) for mode in MODES)
    assert (padded[:2, 4:12] == (255, 0, 0)).all()
    assert (padded[-2:, 4:12] == (0, 0, 255)).all()
    assert (padded[:, :4] == FILL).all()
    assert (padded[:, 12:] == FILL).all()
    assert (squashed[:2] == (255, 0, 0)).all()
    assert (squashed[-2:] == (0, 0, 255)).all()
    assert (cropped == 128).all()


def test_a_crop_of_the_right_size_is_left_as_it_is() -> None:
    image = frame(16, 16).image
    for mode in MODES:
        assert (to_square(image, facts(mode)) == image).all()


def test_shrinking_averages() -> None:
    """8 x 8 to 2 x 2: every pixel is the mean of its 4 x 4, as CLIP's antialiased resize has it, nearly."""
    image = frame(8, 8).image
    means = image.reshape(2, 4, 2, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resized(image, 2, 2) - means).max() <= 0.51


@pytest.mark.parametrize(("height", "width"), [(600, 30), (30, 600)])
def test_shrinking_averages_also_where_the_other_side_grows(height: int, width: int) -> None:
    """A thin person, squashed: stripes of one pixel become grey, not other stripes."""
    stripes = np.zeros((height, width, 3), np.uint8)
    if height > width:
        stripes[::2] = 255
    else:
        stripes[:, ::2] = 255
    square = resized(stripes, 224, 224)
    assert square.min() > 80
    assert square.max() < 176


def test_growing_is_smooth() -> None:
    """Bicubic, not nearest: between black and white lie many greys."""
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 255
    assert len(np.unique(resized(image, 16, 16))) > 5


# ---- crops_of ----


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_one_crop_per_person(n: int, mode: SquareMode) -> None:
    boxes = np.array([[i, i, i + 4 + i, i + 9] for i in range(n)], F32).reshape(n, 4)
    one = Frame("door", 0, 0.0, chart())
    crops = crops_of(one, Detections(boxes, np.ones(n, F32)), facts("pad"), Look(mode, 0.1))
    assert crops.shape == (n, 16, 16, 3)
    assert crops.dtype == np.uint8
    for crop, edges in zip(crops, boxes, strict=True):
        assert (crop == to_square(grown(edges, 0.1), facts(mode))).all()


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.3])
def test_a_look_has_its_margin_and_its_square_and_shows_the_region(n: int, region: Region, margin: float) -> None:
    boxes = np.array([[i, i, i + 4 + i, i + 9] for i in range(n)], F32).reshape(n, 4)
    one = Frame("door", 0, 0.0, chart())
    for square in (None, *MODES):
        crops = crops_of(one, Detections(boxes, np.ones(n, F32)), facts("crop"), Look(square, margin), region)
        assert crops.shape == (n, 16, 16, 3)
        top, bottom = REGIONS[region]
        for crop, (x1, y1, x2, y2) in zip(crops, boxes.tolist(), strict=True):
            part = box(x1, y1 + top * (y2 - y1), x2, y1 + bottom * (y2 - y1))
            assert (crop == to_square(grown(part, margin), facts(square or "crop"))).all()


def test_without_a_look_the_whole_box_is_squared_as_the_bundle_says() -> None:
    people = Detections(box(3, 3, 9, 15).reshape(1, 4), np.ones(1, F32))
    one = Frame("door", 0, 0.0, chart())
    for mode in MODES:
        (crop,) = crops_of(one, people, facts(mode))
        assert (crop == to_square(chart()[3:15, 3:9], facts(mode))).all()


# ---- fit ----


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (32, 64), (33, 64)])
@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_every_frame_fits(height: int, width: int, resize: ResizeMode) -> None:
    image = frame(height, width).image
    before = image.copy()
    seen = fit(image, DETECTOR_FACTS.model_copy(update={"resize": resize}))
    assert seen.shape == (32, 64, 3)
    assert seen.dtype == np.uint8
    assert (image == before).all()


def test_the_letterbox_is_grey_and_keeps_the_aspect_ratio() -> None:
    seen = fit(np.full((100, 100, 3), 255, np.uint8), LETTERBOX)
    assert (seen[:, 16:48] == 255).all()
    assert (seen[:, :16] == 128).all()
    assert (seen[:, 48:] == 128).all()
    assert (fit(np.full((100, 100, 3), 255, np.uint8), STRETCH) == 255).all()


# ---- HostImaging ----


@pytest.mark.parametrize("n", [0, 1, 3])
def test_one_picture_of_the_same_size_per_frame(n: int) -> None:
    frames = [frame(20 + i, 300 - i, i) for i in range(n)]
    for one in (STRETCH, LETTERBOX):
        pictures = HostImaging().fit(frames, one)
        assert pictures.shape == (n, 32, 64, 3)
        assert pictures.dtype == np.uint8
        assert all((picture == fit(own.image, one)).all() for picture, own in zip(pictures, frames, strict=True))


@pytest.mark.parametrize("counts", [[], [0], [0, 2, 0, 3], [64]])
def test_the_boxes_of_all_parts_one_after_the_other(counts: list[int]) -> None:
    look = Look("squash", 0.1)
    parts = [
        (frame(40, 50, i), np.array([[j, j, j + 9, j + 20] for j in range(count)], F32).reshape(-1, 4))
        for i, count in enumerate(counts)
    ]
    crops = HostImaging().crop(parts, ENCODER_FACTS, look, "upper")
    assert crops.shape == (sum(counts), ENCODER_FACTS.size, ENCODER_FACTS.size, 3)
    assert crops.dtype == np.uint8
    singles = [
        crops_of(one, Detections(boxes[j : j + 1], np.ones(1, F32)), ENCODER_FACTS, look, "upper")[0]
        for one, boxes in parts
        for j in range(len(boxes))
    ]
    assert all((crop == single).all() for crop, single in zip(crops, singles, strict=True))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_mirror_image_changes_left_and_right(n: int) -> None:
    pictures = np.stack([chart()] * 3)[:n]
    mirrored = HostImaging().mirror(pictures)
    assert mirrored.flags.c_contiguous
    assert (mirrored[..., 0] == WIDTH - 1 - pictures[..., 0]).all()
    assert (mirrored[..., 1:] == pictures[..., 1:]).all()
    assert (HostImaging().mirror(mirrored) == pictures).all()


def test_the_host_does_not_read_the_gpus_memory() -> None:
    with pytest.raises(TypeError, match="must be given arrays"):
        HostImaging().mirror(OnDevice(4096, (1, 4, 4, 3)))
