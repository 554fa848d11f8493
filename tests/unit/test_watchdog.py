"""What counts as a hang: the judge by itself, over any course of events, and the thread around it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import watchdog as watchdog_module
from edge.capture import CameraState, Phase
from edge.errors import ConfigError
from edge.watchdog import RESOLVER, Judge, Limits, Watchdog

TIMEOUT = 10.0
LIMITS = Limits.of(30.0, TIMEOUT)
PHASES: tuple[Phase, ...] = get_args(Phase)
EVER = 100_000.0  # s


def camera(phase: Phase = "up", live: bool = True, **fields: object) -> CameraState:
    return replace(CameraState("gate", live, phase, beat_at=0.0), **fields)  # type: ignore[arg-type]


def sentences(judge: Judge, now: float, *states: CameraState, beat_at: float | None = None) -> list[str]:
    hangs = judge(now, "detect", now if beat_at is None else beat_at, states)
    return [hang.sentence(now) for hang in hangs]


def test_the_limits_of_the_unit() -> None:
    """WatchdogSec=60 of lookout.service, and what capture waits by itself."""
    assert Limits.of(60.0, 10.0) == Limits(stage=20.0, taken=60.0, reading=20.0, reaching=20.0 + RESOLVER)


def test_a_loop_that_stays_in_a_stage_hangs() -> None:
    judge = Judge(LIMITS)
    assert sentences(judge, 10.0, beat_at=0.0) == []
    assert sentences(judge, 10.1, beat_at=0.0) == ["the loop hangs in 'detect' for 10 s"]
    assert sentences(judge, 10.2, beat_at=10.1) == [], "it came back"


def test_a_thread_without_a_sign_of_life_hangs() -> None:
    for phase in PHASES:
        judge = Judge(LIMITS)
        limit = LIMITS.reading if phase in ("up", "ended") else LIMITS.reaching
        assert sentences(judge, 0.0, camera(phase)) == []
        assert sentences(judge, limit, camera(phase)) == []
        late = sentences(judge, limit + 1, camera(phase))
        if phase == "off":
            assert late == []
        else:
            assert late == [f"camera 'gate': its thread gives no sign of life for {limit + 1:.0f} s"]
        assert sentences(judge, limit + 1, camera("ended", live=False)) == [], "a file that was read to its end"


def test_pictures_that_nobody_takes_are_a_hang_of_the_loop_though_it_beats() -> None:
    judge = Judge(LIMITS)

    def at(now: float, **fields: object) -> list[str]:
        return sentences(judge, now, camera(beat_at=now, **fields))

    assert at(0.0, frames=1) == []
    assert at(30.0, frames=300, drops={"replaced": 290, "paced": 9}) == [], "not yet"
    said = ["camera 'gate': its pictures come and none is taken for 31 s"]
    assert at(31.0, frames=310, drops={"replaced": 300, "paced": 9, "unreadable": 50}) == said
    assert at(31.1, frames=311, drops={"replaced": 300, "paced": 9, "unreadable": 50}) == [], "one was taken"


def test_pictures_that_nobody_wants_by_a_slow_pace_are_no_hang() -> None:
    """[load] max_fps = 0.05, or a quarter of it where it is too hot: the next picture is due in 80 s."""
    judge = Judge(LIMITS)
    for second in range(600):
        taken = 1 + second // 80
        now, frames = float(second), 25 * second + taken
        assert sentences(judge, now, camera(beat_at=now, frames=frames, drops={"paced": frames - taken})) == []


def test_a_camera_back_from_its_pause_has_all_its_time() -> None:
    judge = Judge(LIMITS)
    assert sentences(judge, 0.0, camera("off")) == []
    assert sentences(judge, EVER, camera("off")) == []
    assert sentences(judge, EVER + 1, camera("starting")) == [], "its thread has not yet woken"
    assert sentences(judge, EVER + 1 + LIMITS.reaching + 1, camera("starting")) != []


def test_a_camera_that_a_reload_took_away_is_forgotten() -> None:
    judge = Judge(LIMITS)
    sentences(judge, 0.0, camera())
    assert sentences(judge, EVER) == []
    assert sentences(judge, EVER + 1, camera()) == []


quiet = st.sampled_from(["up", "away", "frozen", "off", "starting"])
steps = st.lists(st.tuples(st.floats(0.1, 9.9), quiet, st.integers(0, 5)), min_size=1, max_size=60)


@given(steps, st.floats(1.0, 300.0))
def test_whatever_cameras_do_a_loop_and_threads_that_go_on_are_no_hang(
    steps: list[tuple[float, Phase, int]], watchdog: float
) -> None:
    """Dark, empty, frozen, away, off, without a picture, in any order: as long as what comes is taken."""
    limits = Limits.of(watchdog, TIMEOUT)
    judge, now, state = Judge(limits), 0.0, camera("starting")
    for seconds, phase, dropped in steps:
        now += min(seconds, limits.stage)
        replaced = state.drops.get("replaced", 0)
        if phase == "up":
            state = replace(state, frames=state.frames + dropped + 1, drops={"replaced": replaced + dropped})
        state = replace(state, phase=phase, beat_at=now)
        assert judge(now, "frames", now - seconds if seconds < limits.stage else now, [state]) == []


@given(steps, st.sampled_from(["loop", "thread", "taken"]))
def test_whatever_came_before_a_hang_is_seen_within_its_limit(steps: list[tuple[float, Phase, int]], what: str) -> None:
    judge, now, state = Judge(LIMITS), 0.0, camera("starting")
    for seconds, phase, dropped in steps:
        now += seconds
        state = replace(state, phase=phase, frames=state.frames + dropped, beat_at=now)
        judge(now, "frames", now, [state])
    state, hung = replace(state, phase="up"), now
    end = now + {"loop": LIMITS.stage, "thread": LIMITS.reading, "taken": LIMITS.taken}[what] + 1.1
    found = []
    while now < end:
        assert not found, "too early, or it went away"
        if what != "thread":
            state = replace(state, beat_at=now)
        if what == "taken" and now > hung:
            state = replace(state, frames=state.frames + 1, drops={"replaced": state.drops.get("replaced", 0) + 1})
        now += 0.5
        found = judge(now, "frames", hung if what == "loop" else now, [state])
        if found:
            break
    (hang,) = found
    assert now - hang.since > {"loop": LIMITS.stage, "thread": LIMITS.reading, "taken": LIMITS.taken}[what]


@given(st.floats(1.0, 3600.0), st.floats(0.1, 60.0))
def test_limits_leave_each_part_the_time_it_may_take(watchdog: float, timeout: float) -> None:
    limits = Limits.of(watchdog, timeout)
    assert limits.stage < limits.taken
    assert timeout < limits.reading < limits.reaching or limits.reading == limits.stage
    assert limits.stage <= limits.reading <= limits.reaching


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    return listener


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_it_is_fed_until_the_loop_hangs_and_again_when_it_goes_on(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    fed: list[float] = []

    def count() -> int:
        try:
            while True:
                assert systemd.recv(4096, socket.MSG_DONTWAIT) == b"WATCHDOG=1"
                fed.append(time.monotonic())
        except BlockingIOError:
            return len(fed)

    with systemd, Watchdog(lambda: [camera(beat_at=time.monotonic())]) as watchdog:

        def beaten(times: int) -> bool:
            watchdog.beat("frames")
            return count() >= times

        until(lambda: beaten(5))
        assert watchdog.trouble() is None
        watchdog.beat("encode")
        until(lambda: watchdog.trouble())
        assert watchdog.trouble() == "the loop hangs in 'encode' for 0 s"
        until(lambda: caplog.records)
        before = count()
        until(lambda: time.monotonic() > fed[-1] + 0.6)
        assert count() <= before + 1, "not fed for twice its limit"
        until(lambda: beaten(before + 3))
    assert [record.levelname for record in caplog.records][:2] == ["ERROR", "WARNING"], "told once, as it ends"
    assert "'encode'" in caplog.text


@pytest.mark.parametrize("unset", ["WATCHDOG_USEC", "WATCHDOG_PID"])
def test_where_systemd_does_not_watch_this_process_it_is_not_fed(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, unset: str
) -> None:
    if unset == "WATCHDOG_PID":
        monkeypatch.setenv(unset, "1")  # of the one that started this one, say
    else:
        monkeypatch.delenv(unset)
    monkeypatch.setattr(watchdog_module, "WITHOUT", 0.3)
    looked: list[float] = []

    def states() -> list[CameraState]:
        looked.append(time.monotonic())
        return []

    with systemd, Watchdog(states) as watchdog:
        until(lambda: len(looked) > 10)
        assert watchdog.trouble() is not None, "for /livez"
        with pytest.raises(BlockingIOError):
            systemd.recv(4096, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("text", ["", "0", "-1", "soon"])
def test_a_watchdog_of_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", text)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with pytest.raises(ConfigError, match="WATCHDOG_USEC"):
        Watchdog(lambda: [])
