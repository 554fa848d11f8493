"""The self-test: what it lets pass, what it refuses, and that a damaged file is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import DETECTOR, SMALLER
from edge.errors import BackendError, BundleError
from edge.golden import MIN_COSINE, Answers, Golden, check_cosine
from tests.fakes import FakeSession, unit_rows

F32 = np.float32
Floats = NDArray[np.float32]


def golden(frames: int = 2, crops: int = 3) -> Golden:
    """Four boxes per frame, 0.2 wide and high; the last is noise, its score below what counts as seen."""
    rng = np.random.default_rng(0)
    corners = rng.random((frames, 4, 2), F32) * F32(0.7)
    return Golden(
        rng.integers(0, 256, (frames, 6, 8, 3), np.uint8),
        np.concatenate([corners, corners + F32(0.2)], axis=2),
        np.tile(np.array([0.95, 0.5, 0.2, 0.05], F32), (frames, 1))[..., None],
        rng.integers(0, 256, (crops, 4, 4, 3), np.uint8),
        unit_rows(crops, 8),
    )


def detector(boxes: Floats, scores: Floats) -> FakeSession:
    return FakeSession({"boxes": boxes, "scores": scores})


def with_smaller(one: Golden) -> Golden:
    """The same with a smaller detector, which sees fewer and other boxes in smaller pictures."""
    fewer = Answers(one.frames[:, ::2, ::2], one.boxes[:, :3] + F32(0.01), one.scores[:, :3] - F32(0.02))
    return replace(one, smaller=fewer)


def arrays_of(one: Golden) -> dict[str, NDArray[Any]]:
    """By their names in the file."""
    arrays = {name: array for name, array in vars(one).items() if name != "smaller"}
    return arrays | {f"smaller_{name}": array for name, array in vars(one.smaller).items()} if one.smaller else arrays


def changed(array: Floats, where: tuple[int | slice, ...], by: float) -> Floats:
    """A copy with one place moved, or set to NaN."""
    copy = array.copy()
    copy[where] = copy[where] + by
    return copy


@pytest.mark.parametrize(("frames", "crops"), [(0, 0), (1, 1), (2, 3)])
def test_the_same_session_passes(frames: int, crops: int) -> None:
    one = golden(frames, crops)
    session = detector(one.boxes, one.scores)
    assert one.check_detector(session, "d").startswith(f"{3 * frames} boxes, smallest IoU 1.0000")
    if frames:
        assert (session.feeds[0]["image"] == one.frames).all()
    encoder = FakeSession({"embedding": one.embeddings})
    assert one.check_encoder(encoder, "e", "fp32").startswith(f"{crops} embeddings, smallest cosine 1.000")
    assert (encoder.feeds[0]["image"] == one.crops).all()


def test_the_smaller_detector_is_held_against_its_own_answers() -> None:
    one = with_smaller(golden())
    fewer = one.answers(SMALLER)
    session = detector(fewer.boxes, fewer.scores)
    assert one.check_detector(session, "s", network=SMALLER).startswith("6 boxes, smallest IoU 1.0000")
    assert (session.feeds[0]["image"] == fewer.frames).all()
    with pytest.raises(BundleError, match="s: boxes: another shape"):
        one.check_detector(session, "s")
    with pytest.raises(BundleError, match="s: boxes differ"):
        one.check_detector(detector(fewer.boxes + F32(0.01), fewer.scores), "s", network=SMALLER)
    with pytest.raises(BundleError, match=r"golden\.npz: nothing to hold detector-smaller\.onnx against.*make export"):
        golden().check_detector(session, "s", network=SMALLER)
    assert (one.answers(DETECTOR).boxes == one.boxes).all()


@pytest.mark.parametrize(
    ("where", "by", "passes"),
    [
        ((0, 0, 0), 0.001, True),
        ((0, 0, 0), 0.01, False),  # a twentieth of the box
        ((1, 2, 3), 0.01, False),
        ((1, 2), np.nan, False),
        ((1, 2), np.inf, False),
        ((1, 3), 0.3, True),  # noise
        ((1, 3), np.nan, True),
    ],
)
def test_boxes_that_count_must_be_in_their_place(where: tuple[int, ...], by: float, passes: bool) -> None:
    one = golden()
    session = detector(changed(one.boxes, where, by), one.scores)
    with np.errstate(invalid="ignore"):
        if passes:
            one.check_detector(session, "d.onnx")
        else:
            with pytest.raises(BundleError, match=r"d\.onnx: boxes differ .*expected IoU >= 0.98.*make export"):
                one.check_detector(session, "d.onnx")


@pytest.mark.parametrize(
    ("where", "by", "passes"),
    [
        ((0, 0, 0), 0.009, True),
        ((0, 0, 0), -0.011, False),
        ((1, 3, 0), 0.6, False),  # noise that became a person
        ((1, 3, 0), np.nan, False),
        ((0, 1, 0), np.nan, False),
    ],
)
def test_every_score_counts(where: tuple[int, ...], by: float, passes: bool) -> None:
    one = golden()
    session = detector(one.boxes, changed(one.scores, where, by))
    if passes:
        one.check_detector(session, "d.onnx")
    else:
        with pytest.raises(BundleError, match=r"d\.onnx: scores differ .*expected <= 0.01, got"):
            one.check_detector(session, "d.onnx")


def turned(rows: Floats, cosine: float) -> Floats:
    """Unit rows at this cosine to the given ones."""
    other = np.roll(rows, 1, axis=1)
    other = other - (other * rows).sum(axis=1, keepdims=True) * rows
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return np.asarray(cosine * rows + np.sqrt(1 - cosine**2) * other, F32)


@pytest.mark.parametrize(
    ("precision", "cosine", "length", "passes"),
    [
        ("fp32", 0.999995, 1, True),
        ("fp32", 0.9999, 1, False),
        ("fp16", 0.9995, 1, True),
        ("fp16", 0.998, 1, False),
        ("fp16", -1.0, 1, False),
        ("fp32", 1.0, 1.01, False),  # longer: no unit vector, though its product with the reference is large
        ("fp32", 1.0, 0.99, False),
        ("fp16", 1.0, 0.0, False),
        ("fp16", 1.0, np.nan, False),
    ],
)
def test_embeddings_must_point_the_same_way(precision: str, cosine: float, length: float, passes: bool) -> None:
    reference = unit_rows(3, 8)
    candidate = reference.copy()
    candidate[1] = turned(reference, cosine)[1] * F32(length)
    if passes:
        assert check_cosine(candidate, reference, "e", precision).startswith("3 embeddings")  # type: ignore[arg-type]
    else:
        with pytest.raises(BundleError, match=f"e: embeddings differ .*cosine >= {MIN_COSINE[precision]}"):  # type: ignore[index]
            check_cosine(candidate, reference, "e", precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (4, 8), (3, 7), (0, 8)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    """(1, 8) would broadcast: an encoder that answers for the first crop only must not pass."""
    reference = np.tile(unit_rows(1, 8), (3, 1))
    with pytest.raises(BundleError, match="e: "):
        check_cosine(np.tile(unit_rows(1, shape[1]), (shape[0], 1)), reference, "e", "fp32")


@pytest.mark.parametrize(("boxes", "scores"), [((2, 3, 4), (2, 3, 1)), ((1, 4, 4), (1, 4, 1)), ((2, 4, 4), (2, 4, 2))])
def test_outputs_of_another_shape_are_refused(boxes: tuple[int, ...], scores: tuple[int, ...]) -> None:
    """Each equal in its values, so that only the shape differs; (2, 4, 2) would broadcast."""
    one = replace(golden(), boxes=np.tile(np.array([0, 0, 1, 1], F32), (2, 4, 1)), scores=np.full((2, 4, 1), 0.5, F32))
    session = detector(np.tile(np.array([0, 0, 1, 1], F32), (*boxes[:2], 1)), np.full(scores, 0.5, F32))
    with pytest.raises(BundleError, match="d: "):
        one.check_detector(session, "d")


def test_the_sessions_error_comes_through() -> None:
    session = FakeSession({})
    session.close()
    with pytest.raises(BackendError):
        golden().check_detector(session, "d")
    with pytest.raises(BackendError):
        golden().check_encoder(session, "e", "fp32")


# ---- the file ----


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize(("frames", "crops"), [(0, 0), (1, 1), (2, 3)])
def test_write_and_read(frames: int, crops: int, smaller: bool, tmp_path: Path) -> None:
    one, path = golden(frames, crops), tmp_path / "golden.npz"
    one = with_smaller(one) if smaller else one
    one.write(path)
    again = arrays_of(Golden.read(path))
    wanted = arrays_of(one)
    assert set(again) == set(wanted)
    for name, array in wanted.items():
        assert again[name].dtype == array.dtype
        assert again[name].shape == array.shape
        assert (again[name] == array).all()
    with np.load(path) as arrays:
        assert set(arrays.files) == set(wanted), "nothing else is in the file"
        assert {"frames", "boxes", "scores", "crops", "embeddings"} <= set(arrays.files), "what older boxes read"


def test_the_smaller_detectors_answers_are_all_there_or_none(tmp_path: Path) -> None:
    arrays = arrays_of(with_smaller(golden()))
    for missing in ("smaller_frames", "smaller_boxes", "smaller_scores"):
        np.savez(tmp_path / "golden.npz", **{name: array for name, array in arrays.items() if name != missing})
        with pytest.raises(BundleError, match="no golden inputs"):
            Golden.read(tmp_path / "golden.npz")


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x04N."])
def test_what_is_no_golden_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"golden\.npz: no golden inputs.*make export"):
        Golden.read(path)


def test_missing_incomplete_or_a_bare_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no golden inputs"):
        Golden.read(tmp_path / "missing.npz")
    with pytest.raises(BundleError, match="no golden inputs"):
        Golden.read(tmp_path)
    np.savez(tmp_path / "part.npz", frames=np.zeros(1))
    with pytest.raises(BundleError, match=r"no golden inputs.*boxes"):
        Golden.read(tmp_path / "part.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(BundleError, match="no golden inputs"):
        Golden.read(tmp_path / "array.npy")


def test_any_flipped_byte_and_any_cut_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """The zip's checksums guard the arrays; a flip in a field that nobody reads changes nothing."""
    one, path = golden(1, 1), tmp_path / "golden.npz"
    one.write(path)
    data = path.read_bytes()
    flips = [
        data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :] for i in range(len(data)) for mask in (0xFF, 1 << i % 8)
    ]
    refused = 0
    for damaged in [*flips, *(data[:end] for end in range(0, len(data), 7))]:
        path.write_bytes(damaged)
        try:
            again = Golden.read(path)
        except BundleError:
            refused += 1
        else:
            assert all(np.array_equal(vars(again)[name], array) for name, array in arrays_of(one).items())
    assert refused > len(data), "most are noticed"
