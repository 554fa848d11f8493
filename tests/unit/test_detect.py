"""Frames to people: the net's input and back, one box per person, and the Detector over a session."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import DetectorFacts, ResizeMode
from edge.config import DetectConfig, Overlap
from edge.detect import Detector, one_per_person, unfit
from edge.errors import BackendError, BundleError
from edge.imaging import fit
from edge.values import Frame
from tests.fakes import DETECTOR_FACTS, FakeSession, frame

F32 = np.float32
Box = tuple[int, ...]
STRETCH, LETTERBOX = DETECTOR_FACTS, DETECTOR_FACTS.model_copy(update={"resize": "letterbox"})

# ---- one box per person ----

# Whole numbers, so that every area and every IoU below is exact; scores that differ, so that there is one answer.
grid_boxes = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 9), st.integers(1, 9)).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    ),
    max_size=14,
)
thresholds = st.sampled_from(
    [Fraction(0), Fraction(1, 4), Fraction(3, 10), Fraction(1, 2), Fraction(2, 3), Fraction(1)]
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[Box], list[float]]:
    """Boxes with different scores, in any order."""
    boxes = draw(grid_boxes)
    scores = [(i + 1) / 16 for i in range(len(boxes))]
    return boxes, draw(st.permutations(scores))


def exact_iou(a: Box, b: Box) -> Fraction:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return Fraction(shared, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def groups_by_hand(boxes: Sequence[Box], scores: Sequence[float], threshold: Fraction) -> list[list[int]]:
    """The best box left and all that overlap it by more, group by group: numbers of boxes, best first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for group in groups:
            if exact_iou(boxes[group[0]], boxes[i]) > threshold:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def kept(boxes: Sequence[Box], scores: Sequence[float], iou: float, overlap: Overlap) -> list[tuple[Box, float]]:
    """one_per_person over plain numbers."""
    people = one_per_person(np.array(boxes, F32).reshape(-1, 4), np.array(scores, F32), iou, overlap)
    return [(tuple(map(int, box)), float(score)) for box, score in zip(people.boxes, people.scores, strict=True)]


@given(scored(), thresholds)
def test_nms_is_what_a_person_would_do_by_hand(people: tuple[list[Box], list[float]], threshold: Fraction) -> None:
    boxes, scores = people
    wanted = [(boxes[group[0]], scores[group[0]]) for group in groups_by_hand(boxes, scores, threshold)]
    assert kept(boxes, scores, float(threshold), "nms") == wanted


@given(scored(), st.sampled_from([0.123, 0.321, 0.456, 0.654]))
def test_nms_agrees_with_opencv(people: tuple[list[Box], list[float]], threshold: float) -> None:
    boxes, scores = people
    sides = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]
    chosen = cv2.dnn.NMSBoxes(sides, scores, 0.0, threshold) if boxes else []
    assert kept(boxes, scores, threshold, "nms") == [(boxes[i], scores[i]) for i in chosen]


@given(scored(), thresholds)
def test_merge_is_the_union_of_each_group(people: tuple[list[Box], list[float]], threshold: Fraction) -> None:
    boxes, scores = people
    wanted = []
    for group in groups_by_hand(boxes, scores, threshold):
        x1, y1, x2, y2 = zip(*(boxes[i] for i in group), strict=True)
        wanted.append(((min(x1), min(y1), max(x2), max(y2)), scores[group[0]]))
    merged = kept(boxes, scores, float(threshold), "merge")
    assert merged == wanted
    for a in boxes:
        assert any(b[0] <= a[0] and b[1] <= a[1] and b[2] >= a[2] and b[3] >= a[3] for b, _ in merged), "nobody is lost"


@given(scored(), st.randoms(use_true_random=False), st.sampled_from(["nms", "merge"]))
def test_the_order_of_the_boxes_does_not_matter(
    people: tuple[list[Box], list[float]], random: object, overlap: Overlap
) -> None:
    rows = list(zip(*people, strict=True))
    shuffled = rows.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = (kept([box for box, _ in one], [s for _, s in one], 0.3, overlap) for one in (rows, shuffled))
    assert first == second
    assert [score for _, score in first] == sorted((score for _, score in first), reverse=True)
    assert {score for _, score in first} <= set(people[1])


@pytest.mark.parametrize("overlap", ["nms", "merge"])
@pytest.mark.parametrize(
    ("boxes", "count"),
    [
        ([], 0),
        ([(0, 0, 9, 9)], 1),
        ([(0, 0, 9, 9)] * 50, 1),
        ([(0, 0, 9, 9), (9, 0, 18, 9)], 2),
        ([(0, 0, 0, 9), (5, 5, 5, 5)], 0),  # no area
        ([(9, 9, 0, 0), (1, 1, 4, 4)], 1),  # inside out
        ([(0, 0, 2, 2), (0, 0, 2, 1)], 2),  # IoU 0.5 is not more than 0.5
    ],
)
def test_how_many_people_there_are(boxes: list[Box], count: int, overlap: Overlap) -> None:
    assert len(kept(boxes, [0.5] * len(boxes), 0.5, overlap)) == count


@pytest.mark.parametrize("overlap", ["nms", "merge"])
def test_even_at_iou_1_every_box_is_taken_once(overlap: Overlap) -> None:
    assert len(kept([(0, 0, 9, 9)] * 3, [0.5, 0.7, 0.6], 1.0, overlap)) == 3


@pytest.mark.parametrize("overlap", ["nms", "merge"])
def test_nan_is_nobody(overlap: Overlap) -> None:
    boxes = np.array([[np.nan] * 4, [0, 0, 4, np.nan], [1, 1, 5, 5]], F32)
    people = one_per_person(boxes, np.array([0.9, 0.8, 0.7], F32), 0.5, overlap)
    assert people.boxes.tolist() == [[1, 1, 5, 5]]
    assert people.scores.tolist() == [F32(0.7)]


def test_equal_scores_keep_the_order_of_the_net() -> None:
    assert kept([(9, 0, 18, 9), (0, 0, 9, 9)], [0.5, 0.5], 0.5, "nms") == [((9, 0, 18, 9), 0.5), ((0, 0, 9, 9), 0.5)]


# ---- the net's input and back ----


def rectangle_in(image: NDArray[np.uint8], facts: DetectorFacts) -> NDArray[np.float32]:
    """Where the white rectangle lies in the net's input, (1, 4) in 0..1; letterbox grey is not white."""
    ys, xs = np.nonzero(image.min(axis=2) > 191)
    edges = [
        xs.min() / facts.width,
        ys.min() / facts.height,
        (xs.max() + 1) / facts.width,
        (ys.max() + 1) / facts.height,
    ]
    return np.array([edges], F32)


@given(
    width=st.integers(40, 200),
    height=st.integers(40, 200),
    corners=st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.3, 0.5)] * 2),
    resize=st.sampled_from(["stretch", "letterbox"]),
)
def test_what_the_net_sees_is_placed_where_it_was(
    width: int, height: int, corners: tuple[float, float, float, float], resize: ResizeMode
) -> None:
    facts = STRETCH.model_copy(update={"resize": resize, "width": 96, "height": 64})
    x1, y1 = int(corners[0] * width), int(corners[1] * height)
    x2, y2 = int(x1 + corners[2] * width), int(y1 + corners[3] * height)
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    seen = fit(image, facts)
    assert seen.shape == (64, 96, 3)
    (box,) = unfit(rectangle_in(seen, facts), width, height, facts)
    pixel = max(width / facts.width, height / facts.height, 1)  # of the net, in px of the frame
    assert np.abs(box - [x1, y1, x2, y2]).max() <= 1.5 * pixel


@pytest.mark.parametrize("facts", [STRETCH, LETTERBOX])
@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    box=st.tuples(*[st.floats(0, 1, width=32)] * 4),
)
def test_unfit_undoes_the_placing(facts: DetectorFacts, size: tuple[int, int], box: tuple[float, ...]) -> None:
    """Against the placing written anew: scale about the centre of the input."""
    width, height = size
    if facts.resize == "stretch":
        inner = facts.width, facts.height
    else:
        scale = min(facts.width / width, facts.height / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (facts.width - inner[0]) // 2, (facts.height - inner[1]) // 2
    net = np.array(
        [
            (left + box[i] * inner[0]) / facts.width if i % 2 == 0 else (top + box[i] * inner[1]) / facts.height
            for i in range(4)
        ],
        F32,
    )
    (back,) = unfit(net[None], width, height, facts)
    wanted = np.array(box) * [width, height, width, height]
    # float32 of a place in the input, magnified by frame / inner picture
    coarse = 4e-7 * np.array([width * facts.width / inner[0], height * facts.height / inner[1]] * 2) + 1e-5
    assert (np.abs(back - wanted) <= coarse * 2).all()


@pytest.mark.parametrize("facts", [STRETCH, LETTERBOX])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_boxes_are_clipped_to_the_frame_and_the_input_is_left_alone(facts: DetectorFacts, n: int) -> None:
    boxes = np.array([[-0.5, -0.5, 1.5, 1.5]] * n, F32).reshape(n, 4)
    before = boxes.copy()
    placed = unfit(boxes, 30, 50, facts)
    assert placed.dtype == F32
    assert placed.tolist() == [[0, 0, 30, 50]] * n
    assert (boxes == before).all()


def test_a_box_in_the_grey_of_the_letterbox_has_no_area() -> None:
    """A square frame in a 64 x 32 input leaves 16 px of grey on the left."""
    placed = unfit(np.array([[0, 0, 0.2, 1]], F32), 100, 100, LETTERBOX)
    assert len(one_per_person(placed, np.array([0.9], F32), 0.5, "nms")) == 0


# ---- the Detector ----


def outputs(scores: Sequence[Sequence[float]], classes: int = 1) -> dict[str, NDArray[np.float32]]:
    """A row of boxes side by side, 0.1 wide, with these scores in the last column."""
    f, a = len(scores), len(scores[0]) if scores else 0
    boxes = np.array([[[0.1 * i, 0.25, 0.1 * i + 0.1, 0.75] for i in range(a)]] * f, F32).reshape(f, a, 4)
    table = np.full((f, a, classes), 0.99, F32)
    table[..., -1] = scores
    return {"boxes": boxes, "scores": table}


@pytest.mark.parametrize("sizes", [[], [(20, 10)], [(20, 10), (7, 300), (64, 64)]])
def test_one_detections_per_frame_in_one_run(sizes: list[tuple[int, int]]) -> None:
    session = FakeSession(outputs([[0.9, 0.1, 0.6]] * len(sizes)))
    frames = [frame(height, width, i) for i, (height, width) in enumerate(sizes)]
    found = Detector(session, STRETCH, DetectConfig())(frames)
    assert len(found) == len(frames)
    for one, people in zip(frames, found, strict=True):
        w, h = one.width, one.height
        assert people.scores.tolist() == [F32(0.9), F32(0.6)]
        wanted = np.array([[0, 0.25, 0.1, 0.75], [0.2, 0.25, 0.3, 0.75]]) * [w, h, w, h]
        np.testing.assert_allclose(people.boxes, wanted, rtol=1e-6)
    if frames:
        (feed,) = session.feeds
        assert list(feed) == ["image"]
        assert feed["image"].dtype == np.uint8
        for one, image in zip(frames, feed["image"], strict=True):
            assert (image == fit(one.image, STRETCH)).all()
    else:
        assert session.feeds == []


@pytest.mark.parametrize(
    ("score", "threshold", "count"), [(0.5, 0.5, 0), (0.501, 0.5, 1), (0.0, 0.0, 0), (1.0, 1.0, 0), (np.nan, 0.0, 0)]
)
def test_a_person_scores_more_than_the_threshold(score: float, threshold: float, count: int) -> None:
    session = FakeSession(outputs([[score]]))
    (people,) = Detector(session, STRETCH, DetectConfig(threshold=threshold))([frame(9, 9)])
    assert len(people) == count


def test_an_empty_frame_is_no_special_case() -> None:
    for answer in (outputs([[0.1, 0.2]]), outputs([[]])):
        (people,) = Detector(FakeSession(answer), LETTERBOX, DetectConfig(overlap="merge"))([frame(9, 9)])
        assert len(people) == 0


def test_the_persons_column_is_read_and_no_other() -> None:
    facts = STRETCH.model_copy(update={"classes": ("bicycle", "person")})
    (people,) = Detector(FakeSession(outputs([[0.2, 0.8]], classes=2)), facts, DetectConfig())([frame(9, 9)])
    assert people.scores.tolist() == [F32(0.8)]


def test_iou_and_overlap_are_the_configurations() -> None:
    answer = {"boxes": np.array([[[0, 0, 0.5, 1], [0.1, 0, 0.6, 1]]], F32), "scores": np.full((1, 2, 1), 0.9, F32)}

    def boxes(**chosen: object) -> list[list[float]]:
        config = DetectConfig.model_validate(chosen)
        return (
            Detector(FakeSession(answer), STRETCH, config)([Frame("c", 0, 0.0, np.zeros((10, 10, 3), np.uint8))])[0]
            .boxes.round(3)
            .tolist()
        )

    assert boxes() == [[0, 0, 5, 10]]
    assert boxes(overlap="merge") == [[0, 0, 6, 10]]
    assert boxes(iou=0.7) == [[0, 0, 5, 10], [1, 0, 6, 10]]


def test_a_bundle_without_people_is_refused() -> None:
    facts = STRETCH.model_copy(update={"classes": ("car", "dog")})
    with pytest.raises(BundleError, match=r"no class 'person': got car, dog; add it to `keep`"):
        Detector(FakeSession({}), facts, DetectConfig())


def test_the_sessions_error_comes_through() -> None:
    session = FakeSession({})
    session.close()
    with pytest.raises(BackendError):
        Detector(session, STRETCH, DetectConfig())([frame(9, 9)])


# ---- boxes of low score ----


def detected(people: tuple[list[Box], list[float]], config: DetectConfig, low: float | None) -> list[tuple[Box, float]]:
    """The Detector over a net of 32 x 32 px and a frame as large, so that boxes stay whole numbers."""
    boxes, scores = people
    facts = STRETCH.model_copy(update={"width": 32, "height": 32})
    answer = {
        "boxes": np.array(boxes, F32).reshape(1, -1, 4) / 32,
        "scores": np.array(scores, F32).reshape(1, -1, 1),
    }
    (found,) = Detector(FakeSession(answer), facts, config, low)([frame(32, 32)])
    assert found.boxes.dtype == found.scores.dtype == F32
    return [(tuple(map(int, one)), float(score)) for one, score in zip(found.boxes, found.scores, strict=True)]


A, B, C = (0, 0, 4, 4), (1, 0, 5, 4), (2, 0, 6, 4)  # neighbours' IoU is 12/20, A's with C 8/24


@given(scored(), thresholds, st.sampled_from(["nms", "merge"]), st.integers(0, 15), st.integers(0, 16))
@example(([A, B], [14 / 16, 2 / 16]), Fraction(1, 2), "nms", 8, 0)  # a low box on a person
@example(([A, B], [14 / 16, 2 / 16]), Fraction(1, 2), "merge", 8, 0)  # makes them no larger
@example(([A, C], [14 / 16, 2 / 16]), Fraction(1, 3), "merge", 8, 0)  # no more than `iou`: beside them
@example(([A, B, C], [4 / 16, 3 / 16, 2 / 16]), Fraction(1, 2), "merge", 8, 0)  # nobody, and a group
@example(([A, B, C], [14 / 16, 3 / 16, 2 / 16]), Fraction(1, 2), "nms", 8, 0)  # what lies on a person hides no other
def test_low_boxes_follow_the_people_where_they_overlap_none(
    people: tuple[list[Box], list[float]], iou: Fraction, overlap: Overlap, threshold: int, low: int
) -> None:
    boxes, scores = people
    config = DetectConfig(threshold=threshold / 16, iou=float(iou), overlap=overlap)
    plain = detected(people, config, None)
    found = detected(people, config, low / 16)
    assert found[: len(plain)] == plain, "people as without them, and first"
    maybe = [i for i, score in enumerate(scores) if low / 16 < score <= threshold / 16]
    maybe = [i for i in maybe if all(exact_iou(boxes[i], person) <= iou for person, _ in plain)]
    rest = []
    for group in groups_by_hand([boxes[i] for i in maybe], [scores[i] for i in maybe], iou):
        members = [boxes[maybe[i]] for i in group]
        x1, y1, x2, y2 = zip(*members, strict=True)
        one = (min(x1), min(y1), max(x2), max(y2)) if overlap == "merge" else members[0]
        rest.append((one, scores[maybe[group[0]]]))
    assert found[len(plain) :] == rest
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


@pytest.mark.parametrize(
    ("low", "scores"),
    [(None, [0.9, 0.6]), (0.3, [0.9, 0.6, 0.5, 0.4]), (0.4, [0.9, 0.6, 0.5]), (0.5, [0.9, 0.6]), (0.8, [0.9, 0.6])],
)
def test_a_low_box_scores_more_than_low_and_a_high_low_hides_nobody(low: float | None, scores: list[float]) -> None:
    session = FakeSession(outputs([[0.4, 0.9, 0.3, 0.6, 0.5, np.nan]]))
    (found,) = Detector(session, STRETCH, DetectConfig(), low)([frame(9, 9)])
    assert found.scores.tolist() == [F32(score) for score in scores]


@pytest.mark.parametrize("answer", [[[0.4, 0.45]], [[]], [[0.1]]])
def test_low_boxes_without_people_are_no_special_case(answer: list[list[float]]) -> None:
    (found,) = Detector(FakeSession(outputs(answer)), LETTERBOX, DetectConfig(), 0.3)([frame(320, 640)])
    assert len(found) == (2 if len(answer[0]) == 2 else 0)
    assert found.boxes.shape == (len(found), 4)
