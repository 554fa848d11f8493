"""The loop over frames: who is encoded, described and told of, where people's colours say who they are."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge import events
from edge.bank import Look, PromptBank
from edge.bundle import PROMPTS, open_bundle
from edge.config import CropConfig, DescribeConfig, DetectConfig, MatchConfig, MotionConfig, TrackConfig
from edge.describe import Described, Describer, largest, tall_enough
from edge.detect import Detector
from edge.encode import Encoder
from edge.imaging import crops_of, cut
from edge.match import match
from edge.motion import MotionGate
from edge.pipeline import Reporter, run
from edge.values import Category, Detections, Floats, Frame, Matches, Region
from edge.zones import Polygon
from tests.fakes import DETECTOR_FACTS, ENCODER_FACTS, SLEEVE, Arrays, FakeSession, bank

F32 = np.float32
START = 1_700_000_000.0
SIZE = (640, 480)  # px: width, height
Colour = tuple[int, int, int]
BLUE, GREEN, RED = (200, 60, 60), (60, 200, 60), (60, 60, 200)
# an option per colour: blue people have long sleeves, green ones short, red ones none; and a sensitive category
WORDS = replace(bank(), vectors=np.eye(4, dtype=F32)[[0, 1, 2, 0, 2]])


@dataclass(frozen=True)
class Someone:
    """x, y: px, the middle of their feet. height: px; they are 0.4 as wide."""

    x: float
    y: float = 300.0
    colour: Colour = BLUE
    height: float = 100.0
    score: float = 0.9

    @property
    def box(self) -> list[float]:
        return [self.x - 0.2 * self.height, self.y - self.height, self.x + 0.2 * self.height, self.y]


def embed(feeds: Arrays) -> dict[str, NDArray[np.float32]]:
    """(n, 4) unit rows: the three channels of the middle of each crop, and nothing."""
    images = feeds["image"]
    half = images.shape[1] // 2
    middle = images[:, half - 1 : half + 1, half - 1 : half + 1].reshape(len(images), -1, 3).mean(axis=1)
    rows = np.pad(middle, ((0, 0), (0, 1)))
    return {"embedding": (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(F32)}


class Stage:
    """A Describer whose detector finds the people that a test puts before the cameras. words: the bank on disk."""

    def __init__(
        self,
        folder: Path,
        words: PromptBank = WORDS,
        zones: Mapping[str, Sequence[Polygon]] | None = None,
        **config: object,
    ) -> None:
        self.config = DescribeConfig.model_validate({"track": TrackConfig(look_every=10), **config})
        self.folder = folder
        self.write(words)
        self.bundle = open_bundle(folder)
        self.detector, self.encoder = FakeSession(self._found), FakeSession(embed)
        self._shown: deque[tuple[Sequence[Someone], tuple[int, int]]] = deque()
        low = self.config.track.low if self.config.track.enabled else None
        finder = Detector(self.detector, DETECTOR_FACTS, self.config.detect, low)
        self.describer = Describer(self.bundle, finder, Encoder(self.encoder, ENCODER_FACTS), self.config, zones=zones)

    def _found(self, feeds: Arrays) -> Arrays:
        views = [self._shown.popleft() for _ in feeds["image"]]
        anchors = max(len(people) for people, _ in views)
        boxes, scores = np.zeros((len(views), anchors, 4), F32), np.zeros((len(views), anchors, 1), F32)
        for view, (people, size) in enumerate(views):
            for i, person in enumerate(people):
                boxes[view, i] = np.array(person.box) / [*size, *size]
                scores[view, i] = person.score
        return {"boxes": boxes, "scores": scores}

    def write(self, words: PromptBank) -> None:
        """Put a new bank in the place of the one on disk, as the export does."""
        (self.folder / "new").write_bytes(words.to_bytes())
        (self.folder / "new").replace(self.folder / PROMPTS)

    def frame(
        self, number: int, *people: Someone, camera: str = "door", size: tuple[int, int] = SIZE, at: float | None = None
    ) -> Frame:
        """A picture with these people, which the detector is going to find."""
        self._shown.append((people, size))
        return picture(number, *people, camera=camera, size=size, at=at)

    def __call__(self, *frames: Frame) -> list[Described]:
        return self.describer(frames)

    def one(self, number: int, *people: Someone, **where: object) -> Described:
        """One frame."""
        (described,) = self(self.frame(number, *people, **where))  # type: ignore[arg-type]
        return described

    @property
    def crops(self) -> list[NDArray[np.uint8]]:
        """All crops encoded so far."""
        return [crop for feed in self.encoder.feeds for crop in feed["image"]]


def picture(
    number: int, *people: Someone, camera: str = "door", size: tuple[int, int] = SIZE, at: float | None = None
) -> Frame:
    """Grey, with people in chequered colours, sharp as can be. at: seconds; else ten frames are one."""
    width, height = size
    image = np.full((height, width, 3), 128, np.uint8)
    chequers = (np.indices((height, width)).sum(axis=0) % 2 * 80 - 40)[..., None]  # the mean stays
    for person in people:
        x1, y1, x2, y2 = (round(edge) for edge in person.box)
        x1, y1 = max(x1, 0), max(y1, 0)
        image[y1:y2, x1:x2] = np.clip(np.array(person.colour) + chequers[y1:y2, x1:x2], 0, 255)
    return Frame(camera, number, START + (number / 10 if at is None else at), image)


def sleeves(described: Described) -> list[str]:
    """What is said of each person's sleeves."""
    return [described.matches.answers(i, 1)[0].top[0].option for i in range(len(described.people))]


def supports(described: Described) -> list[float | None]:
    return [described.matches.answers(i, 1)[0].support for i in range(len(described.people))]


def numbers(array: NDArray[np.generic] | None) -> list[int]:
    assert array is not None, "people are followed"
    return array.tolist()


# ---- a person who is followed ----


def test_a_person_is_encoded_now_and_then_and_described_in_every_frame(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    seen = [stage.one(number, Someone(100 + 4 * number)) for number in range(50)]
    assert len(stage.crops) == stage.describer.encoded == 5
    for number, described in enumerate(seen):
        assert numbers(described.tracks) == [1]
        assert numbers(described.looks) == [1 + number // 10]
        assert described.people.boxes[0] == pytest.approx(Someone(100 + 4 * number).box, abs=1e-3), "where they are now"
        assert sleeves(described) == ["long"]
        assert supports(described) == [1]
        assert np.linalg.norm(described.vectors, axis=1) == pytest.approx(1)
        assert (described.skipped, described.ended, described.news) == (0, (), None)
        assert described.told
    assert stage.describer.tracks == 1


def test_the_answer_is_that_of_all_looks(bundle_folder: Path) -> None:
    """Looks at frames 0, 10 and 20 say blue, those at 30 and 40 red; all are as good."""
    stage = Stage(bundle_folder)
    seen = [stage.one(n, Someone(300, colour=BLUE if n < 25 else RED)) for n in range(50)]
    assert {(*sleeves(one), *numbers(one.looks)) for one in seen} == {("long", n) for n in (1, 2, 3, 4, 5)}
    assert supports(seen[29]) == [1]
    assert supports(seen[30]) == pytest.approx([0.75], abs=1e-3)
    assert supports(seen[49]) == pytest.approx([0.6], abs=1e-3)
    said = match({"whole": seen[49].vectors}, WORDS.permitted(()), ENCODER_FACTS.logit_scale)
    assert seen[49].matches.probabilities == pytest.approx(said.probabilities), "what the vector says that is sent"
    mean = 3 * np.array(BLUE) + 2 * np.array(RED)  # all of one length
    assert seen[49].vectors[0, :3] == pytest.approx(mean / np.linalg.norm(mean), abs=0.02)


def test_whoever_comes_closer_is_looked_at_at_once(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    looks = [numbers(stage.one(n, Someone(300, height=100 + 8 * n)).looks)[0] for n in range(9)]
    heights = [100 + 8 * n for n in range(9)]
    best, wanted, count = 0.0, [], 0
    for height in heights:
        if height**2 > 1.5 * best:
            best, count = height**2, count + 1
        wanted.append(count)
    assert looks == wanted
    assert count > 1


def test_nobody_is_a_frame_like_any_other(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    described = stage.one(0)
    assert (len(described.people), described.vectors.shape, described.matches.probabilities.shape) == (
        0,
        (0, 4),
        (0, 3),
    )
    assert numbers(described.tracks) == numbers(described.looks) == []
    assert described.told, "every frame is told of"
    assert stage.encoder.feeds == []
    assert stage() == []
    assert stage.describer.finish() == []


@pytest.mark.parametrize(("score", "then"), [(0.4, 1), (0.2, 2)])  # above and below track.low
def test_a_box_of_low_score_goes_on_with_a_track_and_is_not_told(bundle_folder: Path, score: float, then: int) -> None:
    """Nobody is published who is none by detect.threshold; but who is seen again in time is who they were."""
    stage = Stage(bundle_folder, track=TrackConfig(look_every=1, lost_s=0.25))
    for number in range(5):
        stage.one(number, Someone(300))
    assert len(stage.crops) == 5
    for number in range(5, 10):
        described = stage.one(number, Someone(300, score=score), Someone(500, score=score, colour=RED))
        assert len(described.people) == described.skipped == 0
    assert len(stage.crops) == 5
    assert numbers(stage.one(10, Someone(300)).tracks) == [then]


def test_a_camera_whose_frame_changes_its_size_goes_on(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    stage.one(0, Someone(300))
    for number, size in enumerate([(320, 240), (1280, 960), SIZE], 1):
        width, height = size
        person = Someone(width / 2, height * 0.7, height=height / 4)
        described = stage.one(number, person, size=size)
        assert len(described.people) == 1
        assert described.people.boxes[0] == pytest.approx(person.box, abs=0.01)
        assert sleeves(described) == ["long"]
        assert (described.frame.width, described.frame.height) == size


def test_two_frames_of_a_camera_at_once(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    both = stage(*(stage.frame(n, Someone(300 + 4 * n)) for n in range(2)))
    assert [numbers(one.tracks) for one in both] == [[1], [1]]
    assert [sleeves(one) for one in both] == [["long"], ["long"]]


# ---- several cameras ----


def test_cameras_share_a_run_of_the_encoder_and_nothing_that_is_known(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    colours = {"door": BLUE, "yard": GREEN, "hall": RED}
    options = {"door": "long", "yard": "short", "hall": "none"}
    for number in range(15):
        frames = [stage.frame(number, Someone(300, colour=colour), camera=name) for name, colour in colours.items()]
        for one in stage(*frames):
            assert numbers(one.tracks) == [1], "each camera counts for itself"
            assert sleeves(one) == [options[one.frame.camera]]
            assert supports(one) == [1]
    assert [len(feed["image"]) for feed in stage.encoder.feeds] == [3, 3]
    assert stage.describer.tracks == 3


def test_of_two_cameras_each_frame_gets_its_own_people(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    left = [Someone(100, colour=RED), Someone(300, colour=GREEN, score=0.8)]
    right = [Someone(200, colour=GREEN, score=0.7), Someone(400, colour=BLUE), Someone(550, colour=RED, score=0.6)]
    frames = [stage.frame(0, *left, camera="a"), stage.frame(0, camera="b"), stage.frame(0, *right, camera="c")]
    assert [sleeves(one) for one in stage(*frames)] == [["none", "short"], [], ["long", "short", "none"]]


# ---- many people ----


def crowd(count: int = 200) -> list[Someone]:
    """Side by side, all of another height; the tallest stand in no order."""
    heights = np.random.default_rng(0).permutation(count) * 0.1 + 25
    return [
        Someone(20 + 31 * (i % 20), 46 + 47 * (i // 20), (BLUE, GREEN, RED)[i % 3], heights[i]) for i in range(count)
    ]


def test_of_a_crowd_the_largest_come_first_and_the_others_later(bundle_folder: Path) -> None:
    stage, people = Stage(bundle_folder, track=TrackConfig(look_every=1000)), crowd()
    by_size = sorted(people, key=lambda one: -one.height)
    for number, described_now in enumerate([32, 64, 96, 128, 160, 192, 200, 200]):
        described = stage.one(number, *people)
        assert len(described.people) == described_now
        assert described.skipped == 200 - described_now
        own = sorted((described.people.boxes[:, 3] - described.people.boxes[:, 1]).tolist(), reverse=True)
        assert own == pytest.approx([one.height for one in by_size[:described_now]], abs=1e-3)
        by_box = {tuple(np.round(one.box)): one.colour for one in people}
        wanted = [
            {BLUE: "long", GREEN: "short", RED: "none"}[by_box[tuple(np.round(box.tolist()))]]
            for box in described.people.boxes
        ]
        assert sleeves(described) == wanted
        assert len(set(numbers(described.tracks))) == described_now
    assert len(stage.crops) == 200


@pytest.mark.parametrize("followed", [True, False])
def test_a_limit_makes_it_encode_fewer_and_never_more_than_the_configuration(
    bundle_folder: Path, followed: bool
) -> None:
    stage = Stage(bundle_folder, track=TrackConfig(enabled=followed, look_every=1), crop=CropConfig(max_per_frame=3))
    crowd = [Someone(100 * i) for i in range(1, 6)]
    for number, (limit, encoded) in enumerate([(None, 3), (1, 1), (2, 2), (10, 3)]):
        if limit is not None:
            stage.describer.limit(limit)
        before = stage.describer.encoded
        stage.one(number, *crowd)
        assert stage.describer.encoded - before == encoded


def test_whoever_is_new_comes_before_those_who_are_due_again(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=TrackConfig(look_every=1), crop=CropConfig(max_per_frame=2))
    large = [Someone(100, height=200), Someone(250, height=180)]
    stage.one(0, *large)
    described = stage.one(1, *large, Someone(500, colour=RED, height=60))
    assert described.skipped == 0
    assert numbers(described.tracks) == [1, 2, 3]
    assert numbers(described.looks) == [2, 1, 1], "and then the largest of the others"


def test_small_people_are_counted_and_not_described(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    people = [Someone(100, height=23.5), Someone(300, height=24.5), Someone(500, height=10)]
    for number in range(3):
        described = stage.one(number, *people)
        assert len(described.people) == 1
        assert described.skipped == 2
    assert len(stage.crops) == 1
    grown = stage.one(3, replace(people[0], height=30), people[1])
    assert (len(grown.people), grown.skipped) == (2, 0)
    assert len(stage.crops) == 2, "who has grown tall enough is new"


# ---- zones ----

LEFT = [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)]  # half of a picture


@pytest.mark.parametrize("enabled", [True, False])
def test_whoever_is_outside_the_zones_is_nobody(bundle_folder: Path, enabled: bool) -> None:
    stage = Stage(bundle_folder, zones={"door": [LEFT]}, track=TrackConfig(enabled=enabled))
    inside, outside = Someone(100, colour=GREEN), [Someone(500), Someone(400, height=10), Someone(600, score=0.4)]
    described = stage.one(0, inside, *outside)
    assert sleeves(described) == ["short"]
    assert described.skipped == 0
    assert len(stage.crops) == 1
    assert len(stage.one(1, *outside).people) == 0
    everybody = stage.one(0, inside, *outside, camera="yard")
    assert len(everybody.people) == 2, "another camera has no zones"
    assert everybody.skipped == 1


def test_whoever_leaves_the_zones_is_gone(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, zones={"door": [LEFT]}, track=TrackConfig(lost_s=1))
    seen = [stage.one(number, Someone(200 + 10 * number)) for number in range(30)]
    assert [len(one.people) for one in seen] == [1] * 13 + [0] * 17, "x is 320 at last"
    (ended,) = [track for one in seen for track in one.ended]
    assert ended.frames == 13


# ---- the end of a track ----


def test_the_end_of_a_described_track_is_told_once(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    for number in range(5):
        stage.one(number, Someone(300), Someone(500, height=20))
    later = [stage.one(number) for number in range(5, 60)]
    ended = [track for one in later for track in one.ended]
    assert [(track.track, track.frames) for track in ended] == [(1, 5)], "nobody ever told of the small one"
    assert (ended[0].first_seen, ended[0].last_seen) == pytest.approx((START, START + 0.4))
    assert stage.describer.finish() == []


def test_whoever_comes_back_after_the_end_is_another(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    stage.one(0, Someone(300))
    described = stage.one(1, Someone(300, colour=RED), at=100.0)
    assert [track.track for track in described.ended] == [1]
    assert numbers(described.tracks) == [2]
    assert sleeves(described) == ["none"]


def test_the_end_of_the_source_ends_the_tracks_of_each_camera(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    for number in range(3):
        stage(
            stage.frame(number, Someone(100), Someone(300, score=0.8), camera="door"),
            stage.frame(number, camera="hall"),
            stage.frame(number, Someone(200), Someone(400, height=20), camera="yard"),
        )
    left = stage.describer.finish()
    assert [(one.frame.camera, one.frame.number, [track.track for track in one.ended]) for one in left] == [
        ("door", 2, [1, 2]),
        ("yard", 2, [1]),
    ]
    for one in left:
        assert one.told
        assert len(one.people) == len(one.matches) == len(one.vectors) == one.skipped == 0
        event = events.decode(events.encode(Reporter("box", "b", "e", 3, crops=True).event(events.Stamp(1, 2), one)))
        assert [track.frames for track in event.header.ended] == [3] * len(one.ended)
        assert event.header.people == ()
    assert stage.describer.finish() == []


# ---- every frame, or changes ----


CHANGES = TrackConfig(publish="changes", look_every=10)


def test_only_changes_are_told(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=CHANGES)
    colours = [BLUE] * 15 + [RED] * 30
    told = {}
    for number, colour in enumerate(colours):
        described = stage.one(number, Someone(300, colour=colour))
        assert len(described.people) == 1, "described all the same"
        if described.told:
            told[number] = (numbers(described.news), sleeves(described))
    # looks at 0, 10: blue; at 20, 30, 40: red, the third of which tips the scales
    assert told == {0: ([0], ["long"]), 40: ([0], ["none"])}


def test_only_the_people_who_are_news_are_told_of(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=CHANGES)
    old = [Someone(100, score=0.95), Someone(500, colour=GREEN, score=0.6)]
    first = stage.one(0, *old)
    assert numbers(first.news) == [0, 1]
    second = stage.one(1, *old, Someone(300, colour=RED, score=0.8))
    assert numbers(second.tracks) == [1, 3, 2], "best score first"
    assert numbers(second.news) == [1]
    assert second.told
    for number in range(2, 5):
        again = stage.one(number, *old, Someone(300, colour=RED, score=0.8))
        assert numbers(again.news) == []
        assert not again.told
    gone = stage.one(50, Someone(100, score=0.95))
    assert gone.told
    assert numbers(gone.news) == [0], "a pause this long ends every track"
    assert [track.track for track in gone.ended] == [1, 2, 3]


def test_an_end_alone_is_told(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=CHANGES)
    told = [stage.one(number, *([Someone(300)] if number < 4 else [])) for number in range(50)]
    assert [one.frame.number for one in told if one.told] == [0, 34]
    assert [track.track for track in told[34].ended] == [1]


# ---- words ----


NEW_WORDS = PromptBank(
    (replace(SLEEVE, name="mood", options=("calm", "cross"), labels=(None, None)),),
    np.eye(4, dtype=F32)[[2, 0]],
    WORDS.text_sha256,
    WORDS.image_sha256,
    "new.toml",
)


def test_new_words_are_taken_between_frames_and_nothing_said_in_the_old_ones_counts(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=CHANGES)
    for number in range(5):
        before = stage.one(number, Someone(300), Someone(500, colour=RED, score=0.8))
    assert (before.bank, sleeves(before)) == (WORDS.sha256, ["long", "none"])
    stage.write(NEW_WORDS)
    after = stage.one(5, Someone(300), Someone(500, colour=RED, score=0.8))
    assert after.bank == NEW_WORDS.sha256
    assert after.matches.categories == NEW_WORDS.categories
    assert after.matches.probabilities.shape == (2, 2)
    assert sleeves(after) == ["cross", "calm"]
    assert numbers(after.tracks) == [1, 2], "people stay who they are"
    assert numbers(after.looks) == [1, 1]
    assert numbers(after.news) == [0, 1]
    assert len(stage.crops) == 4
    assert stage.describer.tracks == 2, "nobody is met twice"


def test_a_track_that_ends_as_the_words_change_is_told_of(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    for number in range(5):
        stage.one(number, Someone(300))
    stage.write(NEW_WORDS)
    later = [stage.one(number) for number in range(5, 50)]
    assert [track.track for one in later for track in one.ended] == [1]


def test_the_same_words_written_anew_change_nothing(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    for number in range(5):
        stage.write(WORDS)
        described = stage.one(number, Someone(300))
    assert numbers(described.looks) == [1]
    assert len(stage.crops) == 1


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no bank"), Path.unlink])
def test_bad_words_are_refused_with_a_line_and_the_old_ones_stay(
    damage: Callable[[Path], object], bundle_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(bundle_folder)
    stage.one(0, Someone(300))
    damage(bundle_folder / PROMPTS)
    with caplog.at_level(logging.WARNING):
        for number in range(1, 5):
            described = stage.one(number, Someone(300))
    assert len(caplog.records) == 1, "once, not per frame"
    assert "the words in use stay" in caplog.text
    assert (described.bank, sleeves(described), numbers(described.looks)) == (WORDS.sha256, ["long"], [1])
    stage.write(WORDS)
    assert numbers(stage.one(5, Someone(300)).looks) == [1], "and whoever mends it loses nothing"


@pytest.mark.parametrize("enabled", [True, False])
def test_sensitive_questions_are_answered_where_they_are_named(enabled: bool, bundle_folder: Path) -> None:
    track = TrackConfig(enabled=enabled)
    plain = Stage(bundle_folder, track=track).one(0, Someone(300))
    assert [one.name for one in plain.matches.categories] == ["sleeve length"]
    allowed = Stage(bundle_folder, track=track, match=MatchConfig(sensitive=("gender",))).one(0, Someone(300))
    assert [one.name for one in allowed.matches.categories] == ["sleeve length", "gender"]
    assert allowed.bank == plain.bank == WORDS.sha256


# ---- regions ----


PLAIN = Look()


def with_regions(*regions: Region, look: Look = PLAIN) -> PromptBank:
    """A category for each."""
    categories = tuple(
        Category(f"{region} {i}", "q", ("blue", "green", "red"), (None,) * 3, region=region)
        for i, region in enumerate(regions)
    )
    vectors = np.tile(np.eye(4, dtype=F32)[:3], (len(regions), 1))
    return replace(WORDS, categories=categories, vectors=vectors, look=look)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("asked", "encoded"),
    [
        (("whole",), ("whole",)),
        (("head",), ("whole", "head")),
        (("feet", "head", "feet", "whole", "head"), ("whole", "feet", "head")),
    ],
)
def test_each_region_that_a_question_looks_at_is_encoded_once(
    asked: tuple[Region, ...], encoded: tuple[Region, ...], enabled: bool, bundle_folder: Path
) -> None:
    look = Look("squash", 0.1)
    stage = Stage(bundle_folder, with_regions(*asked, look=look), track=TrackConfig(enabled=enabled))
    people = [Someone(300), Someone(500, colour=RED, score=0.8)]
    described = stage.one(0, *people)
    assert len(stage.encoder.feeds) == len(encoded)
    found = Detections(np.array([one.box for one in people], F32), np.array([0.9, 0.8], F32))
    for feed, region in zip(stage.encoder.feeds, encoded, strict=True):
        assert (feed["image"] == crops_of(described.frame, found, ENCODER_FACTS, look, region)).all()
    assert stage.describer.encoded == 2, "people, however much of them is looked at"


def test_a_question_is_answered_from_its_region(bundle_folder: Path) -> None:
    """A blue person with a red head and green feet."""
    stage = Stage(bundle_folder, with_regions("whole", "head", "feet", "head"))
    frame = stage.frame(0, Someone(300))
    image = frame.image.copy()
    image[200:232, 280:320], image[274:300, 280:320] = RED, GREEN
    (described,) = stage(replace(frame, image=image))
    assert [one.top[0].option for one in described.matches.answers(0, 1)] == ["blue", "red", "green", "red"]
    assert described.vectors[0].argmax() == 0, "events carry the whole person's"


def test_a_flipped_look_encodes_both(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, replace(WORDS, look=Look(flip=True)))
    stage.one(0, Someone(300))
    one, mirrored = stage.crops
    assert (one[:, ::-1] == mirrored).all()
    assert stage.describer.encoded == 1


# ---- nobody is followed ----


def test_without_tracking_every_frame_is_described_for_itself(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=TrackConfig(enabled=False), crop=CropConfig(max_per_frame=2))
    people = [
        Someone(100, colour=RED, score=0.95),
        Someone(200, height=20, score=0.9),
        Someone(300, colour=GREEN, height=120, score=0.7),
        Someone(400, height=130, score=0.6),
        Someone(500, height=150, score=0.4),
    ]
    for number in range(3):
        described = stage.one(number, *people)
        wanted = [people[2], people[3]]  # the largest, best score first
        boxes = Detections(np.array([one.box for one in wanted], F32), np.array([0.7, 0.6], F32))
        np.testing.assert_allclose(described.people.boxes, boxes.boxes, atol=1e-3)
        crops = crops_of(described.frame, described.people, ENCODER_FACTS, WORDS.look)
        vectors = embed({"image": crops})["embedding"]
        np.testing.assert_array_equal(described.vectors, vectors)
        plain = match({"whole": vectors}, WORDS.permitted([]), ENCODER_FACTS.logit_scale)
        np.testing.assert_array_equal(described.matches.probabilities, plain.probabilities)
        assert described.skipped == 2, "one too small, one too many"
        assert (described.matches.support, described.tracks, described.looks, described.news) == (None,) * 4
        assert described.ended == ()
        assert described.told
    assert len(stage.crops) == 6
    assert stage.describer.tracks == 0
    assert stage.describer.finish() == []


def test_a_frame_described_for_the_first_time_is_as_it_is_without_tracking(bundle_folder: Path) -> None:
    people = [Someone(100, colour=RED, score=0.95), Someone(300, colour=GREEN, score=0.7), Someone(200, height=10)]
    followed, plain = (Stage(bundle_folder, track=TrackConfig(enabled=on)).one(0, *people) for on in (True, False))
    np.testing.assert_array_equal(followed.people.boxes, plain.people.boxes)
    np.testing.assert_allclose(followed.vectors, plain.vectors, atol=1e-6)
    np.testing.assert_allclose(followed.matches.probabilities, plain.matches.probabilities, atol=1e-6)
    assert followed.skipped == plain.skipped == 1


@pytest.mark.parametrize("limit", [0, 1, 3, 9])
def test_the_largest_are_in_the_order_they_stand_in(limit: int) -> None:
    boxes = np.array([[0, 0, w, w] for w in (3, 9, 1, 9, 4)], F32)
    chosen = largest(Detections(boxes, np.ones(5, F32)), limit).tolist()
    assert chosen == {0: [], 1: [1], 3: [1, 3, 4], 9: [0, 1, 2, 3, 4]}[limit]


@pytest.mark.parametrize(("height", "tall"), [(23, False), (24, True), (23.99, False), (-30, False)])
def test_how_tall_is_tall_enough(height: float, tall: bool) -> None:
    assert tall_enough(Detections(np.array([[0, 5, 9, 5 + height]], F32), np.ones(1, F32)), 24).tolist() == [tall]


# ---- what is reported ----


def described_of(people: Sequence[Someone], news: Sequence[int] | None, rows: Floats) -> Described:
    """Rows: (n, 4) unit vectors."""
    frame = picture(7, *people)
    found = Detections(
        np.array([one.box for one in people], F32).reshape(-1, 4), np.array([one.score for one in people], F32)
    )
    shares = np.tile(np.array([0.5, 0.3, 0.2], F32), (len(people), 1))
    support = np.full((len(people), 1), 0.66666, F32)
    tracks, looks = np.arange(len(people)) + 11, np.arange(len(people)) + 1
    which = None if news is None else np.array(news, np.intp)
    return Described(frame, found, rows, Matches((SLEEVE,), shares, support), 3, "bank", tracks, looks, (), which)


PEOPLE = (Someone(100, colour=RED), Someone(300, colour=GREEN, score=0.8), Someone(500, score=0.7))


@pytest.mark.parametrize("news", [None, [], [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("crops", [False, True])
def test_embeddings_and_crops_are_those_of_the_people_told_of(news: list[int] | None, crops: bool) -> None:
    rows = np.eye(3, 4, dtype=F32)
    described = described_of(PEOPLE, news, rows)
    event = Reporter("box", "sum", "e", 2, crops).event(events.Stamp(5, 6, ("a notice",)), described)
    told = [0, 1, 2] if news is None else news
    assert [person.track for person in event.header.people] == [11 + i for i in told]
    assert [person.looks for person in event.header.people] == [1 + i for i in told]
    assert [person.score for person in event.header.people] == pytest.approx([PEOPLE[i].score for i in told], abs=1e-4)
    assert [list(person.box) for person in event.header.people] == [PEOPLE[i].box for i in told]
    assert event.embeddings.tolist() == rows[told].tolist()
    assert event.embeddings.shape == (len(told), 4)
    for i, jpeg in zip(told, event.crops, strict=True):
        assert (jpeg is not None) == crops
        if jpeg is not None:
            image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
            assert image.shape == cut(described.frame.image, described.people.boxes[i]).shape
            assert image.mean(axis=(0, 1)).argmax() == np.argmax(PEOPLE[i].colour)
    again = events.decode(events.encode(event))
    assert again.header == event.header
    header = event.header
    assert (header.epoch, header.seq, header.notices, header.skipped) == (5, 6, ("a notice",), 3)
    assert (header.frame, header.frame_size, header.embedding_dim) == (7, SIZE, 4)


def test_support_is_rounded_and_unknown_is_said_only_where_it_is_true() -> None:
    one = described_of(PEOPLE[:1], None, np.eye(1, 4, dtype=F32))
    reporter = Reporter("box", "sum", "e", 2, crops=False)
    (answer,) = reporter.event(events.Stamp(0, 0), one).header.people[0].answers
    assert (answer.support, answer.unknown, len(answer.top)) == (0.6667, None, 2)
    careful = replace(one, matches=Matches((replace(SLEEVE, threshold=0.6),), one.matches.probabilities))
    (answer,) = reporter.event(events.Stamp(0, 0), careful).header.people[0].answers
    assert (answer.support, answer.unknown) == (None, True)
    assert answer.top[0].option == "long", "the best is told all the same"


@pytest.mark.parametrize(("right", "said"), [(None, None), (True, None), (False, "unsynchronised")])
def test_a_clock_that_is_not_set_is_said(right: bool | None, said: str | None) -> None:
    one = described_of(PEOPLE[:1], None, np.eye(1, 4, dtype=F32))
    event = Reporter("box", "sum", "e", 2, False, lambda: right).event(events.Stamp(0, 0), one)
    assert event.header.clock == said
    assert (b"clock" in events.encode(event)[0]) == (said is not None), "an older collector reads what it knew"


def test_an_ended_tracks_times_are_those_of_its_events(bundle_folder: Path) -> None:
    stage, reporter = Stage(bundle_folder), Reporter("box", "sum", "e", 2, crops=False)
    seen = [stage.one(n, Someone(300), at=(n + 1) / 7) for n in range(5)]
    (left,) = stage.describer.finish()
    heads = [reporter.event(events.Stamp(0, 0), one).header for one in (*seen, left)]
    (ended,) = heads[-1].ended
    assert (ended.first_seen, ended.last_seen) == (heads[0].captured_at, heads[4].captured_at)
    assert (ended.track, ended.frames) == (1, 5)


# ---- a configuration that changes while it runs ----


def configured(stage: Stage, changed: Sequence[str] = (), **config: object) -> list[Described]:
    """Have the describer go by this from now on."""
    wanted = DescribeConfig.model_validate({"track": TrackConfig(look_every=10), **config})
    return stage.describer.configure(wanted, (), {}, changed)


def test_a_new_threshold_counts_from_the_next_frame_on(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    sure, vague = Someone(100), Someone(400, score=0.6)
    assert len(stage.one(0, sure, vague).people) == 2
    (left,) = configured(stage, detect=DetectConfig(threshold=0.7))
    assert [one.frames for one in left.ended] == [1, 1], "a track begins by the threshold: those of the old one end"
    assert len(stage.one(1, sure, vague).people) == 1


def test_a_track_that_begins_after_a_change_never_has_the_number_of_one_before(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    before = {*numbers(stage.one(0, Someone(100), Someone(400)).tracks)}
    configured(stage, track=TrackConfig(min_frames=1))
    assert before.isdisjoint(numbers(stage.one(1, Someone(100), Someone(400)).tracks))


def test_what_has_nothing_to_do_with_tracks_leaves_them(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    first = numbers(stage.one(0, Someone(100)).tracks)
    assert configured(stage, crop=CropConfig(max_per_frame=1), match=MatchConfig(top_k=1)) == []
    assert numbers(stage.one(1, Someone(100)).tracks) == first


def test_a_camera_that_is_no_more_has_its_tracks_ended_and_no_other(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    stage(stage.frame(0, Someone(100)), stage.frame(0, Someone(100), camera="gate"))
    (left,) = configured(stage, changed=["gate", "never seen"])
    assert left.frame.camera == "gate"
    assert len(left.ended) == 1
    assert numbers(stage.one(1, Someone(100)).tracks) == [1]
    assert configured(stage, changed=["gate"]) == [], "told once"


def test_a_sensitive_category_is_answered_once_it_is_named(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    asked = len(stage.one(0, Someone(100)).matches.categories)
    configured(stage, match=MatchConfig(sensitive=("gender",)))
    assert len(stage.one(1, Someone(100)).matches.categories) == asked + 1


def test_fewer_crops_and_other_zones_count_at_once(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    half = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
    stage.describer.configure(DescribeConfig(crop=CropConfig(max_per_frame=1)), (), {"door": [half]}, ())
    assert len(stage.one(0, Someone(100), Someone(200), Someone(500)).people) == 1
    assert len(stage.crops) == 1


# ---- the loop ----


class Reel:
    """Cameras that have these batches of frames; some of the time nothing comes."""

    def __init__(self, batches: Sequence[Sequence[Frame]]) -> None:
        self._batches = deque(batches)

    @property
    def done(self) -> bool:
        return not self._batches

    def next(self, timeout: float) -> list[Frame]:
        return list(self._batches.popleft())


def played(
    stage: Stage,
    batches: Sequence[Sequence[Frame]],
    max_frames: int | None = None,
    motion: MotionConfig | None = None,
    turn: Callable[[], None] = lambda: None,
) -> tuple[list[events.Event], int]:
    """The events sent, numbered as they come, and how many frames were described."""
    sent: list[events.Event] = []
    seen: list[Described] = []

    def send(make: Callable[[events.Stamp], events.Event]) -> None:
        sent.append(make(events.Stamp(0, len(sent))))

    reporter = Reporter("box", "sum", "e", 3, crops=False)
    cameras, gate, stop = Reel(batches), MotionGate(motion or MotionConfig()), threading.Event()
    run(cameras, gate, stage.describer, reporter, send, seen.append, turn, lambda _: None, stop, max_frames)  # type: ignore[arg-type]
    return sent, len(seen)


@pytest.mark.parametrize(("publish", "frames"), [("every-frame", [*range(6), 5]), ("changes", [0, 5])])
def test_the_loop_sends_what_there_is_to_tell_and_the_tracks_left(
    publish: str, frames: list[int], bundle_folder: Path
) -> None:
    stage = Stage(bundle_folder, track=TrackConfig(publish=publish, look_every=10))  # type: ignore[arg-type]
    batches = [[stage.frame(n, Someone(300))] for n in range(6)]
    sent, seen = played(stage, [[], *batches[:3], [], *batches[3:]])
    assert seen == 6
    assert [event.header.frame for event in sent] == frames
    assert [event.header.seq for event in sent] == list(range(len(frames)))
    assert [len(event.header.ended) for event in sent] == [0] * (len(frames) - 1) + [1]
    assert [len(event.header.people) for event in sent] == [1] * (len(frames) - 1) + [0]


def test_the_loop_ends_after_as_many_frames_as_it_may(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    batches = [[stage.frame(n, Someone(300), camera=name) for name in ("a", "b")] for n in range(5)]
    sent, seen = played(stage, batches, max_frames=3)
    assert seen == 3
    assert [(event.header.camera, event.header.frame) for event in sent] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("a", 1),
        ("b", 0),
    ]


def test_what_changes_the_configuration_is_called_between_two_batches(bundle_folder: Path) -> None:
    stage, turns = Stage(bundle_folder), []
    batches = [[stage.frame(n, Someone(300), camera=name) for name in ("a", "b")] for n in range(2)]
    played(stage, [*batches, []], turn=lambda: turns.append(stage.describer.timings.stages["match"].copy()))
    assert [len(one) for one in turns] == [0, 1, 2]


def test_a_frame_in_which_nothing_moves_is_not_looked_at_and_one_with_somebody_is(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder, track=TrackConfig(lost_s=1.0))
    empty = [[stage.frame(n, at=float(n))] for n in range(10)]
    motion = MotionConfig(enabled=True, hold_s=2.5)
    _, seen = played(stage, empty, motion=motion)
    assert seen == 3, "until nothing has moved for hold_s"
    stage = Stage(bundle_folder, track=TrackConfig(lost_s=1.0))
    still = [[stage.frame(n, Someone(300), at=float(n))] for n in range(10)]
    assert played(stage, still, motion=motion)[1] == 10, "who stands still is somebody"


def test_a_stage_is_timed_per_frame(bundle_folder: Path) -> None:
    stage = Stage(bundle_folder)
    stage(stage.frame(0, Someone(300), camera="a"), stage.frame(0, Someone(300), camera="b"))
    assert {name: len(taken) for name, taken in stage.describer.timings.stages.items()} == dict.fromkeys(
        ("detect", "track", "crop", "encode", "match"), 1
    )
