"""Whether a camera shows the same picture again and again: a sensor has noise, a stuck encoder has none."""

from __future__ import annotations

import numpy as np

from edge.values import Image

SAMPLES = 64  # px looked at along each side, before all of them are


class Still:
    """Tells pictures that are equal to the last bit, for longer than a limit.

    Of a scene that is merely dark or empty no two pictures are: there is noise in them, which any lossy codec writes
    anew at least with each of its key frames. Where a camera's encoder goes on with a sensor that is stuck, and writes
    the same picture differently each time, this sees nothing.
    """

    def __init__(self, limit: float) -> None:
        """limit: seconds."""
        self._limit = limit
        self.forget()

    def forget(self) -> None:
        """The next picture is the first."""
        self._since = 0.0
        self._sample: Image | None = None
        self._whole: Image | None = None  # kept only where the samples did not tell it from the next

    def frozen(self, image: Image, now: float) -> bool:
        """Whether the pictures up to this one, of (H, W, 3), show the same since `limit` seconds. now: monotonic."""
        sample = image[:: max(1, image.shape[0] // SAMPLES), :: max(1, image.shape[1] // SAMPLES)]
        if self._sample is None or not np.array_equal(sample, self._sample):
            self._since, self._sample, self._whole = now, sample.copy(), None
        elif self._whole is None:
            self._whole = image
        elif not np.array_equal(image, self._whole):
            self._since, self._whole = now, image
        return now - self._since >= self._limit
