"""The gate of an engine: a right one passes with its figures, each fault is refused with its own message."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bank import PromptBank
from edge.bundle import SMALLER
from edge.errors import BundleError
from edge.golden import Answers, Golden
from edge.values import Category
from export.variants import MOST, name_of, variants_of
from export.verify import (
    detector_answers,
    encoder_answers,
    gate_crops,
    gate_detector,
    gate_encoder,
    gate_frames,
)
from tests.fakes import FakeSession, unit_rows

F32 = np.float32
Outputs = dict[str, NDArray[Any]]
Spoil = Callable[[Outputs, int], Outputs]  # the answers of one run, and how many pictures it had

SIZE, DIM, SCALE = 16, 24, 100.0
SIZES = (1, 8, 32)
COLOURS = tuple(f"colour {i}" for i in range(5))


def golden(frames: int = 2, crops: int = 8) -> Golden:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (frames + crops, SIZE, SIZE, 3), np.uint8)
    none = np.zeros((0,), F32)  # what the fp32 graphs said of them: the gate asks anew
    return Golden(pictures[:frames], none, none, pictures[frames:], none)


def embedding(feeds: Mapping[str, NDArray[Any]]) -> Outputs:
    """Each picture's own: a fixed random projection of its pixels, which sees colour and place."""
    images = feeds["image"].astype(F32) / 255 - F32(0.5)
    projection = np.random.default_rng(1).normal(size=(SIZE * SIZE * 3, DIM)).astype(F32)
    vectors = images.reshape(len(images), -1) @ projection
    return {"embedding": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}


def boxes(feeds: Mapping[str, NDArray[Any]]) -> Outputs:
    """Five boxes per picture, of sizes and scores that its colours say; the last is noise."""
    means = feeds["image"].reshape(len(feeds["image"]), -1, 3)[:, :5].astype(F32) / 255  # (n, 5, 3)
    corners = means[..., :2] * F32(0.5)
    sides = F32(0.2) + means[..., 1:] * F32(0.2)
    scores = np.array([0.9, 0.6, 0.3, 0.15, 0.02], F32)[:, None] + means[..., :1] * F32(0.05)
    return {"boxes": np.concatenate([corners, corners + sides], axis=2), "scores": scores}


def with_fault(right: Callable[[Mapping[str, NDArray[Any]]], Outputs], spoil: Spoil) -> FakeSession:
    def answer(feeds: Mapping[str, NDArray[Any]]) -> Outputs:
        return spoil({name: array.copy() for name, array in right(feeds).items()}, len(feeds["image"]))

    session = FakeSession(answer)
    session.precision, session.about = "fp16", "TensorRT 10.3.0 on Orin, fp16"
    return session


def unspoilt(outputs: Outputs, n: int) -> Outputs:
    return outputs


def bank(categories: int = 13, **of_the_first: Any) -> PromptBank:
    asked = [Category(f"question {i}", f"question {i}", COLOURS, (None,) * 5) for i in range(categories)]
    if of_the_first:
        asked[0] = replace(asked[0], **of_the_first)
    return PromptBank(tuple(asked), unit_rows(5 * categories, DIM, 3).reshape(-1, DIM), "", "", "words.toml")


GOLDEN = golden()
CROPS, FRAMES = gate_crops(GOLDEN), gate_frames(GOLDEN)
VECTORS = encoder_answers(FakeSession(embedding), CROPS)
SEEN = detector_answers(FakeSession(boxes), FRAMES)


def judge_encoder(candidate: FakeSession, asked: PromptBank | None = None, sizes: tuple[int, ...] = SIZES) -> str:
    return gate_encoder(candidate, VECTORS, CROPS, bank() if asked is None else asked, SCALE, sizes, "image-1.engine")


def judge_detector(candidate: FakeSession, reference: Answers = SEEN, sizes: tuple[int, ...] = (1, 4)) -> str:
    return gate_detector(candidate, reference, sizes, "detector-1.engine")


# ---- the pictures ----


@pytest.mark.parametrize("n", [0, 1, 2, 8])
def test_variants_are_many_different_and_the_same_every_time(n: int) -> None:
    one = golden(crops=n, frames=n)
    crops, frames = gate_crops(one), gate_frames(one)
    assert crops.shape == (32 * n, SIZE, SIZE, 3)
    assert frames.shape == (6 * n, SIZE, SIZE, 3)
    assert crops.dtype == frames.dtype == np.uint8
    assert len({picture.tobytes() for picture in crops}) == len(crops)
    assert (gate_crops(one) == crops).all()
    assert all((crops[32 * i] == one.crops[i]).all() for i in range(n)), "the picture itself is among them"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_smaller_detectors_frames_vary_as_the_others_do(n: int) -> None:
    one, none = golden(frames=n), np.zeros((0,), F32)
    fewer = replace(one, smaller=Answers(one.frames[:, ::2, ::2], none, none))
    frames = gate_frames(fewer, SMALLER)
    assert frames.shape == (6 * n, SIZE // 2, SIZE // 2, 3)
    assert all((frames[6 * i] == one.frames[i, ::2, ::2]).all() for i in range(n))
    assert (gate_frames(fewer) == gate_frames(one)).all()
    with pytest.raises(BundleError, match=f"nothing to hold {SMALLER} against"):
        gate_frames(one, SMALLER)


def test_two_golden_crops_and_frames_are_enough() -> None:
    """What the export makes at least: 13 categories decide more than 800 times."""
    assert len(gate_crops(golden(crops=2))) * 13 >= 800
    assert len(gate_crops(golden(crops=2))) >= 64
    assert len(gate_frames(golden(frames=2))) >= 6


def test_all_variants_differ_and_are_what_they_are_called() -> None:
    y, x = np.mgrid[:64, :64]
    picture = np.stack([np.full_like(x, 60), 2 * y, 3 * x], axis=2).astype(np.uint8)[None]
    made = {name_of(i, MOST)[3:-1]: one.astype(int) for i, one in enumerate(variants_of(picture, MOST))}
    assert len(made) == MOST
    plain = made["as it is"]
    assert (plain == picture[0]).all()
    mirrored = [name for name in made if "mirrored" in name]
    assert MOST // 2 - 1 <= len(mirrored) <= MOST // 2
    for name, one in made.items():
        if name == "noise":
            assert one.std() > 60
        elif "noisy" not in name:
            mean, spread = one.mean() - plain.mean(), one.std() / plain.std()
            assert ("darker" in name) == (mean < -20), name
            assert ("brighter" in name) == (mean > 20), name
            assert ("low contrast" in name) == (spread < 0.47 and mean > -20), name
    # the darkest column of red is the left one: its place tells where the picture went
    assert made["shifted left"][32, 0, 2] > plain[32, 0, 2] + 9
    assert made["shifted down"][40, 32, 1] < plain[40, 32, 1] - 6
    assert made["nearer"][:, :, 1].std() < plain[:, :, 1].std()


@pytest.mark.parametrize(
    ("number", "name"), [(0, "0 (as it is)"), (33, "1 (darker, shifted left, mirrored)"), (63, "1 (noise)")]
)
def test_names(number: int, name: str) -> None:
    assert name_of(number, 32) == name


# ---- a right engine ----


def rounding(outputs: Outputs, n: int) -> Outputs:
    return {name: array.astype(np.float16).astype(F32) for name, array in outputs.items()}


@pytest.mark.parametrize("spoil", [unspoilt, rounding], ids=["equal", "rounded"])
def test_a_right_encoder_passes_with_figures(spoil: Spoil) -> None:
    candidate = with_fault(embedding, spoil)
    figures = judge_encoder(candidate)
    assert re.fullmatch(
        r"256 crops in runs of 1, 8, 32: smallest cosine (1\.0|0\.99999)\d+, \d+ of 3328 decisions another", figures
    )
    assert "\n" not in figures


@pytest.mark.parametrize("spoil", [unspoilt, rounding], ids=["equal", "rounded"])
def test_a_right_detector_passes_with_figures(spoil: Spoil) -> None:
    figures = judge_detector(with_fault(boxes, spoil))
    assert re.fullmatch(
        r"12 frames in runs of 1, 4: 48 boxes, smallest IoU (0\.99|1\.00)\d\d, "
        r"largest score difference \d\.\de[-+]\d\d",
        figures,
    )


@pytest.mark.parametrize("size", [1, 5, 8, 32, 300])
def test_every_crop_is_seen_in_runs_of_exactly_the_size(size: int) -> None:
    candidate = with_fault(embedding, unspoilt)
    judge_encoder(candidate, sizes=(size,))
    runs = [feeds["image"] for feeds in candidate.feeds]
    assert {len(run) for run in runs} == {size}
    seen = {picture.tobytes() for run in runs for picture in run}
    assert seen == {picture.tobytes() for picture in CROPS}
    assert len(runs) == -(-len(CROPS) // size)


def test_a_bank_without_categories_is_judged_by_its_vectors() -> None:
    nothing = PromptBank((), np.zeros((0, DIM), F32), "", "", "words.toml")
    assert judge_encoder(with_fault(embedding, unspoilt), nothing).endswith("no categories")
    with pytest.raises(BundleError, match="cosine"):
        judge_encoder(with_fault(embedding, lambda outputs, n: {"embedding": -outputs["embedding"]}), nothing)


@pytest.mark.parametrize(("frames", "crops", "sizes"), [(0, 0, (1,)), (1, 1, ())])
def test_nothing_to_judge_by_is_no_pass(frames: int, crops: int, sizes: tuple[int, ...]) -> None:
    one = golden(frames, crops)
    pictures = gate_crops(one)
    with pytest.raises(BundleError, match=r"no crop to judge it by; build it with `make export`"):
        gate_encoder(FakeSession(embedding), VECTORS[: len(pictures)], pictures, bank(), SCALE, sizes, "e")
    seen = Answers(gate_frames(one), SEEN.boxes[: 6 * frames], SEEN.scores[: 6 * frames])
    with pytest.raises(BundleError, match="no frame to judge it by"):
        gate_detector(FakeSession(boxes), seen, sizes, "d")


# ---- wrong ones ----


def swapped_channels(right: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return lambda feeds: right({"image": np.ascontiguousarray(feeds["image"][..., ::-1])})


def only(size: int, spoil: Spoil) -> Spoil:
    """The fault shows in runs of this size alone."""
    return lambda outputs, n: spoil(outputs, n) if n == size else outputs


def put(output: str, value: float, row: int = -1) -> Spoil:
    def spoil(outputs: Outputs, n: int) -> Outputs:
        outputs[output][row, ..., 0] = value
        return outputs

    return spoil


def turned(angle: float) -> Spoil:
    """Every vector by this angle, each in a direction of its own."""

    def spoil(outputs: Outputs, n: int) -> Outputs:
        rows = outputs["embedding"]
        other = np.roll(rows, 1, axis=1)
        other -= (other * rows).sum(axis=1, keepdims=True) * rows
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        return {"embedding": (np.cos(angle) * rows + np.sin(angle) * other).astype(F32)}

    return spoil


def scaled(factor: float) -> Spoil:
    return lambda outputs, n: {"embedding": outputs["embedding"] * F32(factor)}


def cut(output: str, axis: int) -> Spoil:
    return lambda outputs, n: {
        **outputs,
        output: np.take(outputs[output], range(outputs[output].shape[axis] - 1), axis),
    }


def less(output: str) -> Spoil:
    return lambda outputs, n: {name: array for name, array in outputs.items() if name != output}


def as_half(outputs: Outputs, n: int) -> Outputs:
    return {name: array.astype(np.float16) for name, array in outputs.items()}


ENCODERS: list[tuple[str, Spoil, str]] = [
    (
        "nan",
        put("embedding", np.nan),
        r"embedding of crop 0 \(as it is\) in runs of 1, .*expected -?0\.\d{4}, got nan, as 1 num",
    ),
    ("inf", only(8, put("embedding", np.inf)), r"crop 0 \(.*\) in runs of 8, .*got inf"),
    ("turned", turned(0.05), r"embedding of crop \d+ \(.*\) in runs of 1, .*expected cosine >= 0\.999, got 0\.9987"),
    ("turned round", turned(np.pi), r"got -1\.0000"),
    ("one row", only(32, put("embedding", 0.9, row=5)), r"crop \d+ \(.*\) in runs of 32, .*expected unit length, got"),
    ("long", scaled(1.01), r"expected unit length, got 1\.0100"),
    ("zero", scaled(0), r"expected unit length, got 0\.0000"),
    ("narrow", cut("embedding", 1), r"embedding of crop 0 .*expected float32 \(1, 24\), got float32 \(1, 23\)"),
    ("short", only(8, cut("embedding", 0)), r"runs of 8, .*expected float32 \(8, 24\), got float32 \(7, 24\)"),
    ("half", as_half, r"expected float32 \(1, 24\), got float16 \(1, 24\)"),
    ("nameless", less("embedding"), r"embedding of crop 0 .*got none"),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in ENCODERS], ids=[case[0] for case in ENCODERS])
def test_a_wrong_encoder_is_refused(spoil: Spoil, said: str) -> None:
    with pytest.raises(BundleError, match=said) as refused:
        judge_encoder(with_fault(embedding, spoil))
    line = str(refused.value)
    assert line.startswith("image-1.engine: ")
    assert "by TensorRT 10.3.0 on Orin, fp16, is not what the fp32 graph says" in line
    assert 'backend = "onnxruntime"' in line
    assert "\n" not in line


@pytest.mark.parametrize("right", [embedding, boxes], ids=["encoder", "detector"])
def test_swapped_channels_are_refused(right: Callable[..., Outputs]) -> None:
    candidate = with_fault(swapped_channels(right), unspoilt)
    with pytest.raises(BundleError, match="is not what the fp32 graph says"):
        judge_encoder(candidate) if right is embedding else judge_detector(candidate)


@pytest.mark.parametrize("size", SIZES)
def test_one_wrong_size_is_named_with_the_recipes_key(size: int) -> None:
    right = ", ".join(str(other) for other in SIZES if other != size)
    said = rf"in runs of {size}, .*; runs of {right} are right: leave {size} out of encoder_batches in the recipe"
    with pytest.raises(BundleError, match=said):
        judge_encoder(with_fault(embedding, only(size, turned(0.5))))


def test_the_last_rows_of_the_last_run_count() -> None:
    """257 crops in runs of 32: the ninth run has one new picture; what is wrong there alone shows."""
    pictures, calls = np.concatenate([CROPS, FRAMES[1:2]]), 0

    def spoil(outputs: Outputs, n: int) -> Outputs:
        nonlocal calls
        calls += 1
        return turned(0.5)(outputs, n) if calls == 9 else outputs

    vectors = np.concatenate([VECTORS, embedding({"image": FRAMES[1:2]})["embedding"]])
    with pytest.raises(BundleError, match="cosine"):
        gate_encoder(with_fault(embedding, spoil), vectors, pictures, bank(), SCALE, (32,), "e")
    assert calls == 9


def test_a_category_that_flips_often_is_refused_by_name() -> None:
    """The first is never in doubt; the second is, by a turn that no cosine shows."""
    asked = bank(2, bias=(1e3, 0.0, 0.0, 0.0, 0.0))
    with pytest.raises(BundleError) as refused:
        judge_encoder(with_fault(embedding, turned(0.04)), asked)
    assert re.search(
        r"best option of 'question 1', and \d+ of 512 decisions in all, of crop \d+ \(.*\) in runs of 1, .*"
        r"expected 'colour \d' and 99\.5% equal, got 'colour \d' and 9\d\.\d%",
        str(refused.value),
    )
    judge_encoder(with_fault(embedding, unspoilt), asked)


@pytest.mark.parametrize(("share", "passes"), [(0, True), (1 / 256, True), (2 / 256, False)])
def test_one_in_two_hundred_may_flip_and_no_more(share: float, passes: bool) -> None:
    """One category of two options: 256 decisions. 1 of them is 0.4 %, 2 are 0.8 %."""
    words = (VECTORS.mean(axis=0) + 1e-3 * unit_rows(2, DIM, 5)).astype(F32)  # near each other, so that 0.999 holds
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    # both words at equal distance: a hair decides
    asked = PromptBank((Category("hat", "hat", ("yes", "no"), (None, None)),), words, "", "", "w.toml")
    margins = VECTORS @ (words[0] - words[1]) / np.linalg.norm(words[0] - words[1])
    order = np.argsort(np.abs(margins))
    assert np.abs(margins[order[1]]) < 0.03, "near enough to flip by a turn that 0.999 allows"
    chosen = set(order[: round(share * 256)].tolist())
    table = {vector.tobytes(): number for number, vector in enumerate(VECTORS)}

    def spoil(outputs: Outputs, n: int) -> Outputs:
        axis = (words[0] - words[1]) / np.linalg.norm(words[0] - words[1])
        for row in outputs["embedding"]:
            if table.get(row.tobytes()) in chosen:
                row -= F32(1.05) * (row @ axis) * axis
                row /= np.linalg.norm(row)
        return outputs

    candidate = with_fault(embedding, spoil)
    if passes:
        assert judge_encoder(candidate, asked).endswith(f"{len(chosen)} of 256 decisions another")
    else:
        with pytest.raises(BundleError, match=r"99\.5% equal, got .*99\.2%"):
            judge_encoder(candidate, asked)


def test_calibration_counts() -> None:
    """A bias that lifts one option above all others by far: no turn flips what was never in doubt."""
    asked = bank(1)
    lifted = bank(1, bias=(1e3, 0.0, 0.0, 0.0, 0.0), temperature=2.0)
    spoil = turned(0.04)
    assert judge_encoder(with_fault(embedding, spoil), lifted).endswith(" 0 of 256 decisions another")
    with pytest.raises(BundleError, match="best option of 'question 0'"):
        judge_encoder(with_fault(embedding, spoil), asked)


def test_an_fp32_candidate_must_be_nearer() -> None:
    candidate = with_fault(embedding, turned(0.006))
    judge_encoder(candidate)
    candidate.precision = "fp32"
    with pytest.raises(BundleError, match=r"cosine >= 0\.99999,"):
        judge_encoder(candidate)


def moved(share: float, box: int = 0) -> Spoil:
    """One box to the right by this share of its width."""

    def spoil(outputs: Outputs, n: int) -> Outputs:
        one = outputs["boxes"][:, box]
        one[:, 0::2] += F32(share) * (one[:, 2:3] - one[:, 0:1])
        return outputs

    return spoil


def raised(by: float, box: int = 0) -> Spoil:
    def spoil(outputs: Outputs, n: int) -> Outputs:
        outputs["scores"][:, box] += F32(by)
        return outputs

    return spoil


DETECTORS: list[tuple[str, Spoil, str]] = [
    (
        "moved",
        moved(0.03),
        r"boxes of frame \d+ \(.*\) in runs of 1, .*expected IoU >= 0\.98 with \[.*\], got 0\.94\d\d, \[",
    ),
    ("low box", moved(0.03, box=3), r"expected IoU >= 0\.98"),
    ("score", raised(0.02), r"scores of frame \d+ \(.*\) in runs of 1, .*expected 0\.9\d* within 0\.01, got 0\.9"),
    ("lower", only(4, raised(-0.02)), r"in runs of 4, .*; runs of 1 are right: leave 4 out of detector_batches"),
    ("ghost", raised(0.5, box=4), r"scores of frame .*expected 0\.0\d* within 0\.01, got 0\.5"),
    ("nan", put("scores", np.nan), r"scores of frame 0 .*got nan, as 5 numbers"),
    ("nan box", put("boxes", np.nan), r"boxes of frame 0 .*got nan"),
    ("fewer", cut("scores", 1), r"expected float32 \(1, 5, 1\), got float32 \(1, 4, 1\)"),
    ("other frame", only(4, lambda outputs, n: {k: np.roll(a, 1, axis=0) for k, a in outputs.items()}), "runs of 4"),
]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in DETECTORS], ids=[case[0] for case in DETECTORS])
def test_a_wrong_detector_is_refused(spoil: Spoil, said: str) -> None:
    with pytest.raises(BundleError, match=said) as refused:
        judge_detector(with_fault(boxes, spoil))
    assert str(refused.value).startswith("detector-1.engine: ")
    assert "TensorRT 10.3.0 on Orin, fp16" in str(refused.value)


@pytest.mark.parametrize("spoil", [moved(0.005), raised(0.009), moved(0.3, box=4)], ids=["place", "score", "noise"])
def test_what_is_within_bounds_or_noise_passes(spoil: Spoil) -> None:
    judge_detector(with_fault(boxes, spoil))


def test_what_is_infinite_in_fp32_too_may_be() -> None:
    """A box of noise may overflow its exponential in any precision."""
    endless = SEEN.boxes.copy()
    endless[:, 4, 2] = np.inf

    def spoil(outputs: Outputs, n: int) -> Outputs:
        outputs["boxes"][:, 4, 2] = np.inf
        return outputs

    judge_detector(with_fault(boxes, spoil), replace(SEEN, boxes=endless))


def test_no_boxes_at_all() -> None:
    def blind(outputs: Outputs, n: int) -> Outputs:
        return {**outputs, "scores": outputs["scores"] * F32(0.01)}

    reference = replace(SEEN, scores=SEEN.scores * F32(0.01))
    assert ": 0 boxes, smallest IoU 1.0000" in judge_detector(with_fault(boxes, blind), reference)
