"""What the thread of a source tells of itself, step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from edge.errors import CaptureError
from edge.values import Image

Phase = Literal["starting", "up", "away", "frozen", "off", "ended"]
Drop = Literal["replaced", "paced", "unreadable"]


@dataclass(frozen=True, eq=False)
class Step:
    """A picture came, or did not, or time passed: each is a sign of life.

    phase: how the source does from now on. picture: seconds since 1970, and (H, W, 3) uint8 BGR. dropped: a picture
    came and goes no further. begins: it is the first of a connection to a camera. error: a mishap that the source goes
    on after.
    """

    phase: Phase
    picture: tuple[float, Image] | None = None
    dropped: Drop | None = None
    begins: bool = False
    error: CaptureError | None = None


Steps = Generator[Step, None, None]  # what ends a source before its time it raises, as CaptureError
