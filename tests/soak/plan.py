"""What goes wrong in a soak, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

WIRE = ("refuse", "blackhole", "delay", "reset", "half-open", "cut")
BOX = ("zoned", "bad-config")
QUIET = 45.0  # s at the start, in which nothing goes wrong
REST = 60.0  # s after a fault before the next of the same target: it must have recovered by then
PAUSE = (6.0, 18.0)  # s from one fault to the next, of whatever
LASTS = (4.0, 20.0)  # s
FROZEN = (34.0, 45.0)  # s: long enough to be noticed
COLLECTOR_UNTIL = 1 / 3  # of the run: then it stays, and its memory can be watched
BACKLOG = 50.0  # s that it is away the last time: what comes then is more than any later fault holds back


@dataclass(frozen=True)
class Fault:
    """At second `at`, for so many seconds. target: a camera, "collector", "wire" or "box"."""

    at: float
    target: str
    kind: str
    seconds: float

    @property
    def ends(self) -> float:
        """Second."""
        return self.at + self.seconds

    def __str__(self) -> str:
        return f"{self.target}: {self.kind} for {self.seconds:.0f} s"


def plan_from_seed(seed: int, seconds: float, cameras: Mapping[str, Sequence[str]]) -> list[Fault]:
    """In order, the last one over REST before the end. cameras: the kinds that each knows.

    A collector takes most memory for the largest batch that it ever kept, some 0.1 MiB for an event of four people. So
    the one that is watched begins with a backlog, and grows by no later one.
    """
    chance = random.Random(seed)
    free = dict.fromkeys((*cameras, "collector", "wire", "box"), QUIET)
    kinds: dict[str, Sequence[str]] = {**cameras, "collector": ("kill", "stop"), "wire": WIRE, "box": BOX}
    decks: dict[str, list[str]] = {target: [] for target in kinds}
    faults: list[Fault] = []
    now = QUIET
    # The collector goes first: a run of ten minutes has to have it, too.
    turn = ["collector"]
    while now < seconds:
        ready = [target for target, at in free.items() if at <= now]
        ready = [one for one in ready if one != "collector" or now < COLLECTOR_UNTIL * seconds]
        target = turn.pop() if turn else chance.choice(ready) if ready else None
        if target:
            if not decks[target]:
                decks[target] = chance.sample(list(kinds[target]), len(kinds[target]))
            kind = decks[target].pop()
            fault = Fault(now, target, kind, chance.uniform(*(FROZEN if kind == "freeze" else LASTS)))
            free[target] = fault.ends + REST
            if fault.ends + REST < seconds:
                faults.append(fault)
        now += chance.uniform(*PAUSE)
    last = max(index for index, fault in enumerate(faults) if fault.target == "collector")
    faults[last] = replace(faults[last], seconds=BACKLOG)
    return faults
