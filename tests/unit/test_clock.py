"""Whether the clock is right: as kernel and time service say it, asked rarely enough for every event."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge.clock import judged, kernel_clock, synchronised


@pytest.mark.parametrize(
    ("kernel", "service", "right"),
    [
        (None, None, None),
        (None, "runs", False),
        (None, "has set it", True),
        (False, None, False),
        (False, "runs", False),
        (False, "has set it", True),
        (True, None, True),
        (True, "runs", True),
        (True, "has set it", True),
    ],
)
def test_who_is_believed(kernel: bool | None, service: str | None, right: bool | None, tmp_path: Path) -> None:
    folder = tmp_path / "run/systemd/timesync"
    if service:
        folder.mkdir(parents=True)
    if service == "has set it":
        (folder / "synchronized").touch()
    assert judged(tmp_path, kernel) is right


def test_the_kernel_is_asked_without_an_error_and_without_root() -> None:
    assert kernel_clock() in (True, False, None)
    assert synchronised() is judged(Path("/"), kernel_clock())


def test_a_thousand_events_ask_it_in_no_time() -> None:
    synchronised()
    start = time.process_time()
    for _ in range(1000):
        synchronised()
    assert time.process_time() - start < 0.1
