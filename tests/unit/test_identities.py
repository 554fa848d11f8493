"""Who is looked at again, and what the looks say together: against plain loops over every look ever made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.identities import BETTER, GROWN, Identities
from edge.values import Category, Matches
from tests.fakes import GENDER, SLEEVE, unit_rows

F32 = np.float32
CATEGORIES = (SLEEVE, GENDER)  # 3 + 2 options
OPTIONS, DIM = 5, 4
EVERY = 10


def ids(*tracks: int) -> NDArray[np.int64]:
    return np.array(tracks, np.int64)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, F32)


def matches(rows: Sequence[Sequence[float]], categories: tuple[Category, ...] = CATEGORIES) -> Matches:
    return Matches(categories, np.array(rows, F32).reshape(len(rows), OPTIONS))


def look(one: Identities, track: int, row: Sequence[float], frame: int = 0, quality: float = 0.5) -> None:
    one.look(ids(track), floats(100), floats(quality), frame, {"whole": unit_rows(1, DIM, frame)}, matches([row]))


def told(
    one: Identities, said: Mapping[int, Sequence[float]], categories: tuple[Category, ...] = CATEGORIES
) -> list[int]:
    """The tracks that `news` names of these, of whom this is said now."""
    tracks = list(said)
    return [tracks[i] for i in one.news(ids(*tracks), matches(list(said.values()), categories)).tolist()]


def whole(one: Identities, *tracks: int) -> NDArray[np.float32]:
    return one.means(ids(*tracks), ("whole",), DIM)["whole"]


def support(one: Identities, said: Mapping[int, Sequence[float]]) -> NDArray[np.float32]:
    found = one.supported(ids(*said), matches(list(said.values())))
    assert found.support is not None
    assert (found.probabilities == matches(list(said.values())).probabilities).all()
    return found.support


LONG, SHORT = (0.8, 0.1, 0.1, 0.5, 0.5), (0.1, 0.8, 0.1, 0.5, 0.5)


# ---- due ----


def test_who_is_looked_at_and_in_which_order() -> None:
    """1 and 2 grew, 3 is better to see, 4 and 5 were looked at long ago, 6 was just now, 7 and 8 are new."""
    one = Identities(EVERY)
    for track, frame in ((1, 9), (2, 9), (3, 9), (4, 0), (5, 0), (6, 1)):
        one.look(ids(track), floats(100), floats(0.4), frame, {"whole": unit_rows(1, DIM)}, matches([LONG]))
    tracks = ids(6, 5, 4, 3, 2, 1, 7, 8)
    areas = floats(140, 100, 120, 90, 160, 200, 10, 20)
    qualities = floats(0.5, 0.4, 0.1, 0.7, 0.4, 0.4, 0.4, 0.4)
    due = one.due(tracks, areas, qualities, 10)
    assert tracks[due].tolist() == [8, 7, 1, 2, 3, 4, 5]
    assert due.dtype == np.intp


@pytest.mark.parametrize(
    ("area", "quality", "frame", "due"),
    [
        (100, 0.5, 1, False),
        (100, 0.5, EVERY - 1, False),
        (100, 0.5, EVERY, True),
        (1, 0.0, EVERY + 1, True),
        (100 * GROWN, 0.5, 1, False),  # not more
        (101 * GROWN, 0.5, 1, True),
        (100, 0.5 * BETTER, 1, False),
        (100, 0.51 * BETTER, 1, True),
        (1, 0.01, 1, False),
        (100, 0.5, 0, False),  # the same frame
    ],
)
def test_when_a_look_is_worth_it(area: float, quality: float, frame: int, due: bool) -> None:
    one = Identities(EVERY)
    look(one, 1, LONG)
    assert len(one.due(ids(1), floats(area), floats(quality), frame)) == due


def test_growth_and_quality_are_measured_by_the_best_look_so_far() -> None:
    one = Identities(100)
    for frame, (area, quality) in enumerate([(400, 0.2), (100, 0.6), (100, 0.1)]):
        one.look(ids(1), floats(area), floats(quality), frame, {"whole": unit_rows(1, DIM)}, matches([LONG]))
    assert len(one.due(ids(1), floats(590), floats(0.89), 3)) == 0
    assert len(one.due(ids(1), floats(610), floats(0.1), 3)) == 1
    assert len(one.due(ids(1), floats(100), floats(0.91), 3)) == 1


def test_every_1_looks_at_every_frame() -> None:
    one = Identities(1)
    for frame in range(5):
        assert one.due(ids(1), floats(100), floats(0.5), frame).tolist() == [0]
        look(one, 1, LONG, frame)


@pytest.mark.parametrize("n", [0, 1, 200])
def test_any_number_of_people(n: int) -> None:
    one, rng = Identities(EVERY), np.random.default_rng(n)
    tracks, areas = np.arange(n, dtype=np.int64) + 7, rng.permutation(n).astype(F32) + 1
    qualities, vectors = rng.random(n, F32), unit_rows(n, DIM)
    rows = np.tile(np.array(LONG, F32), (n, 1))
    assert areas[one.due(tracks, areas, qualities, 0)].tolist() == sorted(areas.tolist(), reverse=True)
    one.look(tracks, areas, qualities, 0, {"whole": vectors}, matches(rows))
    assert len(one.due(tracks, areas, qualities, 1)) == 0
    np.testing.assert_allclose(whole(one, *tracks.tolist()), vectors, atol=1e-6)
    said = one.supported(tracks, matches(rows))
    assert said.support is not None
    assert said.support.shape == (n, 2)
    assert (said.support == 1).all()
    assert one.news(tracks, said).tolist() == list(range(n))
    assert one.looks(tracks).tolist() == [1] * n
    assert one.met == n
    assert sorted(one.forget(range(7 + n))) == tracks.tolist()


def test_nobody_was_looked_at_before_the_first_look() -> None:
    assert Identities(1).looks(ids(4, 5)).tolist() == [0, 0]


def test_without_questions_people_are_still_known() -> None:
    one = Identities(EVERY)
    nothing = Matches((), np.zeros((1, 0), F32))
    one.look(ids(3), floats(9), floats(0.5), 0, {"whole": unit_rows(1, DIM)}, nothing)
    said = one.supported(ids(3), nothing)
    assert whole(one, 3).shape == (1, DIM)
    assert said.support is not None
    assert said.support.shape == (1, 0)
    assert one.news(ids(3), said).tolist() == [0]
    assert one.news(ids(3), said).tolist() == []


# ---- what was said, by hand ----


@dataclass
class Look:
    area: float
    weight: float
    frame: int
    vector: list[float]
    row: list[float]


@dataclass
class ByHand:
    """Every look at every track, and the answers recomputed from all of them."""

    looks: dict[int, list[Look]] = field(default_factory=dict)

    def rank(self, track: int, area: float, quality: float, frame: int) -> int | None:
        made = self.looks.get(track, [])
        if not made:
            return 0
        if area > 1.5 * max(one.area for one in made) or quality > 1.5 * max(one.weight for one in made):
            return 1
        return 2 if frame - made[-1].frame >= EVERY else None

    def due(self, tracks: list[int], areas: list[float], qualities: list[float], frame: int) -> list[int]:
        ranked = [
            (self.rank(*one, frame), -one[1], i) for i, one in enumerate(zip(tracks, areas, qualities, strict=True))
        ]
        return [i for rank, _, i in sorted(one for one in ranked if one[0] is not None)]

    def support(self, track: int, first: int, end: int, best: int) -> float:
        made = self.looks[track]
        own = [one.weight for one in made if max(range(first, end), key=lambda column: one.row[column]) == best]
        return math.fsum(own) / math.fsum(one.weight for one in made)

    def vector(self, track: int) -> list[float]:
        total = [math.fsum(one.weight * one.vector[i] for one in self.looks[track]) for i in range(DIM)]
        length = math.sqrt(math.fsum(value * value for value in total))
        return [value / length for value in total]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 6), unique=True), st.booleans()), max_size=25),
    st.integers(0, 2**32 - 1),
)
def test_a_history_against_plain_loops(history: list[tuple[int, list[int], bool]], seed: int) -> None:
    """Frames that pass, who is in the frame reached, and whether only the first of those due is looked at."""
    one, hand, rng, frame = Identities(EVERY), ByHand(), np.random.default_rng(seed), 0
    for passed, present, pressed in history:
        frame += passed
        tracks, n = ids(*present), len(present)
        areas, qualities = rng.integers(1, 200, n).astype(F32), rng.choice([0, 0.1, 0.3, 0.5, 1], n).astype(F32)
        due = one.due(tracks, areas, qualities, frame)
        assert due.tolist() == hand.due(present, areas.tolist(), qualities.tolist(), frame)
        due = due[:1] if pressed else due
        vectors, rows = unit_rows(len(due), DIM, frame), rng.random((len(due), OPTIONS)).astype(F32)
        before = [array.copy() for array in (tracks, areas, qualities, vectors, rows)]
        head = -vectors[:, ::-1]  # of another region
        one.look(tracks[due], areas[due], qualities[due], frame, {"whole": vectors, "head": head}, matches(rows))
        for array, copy in zip((tracks, areas, qualities, vectors, rows), before, strict=True):
            assert (array == copy).all(), "inputs are never modified"
        for i, person in enumerate(due.tolist()):
            seen = Look(
                float(areas[person]), max(float(qualities[person]), 1e-6), frame, vectors[i].tolist(), rows[i].tolist()
            )
            hand.looks.setdefault(present[person], []).append(seen)
        assert one.looks(tracks).tolist() == [len(hand.looks.get(track, [])) for track in present]
        assert one.met == len(hand.looks)
        known = [track for track in present if track in hand.looks]
        means = one.means(ids(*known), ("whole", "head"), DIM)
        now = rng.random((len(known), OPTIONS)).astype(F32)
        said = one.supported(ids(*known), matches(now))
        assert means["whole"].dtype == F32
        assert said.support is not None
        assert ((said.support >= 0) & (said.support <= 1)).all()
        np.testing.assert_allclose(np.linalg.norm(means["whole"], axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(means["head"], -means["whole"][:, ::-1], atol=1e-5)
        for i, track in enumerate(known):
            np.testing.assert_allclose(means["whole"][i], hand.vector(track), atol=1e-5)
            for number, (first, end) in enumerate(((0, 3), (3, 5))):
                best = first + int(now[i, first:end].argmax())
                assert said.support[i, number] == pytest.approx(hand.support(track, first, end, best), abs=1e-5)


def test_a_good_look_outweighs_several_bad_ones() -> None:
    one = Identities(EVERY)
    for frame in range(3):
        look(one, 1, SHORT, frame, quality=0.1)
    look(one, 1, LONG, 3, quality=0.9)
    assert support(one, {1: LONG})[0, 0] == pytest.approx(0.75)
    rows = [unit_rows(1, DIM, frame)[0] for frame in range(4)]
    mean = 0.1 * (rows[0] + rows[1] + rows[2]) + 0.9 * rows[3]
    np.testing.assert_allclose(whole(one, 1)[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_looks_without_any_quality_count_alike() -> None:
    one = Identities(EVERY)
    for frame, row in enumerate((LONG, LONG, SHORT)):
        look(one, 1, row, frame, quality=0.0)
    assert support(one, {1: LONG})[0, 0] == pytest.approx(2 / 3)


def test_what_is_said_may_be_no_looks_favourite() -> None:
    """Two looks that are sure of different things: nobody voted for what their mean says."""
    one = Identities(EVERY)
    look(one, 1, (0.55, 0.45, 0.0, 1, 0), 0)
    look(one, 1, (0.0, 0.45, 0.55, 1, 0), 1)
    assert support(one, {1: (0.3, 0.4, 0.3, 1, 0)})[0].tolist() == [0, 1]


def test_people_are_told_apart() -> None:
    one = Identities(EVERY)
    one.look(ids(5, 9), floats(1, 1), floats(0.5, 0.5), 0, {"whole": unit_rows(2, DIM)}, matches([LONG, SHORT]))
    assert support(one, {9: SHORT, 5: LONG}).tolist() == [[1, 1], [1, 1]]
    assert support(one, {9: LONG, 5: SHORT})[:, 0].tolist() == [0, 0]
    np.testing.assert_allclose(whole(one, 9, 5), unit_rows(2, DIM)[::-1], atol=1e-6)


def test_ten_thousand_looks_lose_nothing() -> None:
    one = Identities(1)
    for frame in range(10_000):
        look(one, 1, SHORT if frame % 10 == 0 else LONG, frame, quality=0.1)
    assert support(one, {1: LONG})[0, 0] == pytest.approx(0.9, rel=1e-6)


# ---- news ----


def test_news_is_only_what_changed() -> None:
    one = Identities(EVERY)
    look(one, 1, LONG, 0)
    look(one, 2, LONG, 0)
    assert told(one, {2: LONG}) == [2]
    assert told(one, {1: LONG, 2: LONG}) == [1], "the other was told"
    assert told(one, {1: (0.9, 0.1, 0, 0.5, 0.5), 2: LONG}) == [], "more probable is no other answer"
    assert told(one, {2: LONG}) == []
    assert told(one, {2: LONG, 1: SHORT}) == [1]
    assert told(one, {1: SHORT, 2: LONG}) == []
    assert told(one, {}) == []


def test_one_category_that_changes_is_news() -> None:
    one = Identities(EVERY)
    look(one, 1, LONG)
    assert told(one, {1: (0.8, 0.1, 0.1, 0.6, 0.4)}) == [1]
    assert told(one, {1: (0.8, 0.1, 0.1, 0.1, 0.9)}) == [1]


def test_known_and_unknown_are_news_of_each_other() -> None:
    careful = (replace(SLEEVE, threshold=0.6), GENDER)
    one = Identities(EVERY)
    look(one, 1, LONG)
    assert told(one, {1: (0.4, 0.3, 0.3, 1, 0)}, careful) == [1]
    assert told(one, {1: (0.3, 0.4, 0.3, 1, 0)}, careful) == [], "another best option is none where none is believed"
    assert told(one, {1: (0.1, 0.8, 0.1, 1, 0)}, careful) == [1], "now it is known"
    assert told(one, {1: (0.1, 0.8, 0.1, 1, 0)}, careful) == []
    assert told(one, {1: (0.3, 0.5, 0.2, 1, 0)}, careful) == [1], "and now no more"


# ---- forget, restart ----


def test_whoever_was_never_looked_at_is_not_told_of() -> None:
    one = Identities(EVERY)
    look(one, 1, LONG)
    look(one, 2, LONG)
    assert one.forget([3, 2, 4]) == [2]
    assert one.forget([3, 2, 4]) == []
    assert one.looks(ids(1, 2)).tolist() == [1, 0]
    assert one.forget(track for track in (1, 2)) == [1]
    assert one.forget([]) == []
    assert one.met == 2


def test_after_a_restart_everybody_is_looked_at_again_and_nothing_old_counts() -> None:
    one = Identities(EVERY)
    look(one, 1, LONG)
    look(one, 2, LONG)
    assert told(one, {1: LONG, 2: LONG}) == [1, 2]
    one.restart()
    assert one.looks(ids(1, 2)).tolist() == [0, 0]
    assert one.due(ids(1, 2), floats(1, 2), floats(0, 0), 1).tolist() == [1, 0]
    three = Matches((SLEEVE,), floats(0, 0, 1).reshape(1, 3))  # of another width
    one.look(ids(1), floats(1), floats(0.5), 1, {"whole": unit_rows(1, DIM)}, three)
    said = one.supported(ids(1), three)
    assert said.answers(0, 1)[0].support == 1
    assert one.news(ids(1), said).tolist() == [0]
    assert one.met == 2, "nobody is met twice"


def test_the_end_of_a_track_is_told_also_after_a_restart() -> None:
    one = Identities(EVERY)
    look(one, 1, LONG)
    one.restart()
    assert one.forget([1, 2]) == [1]
    assert one.forget([1, 2]) == []
