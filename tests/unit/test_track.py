"""Identities: people who walk, cross, hide and come back; the filter against a textbook's; properties of any input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.boxes import iou
from edge.config import TrackConfig, read_edge_config
from edge.errors import ConfigError
from edge.track import Ended, Tracker, Tracks, ahead, corrected, distances, expected, pairs, standing
from edge.values import Detections

F32 = np.float32
Box = tuple[float, float, float, float]
THRESHOLD = 0.5
CONFIG = TrackConfig(low=0.1, match_iou=0.1, lost_s=3.0, min_frames=3)
STEP = 0.1  # seconds
SPEED = 80.0  # px per second: a person of 100 px walks 0.8 heights


def tracker(**changes: float) -> Tracker:
    return Tracker(CONFIG.model_copy(update=changes), THRESHOLD)


def box(x: float, y: float = 200.0, height: float = 100.0) -> Box:
    """Of a person whose feet are above or below the middle x, 0.4 heights wide."""
    return x - 0.2 * height, y, x + 0.2 * height, y + height


def people(boxes: Iterable[Box], scores: Sequence[float] | float = 0.9) -> Detections:
    array = np.array(list(boxes), F32).reshape(-1, 4)
    return Detections(array, np.broadcast_to(np.array(scores, F32), len(array)).copy())


def walk(one: Tracker, times: Iterable[float], speed: float = SPEED, start: float = 100.0) -> list[Tracks]:
    """One person who walks along."""
    return [one.update(people([box(start + speed * seconds)]), seconds) for seconds in times]


def steps(first: int, last: int) -> list[float]:
    return [STEP * number for number in range(first, last)]


def ids(answers: Iterable[Tracks]) -> list[list[int]]:
    return [tracks.ids.tolist() for tracks in answers]


# ---- people of a scene ----


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_people_keep_their_identity(count: int) -> None:
    rng = np.random.default_rng(count)
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(10)), axis=2).reshape(-1, 2)[:count] * (90.0, 160.0)
    pushes = rng.uniform(-SPEED, SPEED, (count, 2)) * (0.3, 0.3)
    one, names = tracker(), {}
    for seconds in steps(0, 30):
        order = rng.permutation(count)
        found = people([box(*(grid[i] + pushes[i] * seconds)) for i in order], np.linspace(0.9, 0.6, count))
        tracks = one.update(found, seconds)
        assert tracks.ended == ()
        assert len(tracks) == count
        for i, name in zip(order.tolist(), tracks.ids.tolist(), strict=True):
            assert names.setdefault(i, name) == name
    assert sorted(names.values()) == list(range(1, count + 1))


@pytest.mark.parametrize("hidden", [False, True])
def test_people_who_cross_keep_their_identity(hidden: bool) -> None:
    one = tracker()
    for seconds in steps(0, 50):
        left, right = box(100 + SPEED * seconds), box(500 - SPEED * seconds, y=205)
        covered = hidden and iou(np.array(left, F32), np.array(right, F32)) > 0.3
        tracks = one.update(people([left] if covered else [left, right]), seconds)
        assert tracks.ids.tolist() == ([1] if covered else [1, 2])


@pytest.mark.parametrize(("hidden_s", "same"), [(STEP, True), (1.0, True), (2.8, True), (3.3, False)])
def test_whoever_is_hidden_no_longer_than_lost_s_comes_back(hidden_s: float, same: bool) -> None:
    one, gone = tracker(), round(hidden_s / STEP)
    assert ids(walk(one, steps(0, 20))) == [[1]] * 20
    empty = [one.update(Detections.empty(), seconds) for seconds in steps(20, 20 + gone)]
    back = walk(one, steps(20 + gone, 30 + gone))
    assert ids(back) == ([[1]] if same else [[2]]) * 10
    said = [ended for tracks in (*empty, *back) for ended in tracks.ended]
    assert said == ([] if same else [Ended(1, 20, 0.0, pytest.approx(1.9))])


def test_the_end_of_a_track_is_said_when_lost_s_is_over() -> None:
    one = tracker(lost_s=1.0)
    walk(one, steps(0, 5))
    when = [seconds for seconds in steps(5, 40) if one.update(Detections.empty(), seconds).ended]
    assert when == [pytest.approx(0.4 + 1.0 + STEP)] or when == [pytest.approx(0.4 + 1.0)]


def test_who_walked_behind_something_is_expected_where_walking_leads() -> None:
    one = tracker()
    walk(one, steps(0, 20))
    for seconds in steps(20, 35):
        one.update(Detections.empty(), seconds)
    there = one.update(people([box(100 + SPEED * 1.9), box(100 + SPEED * 3.5)]), 3.5)
    assert there.ids.tolist() == [2, 1]


def test_a_box_that_shrank_as_its_person_was_covered_does_not_go_on_shrinking() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    for number in range(10, 14):  # between two others, who close in
        x1, y1, x2, y2 = box(100.0)
        one.update(people([(x1 + 3 * (number - 9), y1, x2 - 3 * (number - 9), y2)]), STEP * number)
    for seconds in steps(14, 30):
        one.update(Detections.empty(), seconds)
    assert one.update(people([box(100.0)]), 3.0).ids.tolist() == [1]


def test_a_low_score_continues_a_track_and_begins_none() -> None:
    one = tracker()
    for number, seconds in enumerate(steps(0, 60)):
        scores = (0.9, 0.2) if number < 5 else (0.2, 0.2)  # the second is never high
        tracks = one.update(people([box(100 + SPEED * seconds), box(100 + SPEED * seconds, y=500)], scores), seconds)
        assert tracks.ids.tolist() == [1]
        np.testing.assert_array_equal(tracks.people.boxes, np.array([box(100 + SPEED * seconds)], F32))
    assert one.finish() == (Ended(1, 60, 0.0, pytest.approx(5.9)),)


@pytest.mark.parametrize(("score", "named"), [(0.5, []), (0.51, [1])])
def test_only_above_the_threshold_a_track_begins(score: float, named: list[int]) -> None:
    assert tracker().update(people([box(100)], score), 0.0).ids.tolist() == named


@pytest.mark.parametrize(("score", "named"), [(0.1, []), (0.11, [1]), (0.5, [1])])
def test_only_above_low_a_track_goes_on(score: float, named: list[int]) -> None:
    one = tracker(low=float(F32(0.1)))
    walk(one, steps(0, 5), speed=0)
    assert one.update(people([box(100)], score), 0.5).ids.tolist() == named


def test_a_low_score_must_lie_well_on_its_track_and_wakes_none_that_is_hidden() -> None:
    one = tracker()
    walk(one, steps(0, 5), speed=0)
    beside = people([box(100 + 16)], 0.3)  # IoU 0.43: enough for a high score
    assert ids([one.update(beside, 0.5), one.update(people([box(100)], 0.3), 0.6)]) == [[], []]
    assert one.update(people([box(100)]), 0.7).ids.tolist() == [1]


def test_a_second_box_on_a_person_does_not_take_their_identity() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    assert one.update(people([box(100), box(112)]), 1.0).ids.tolist() == [1, 2]
    # the newer track fits better; the older one has the first choice all the same
    assert one.update(people([box(109)]), 1.1).ids.tolist() == [1]


@pytest.mark.parametrize(("seen", "same"), [(1, False), (2, False), (3, True)])
def test_a_track_is_waited_for_once_it_was_seen_min_frames_times(seen: int, same: bool) -> None:
    one = tracker()
    walk(one, steps(0, seen), speed=0)
    missed = one.update(Detections.empty(), STEP * seen)
    assert missed.ended == (() if same else (Ended(1, seen, 0.0, STEP * (seen - 1)),))
    assert one.update(people([box(100)]), STEP * (seen + 1)).ids.tolist() == [1 if same else 2]


def test_who_leaves_through_the_border_is_one_person_until_nothing_is_left() -> None:
    one, width = tracker(), 640.0
    for seconds in steps(0, 40):
        x1, y1, x2, y2 = box(560 + SPEED * seconds)
        if x1 >= width - 1:
            break
        tracks = one.update(people([(x1, y1, min(x2, width), y2)]), seconds)
        assert tracks.ids.tolist() == [1]
    assert seconds > 1
    came = one.update(people([(630, 600, 640, 700)]), seconds)
    assert came.ids.tolist() == [2]  # elsewhere at the border


@pytest.mark.parametrize("size", [1e-3, 0.5, 1.0])
def test_tiny_boxes_are_people_like_others(size: float) -> None:
    one = tracker()
    for seconds in steps(0, 20):
        tracks = one.update(people([(5, 5, 5 + size, 5 + size), (9, 9, 9 + size, 9 + size)]), seconds)
        assert tracks.ids.tolist() == [1, 2]


def test_a_box_without_area_is_named_and_harms_nobody() -> None:
    one = tracker()
    for seconds in steps(0, 5):
        tracks = one.update(people([box(100), (0, 0, 0, 0)], (0.9, 0.8)), seconds)
        assert tracks.ids[0] == 1
        assert len(tracks) == 2


def test_boxes_are_the_detections_own_in_their_order() -> None:
    one = tracker()
    walk(one, steps(0, 10))
    given = people([box(900), box(100 + SPEED * 1.03), box(700)], (0.9, 0.8, 0.2))
    tracks = one.update(given, 1.0)
    np.testing.assert_array_equal(tracks.people.boxes, given.boxes[:2])
    np.testing.assert_array_equal(tracks.people.scores, given.scores[:2])
    assert tracks.ids.tolist() == [2, 1]
    np.testing.assert_array_equal(given.scores, np.array([0.9, 0.8, 0.2], F32))


# ---- time ----


def test_frames_may_come_as_they_like() -> None:
    one, seconds = tracker(), 0.0
    for step in itertools.islice(itertools.cycle([0.04, 0.6, 0.1, 0.9, 0.04]), 60):
        assert one.update(people([box(100 + SPEED * seconds)]), seconds).ids.tolist() == [1]
        seconds += step


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_a_slow_camera_sees_people_leave_their_boxes(step: float) -> None:
    one = tracker()
    # no two boxes of one person overlap; two people walk apart
    for seconds in (step * number for number in range(10)):
        found = [box(500 - 85 * seconds), box(1000 + 85 * seconds)]
        assert one.update(people(found), seconds).ids.tolist() == [1, 2]


def test_who_stands_does_not_jump_aside_in_a_tenth_of_a_second() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    assert one.update(people([box(150)]), 1.0).ids.tolist() == [2]


def test_who_was_hidden_is_known_by_the_place_alone() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    for seconds in steps(10, 28):
        one.update(Detections.empty(), seconds)  # by now the filter would take anyone near for the one it lost
    assert one.update(people([box(150)]), 2.8).ids.tolist() == [2]
    assert one.update(people([box(120), box(150)]), 2.9).ids.tolist() == [1, 2]


@pytest.mark.parametrize("jump", [-1e9, -3600.0, -0.5, -STEP])
def test_a_clock_that_goes_back_harms_nobody(jump: float) -> None:
    one = tracker()
    walk(one, steps(0, 20))
    for seconds in steps(20, 40):
        tracks = one.update(people([box(100 + SPEED * seconds)]), seconds + jump)
        assert (tracks.ids.tolist(), tracks.ended) == ([1], ())


@pytest.mark.parametrize(("step", "frames"), [(0.1, (29, 30)), (0.5, (5, 6))])  # 3 s, give or take a rounding
def test_where_a_clock_stands_still_the_frames_are_counted(step: float, frames: tuple[int, int]) -> None:
    one = tracker()
    walk(one, (step * number for number in range(10)), speed=0)
    ended = [one.update(Detections.empty(), step * 9).ended for _ in range(40)]
    assert [len(some) for some in ended].index(1) in frames


def test_without_any_clock_people_are_followed() -> None:
    one = tracker()
    for number in range(20):
        assert one.update(people([box(100 + SPEED * STEP * number)]), 7.0).ids.tolist() == [1]


def test_a_clock_that_jumps_forth_and_back_teaches_no_step() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    forth, back = one.update(people([box(100)]), 5000.0), one.update(people([box(100)]), 1.0)
    assert [ended.track for ended in forth.ended] == [1]
    assert (back.ids.tolist(), back.ended) == ([2], ())


def test_a_clock_that_is_set_after_the_start_ends_the_tracks_and_people_are_followed_on() -> None:
    """By decades: a board without a battery begins in 1970, until the network tells it the time."""
    one, now = tracker(), 1.8e9
    walk(one, steps(0, 20))
    answers = [one.update(people([box(100 + SPEED * seconds)]), now + seconds) for seconds in steps(20, 40)]
    assert ids(answers) == [[2]] * 20
    assert answers[0].ended == (Ended(1, 20, 0.0, pytest.approx(1.9)),)
    (left,) = one.finish()
    assert (left.first_seen, left.last_seen) == (now + 2, pytest.approx(now + 3.9))


def test_a_pause_is_the_end_of_what_was_before_it() -> None:
    one = tracker()
    walk(one, steps(0, 10), speed=0)
    after = one.update(people([box(100)]), 0.9 + 3.5)
    assert after.ids.tolist() == [2]
    assert after.ended == (Ended(1, 10, 0.0, pytest.approx(0.9)),)


def test_the_end_of_a_source_ends_all_its_tracks_and_numbers_go_on() -> None:
    one = tracker()
    assert one.finish() == ()
    for seconds in steps(0, 4):
        one.update(people([box(100), box(300)][: 1 if seconds > 0.15 else 2]), seconds)
    assert one.finish() == (Ended(1, 4, 0.0, pytest.approx(0.3)),)  # the other ended at its first miss
    assert one.finish() == ()
    assert one.update(people([box(100)]), 0.4).ids.tolist() == [3]


# ---- the filter ----


def textbook(boxes: NDArray[np.float32], gaps: Sequence[float]) -> Iterable[tuple[NDArray, NDArray, float]]:
    """Before each box but the first: state (8,), covariance (8, 8), and the squared Mahalanobis distance of the box.

    As in any book: one track, full matrices, Joseph's form.
    """

    def measured(one: NDArray[np.float32]) -> NDArray[np.float64]:
        x1, y1, x2, y2 = map(float, one)
        return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])

    observe = np.hstack([np.eye(4), np.zeros((4, 4))])
    state = np.concatenate([measured(boxes[0]), np.zeros(4)])
    height = max(state[3], 1)
    covariance = np.diag([(0.05 * height) ** 2] * 4 + [(0.5 * height) ** 2] * 4)
    for one, gap in zip(boxes[1:], gaps, strict=True):
        move = np.eye(8) + np.diag([gap] * 4, 4)
        push = np.vstack([np.eye(4), np.zeros((4, 4))]), np.vstack([np.zeros((4, 4)), np.eye(4)])
        noise = (
            gap**3 / 3 * push[0] @ push[0].T
            + gap**2 / 2 * (push[0] @ push[1].T + push[1] @ push[0].T)
            + gap * push[1] @ push[1].T
        )
        noise = noise * (0.5 * max(state[3], 1)) ** 2
        state, covariance = move @ state, move @ covariance @ move.T + noise
        doubt = np.eye(4) * (0.05 * max(state[3], 1)) ** 2
        innovation = observe @ covariance @ observe.T + doubt
        surprise = measured(one) - observe @ state
        yield state, covariance, float(surprise @ np.linalg.inv(innovation) @ surprise)
        gain = covariance @ observe.T @ np.linalg.inv(innovation)
        keep = np.eye(8) - gain @ observe
        state = state + gain @ surprise
        covariance = keep @ covariance @ keep.T + gain @ doubt @ gain.T


def test_the_filter_is_the_textbooks() -> None:
    rng = np.random.default_rng(5)
    count, length = 6, 25
    corners = rng.uniform(0, 600, (length, count, 2)) * 0.1 + rng.uniform(0, 400, (count, 2))
    sizes = rng.uniform(0.2, 300, (count, 2)) * rng.uniform(0.9, 1.1, (length, count, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=2).astype(F32)  # (length, count, 4)
    gaps = rng.uniform(0.01, 1.5, length - 1).tolist()
    books = [list(textbook(boxes[:, i], gaps)) for i in range(count)]
    motion, spread = standing(boxes[0])
    for number, gap in enumerate(gaps):
        motion, spread = ahead(motion, spread, gap)
        far = distances(motion, spread, boxes[number + 1])
        assert far.shape == (count, count)
        for i in range(count):
            state, covariance, distance = books[i][number]
            np.testing.assert_allclose(motion[i].reshape(-1), state, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(np.kron(spread[i], np.eye(4)), covariance, rtol=1e-9, atol=1e-9)
            assert far[i, i] == pytest.approx(distance, rel=1e-9)
        motion, spread = corrected(motion, spread, boxes[number + 1])


def test_what_is_expected_is_a_box_around_the_centre() -> None:
    motion, _ = standing(np.array([[10, 20, 30, 80]], F32))
    np.testing.assert_array_equal(expected(motion), np.array([[10, 20, 30, 80]], F32))
    motion[:, 1] = (5, -5, 0, -100)
    moved, _ = ahead(motion, np.zeros((1, 2, 2)), 1.0)
    np.testing.assert_array_equal(expected(moved), np.array([[15, 45, 35, 45]], F32))  # no height below 0


@given(st.integers(0, 4), st.integers(0, 4), st.data())
def test_pairs_are_worth_as_much_as_any(rows: int, columns: int, data: st.DataObject) -> None:
    cells = st.lists(st.integers(-3, 9), min_size=rows * columns, max_size=rows * columns)
    worth = np.array(data.draw(cells), np.float64).reshape(rows, columns)
    may = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)
    which = np.array(data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns)), bool)
    i, j = pairs(worth, may, which)
    assert len(set(i.tolist())) == len(i) == len(j) == len(set(j.tolist()))
    assert may[i].all()
    assert which[j].all()
    assert (worth[i, j] > 0).all()
    allowed = np.where(np.outer(may, which), worth, 0)
    ways = itertools.permutations(range(max(rows, columns)), min(rows, columns))
    table = allowed if rows <= columns else allowed.T
    assert worth[i, j].sum() == max(sum(max(table[a, b], 0) for a, b in enumerate(way)) for way in ways)


# ---- any input ----

a_box = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 12), st.integers(0, 12)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
a_frame = st.lists(st.tuples(a_box, st.integers(0, 16)), max_size=7, unique_by=lambda pair: pair[0])
a_step = st.sampled_from([0.1, 0.1, 0.04, 0.7, 2.0, 5.0, 0.0, -0.1, -1000.0])
a_video = st.lists(st.tuples(a_frame, a_step), max_size=12)
Video = list[tuple[list[tuple[Box, int]], float]]


def played(video: Video, one: Tracker) -> Iterable[tuple[Detections, float, Tracks]]:
    seconds = 0.0
    for frame, step in video:
        found = people([place for place, _ in frame], [score / 16 for _, score in frame])
        yield found, seconds, one.update(found, seconds)
        seconds += step


@given(a_video)
def test_of_any_video_each_identity_is_one_life(video: Video) -> None:
    one = tracker()
    lives: dict[int, list[float]] = {}
    over: dict[int, Ended] = {}
    for found, seconds, tracks in played(video, one):
        given_out = len(lives)
        place, named = 0, dict(zip(map(tuple, tracks.people.boxes.tolist()), tracks.ids.tolist(), strict=True))
        for at, score in zip(map(tuple, found.boxes.tolist()), found.scores.tolist(), strict=True):
            if at in named:
                assert tuple(tracks.people.boxes[place].tolist()) == at, "in the order given"
                assert tracks.people.scores[place] == score
                place += 1
            assert at in named or score <= THRESHOLD, "whoever scores high is somebody"
            assert at not in named or score > CONFIG.low
            if score <= THRESHOLD and at in named:
                assert named[at] <= given_out, "a low score begins nobody"
        assert place == len(tracks)
        assert not set(tracks.ids.tolist()) & set(over), "who has ended does not return"
        for name in tracks.ids.tolist():
            lives.setdefault(name, []).append(seconds)
        assert sorted(lives) == list(range(1, len(lives) + 1)), "numbers are given out one by one"
        assert not {ended.track for ended in tracks.ended} & set(over)
        over.update((ended.track, ended) for ended in tracks.ended)
    last = one.finish()
    assert not {ended.track for ended in last} & set(over)
    over.update((ended.track, ended) for ended in last)
    assert over == {name: Ended(name, len(seen), seen[0], max(seen)) for name, seen in lives.items()}


@given(a_video, st.randoms(use_true_random=False))
def test_the_order_of_the_boxes_changes_nobodys_identity(video: Video, random: object) -> None:
    mixed = [(random.sample(frame, len(frame)), step) for frame, step in video]  # type: ignore[attr-defined]
    for (_, _, a), (_, _, b) in zip(played(video, tracker()), played(mixed, tracker()), strict=True):
        assert _named(a) == _named(b)
        assert a.ended == b.ended


def _named(tracks: Tracks) -> dict[tuple[float, ...], int]:
    return dict(zip(map(tuple, tracks.people.boxes.tolist()), tracks.ids.tolist(), strict=True))


# ---- values and configuration ----


@pytest.mark.parametrize(
    ("given_ids", "message"),
    [
        (np.array([1, 1]), "different"),
        (np.array([0, 1]), "at least 1"),
        (np.array([1]), "int64 (2,)"),
        (np.array([[1], [2]]), "int64 (2,)"),
        (np.array([1, 2], np.int32), "int64 (2,), got int32"),
        (np.array([1.0, 2.0]), "int64 (2,), got float64"),
    ],
)
def test_identities_are_checked_at_the_door(given_ids: NDArray[np.generic], message: str) -> None:
    two = people([box(100), box(300)])
    with pytest.raises(ValueError, match=r"Tracks\.ids must be") as found:
        Tracks(two, given_ids)
    assert message in str(found.value)
    assert len(Tracks(two, np.array([7, 3]))) == 2


EDGE = 'device = "d"\nbundle = "b"\n[[camera]]\nname = "c"\nsource = "v.avi"\n'


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[track]\nlow = 0.6", "at most detect.threshold, 0.5, got 0.6"),
        ("[detect]\nthreshold = 0.2\n[track]\nlow = 0.3", "at most detect.threshold, 0.2, got 0.3"),
        ("[track]\nlow = -0.1", "greater than or equal to 0"),
        ("[track]\nmatch_iou = 1.1", "less than or equal to 1"),
        ("[track]\nlost_s = 0", "greater than 0"),
        ("[track]\nmin_frames = 0", "greater than or equal to 1"),
        ("[track]\nlow = 0.5", None),
        ("[detect]\nthreshold = 0.05\n[track]\nlost_s = 2", None),  # no low boxes then, and no mistake
    ],
)
def test_the_operators_choices_are_checked(tmp_path: Path, text: str, wrong: str | None) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(EDGE + text)
    if wrong is None:
        read_edge_config(path)
        return
    with pytest.raises(ConfigError) as found:
        read_edge_config(path)
    assert wrong in str(found.value)
