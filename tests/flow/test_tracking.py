"""People of PETS09-S2L1 keep their identity: floors for the tracker, on true boxes and on the mini detector's."""

from __future__ import annotations

import numpy as np
import pytest

from edge.backend import open_session
from edge.bundle import DETECTOR, SMALLER, Bundle, open_bundle
from edge.config import DetectConfig, TrackConfig
from edge.detect import Detector
from edge.errors import CaptureError
from edge.values import Detections
from export.samples import find_sample
from export.weights import cache_folder
from tests.mot import Identified, detected, identities_from, scores, strangers, tracked, within
from tests.pets import TRUTH, frames_of

FIRST, LAST = 501, 795  # the mini detector was trained on the frames before
CONFIG, THRESHOLD = TrackConfig(), DetectConfig().threshold

needs_truth = pytest.mark.skipif(not TRUTH.exists(), reason="needs ../shared/data/pets/gt.txt")


@pytest.fixture(scope="module")
def truth() -> Identified:
    return within(identities_from(TRUTH), FIRST, LAST)


@pytest.fixture(scope="module")
def bundle(mini: object) -> Bundle:
    return open_bundle(mini)


def test_the_figures_count_what_their_names_say() -> None:
    boxes = np.array([[0, 0, 10, 20], [50, 0, 60, 20]], np.float32)
    true = {number: (np.array([1, 2]), boxes) for number in (1, 2, 3, 4)}
    named = {
        1: (np.array([7, 8]), boxes),
        2: (np.array([7, 8]), boxes),
        3: (np.array([8, 7]), boxes),  # two switches
        4: (np.array([8]), boxes[:1] + 100),  # one on nobody, two people missed
    }
    found = scores(true, named)
    assert found.mota == pytest.approx(1 - (2 + 1 + 2) / 8)
    assert found.idf1 == pytest.approx(2 * 4 / (8 + 7))
    assert (found.switches, found.people, found.tracks) == (2, 2, 2)
    assert (found.precision, found.recall) == pytest.approx((6 / 7, 6 / 8))
    assert (found.mostly_tracked, found.mostly_lost) == (0, 0)  # three frames of four are less than 80 %


@needs_truth
def test_true_boxes_keep_every_identity(truth: Identified) -> None:
    found = scores(truth, tracked(detected(truth), CONFIG, THRESHOLD))
    assert (found.switches, found.tracks) == (0, found.people)
    assert found.idf1 == 1


@needs_truth
@pytest.mark.parametrize(("step", "least"), [(2, 1), (5, 0.95), (10, 0.85)])  # 5, 2 and 1 frames a second
def test_true_boxes_of_a_slow_camera_keep_nearly_every_identity(truth: Identified, step: int, least: float) -> None:
    slow = {number: people for number, people in truth.items() if number % step == 0}
    found = scores(slow, tracked(detected(slow), CONFIG, THRESHOLD))
    assert found.idf1 >= least


Found = dict[int, Detections]


@pytest.fixture(scope="module")
def people(bundle: Bundle) -> tuple[Found, Found]:
    """What the mini detector sees, and what it sees at the smaller size, down to the tracker's lowest score."""
    try:
        video = find_sample(cache=cache_folder())
    except CaptureError as error:
        pytest.skip(f"needs the sample video: {error}")
    facts, config = bundle.manifest, DetectConfig(threshold=CONFIG.low)
    assert facts.smaller is not None
    with open_session(bundle.file(DETECTOR)) as session, open_session(bundle.file(SMALLER)) as fewer:
        larger, smaller = Detector(session, facts.detector, config), Detector(fewer, facts.smaller, config)
        seen = {number: (larger([frame])[0], smaller([frame])[0]) for number, frame in frames_of(video, FIRST, LAST)}
    return {number: one for number, (one, _) in seen.items()}, {number: one for number, (_, one) in seen.items()}


@needs_truth
@pytest.mark.parametrize("every", [5, 20])  # frames
def test_people_keep_their_identity_while_the_box_changes_its_detector(
    every: int, people: tuple[Found, Found], truth: Identified
) -> None:
    larger, smaller = people
    mixed = {number: (larger, smaller)[number // every % 2][number] for number in larger}
    found, alone = scores(truth, tracked(mixed, CONFIG, THRESHOLD)), scores(truth, tracked(smaller, CONFIG, THRESHOLD))
    assert found.switches <= alone.switches, "the changes confuse nobody whom the smaller one does not"
    assert found.mota >= alone.mota - 0.01
    assert found.idf1 >= 0.7
    assert found.mostly_lost == 0


@needs_truth
def test_the_mini_detectors_people_keep_their_identity(people: tuple[Found, Found], truth: Identified) -> None:
    seen, _ = people
    found = scores(truth, tracked(seen, CONFIG, THRESHOLD))
    assert found.mota >= 0.78
    assert found.idf1 >= 0.7  # one identity that two people swap as they cross moves it by 0.1
    assert found.switches <= 35
    assert found.mostly_tracked >= 0.8
    assert found.mostly_lost == 0
    # boxes of low score are worth having: without them fewer of the people seen are named
    assert found.recall > scores(truth, strangers(seen, THRESHOLD)).recall
