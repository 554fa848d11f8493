"""The mini detector finds the people of PETS09-S2L1: floors that a broken decode could not reach."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from edge.backend import open_session
from edge.bundle import IMAGE, SMALLER, open_bundle
from edge.config import DescribeConfig, DetectConfig, MotionConfig
from edge.describe import Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import CaptureError
from edge.images import read_image
from edge.motion import MotionGate
from edge.values import Frame, Image
from export.samples import find_sample
from export.weights import cache_folder
from tests.empty_scene import EmptyScene
from tests.flow.conftest import PICTURE
from tests.mot import FRAMES_A_SECOND, identities_from
from tests.pets import TRUTH, frames_of, precision_and_recall, truth_from

# frame 650's people: x1 y1 x2 y2 in px, from the benchmark's true boxes
FRAME_650 = np.array(
    [
        [472, 228, 501, 313],
        [135, 146, 161, 217],
        [643, 197, 671, 281],
        [330, 373, 382, 510],
        [326, 157, 353, 229],
        [215, 157, 239, 225],
    ],
    np.float32,
)


@pytest.fixture(scope="module")
def detector(mini: Path) -> Iterator[Detector]:
    with open_session(mini / "detector.onnx") as session:
        yield Detector(session, open_bundle(mini).manifest.detector, DetectConfig())


def test_finds_the_people_of_one_frame(detector: Detector) -> None:
    frame = Frame("pets", 649, 0.0, read_image(PICTURE))
    precision, recall = precision_and_recall(detector, [(650, frame)], {650: FRAME_650})
    assert precision >= 0.8
    assert recall >= 0.8


@pytest.fixture(scope="module")
def smaller(mini: Path) -> Iterator[Detector]:
    facts = open_bundle(mini).manifest.smaller
    assert facts is not None
    with open_session(mini / SMALLER) as session:
        yield Detector(session, facts, DetectConfig())


@pytest.mark.skipif(not TRUTH.exists(), reason="needs ../shared/data/pets/gt.txt")
def test_finds_the_people_of_the_frames_it_was_not_trained_on(detector: Detector, smaller: Detector) -> None:
    try:
        video = find_sample(cache=cache_folder())
    except CaptureError as error:
        pytest.skip(f"needs the sample video: {error}")
    frames = [pair for pair in frames_of(video, 501, 795) if pair[0] % 5 == 0]
    truth = {number: boxes for number, boxes in truth_from(TRUTH).items() if number % 5 == 0}
    for finder, least in ((detector, 0.85), (smaller, 0.82)):
        precision, recall = precision_and_recall(finder, frames, truth)
        assert precision >= least
        assert recall >= least


def test_people_outside_the_zones_of_their_camera_are_not_told_of(mini: Path, detector: Detector) -> None:
    """A zone of the lower part of frame 650: some people stand in it, some behind."""
    bundle, zone = open_bundle(mini), [(0.0, 0.33), (1.0, 0.6), (1.0, 1.0), (0.0, 1.0)]
    frames = [Frame(camera, 649, 0.0, read_image(PICTURE)) for camera in ("zoned", "not")]
    with open_session(mini / IMAGE) as session:
        encoder, zones = Encoder(session, bundle.manifest.encoder), {"zoned": [zone]}
        zoned, not_zoned = Describer(bundle, detector, encoder, DescribeConfig(), zones=zones)(frames)
    assert len(not_zoned.people) >= 5
    feet = [((x1 + x2) / 2 / 768, y2 / 576) for x1, _, x2, y2 in not_zoned.people.boxes.tolist()]
    below = [y > 0.33 + 0.27 * x for x, y in feet]
    assert 0 < sum(below) < len(below)
    assert zoned.people.boxes.tolist() == not_zoned.people.boxes[below].tolist()
    assert zoned.skipped == 0


@pytest.mark.skipif(not TRUTH.exists(), reason="needs ../shared/data/pets/gt.txt")
def test_the_motion_gate_sees_everybody_and_closes_where_nobody_is() -> None:
    """Each person alone, at once after a minute without anybody; the gate holds for no time."""
    try:
        scene = EmptyScene(find_sample(cache=cache_folder()), identities_from(TRUTH), 200)
    except CaptureError as error:
        pytest.skip(f"needs the sample video: {error}")
    scene.empty[:, :130, 690:] = scene.empty[0, :130, 690:]  # a car that somebody loads, whom the truth does not have
    gate, step = MotionGate(MotionConfig(enabled=True, hold_s=0.01)), 5

    def wanted(gate: MotionGate, number: int, picture: Image) -> bool:
        return gate.wanted(Frame("pets", number, number / FRAMES_A_SECOND, picture), False)

    nobody = [
        wanted(gate, number, picture) for number, picture in enumerate(islice(scene.nobody(), 600)) if not number % step
    ]
    assert nobody[60:].count(False) >= 30, "traces of those taken out are left in so short a part of the video"
    persons = sorted({int(one) for ids, _ in scene.truth.values() for one in ids})
    assert len(persons) > 5
    for person in persons:
        before = deepcopy(gate)
        alone = [wanted(before, 600 + number, picture) for number, picture in list(scene.alone(person))[::step]]
        assert all(alone), f"person {person}"
