"""Whether this machine's clock is right: what the kernel and systemd's time service say of it."""

from __future__ import annotations

import ctypes
import os
import time
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0  # that an answer counts: events ask several times a second
TIME_ERROR = 5  # what adjtimex(2) answers while nobody has set the clock


def synchronised() -> bool | None:
    """Whether the clock is right now; None where nobody says. Cheap enough for every event."""
    return _asked(int(time.monotonic() / SECONDS))


@lru_cache(maxsize=1)
def _asked(period: int) -> bool | None:
    return judged(Path("/"), kernel_clock())


def judged(root: Path, kernel: bool | None) -> bool | None:
    """Whether a clock is right of which the kernel says this; None where nobody says.

    root: "/", or a made-up tree. systemd-timesyncd leaves a file there once it has set the clock, also where the kernel
    may not be asked.
    """
    told = root / "run/systemd/timesync"
    # os.path's, as those of Path raise where they may not look
    if os.path.exists(told / "synchronized"):  # noqa: PTH110
        return True
    return False if kernel is None and os.path.isdir(told) else kernel  # noqa: PTH112


def kernel_clock() -> bool | None:
    """Whether the kernel holds its clock to be synchronised (adjtimex(2)); None where it does not say."""
    try:
        answer = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # zeros: modes 0 changes nothing
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != TIME_ERROR
