"""Golden inputs and outputs: what the graphs said at export, and whether a session still says it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.backend import Pictures, Session
from edge.boxes import iou
from edge.bundle import DETECTOR, GOLDEN, MEND, Network, Precision
from edge.errors import BundleError
from edge.values import Floats, Image

MIN_COSINE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999}
MIN_IOU, MAX_SCORE_GAP = 0.98, 0.01
SEEN = 0.1  # boxes below this score are noise; their place does not matter
_SMALLER = "smaller_"  # how the arrays of the smaller detector begin in the file


@dataclass(frozen=True, eq=False)
class Answers:
    """What an fp32 detector says of some frames.

    frames: (f, H, W, 3) uint8 BGR -> boxes (f, A, 4), scores (f, A, K) float32.
    """

    frames: Image
    boxes: Floats
    scores: Floats


@dataclass(frozen=True, eq=False)
class Golden:
    """A few inputs with the outputs that the fp32 graphs gave at export; the self-test at start compares.

    frames: (f, H, W, 3) uint8 BGR -> boxes (f, A, 4), scores (f, A, K) float32.
    crops: (c, S, S, 3) uint8 BGR -> embeddings (c, d) float32.
    smaller: the same pictures at the size of the smaller detector, where there is one.
    """

    frames: Image
    boxes: Floats
    scores: Floats
    crops: Image
    embeddings: Floats
    smaller: Answers | None = None

    def answers(self, network: Network) -> Answers:
        """Of one of the detectors. Raises BundleError where there are none of the smaller one."""
        if network == DETECTOR:
            return Answers(self.frames, self.boxes, self.scores)
        if self.smaller is None:
            raise BundleError(f"{GOLDEN}: nothing to hold {network} against", remedy=MEND)
        return self.smaller

    def write(self, path: Path) -> None:
        arrays = {name: array for name, array in vars(self).items() if name != "smaller"}
        if self.smaller is not None:
            arrays |= {_SMALLER + name: array for name, array in vars(self.smaller).items()}
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Raises BundleError."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                whole = {name: arrays[name] for name in ("frames", "boxes", "scores", "crops", "embeddings")}
                fewer = [arrays[_SMALLER + name] for name in ("frames", "boxes", "scores") if _SMALLER + name in arrays]
                return cls(**whole, smaller=Answers(*fewer) if fewer else None)
        except Exception as error:  # zip, zlib and numpy refuse in a dozen ways
            raise BundleError(f"{path}: no golden inputs: {error}", remedy=MEND) from error

    def check_detector(
        self, session: Session, name: str, frames: Pictures | None = None, network: Network = DETECTOR
    ) -> str:
        """Compare a detector with the golden boxes -> the figures in one line. Raises BundleError, BackendError.

        frames: the golden ones as they come out of what makes a machine's pictures; without, as they are. network:
        whose boxes.
        """
        golden = self.answers(network)
        outputs = session.run({"image": golden.frames if frames is None else frames})
        for output, wanted in (("boxes", golden.boxes), ("scores", golden.scores)):
            _check_shape(f"{name}: {output}", outputs[output], wanted)
        seen = golden.scores.max(axis=-1) > SEEN  # (f, A)
        place = _smallest(iou(outputs["boxes"][seen], golden.boxes[seen]))
        gap = float(np.abs(outputs["scores"] - golden.scores).max(initial=0))
        # NaN is no number that a comparison lets pass
        if not place >= MIN_IOU:
            raise BundleError(
                f"{name}: boxes differ from golden.npz", expected=f"IoU >= {MIN_IOU}", got=f"{place:.4f}", remedy=MEND
            )
        if not gap <= MAX_SCORE_GAP:
            raise BundleError(
                f"{name}: scores differ from golden.npz", expected=f"<= {MAX_SCORE_GAP}", got=f"{gap:.4f}", remedy=MEND
            )
        return f"{int(seen.sum())} boxes, smallest IoU {place:.4f}, largest score difference {gap:.1e}"

    def check_encoder(self, session: Session, name: str, precision: Precision, crops: Pictures | None = None) -> str:
        """Compare an encoder with the golden crops -> the figures in one line. Raises BundleError, BackendError.

        crops: as `frames` of check_detector.
        """
        embeddings = session.run({"image": self.crops if crops is None else crops})["embedding"]
        return check_cosine(embeddings, self.embeddings, name, precision)


def check_cosine(candidate: Floats, reference: Floats, name: str, precision: Precision) -> str:
    """Compare unit rows (n, d) pair by pair -> the figures in one line. Raises BundleError."""
    _check_shape(f"{name}: embedding", candidate, reference)
    cosine = _smallest((candidate * reference).sum(axis=1))
    length = float(np.abs(np.linalg.norm(candidate, axis=1) - 1).max(initial=0))
    if not (cosine >= MIN_COSINE[precision] and length <= 1e-3):
        raise BundleError(
            f"{name}: embeddings differ from the fp32 reference",
            expected=f"unit length, cosine >= {MIN_COSINE[precision]}",
            got=f"length off by {length:.1e}, cosine {cosine:.6f}",
            remedy=MEND,
        )
    return f"{len(reference)} embeddings, smallest cosine {cosine:.6f}"


def _smallest(shares: Floats) -> float:
    """At most 1, also where there is none; NaN where there is one."""
    return float(np.append(shares, 1.0).min())


def _check_shape(output: str, candidate: Floats, reference: Floats) -> None:
    """Equal shapes, so that nothing is broadcast. Raises BundleError."""
    if candidate.shape != reference.shape:
        raise BundleError(
            f"{output}: another shape than in golden.npz", expected=reference.shape, got=candidate.shape, remedy=MEND
        )
