"""Which share of what the live cameras offer a box keeps up with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from edge.capture import CameraState

WINDOW_S = 10.0  # that a share speaks of


class _Counts(NamedTuple):
    """Of one camera, since its start: frames that were taken, and those that a newer one replaced before."""

    taken: int
    replaced: int


class Share:
    """Of the frames that each live camera offered lately, the share that was taken; of the slowest camera.

    What a camera offers is what it makes, at most as much as Cameras.pace wants of it: a slow camera, one that is away
    and one that sleeps offer less, and nothing is missed of that. Pure: times are what it is told.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, _Counts]]] = deque()

    def forget(self) -> None:
        """What was until now says nothing any more: another pace."""
        self._seen.clear()

    def __call__(self, now: float, states: Sequence[CameraState]) -> float | None:
        """0..1 over the last WINDOW_S, or since the call before where that is longer ago; None: none offered a frame.

        now: seconds, of a clock that goes on.
        """
        counts = {one.name: _Counts(one.taken, one.drops.get("replaced", 0)) for one in states if one.live}
        self._seen.append((now, counts))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()
        before, after = self._seen[0][1], self._seen[-1][1]
        shares = [_share(before[name], own) for name, own in after.items() if name in before]
        return min((share for share in shares if share is not None), default=None)


def _share(before: _Counts, after: _Counts) -> float | None:
    """None where nothing was offered, or another camera has that name by now and counts anew."""
    taken, replaced = after.taken - before.taken, after.replaced - before.replaced
    return None if min(taken, replaced) < 0 or not taken + replaced else taken / (taken + replaced)
