"""The seam behind the server: what arrived in order, and whatever keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from edge.events import Event
from edge.protocol import Gone


@dataclass(frozen=True)
class Poison:
    """A message that is no event, and why."""

    reason: str


@dataclass(frozen=True, eq=False)
class Item:
    """What a box sent under the numbers first..last of one of its epochs (equal, but for Gone).

    frames: the bytes as they came; none for Gone.
    """

    device: str
    epoch: int
    first: int
    last: int
    payload: Event | Gone | Poison
    frames: tuple[bytes, ...] = ()


class Kept(Enum):
    """What became of an item."""

    NEW = "new"
    DUPLICATE = "duplicate"  # the same was there already
    REFUSED = "refused"  # set aside: kept for a person to look at, and not an event


@dataclass(frozen=True)
class Outcome:
    """What became of an item; for a refused one, why."""

    kept: Kept
    reason: str = ""


class Sink(Protocol):
    """Keeps items for good. The server acknowledges what `add` returned from, and nothing else."""

    def resume(self, device: str, epoch: int) -> int | None:
        """Every number of this epoch below it is accounted for; None where the sink does not know."""

    def add(self, items: Sequence[Item], received_at: float) -> list[Outcome]:
        """Keep all of them, durably, or raise StoreError and keep none. received_at: seconds since 1970, UTC."""

    def close(self) -> None:
        """Let go of what it holds."""
