"""When a camera is looked at: hours of the week, by the box's local time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")  # by datetime.weekday()
_MIDNIGHT = 24 * 60  # minutes
_TEXT = re.compile(r"(?:(\S+) +)?(\d{1,2}):(\d\d)-(\d{1,2}):(\d\d)", re.ASCII)
_EXAMPLES = '"Mon-Fri 07:00-19:00", "Sat,Sun 10:00-16:00" or "22:00-06:00"'


@dataclass(frozen=True)
class Hours:
    """From minute `begin` of each of these days (0 is Monday) until before `end`, the next day where that is less."""

    days: frozenset[int]
    begin: int
    end: int

    def hold(self, day: int, minute: int) -> bool:
        """Whether minute `minute` of day `day` is among them."""
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        begun_today, begun_yesterday = day in self.days, (day - 1) % 7 in self.days
        return (begun_today and minute >= self.begin) or (begun_yesterday and minute < self.end)


@dataclass(frozen=True)
class Schedule:
    """The union of its hours; without any, always."""

    hours: tuple[Hours, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Schedule:
        """Texts like "Mon-Fri 07:00-19:00", "Sat,Sun 10:00-16:00", "22:00-06:00" (every day).

        What goes over midnight belongs to the day it begins on. Raises ValueError, whose words say what is allowed.
        """
        return cls(tuple(_hours(text) for text in texts))

    def open_at(self, moment: datetime) -> bool:
        """Whether it is looked then. Only what a clock on the wall shows at `moment` counts.

        So in the night in which the clocks are put back the hour that comes twice is open, or not, both times.
        """
        minute = moment.hour * 60 + moment.minute
        return not self.hours or any(hours.hold(moment.weekday(), minute) for hours in self.hours)


def _hours(text: str) -> Hours:
    try:
        parts = _TEXT.fullmatch(text.strip())
        if not parts:
            raise ValueError("days, if not every day, a space, and two times")
        days, *numbers = parts.groups()
        begin, end = _minute(*numbers[:2]), _minute(*numbers[2:])
        if begin == _MIDNIGHT:
            raise ValueError("a day begins at 00:00")
        if begin == end:
            raise ValueError("it ends when it begins; the whole day is 00:00-24:00")
        return Hours(_days(days) if days else frozenset(range(7)), begin, end)
    except ValueError as error:
        raise ValueError(f"should be like {_EXAMPLES}, got {text!r}: {error}") from None


def _minute(hour: str, minute: str) -> int:
    """Of the day, 0..1440."""
    time = int(hour) * 60 + int(minute)
    if int(minute) > 59 or time > _MIDNIGHT:
        raise ValueError(f"there is no time {hour}:{minute}")
    return time


def _days(text: str) -> frozenset[int]:
    """Days and ranges of days: "Mon-Thu,Sat"; a range may go over Sunday."""
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin = _day(first)
        days |= {(begin + i) % 7 for i in range((_day(last) - begin) % 7 + 1)} if dash else {begin}
    return frozenset(days)


def _day(name: str) -> int:
    if name.capitalize() not in _DAYS:
        raise ValueError(f"the days are {' '.join(_DAYS)}, not {name!r}")
    return _DAYS.index(name.capitalize())
