"""Places where a test kills this process: LOOKOUT_FAILPOINT="point" or "point:times", the time at which it dies.

Power cuts and kill -9 come between any two lines. These are the lines between which it matters.
"""

from __future__ import annotations

import os
import signal

POINTS = frozenset(
    {
        "box.before-append",
        "box.after-append",
        "box.before-send",
        "box.after-send",
        "box.before-forget",
        "box.after-forget",
        "box.after-hello",
        "box.after-welcome",
        "collector.after-hello",
        "collector.before-keep",
        "collector.before-commit",
        "collector.after-commit",
        "collector.after-ack",
    }
)

_name, _, _times = os.environ.get("LOOKOUT_FAILPOINT", "").partition(":")
_left = int(_times or 1)


def failpoint(point: str) -> None:
    """Die here, as by kill -9, when this is the point and the time that the environment names."""
    global _left
    if point == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
