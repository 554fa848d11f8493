"""The box changes its detector between frames: people are where they are, and who they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bundle import DetectorFacts, ResizeMode
from edge.describe import Described, Describer
from edge.detect import Detector
from edge.encode import Encoder
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS, SMALLER_FACTS, FakeSession
from tests.unit.test_pipeline import GREEN, Someone, Stage, numbers, sleeves


class Two(Stage):
    """A stage with two detectors, each of which sees the people that are shown, in its own input."""

    def __init__(self, folder: Path, smaller: DetectorFacts | None = SMALLER_FACTS) -> None:
        super().__init__(folder)
        self.smaller = FakeSession(self._found)
        low = self.config.track.low
        finder = Detector(self.detector, DETECTOR_FACTS, self.config.detect, low)
        fewer = None if smaller is None else Detector(self.smaller, smaller, self.config.detect, low)
        self.describer = Describer(
            self.bundle, finder, Encoder(self.encoder, ENCODER_FACTS), self.config, smaller=fewer
        )

    @property
    def runs(self) -> tuple[int, int]:
        """Of the detector, and of the smaller one."""
        return len(self.detector.feeds), len(self.smaller.feeds)


def walkers(number: int) -> list[Someone]:
    return [Someone(100 + 4 * number), Someone(400 - 3 * number, colour=GREEN)]


def test_tracks_go_on_while_the_detector_changes(bundle_folder: Path) -> None:
    stage = Two(bundle_folder)
    seen: list[Described] = []
    for number in range(40):
        stage.describer.use_smaller(number // 5 % 2 == 1)  # there and back, again and again
        seen.append(stage.one(number, *walkers(number)))
    assert stage.runs == (20, 20)
    for session, facts in ((stage.detector, DETECTOR_FACTS), (stage.smaller, SMALLER_FACTS)):
        assert {feed["image"].shape for feed in session.feeds} == {(1, facts.height, facts.width, 3)}
    for number, described in enumerate(seen):
        assert numbers(described.tracks) == [1, 2]
        assert sleeves(described) == ["long", "short"]
        assert not described.ended
        for box, person in zip(described.people.boxes, walkers(number), strict=True):
            assert box == pytest.approx(person.box, abs=1e-3), "px of the frame, whoever saw it"
    assert stage.describer.encoded == 2 * 4, "nobody is looked at anew because of a change"


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_the_smaller_one_fits_frames_by_its_own_facts(resize: ResizeMode, bundle_folder: Path) -> None:
    square = SMALLER_FACTS.model_copy(update={"resize": resize, "height": 32})
    stage = Two(bundle_folder, square)
    stage.describer.use_smaller(True)
    described = stage.one(0, Someone(300))
    x1, y1, x2, y2 = Someone(300).box
    if resize == "letterbox":  # 640 x 480 lies in 32 x 32 from row 4 to 28: what is said of the input is of the frame
        y1, y2 = ((y / 480 * 32 - 4) / 24 * 480 for y in (y1, y2))
    assert described.people.boxes[0] == pytest.approx([x1, y1, x2, y2], abs=1e-3)


def test_a_change_is_for_the_next_frames_and_asked_for_twice_is_once(bundle_folder: Path) -> None:
    stage = Two(bundle_folder)
    stage.one(0, Someone(100))
    assert stage.runs == (1, 0)
    stage.describer.use_smaller(True)
    stage.describer.use_smaller(True)
    assert stage.runs == (1, 0)
    stage(stage.frame(1, Someone(104)), stage.frame(1, Someone(200), camera="yard"))
    assert stage.runs == (1, 1), "one run for both cameras"
    stage.describer.use_smaller(False)
    stage.describer.use_smaller(False)
    stage.one(2, Someone(108))
    assert stage.runs == (2, 1)


def test_without_a_smaller_one_there_is_nothing_to_change_to(bundle_folder: Path) -> None:
    stage = Two(bundle_folder, None)
    stage.describer.use_smaller(False)
    with pytest.raises(ValueError, match="no smaller detector"):
        stage.describer.use_smaller(True)
    assert numbers(stage.one(0, Someone(100)).tracks) == [1]
    assert stage.runs == (1, 0)
