"""Which pictures of a camera are wanted, where it makes more than the box can describe."""

from __future__ import annotations


class Pace:
    """Chooses about max_fps pictures per second, evenly; None chooses all."""

    def __init__(self, max_fps: float | None = None) -> None:
        self.max_fps = max_fps
        self._due = 0.0

    def wanted(self, now: float) -> bool:
        """Of a picture that comes now, in seconds, monotonic.

        It may come half an interval early, so that of a camera as fast as wanted none is lost.
        """
        if not self.max_fps:
            return True
        interval = 1 / self.max_fps
        if now >= self._due - interval / 2:
            self._due = max(self._due, now - interval / 2) + interval
            return True
        self._due = min(self._due, now + 2 * interval)  # it was slower before
        return False
