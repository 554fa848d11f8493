"""What a box gives up, step by step, while it is too hot or has too much to do, and when it takes it back.

Down soon: after HOT_S of heat, SLOW_S of too much to do. Up late: after CALM_S in which all was well. Each time that a
step up proves too much within PROVEN_S, the next try of that step waits twice as long, up to PATIENCE_S. So a box that
can do no more settles, and looks now and then whether it can by now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge.config import LoadConfig

HOT_S, SLOW_S = 30.0, 10.0  # of trouble, before a step down
CALM_S, PATIENCE_S = 120.0, 1800.0  # without any, before a step up: the first time, and at most
PROVEN_S = 1800.0  # on a step, after which what it was too much before is forgotten
LONGEST_S = 10.0  # that may count between two looks: of a longer time nobody knows how it was
SLOW, WELL = 0.6, 0.85  # of the frames allowed: less than the one is too much to do, from the other on all is well


@dataclass(frozen=True)
class Limits:
    """What the box may do: frames per second of each live camera, people encoded of a frame, and by which detector."""

    max_fps: float
    max_crops: int
    smaller_net: bool = False


@dataclass(frozen=True)
class Heat:
    """How hot it is: degrees Celsius of the hottest part, None where nobody says, and what the system slows down."""

    celsius: float | None = None
    where: str = ""
    throttled: tuple[str, ...] = ()


class Ladder:
    """Which step the box is on. Pure: times are what it is told.

    max_crops: people encoded of a frame when all is well. smaller: whether there is a smaller detector.
    """

    def __init__(self, config: LoadConfig, max_crops: int, smaller: bool) -> None:
        self._smaller = smaller
        self._level = 0
        self._waits: dict[int, float] = {}  # step -> seconds of calm that the next try of it takes, where it failed
        self._tried: int | None = None  # the step that the last one up led to, while it is not proven
        self._seen_at: float | None = None
        self._tried_s = self._hot_s = self._slow_s = self._calm_s = 0.0
        self.configure(config, max_crops)

    def configure(self, config: LoadConfig, max_crops: int) -> None:
        """Go by these from now on; the step stays."""
        steps = _steps(config.max_fps, max_crops, self._smaller)
        self._level = min(self._level, len(steps) - 1)  # first, as other threads may look
        self._config, self._steps = config, steps

    @property
    def limits(self) -> Limits:
        """What the box may do now."""
        return self._steps[self._level]

    @property
    def level(self) -> int:
        """Steps down; 0: it does everything."""
        return self._level

    @property
    def name(self) -> str:
        """The step in words."""
        return _new(self._steps[self._level - 1], self.limits) if self._level else "everything"

    def observe(self, now: float, achieved: float | None, heat: Heat) -> str | None:
        """How it goes now -> a sentence for people where that took a step.

        now: seconds, of a clock that goes on. achieved: which share of the frames allowed the slowest live camera got
        looked at, 0..1, None where there were none.
        """
        passed = 0.0 if self._seen_at is None else min(max(now - self._seen_at, 0.0), LONGEST_S)
        self._seen_at = now
        hot = bool(heat.throttled) or (heat.celsius is not None and heat.celsius >= self._config.hot_c)
        cool = not heat.throttled and (heat.celsius is None or heat.celsius < self._config.cool_c)
        slow, well = achieved is not None and achieved < SLOW, achieved is None or achieved >= WELL
        # what trembles about a bound is on the one side for more of the time
        self._hot_s = min(max(0.0, self._hot_s + (passed if hot else -passed)), HOT_S)
        self._slow_s = min(max(0.0, self._slow_s + (passed if slow else -passed)), SLOW_S)
        self._calm_s = self._calm_s + passed if cool and well else 0.0
        self._tried_s += passed
        if self._tried is not None and self._tried_s >= PROVEN_S:
            self._waits = {step: wait for step, wait in self._waits.items() if step < self._tried}
            self._tried = None
        if self._level < len(self._steps) - 1:
            if self._hot_s >= HOT_S and hot:
                return self._down(_of_heat(heat))
            if self._slow_s >= SLOW_S and achieved is not None and slow:
                return self._down(f"{100 * achieved:.0f} % of the frames could be looked at")
        if self._level > 0 and self._calm_s >= self._waits.get(self._level - 1, CALM_S):
            return self._up(_of_calm(heat, achieved))
        return None

    def _down(self, why: str) -> str:
        if self._tried == self._level:
            self._waits[self._level] = min(2 * self._waits.get(self._level, CALM_S), PATIENCE_S)
        self._tried = None
        before = self._step(self._level + 1)
        return f"{why}: {_new(before, self.limits)} instead of {_short(self.limits, before)}"

    def _up(self, why: str) -> str:
        before = self._step(self._level - 1)
        self._tried, self._tried_s = self._level, 0.0
        return f"{why}: {_new(before, self.limits)} again"

    def _step(self, level: int) -> Limits:
        """What was allowed before."""
        before = self.limits
        self._level = level
        self._hot_s = self._slow_s = self._calm_s = 0.0
        return before


def _steps(max_fps: float, max_crops: int, smaller: bool) -> tuple[Limits, ...]:
    """Everything first; at the end the least."""
    everything = Limits(max_fps, max_crops)
    steps = [everything, replace(everything, max_fps=max_fps / 2), replace(everything, max_fps=max_fps / 4)]
    if max_crops > 1:
        steps.append(replace(steps[-1], max_crops=max(1, max_crops // 4)))
    if smaller:
        steps.append(replace(steps[-1], smaller_net=True))
    return tuple(steps)


def _new(one: Limits, other: Limits) -> str:
    """What is new in the other, in words."""
    if one.smaller_net != other.smaller_net:
        return f"{_short(one, other)} detector"
    return f"{_short(one, other)} {'frames per second' if one.max_crops == other.max_crops else 'people per frame'}"


def _short(one: Limits, other: Limits) -> str:
    """The same, where it is clear of what."""
    if one.smaller_net != other.smaller_net:
        return "the smaller" if other.smaller_net else "the larger"
    return f"{other.max_fps:.3g}" if one.max_crops == other.max_crops else str(other.max_crops)


def _of_heat(heat: Heat) -> str:
    slowed = f"the system slows down {', '.join(heat.throttled)}" if heat.throttled else ""
    return ", ".join(part for part in (_degrees(heat), slowed) if part)


def _of_calm(heat: Heat, achieved: float | None) -> str:
    frames = "" if achieved is None else f"{100 * achieved:.0f} % of the frames could be looked at"
    return ", ".join(part for part in (_degrees(heat), frames) if part) or "all is well"


def _degrees(heat: Heat) -> str:
    return "" if heat.celsius is None else f"{heat.celsius:.0f} °C at {heat.where}"
