"""Hours of the week: what the texts mean, minute by minute, and how a wrong one is refused."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config import read_edge_config
from edge.errors import ConfigError
from edge.schedule import Schedule

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
MONDAY = datetime(2024, 1, 1)  # a Monday


def at(text: str) -> datetime:
    """ "Mon 07:00" of some week."""
    day, time = text.split()
    hour, minute = time.split(":")
    return MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute))


@pytest.mark.parametrize(
    ("texts", "opened", "closed"),
    [
        ([], ["Mon 00:00", "Sun 23:59"], []),
        (["Mon-Fri 07:00-19:00"], ["Mon 07:00", "Fri 18:59"], ["Mon 06:59", "Fri 19:00", "Sat 12:00", "Sun 12:00"]),
        (["07:00-19:00"], ["Mon 07:00", "Sun 18:59"], ["Mon 19:00", "Sun 06:59"]),
        (["Sat,Sun 10:00-16:00"], ["Sat 10:00", "Sun 15:59"], ["Fri 10:00", "Mon 10:00", "Sun 16:00"]),
        (["Mon-Thu,Sat 10:00-16:00"], ["Mon 10:00", "Thu 10:00", "Sat 10:00"], ["Fri 10:00", "Sun 10:00"]),
        (["22:00-06:00"], ["Mon 22:00", "Tue 05:59", "Mon 00:00", "Sun 23:59"], ["Mon 06:00", "Mon 21:59"]),
        (["Fri 22:00-06:00"], ["Fri 22:00", "Sat 00:00", "Sat 05:59"], ["Fri 05:00", "Sat 06:00", "Sat 22:00"]),
        (["Sun 22:00-06:00"], ["Sun 22:00", "Mon 05:59"], ["Sun 05:59", "Mon 06:00"]),
        (["Mon 22:00-24:00"], ["Mon 22:00", "Mon 23:59"], ["Tue 00:00", "Mon 21:59"]),
        (["Mon 22:00-00:00"], ["Mon 22:00", "Mon 23:59"], ["Tue 00:00", "Mon 00:00"]),
        (["Wed 00:00-24:00"], ["Wed 00:00", "Wed 23:59"], ["Tue 23:59", "Thu 00:00"]),
        (["Sat-Mon 10:00-11:00"], ["Sat 10:00", "Sun 10:00", "Mon 10:00"], ["Tue 10:00", "Fri 10:00"]),
        (["Fri-Fri 10:00-11:00"], ["Fri 10:00"], ["Thu 10:00", "Sat 10:00"]),
        (["Mon 07:00-08:00", "Mon 09:00-10:00"], ["Mon 07:00", "Mon 09:30"], ["Mon 08:00", "Mon 10:00"]),
        (["mon-fri  7:00-9:00 "], ["Mon 07:00"], ["Mon 09:00"]),
    ],
)
def test_what_a_schedule_means(texts: list[str], opened: list[str], closed: list[str]) -> None:
    schedule = Schedule.parse(texts)
    assert [moment for moment in opened if not schedule.open_at(at(moment))] == []
    assert [moment for moment in closed if schedule.open_at(at(moment))] == []


def test_a_minute_holds_all_its_seconds() -> None:
    schedule = Schedule.parse(["07:00-07:01"])
    assert schedule.open_at(MONDAY.replace(hour=7, second=59, microsecond=999_999))
    assert not schedule.open_at(MONDAY.replace(hour=7, minute=1))


spans = st.tuples(
    st.sets(st.integers(0, 6), min_size=1), st.integers(0, 1439), st.integers(0, 1440)
).filter(lambda span: span[1] != span[2])  # fmt: skip


@given(st.lists(spans, min_size=1, max_size=3), st.integers(0, 7 * 1440 - 1))
def test_every_minute_of_the_week_is_as_a_table_has_it(written: list[tuple[set[int], int, int]], minute: int) -> None:
    table = [False] * (7 * 1440)
    for days, begin, end in written:
        length = end - begin if end > begin else end - begin + 1440
        for day in days:
            for one in range(day * 1440 + begin, day * 1440 + begin + length):
                table[one % len(table)] = True
    texts = [
        f"{','.join(DAYS[day] for day in days)} {begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
        for days, begin, end in written
    ]
    assert Schedule.parse(texts).open_at(MONDAY + timedelta(minutes=minute)) == table[minute]


def test_the_clock_on_the_wall_decides_where_clocks_are_put_back_or_on() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    night, hour = Schedule.parse(["Sat 22:00-06:00"]), Schedule.parse(["02:00-03:00"])
    for start, hours in ((datetime(2024, 10, 26, 22, tzinfo=berlin), 9), (datetime(2024, 3, 30, 22, tzinfo=berlin), 7)):
        elapsed = [
            datetime.fromtimestamp(start.timestamp() + 60 * minute, berlin) for minute in range(-30, hours * 60 + 30)
        ]
        assert sum(night.open_at(moment) for moment in elapsed) == hours * 60
        assert sum(hour.open_at(moment) for moment in elapsed) == {9: 120, 7: 0}[hours]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "two times"),
        ("always", "two times"),
        ("Mon-Fri", "two times"),
        ("Mon Tue 07:00-08:00", "two times"),
        ("Mon-Fri 07:00", "two times"),
        ("07:00–19:00", "two times"),
        ("٠٧:00-19:00", "two times"),
        ("Mon-Fri 07.00-19.00", "two times"),
        ("Mon-Fri 25:00-26:00", "no time 25:00"),
        ("Mon-Fri 07:60-08:00", "no time 07:60"),
        ("07:00-24:01", "no time 24:01"),
        ("24:00-06:00", "begins at 00:00"),
        ("07:00-07:00", "00:00-24:00"),
        ("Mo-Fr 07:00-19:00", "'Mo'"),
        ("Mon- 07:00-19:00", "''"),
        ("Mon,,Tue 07:00-19:00", "''"),
        ("Mon-Tue-Wed 07:00-19:00", "'Tue-Wed'"),
    ],
)
def test_a_wrong_text_is_refused_with_an_example(text: str, said: str) -> None:
    with pytest.raises(ValueError, match='should be like "Mon-Fri 07:00-19:00"') as caught:
        Schedule.parse(["22:00-06:00", text])
    assert repr(text) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_refuses_it_by_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    text = 'device = "b"\nbundle = "b"\n[[camera]]\nname = "door"\nsource = "a.avi"\nschedule = ["Mo-Fr 07:00-19:00"]\n'
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_edge_config(file)
    assert str(caught.value).startswith(f"{file}: camera.0.schedule: should be like ")
    assert str(caught.value).endswith("not 'Mo'")
    file.write_text(text.replace("Mo-Fr", "Mon-Fri"))
    assert read_edge_config(file).camera[0].schedule == ("Mon-Fri 07:00-19:00",)
