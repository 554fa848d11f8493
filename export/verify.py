"""The gate: golden inputs are described by the fp32 graphs, and every graph and engine that is packed must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.backend import Session, open_session
from edge.bank import PromptBank
from edge.boxes import iou
from edge.bundle import DETECTOR, IMAGE, MEND, SMALLER, TEXT, DetectorFacts, EncoderFacts, Network
from edge.config import DetectConfig
from edge.detect import Detector
from edge.encode import MAX_BATCH
from edge.errors import BundleError
from edge.golden import MAX_SCORE_GAP, MIN_COSINE, MIN_IOU, SEEN, Answers, Golden, check_cosine
from edge.imaging import HostImaging, crops_of
from edge.match import match
from edge.values import Detections, Floats, Frame, Image, columns_of
from export.tokenizer import Tokens
from export.variants import name_of, variants_of

PHRASES = ("a photo of a man", "a woman with long hair, wearing a red top and blue jeans", "no hat", "a" + 60 * " bag")
_PEOPLE = 4  # golden crops per picture
_CROP_VARIANTS, _FRAME_VARIANTS = 32, 6  # of each golden one: with 13 categories more than 800 decisions
MIN_EQUAL = 0.995  # of the gate's decisions
TRY = (
    "try another TensorRT (10.3 to 10.7 are known to give wrong ViT outputs) and `make export`; until then the box can "
    'serve with `backend = "onnxruntime"`'
)


def golden_from_picture(
    picture: Image,
    detector: Session,
    detector_facts: DetectorFacts,
    encoder: Session,
    encoder_facts: EncoderFacts,
    smaller: tuple[Session, DetectorFacts] | None = None,
) -> Golden:
    """Golden inputs from one picture (h, w, 3) BGR and its mirror image, with the outputs of these fp32 sessions.

    The crops are the people found; where a detector finds none (a network with random weights), fixed parts of the
    picture. smaller: the smaller detector and its facts. Raises BackendError.
    """
    frames = [Frame("golden", i, 0.0, view) for i, view in enumerate((picture, picture[:, ::-1]))]
    people = Detector(detector, detector_facts, DetectConfig())(frames)
    crops = [
        crops_of(frame, found[:_PEOPLE] if len(found) else _quarters(frame), encoder_facts)
        for frame, found in zip(frames, people, strict=True)
    ]
    embeddings = encoder.run({"image": np.concatenate(crops)})["embedding"]
    seen, fewer = _golden_answers(frames, detector, detector_facts), smaller and _golden_answers(frames, *smaller)
    return Golden(seen.frames, seen.boxes, seen.scores, np.concatenate(crops), embeddings, fewer)


def _golden_answers(frames: Sequence[Frame], detector: Session, facts: DetectorFacts) -> Answers:
    inputs = HostImaging().fit(frames, facts)
    outputs = detector.run({"image": inputs})
    return Answers(inputs, outputs["boxes"], outputs["scores"])


def verify(folder: Path, golden: Golden, tokens: Tokens, words: Floats) -> str:
    """Hold the fp32 graphs in `folder` against what they said when they were asked first -> the figures in one line.

    So they load again as they lie on disk, and give finite, unit answers. tokens: (p, 77) int64. words: (p, d) float32,
    what the text tower said of them. Raises BundleError for a graph that differs, BackendError.
    """
    with open_session(folder / DETECTOR) as detector:
        boxes = f"detector: {golden.check_detector(detector, DETECTOR)}"
    if golden.smaller is not None:
        with open_session(folder / SMALLER) as smaller:
            boxes += f"; smaller: {golden.check_detector(smaller, SMALLER, network=SMALLER)}"
    with open_session(folder / IMAGE) as image:
        crops = golden.check_encoder(image, IMAGE, "fp32")
    with open_session(folder / TEXT) as text:
        phrases = check_cosine(text.run({"tokens": tokens})["embedding"], words, TEXT, "fp32")
    return f"{boxes}; image: {crops}; text: {phrases}"


def _quarters(frame: Frame) -> Detections:
    x, y = frame.width / 2, frame.height / 2
    boxes = np.array([[0, 0, x, y], [x, 0, 2 * x, y], [0, y, x, 2 * y], [x, y, 2 * x, 2 * y]], np.float32)
    return Detections(boxes, np.ones(4, np.float32))


# ---- the gate of an engine ----


def gate_frames(golden: Golden, network: Network = DETECTOR) -> Image:
    """Six variants of each golden frame of a detector: (6 f, H, W, 3) uint8 BGR. Raises BundleError: it has none."""
    return variants_of(golden.answers(network).frames, _FRAME_VARIANTS)


def gate_crops(golden: Golden) -> Image:
    """32 variants of each golden crop, of which there are two at least: (32 c, S, S, 3) uint8 BGR."""
    return variants_of(golden.crops, _CROP_VARIANTS)


def detector_answers(reference: Session, frames: Image) -> Answers:
    """What this session, an fp32 graph's, says of gate_frames; one frame at a time. Raises BackendError."""
    runs = [reference.run({"image": frame[None]}) for frame in frames]
    boxes, scores = (np.concatenate([run[output] for run in runs]) for output in ("boxes", "scores"))
    return Answers(frames, boxes, scores)


def encoder_answers(reference: Session, crops: Image) -> Floats:
    """What this session, an fp32 graph's, says of gate_crops: (n, d). Raises BackendError."""
    starts = range(0, len(crops), MAX_BATCH)
    return np.concatenate([reference.run({"image": crops[at : at + MAX_BATCH]})["embedding"] for at in starts])


def gate_detector(candidate: Session, reference: Answers, sizes: Sequence[int], name: str) -> str:
    """Hold an engine against the fp32 graph's answers, in runs of each of `sizes` -> the figures in one line.

    Boxes that either of them scores above SEEN must overlap by MIN_IOU, and no score may differ by more than
    MAX_SCORE_GAP. Raises BundleError that says what differs most and what to try, BackendError.
    """
    boxes_seen, place, gap = 0, 1.0, 0.0

    def judge(rows: Rows, got: Mapping[str, Floats]) -> None:
        nonlocal boxes_seen, place, gap
        scores, wanted = got["scores"], reference.scores[rows]
        gaps = np.abs(scores - wanted)  # (r, A, K)
        at = _place_of(gaps, gaps.argmax())
        if not gaps[at] <= MAX_SCORE_GAP:
            raise _FaultError("scores", rows[at[0]], f"{wanted[at]:.4f} within {MAX_SCORE_GAP}", f"{scores[at]:.4f}")
        seen = np.maximum(scores, wanted).max(axis=-1) > SEEN  # (r, A)
        shares = np.ones(seen.shape, np.float32)
        shares[seen] = iou(got["boxes"][seen], reference.boxes[rows][seen])
        at = _place_of(shares, shares.argmin())
        if not shares[at] >= MIN_IOU:
            told, meant = _numbers(got["boxes"][at]), _numbers(reference.boxes[rows][at])
            raise _FaultError("boxes", rows[at[0]], f"IoU >= {MIN_IOU} with {meant}", f"{shares[at]:.4f}, {told}")
        boxes_seen = int(seen[: len(reference.frames)].sum())
        place, gap = min(place, float(shares.min())), max(gap, float(gaps.max()))

    wanted = {"boxes": reference.boxes, "scores": reference.scores}
    kind = _Kind("frame", _FRAME_VARIANTS, "detector_batches")
    _held_against(candidate, reference.frames, wanted, sizes, name, kind, judge)
    told = f"{boxes_seen} boxes, smallest IoU {place:.4f}, largest score difference {gap:.1e}"
    return f"{_looked(len(reference.frames), kind, sizes)}: {told}"


def gate_encoder(
    candidate: Session,
    reference: Floats,
    crops: Image,
    bank: PromptBank,
    logit_scale: float,
    sizes: Sequence[int],
    name: str,
) -> str:
    """Hold an engine against the fp32 graph's vectors of `crops`, in runs of each of `sizes` -> figures in one line.

    reference: (n, d). Every vector must be of unit length and have MIN_COSINE with its reference; the best option of a
    category, by the bank as it is calibrated, must be the same in MIN_EQUAL of all crops and categories, however near
    the second best. Raises BundleError that says what differs most and what to try, BackendError.
    """
    least, best = MIN_COSINE[candidate.precision], _best_options(reference, bank, logit_scale)  # (n, C)
    smallest, other = 1.0, 0

    def judge(rows: Rows, got: Mapping[str, Floats]) -> None:
        nonlocal smallest, other
        vectors = got["embedding"]
        lengths = np.linalg.norm(vectors, axis=1)
        worst = int(np.abs(lengths - 1).argmax())
        if not abs(lengths[worst] - 1) <= 1e-3:
            raise _FaultError("embedding", rows[worst], "unit length", f"{lengths[worst]:.4f}")
        cosines = (vectors * reference[rows]).sum(axis=1) / lengths
        worst = int(cosines.argmin())
        if not cosines[worst] >= least:
            raise _FaultError("embedding", rows[worst], f"cosine >= {least}", f"{cosines[worst]:.6f}")
        options = _best_options(vectors[: len(crops)], bank, logit_scale)
        differ = options != best
        if differ.sum() > (1 - MIN_EQUAL) * differ.size:
            column = int(differ.sum(axis=0).argmax())
            crop, asked = int(differ[:, column].argmax()), bank.categories[column]
            raise _FaultError(
                f"best option of {asked.name!r}, and {differ.sum()} of {differ.size} decisions in all,",
                crop,
                f"{asked.options[best[crop, column]]!r} and {MIN_EQUAL:.1%} equal",
                f"{asked.options[options[crop, column]]!r} and {1 - differ.mean():.1%}",
            )
        smallest, other = min(smallest, float(cosines.min())), max(other, int(differ.sum()))

    kind = _Kind("crop", _CROP_VARIANTS, "encoder_batches")
    _held_against(candidate, crops, {"embedding": reference}, sizes, name, kind, judge)
    decisions = f"{other} of {best.size} decisions another" if best.size else "no categories"
    return f"{_looked(len(crops), kind, sizes)}: smallest cosine {smallest:.6f}, {decisions}"


Rows = NDArray[np.int64]


class _Kind(NamedTuple):
    """What is looked at, how many variants of one there are, and the recipe's key for the sizes of runs."""

    word: str
    variants: int
    key: str


class _FaultError(Exception):
    """What one picture's answer is, beside what it should be."""

    def __init__(self, output: str, picture: int, expected: object, got: object) -> None:
        super().__init__(output)
        self.output, self.picture, self.expected, self.got = output, int(picture), expected, got


def _held_against(
    candidate: Session,
    pictures: Image,
    references: Mapping[str, Floats],
    sizes: Sequence[int],
    name: str,
    kind: _Kind,
    judge: Callable[[Rows, Mapping[str, Floats]], None],
) -> None:
    """Every picture in runs of exactly each size, the last run filled up with the first pictures.

    judge: is told which pictures the answers are of, and raises _FaultError. All sizes run before one is refused:
    whether the others are right says what to try.
    """
    if not len(pictures) or not sizes:
        raise BundleError(f"{name}: golden.npz holds no {kind.word} to judge it by", remedy=MEND)
    faults: dict[int, _FaultError] = {}
    for size in sizes:
        rows = np.arange(-(-len(pictures) // size) * size) % len(pictures)
        try:
            judge(rows, _answers(candidate, pictures, references, rows, size))
        except _FaultError as error:
            faults[size] = error
    for size, fault in faults.items():
        right = ", ".join(str(other) for other in sizes if other not in faults)
        known = (
            f"runs of {right} are right: leave {size} out of {kind.key} in the recipe's [engine]; or " if right else ""
        )
        raise BundleError(
            f"{name}: {fault.output} of {kind.word} {name_of(fault.picture, kind.variants)} in runs of {size}, "
            f"by {candidate.about}, is not what the fp32 graph says",
            expected=fault.expected,
            got=fault.got,
            remedy=known + TRY if right else TRY,
        ) from fault


def _answers(
    candidate: Session, pictures: Image, references: Mapping[str, Floats], rows: Rows, size: int
) -> dict[str, Floats]:
    """The candidate's outputs for pictures[rows], in runs of `size`; finite wherever the reference is."""
    parts: dict[str, list[Floats]] = {output: [] for output in references}
    for start in range(0, len(rows), size):
        run = rows[start : start + size]
        got = candidate.run({"image": pictures[run]})
        for output, reference in references.items():
            wanted = f"float32 {(size, *reference.shape[1:])}"
            made = f"{got[output].dtype} {got[output].shape}" if output in got else "none"
            if made != wanted:
                raise _FaultError(output, run[0], wanted, made)
            broken = ~np.isfinite(got[output]) & np.isfinite(reference[run])
            if broken.any():
                at = _place_of(broken, broken.argmax())
                expected = f"{reference[run][at]:.4f}"
                raise _FaultError(
                    output, run[at[0]], expected, f"{got[output][at]}, as {broken.sum()} numbers of this run"
                )
            parts[output].append(got[output])
    return {output: np.concatenate(answers) for output, answers in parts.items()}


def _best_options(vectors: Floats, bank: PromptBank, logit_scale: float) -> Rows:
    """(n, d) -> (n, C): the number of each category's most probable option."""
    matches = match(dict.fromkeys(bank.regions, vectors), bank, logit_scale)
    columns = [matches.probabilities[:, columns].argmax(axis=1) for _, columns in columns_of(bank.categories)]
    return np.stack(columns, axis=1) if columns else np.zeros((len(vectors), 0), np.int64)


def _place_of(array: NDArray[Any], flat: Any) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(int(flat), array.shape))


def _numbers(box: Floats) -> str:
    return "[" + " ".join(f"{number:.4f}" for number in box) + "]"


def _looked(count: int, kind: _Kind, sizes: Sequence[int]) -> str:
    return f"{count} {kind.word}s in runs of {', '.join(map(str, sizes))}"
