"""What a soak goes by: a leak is found, noise and spikes are none, and its plan leaves time to recover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.soak.__main__ import settled, told
from tests.soak.judge import BLOCKS, trend
from tests.soak.picture import save
from tests.soak.plan import COLLECTOR_UNTIL, QUIET, REST, Fault, plan_from_seed
from tests.soak.run import Outcome, Recovery, Sample, Usage

KINDS = {"rtsp-1": ("stop", "stall", "removed"), "http-1": ("freeze", "size")}
SECONDS = np.arange(0, 480, 2.0)  # a soak of ten minutes, once it is warm


def resembling(random: np.random.Generator, size: float, memory: float = 0.9) -> NDArray[np.float64]:
    """Noise whose neighbours resemble each other, of this standard deviation."""
    steps = random.normal(0, size * np.sqrt(1 - memory**2), len(SECONDS))
    values = [random.normal(0, size)]
    for step in steps[1:]:
        values.append(memory * values[-1] + step)
    return np.array(values)


@pytest.mark.parametrize("leak", [12.0, 24.0])  # MiB in the time, of which 6 are allowed
def test_a_leak_is_found(leak: float) -> None:
    for seed in range(30):
        noise = resembling(np.random.default_rng(seed), 1.0)
        found = trend(SECONDS, 200 + leak * SECONDS / SECONDS[-1] + noise)
        assert found.grew(6, 100), seed
        assert found.slope == pytest.approx(leak / found.hours, rel=0.5)
        assert found.low < found.slope < found.high


def test_a_leak_by_steps_is_found() -> None:
    """A file that stays open after each of a dozen faults."""
    found = trend(SECONDS, 30 + SECONDS // 40)
    assert found.grew(2, 100)
    assert (found.first, found.last) == (30, 41)


def test_one_step_is_found_though_the_slope_is_flat() -> None:
    found = trend(SECONDS, 355 + 75 * (0.9 * SECONDS[-1] < SECONDS))
    assert found.slope == 0
    assert found.grew(6, 12)
    assert not found.grew(6, 80)


def test_noise_and_a_rise_that_is_allowed_are_none() -> None:
    for seed in range(100):
        noise = resembling(np.random.default_rng(seed), 2.0)
        assert not trend(SECONDS, 200 + 2 * SECONDS / SECONDS[-1] + noise).grew(6, 12), seed


def test_spikes_are_no_leak_even_late_ones() -> None:
    values = np.full(len(SECONDS), 30.0)
    values[-60::4] += 500
    assert not trend(SECONDS, values).grew(2, 10)


def test_what_shrinks_or_stays_is_flat() -> None:
    for values in (np.full(len(SECONDS), 7.0), 100 - SECONDS / 10):
        found = trend(SECONDS, values)
        assert not found.grew(0, 0)
        assert found.slope <= 0


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {BLOCKS}"):
        trend([0.0, 1.0], [1.0, 1.0])


@given(st.integers(0, 1_000_000), st.floats(300, 3600))
@settings(max_examples=50)
def test_a_plan_has_every_target_and_leaves_time_to_recover(seed: int, seconds: float) -> None:
    faults = plan_from_seed(seed, seconds, KINDS)
    assert faults == plan_from_seed(seed, seconds, KINDS)
    assert {"collector"} <= {fault.target for fault in faults} <= {*KINDS, "collector", "wire", "box"}
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    for target in {fault.target for fault in faults}:
        own = [fault for fault in faults if fault.target == target]
        assert all(later.at >= before.ends + REST for before, later in pairwise(own))
    for fault in faults:
        assert fault.at >= QUIET
        assert fault.ends + REST < seconds
        assert fault.target != "collector" or fault.at < COLLECTOR_UNTIL * seconds
    *_, last = (fault for fault in faults if fault.target == "collector")
    assert all(fault.seconds < last.seconds for fault in faults if fault is not last)


def test_a_long_plan_has_every_kind() -> None:
    done = {(fault.target, fault.kind) for fault in plan_from_seed(3, 3600, KINDS)}
    assert {(target, kind) for target, kinds in KINDS.items() for kind in kinds} <= done
    assert {kind for target, kind in done if target == "wire"} == {
        "refuse", "blackhole", "delay", "reset", "half-open", "cut"
    }  # fmt: skip
    assert {"zoned", "bad-config"} == {kind for target, kind in done if target == "box"}


FAULT = Fault(100.0, "http-1", "stop", 10.0)


def soaked(leak: Callable[[float, Usage], Usage] = lambda second, usage: usage) -> Outcome:
    """Ten minutes in which all was well; the collector was killed at 100 s. leak: what the box took beyond."""
    outcome = Outcome(7, [FAULT], described=1000, delivered=1002, stored=1003)
    outcome.recoveries.append(Recovery(FAULT, 110.0, 4.0, {"away"}))
    for second in np.arange(0, 600, 2.0).tolist():
        box = leak(second, Usage(1, 400 << 20, 26, 23))
        collector = None if 100 <= second < 110 else Usage(2 if second < 100 else 3, 85 << 20, 16, 5)
        outcome.samples.append(Sample(second, box, collector, {"http-1": 0.3, "http-2": None}, {"http-1": "up"}))
    return outcome


def test_a_soak_in_which_all_was_well_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = soaked()
    assert told(outcome)
    said = capsys.readouterr().out
    assert said.count("flat") == 6
    assert "1 faults; 1000 frames described, 1002 events delivered, 1003 stored, gaps: none" in said
    save(outcome, tmp_path / "out/soak.png")
    assert (tmp_path / "out/soak.png").stat().st_size > 10_000


def test_of_a_collector_that_was_killed_the_last_one_counts() -> None:
    taken = settled(soaked(), "collector")
    assert {usage.pid for _, usage in taken} == {3}
    assert taken[0][0] > 110 + 60


@pytest.mark.parametrize(
    "leak",
    [
        lambda second, usage: replace(usage, memory=usage.memory + int(40_000 * second)),
        lambda second, usage: replace(usage, files=usage.files + int(second // 100)),
        lambda second, usage: replace(usage, threads=usage.threads + int(second // 100)),
    ],
)
def test_a_box_that_grows_is_told_of(leak: Callable[[float, Usage], Usage], capsys: pytest.CaptureFixture[str]) -> None:
    assert not told(soaked(leak))
    assert capsys.readouterr().out.count("GREW") == 1


def test_what_else_goes_wrong_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    wrongs: list[tuple[Callable[[Outcome], Outcome], str]] = [
        (lambda one: replace(one, recoveries=[Recovery(FAULT, 110.0)]), "http-1: stop for 10 s: no picture within"),
        (lambda one: replace(one, recoveries=[Recovery(FAULT, 110.0, 61.0)]), "no picture within"),
        (lambda one: replace(one, gaps='{"first": 3}'), "events are missing"),
        (lambda one: replace(one, waiting=1), "1 wait"),
        (lambda one: replace(one, stored=999), "999 stored"),
        (lambda one: replace(one, ended=["the box ended"]), "the box ended"),
        (lambda one: replace(one, unwell=["it hangs"]), "it hangs"),
        (lambda one: replace(one, samples=one.samples[:30]), "too few samples"),
    ]
    for change, said in wrongs:
        assert not told(change(soaked()))
        assert said in capsys.readouterr().out
