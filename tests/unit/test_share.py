"""Which share of the offered frames was taken: slow cameras and those that are away are no overload, a slow box is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.capture import CameraState
from edge.pace import Pace
from edge.share import WINDOW_S, Share


def state(taken: int, replaced: int = 0, *, name: str = "door", paced: int = 0, live: bool = True) -> CameraState:
    """The frames that were taken, and those that were not; two more could not be read."""
    drops = {"replaced": replaced, "paced": paced, "unreadable": 2}
    return CameraState(name, live, "up", taken + replaced + paced, drops)


def test_before_anything_was_offered_there_is_no_share() -> None:
    share = Share()
    assert share(0.0, []) is None
    assert share(1.0, [state(0)]) is None
    assert share(2.0, [state(0)]) is None
    assert share(3.0, [state(0, paced=50)]) is None, "what nobody wanted was not offered"


@pytest.mark.parametrize(
    ("taken", "replaced", "wanted"), [(10, 0, 1.0), (0, 10, 0.0), (6, 4, 0.6), (1, 99, 0.01), (0, 0, None)]
)
@pytest.mark.parametrize("paced", [0, 300])
def test_the_share_is_of_what_was_offered(taken: int, replaced: int, wanted: float | None, paced: int) -> None:
    share = Share()
    share(0.0, [state(500, 500)])
    assert share(2.0, [state(500 + taken, 500 + replaced, paced=paced)]) == wanted


def test_the_slowest_camera_counts_and_files_do_not() -> None:
    share = Share()
    share(0.0, [state(0), state(0, name="yard"), state(0, name="film", live=False), state(9, name="away")])
    states = [
        state(9, 1), state(6, 4, name="yard"), state(1, 99, name="film", live=False), state(9, name="away"),
    ]  # fmt: skip
    assert share(2.0, states) == 0.6


def test_only_the_latest_seconds_count() -> None:
    share, taken, replaced = Share(), 0, 0
    for second in range(60):
        taken, replaced = (taken + 1, replaced + 9) if second < 40 else (taken + 10, replaced)
        answer = share(float(second), [state(taken, replaced)])
        if 1 <= second < 40:
            assert answer == pytest.approx(0.1)
        if second >= 40 + WINDOW_S:
            assert answer == 1.0


def test_a_box_that_is_asked_seldom_speaks_of_the_time_since() -> None:
    share = Share()
    share(0.0, [state(0)])
    share(100.0, [state(1, 99)])
    assert share(200.0, [state(101, 99)]) == 1.0


def test_what_was_is_forgotten_where_it_is_asked_to() -> None:
    share = Share()
    share(0.0, [state(0)])
    share(2.0, [state(1, 99)])
    share.forget()
    assert share(4.0, [state(2, 99)]) is None
    assert share(6.0, [state(12, 99)]) == 1.0


def test_a_camera_that_is_another_by_now_counts_anew() -> None:
    share = Share()
    share(0.0, [state(500, 100)])
    assert share(2.0, [state(3, 7)]) is None
    share.forget()
    share(4.0, [state(3, 7)])
    assert share(6.0, [state(13, 7), state(1, 9, name="new")]) == 1.0


@given(camera=st.floats(0.5, 60), wanted=st.floats(0.5, 30), box=st.floats(0.2, 100))
def test_of_a_simulated_camera_and_loop(camera: float, wanted: float, box: float) -> None:
    """A camera of so many fps, paced as Cameras does it, before a loop that takes 1/box s for a frame."""
    pace, share = Pace(wanted), Share()
    taken = replaced = paced = 0
    waits, free_at, answer = False, 0.0, None
    share(0.0, [state(0)])
    end = 60 + 20 / min(camera, wanted, box)
    for number in range(1, int(end * camera)):
        now = number / camera
        if waits and free_at <= now:  # the loop took it as soon as it could
            waits, taken, free_at = False, taken + 1, free_at + 1 / box
        if not pace.wanted(now):
            paced += 1
        elif free_at <= now:
            taken, free_at = taken + 1, now + 1 / box
        else:
            replaced, waits = replaced + waits, True
        answer = share(now, [state(taken + waits, replaced, paced=paced)])
    offered = min(camera, wanted)
    if box >= 1.6 * offered:
        assert answer is None or answer > 0.85, "it keeps up, however slow the camera is"
    if box <= 0.5 * offered and min(box, offered) * WINDOW_S >= 10:
        assert answer is not None
        assert answer < 0.7
