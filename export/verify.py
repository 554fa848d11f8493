"""The gate: golden inputs are described by the fp32 graphs, and every graph that is packed must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge.backend import Session, open_session
from edge.bundle import DETECTOR, IMAGE, TEXT, DetectorFacts, EncoderFacts, Precision
from edge.config import DetectConfig
from edge.crop import crops_of
from edge.detect import Detector, fit
from edge.golden import Golden, check_cosine
from edge.values import Detections, Floats, Frame, Image
from export.tokenizer import Tokens

PHRASES = ("a photo of a man", "a woman with long hair, wearing a red top and blue jeans", "no hat", "a" + 60 * " bag")
_PEOPLE = 4  # golden crops per picture


def golden_from_picture(
    picture: Image, detector: Session, detector_facts: DetectorFacts, encoder: Session, encoder_facts: EncoderFacts
) -> Golden:
    """Golden inputs from one picture (h, w, 3) BGR and its mirror image, with the outputs of these two fp32 sessions.

    The crops are the people found; where a detector finds none (a network with random weights), fixed parts of the
    picture. Raises BackendError.
    """
    frames = [Frame("golden", i, 0.0, view) for i, view in enumerate((picture, picture[:, ::-1]))]
    people = Detector(detector, detector_facts, DetectConfig())(frames)
    crops = [
        crops_of(frame, found[:_PEOPLE] if len(found) else _quarters(frame), encoder_facts)
        for frame, found in zip(frames, people, strict=True)
    ]
    inputs = np.stack(
        [fit(f.image, detector_facts.width, detector_facts.height, detector_facts.resize) for f in frames]
    )
    boxes = detector.run({"image": inputs})
    embeddings = encoder.run({"image": np.concatenate(crops)})
    return Golden(inputs, boxes["boxes"], boxes["scores"], np.concatenate(crops), embeddings["embedding"])


def verify(folder: Path, golden: Golden, tokens: Tokens, words: Floats, precision: Precision) -> str:
    """Hold the graphs in `folder` against what their fp32 siblings said -> the figures in one line.

    Graphs in fp32 are their own siblings: what is held then is that the files load and give finite, unit answers.
    tokens: (p, 77) int64. words: (p, d), their embeddings by the fp32 text tower. precision: the encoder's. Raises
    BundleError for a graph that differs, BackendError.
    """
    with open_session(folder / DETECTOR) as detector:
        boxes = golden.check_detector(detector, DETECTOR)
    with open_session(folder / IMAGE) as image:
        crops = golden.check_encoder(image, IMAGE, precision)
    with open_session(folder / TEXT) as text:
        phrases = check_cosine(text.run({"tokens": tokens})["embedding"], words, TEXT, precision)
    return f"detector: {boxes}; image: {crops}; text: {phrases}"


def _quarters(frame: Frame) -> Detections:
    x, y = frame.width / 2, frame.height / 2
    boxes = np.array([[0, 0, x, y], [x, 0, 2 * x, y], [0, y, x, 2 * y], [x, y, 2 * x, 2 * y]], np.float32)
    return Detections(boxes, np.ones(4, np.float32))
