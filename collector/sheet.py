"""A store as spreadsheets see it: a row per person, and cells that run nothing."""

from __future__ import annotations

import csv
from typing import IO

from collector.report import utc
from collector.stats import harmless
from collector.store import Store
from edge.events import Answer

COLUMNS = (
    "device", "epoch", "seq", "camera", "frame", "captured_at", "captured_utc", "x1", "y1", "x2", "y2", "score",
    "track", "clock",
)  # fmt: skip
FORMULA = tuple("=+-@＝＋－＠")  # what a cell that is run begins with; the wide ones count in East Asian locales


def write_csv(store: Store, file: IO[str]) -> None:
    """Box in px; captured_at in seconds since 1970; per category the answer as `said` and its probability.

    clock: "unsynchronised" where the time is that of a box whose clock was not set.
    """
    categories = store.categories()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*COLUMNS, *(cell(text) for name in categories for text in (name, f"{name} probability"))])
    for header in store.headers():
        names = (cell(header.device), header.epoch, header.seq, cell(header.camera), header.frame)
        for person in header.people:
            given = {answer.category: answer for answer in person.answers}
            answers: list[str | float] = []
            for name in categories:
                answers += (said(given[name]), given[name].top[0].probability) if name in given else ("", "")
            times, track = (header.captured_at, utc(header.captured_at)), "" if person.track is None else person.track
            rows.writerow([*names, *times, *person.box, person.score, track, header.clock or "", *answers])


def said(answer: Answer) -> str:
    """The best option as a cell, or "unknown" where it is not to be believed."""
    return "unknown" if answer.unknown else cell(answer.top[0].option)


def cell(text: str) -> str:
    """`text` from the wire as a spreadsheet may see it: an apostrophe keeps it from running as a formula."""
    text = harmless(text)  # a lone carriage return would begin a row of its own
    return f"'{text}" if text.lstrip()[:1] in FORMULA else text
