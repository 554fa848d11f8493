"""Whether something grew: a slope that neither spikes nor a few odd values move, with how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

BLOCKS = 40  # medians of so many stretches: neighbouring samples resemble each other, and would seem to know more
SURE = 0.95  # the share of the interval about the slope


@dataclass(frozen=True)
class Trend:
    """Theil and Sen's slope per hour with its interval, over so many hours, and the median at its ends."""

    slope: float
    low: float
    high: float
    hours: float
    first: float
    last: float

    def grew(self, limit: float, step: float) -> bool:
        """Whether it surely rose by more than `limit` within these hours, or by more than `step` in the end.

        A robust slope does not see one step, however large.
        """
        return self.low * self.hours > limit or self.last - self.first > step


def trend(seconds: Sequence[float], values: Sequence[float]) -> Trend:
    """Of values at these times, of which there must be at least BLOCKS."""
    if len(values) < BLOCKS:
        raise ValueError(f"expected at least {BLOCKS} values, got {len(values)}")
    hours = np.asarray(seconds) / 3600
    times = [float(np.median(block)) for block in np.array_split(hours, BLOCKS)]
    middles = [float(np.median(block)) for block in np.array_split(np.asarray(values, np.float64), BLOCKS)]
    slope, _, low, high = theilslopes(middles, times, SURE)
    ends = (float(np.median(part)) for part in (middles[:4], middles[-4:]))
    return Trend(float(slope), float(low), float(high), float(hours[-1] - hours[0]), *ends)
