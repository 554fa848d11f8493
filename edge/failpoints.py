"""Places where a test kills this process, or lets it hang: LOOKOUT_FAILPOINT="point", "point:times" or "…:times:hang".

Power cuts and kill -9 come between any two lines. POINTS are the lines between which it matters. A GPU, a disk or a
camera may also just never answer: HANGS are the lines of which each stands for a stage that does not come back.
"""

from __future__ import annotations

import os
import signal
import threading

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
RELEASES = frozenset(  # of edge activate, whose power cuts are another matter than the delivery's
    {
        "release.link-made",
        "release.on-trial",
        "release.switched",
        "release.confirmed",
        "release.back",
        "release.gone",
    }
)
HANGS = frozenset({"box.capture", "box.detect", "box.encode", "box.publish"})

_name, _, _rest = os.environ.get("LOOKOUT_FAILPOINT", "").partition(":")
_times, _, _kind = _rest.partition(":")
_left = int(_times or 1)


def failpoint(point: str) -> None:
    """Die here, as by kill -9, or never return, when this is the point and the time that the environment names."""
    global _left
    if point == _name:
        _left -= 1
        if _left == 0:
            if _kind == "hang":
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)
