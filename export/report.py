"""What evaluate, calibrate and adapt found: tables for a terminal, JSON for programs, a picture to look at."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge.errors import ConfigError
from export.evaluate import HEIGHTS, CategoryScore, Score, accuracy_at
from export.learn import CurvePoint
from export.metrics import COVERAGES, Interval

NOT_THERE = "–"
LONGEST = 24  # characters of a name in the picture
_SURE = ("error", "80 %", "known", "Top-1")  # titles of what probabilities and thresholds are worth


@dataclass(frozen=True)
class Judged:
    """Of whom the figures are. people, pictures: of the labelled set, those judged by. held_out: the others taught."""

    labels: str
    people: int
    pictures: int
    held_out: bool

    def __str__(self) -> str:
        half = ", the half that nothing was learned from" if self.held_out else ""
        return f"{self.labels}: {self.people:,} people, {self.pictures:,} pictures{half}; each person counts once"


def print_score(console: Console, judged: Judged, score: Score) -> None:
    """A row per category, and again by the pictures' heights."""
    table = _table("category", "people", "Top-1", "±", "Top-3", "Top-5", "balanced", "majority", *_SURE)
    for one in score.categories:
        table.add_row(Text(one.name), f"{one.people:,}", *_cells(one))
    table.add_section()
    table.add_row("mean", "", *_means(score))
    console.print(Text(f"\n{judged}\n{score.variant}:"), soft_wrap=True)
    console.print(table)
    if heights := _heights(score):
        table = _table("Top-1 by height of the picture", *heights)
        for one in score.categories:
            table.add_row(Text(one.name), *map(percent, one.by_height))
        table.add_section()
        table.add_row("mean", *(percent(_mean_height(score, number)) for number in range(len(heights))))
        console.print(table)
    console.print(
        f"%; ±: half of the 95 % interval; error: of the probabilities, less chance; 80 %: Top-1 of the surest 80 %;\n"
        f"known: above the threshold. {score.ms:.1f} ms a picture for cropping and encoding",
        soft_wrap=True,
    )


def print_comparison(console: Console, judged: Judged, scores: Sequence[Score]) -> None:
    """A row per variant, then balanced accuracy by category with a column per variant."""
    table = _table("variant", "Top-1", "Top-3", "Top-5", "balanced", "majority", *_SURE, "ms")
    for score in scores:
        top1, _, *others = _means(score)
        table.add_row(Text(score.variant), top1, *others, f"{score.ms:.1f}")
    console.print(Text(f"\n{judged}\nmeans over the categories, %"), soft_wrap=True)
    console.print(table)
    table = _table("balanced accuracy", *(score.variant for score in scores))
    by_name = [{one.name: one for one in score.categories} for score in scores]
    for name in dict.fromkeys(one.name for score in scores for one in score.categories):
        figures = [named[name].balanced if name in named else None for named in by_name]
        best = max(figure for figure in figures if figure is not None)
        table.add_row(Text(name), *(Text(percent(f), "bold" if f == best else "") for f in figures))
    console.print(table)


def print_curve(console: Console, points: Sequence[CurvePoint]) -> None:
    """What labels are worth."""
    table = _table("labels per option", "balanced", "95 %", "gain", "95 %")
    for point in points:
        table.add_row(
            "all" if point.labels is None else str(point.labels),
            percent(point.mean),
            _range(point.interval, 1),
            f"{100 * point.gain:+.1f}",
            _range(point.gain_interval, 1),
        )
    console.print(table)


def write_json(path: Path, judged: Judged, scores: Sequence[Score], points: Sequence[CurvePoint] = ()) -> None:
    """Everything that was measured; shares in 0..1. Raises OSError."""
    found: dict[str, Any] = {"judged": asdict(judged), "coverages": COVERAGES, "heights_px": HEIGHTS}
    found["variants"] = [{**asdict(score), "calibration": score.calibration} for score in scores]
    found["labels_per_option"] = [asdict(point) for point in points]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def write_picture(path: Path, judged: Judged, scores: Sequence[Score], points: Sequence[CurvePoint] = ()) -> None:
    """Bars per category, coverage curves, what labels are worth, and a confusion matrix per category.

    Of several scores the bars and curves show all, the matrices the last. Raises OSError, and ConfigError without
    matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib", remedy="pip install 'lookout[export]'") from error
    last, columns = scores[-1], 5
    rows = -(-len(last.categories) // columns)
    figure = Figure(figsize=(18, 9 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figures: Any = figure.subfigures(2, 1, height_ratios=[9, 3.6 * rows])
    upper, lower = figures
    figure.suptitle(f"How right the words are\n{_plain(str(judged))}", fontsize=14)
    bars, curves, gains = upper.subplot_mosaic([["bars", "bars"], ["curves", "gains"]]).values()
    _bars(bars, scores)
    _curves(curves, scores)
    _gains(gains, points, last)
    lower.suptitle(f"{_short(last.variant)}: right answers by row, given ones by column, share of the row")
    axes = np.atleast_1d(lower.subplots(rows, columns)).ravel()
    for place, one in zip(axes, last.categories, strict=False):
        _matrix(place, one)
    for place in axes[len(last.categories) :]:
        place.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # a box in the place of a letter is all that a font can do about it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=90)


def _bars(axes: Any, scores: Sequence[Score]) -> None:
    names = [one.name for one in scores[0].categories]
    places, width = np.arange(len(names)), 0.8 / len(scores)
    for number, score in enumerate(scores):
        found = {one.name: one for one in score.categories}
        shift = places - 0.4 + width * (number + 0.5)
        heights = [100 * found[name].balanced if name in found else 0 for name in names]
        ends = [found[name].balanced_interval if name in found else Interval(0, 0) for name in names]
        around = [[h - 100 * e.low for h, e in zip(heights, ends, strict=True)],
                  [100 * e.high - h for h, e in zip(heights, ends, strict=True)]]  # fmt: skip
        axes.bar(shift, heights, width * 0.95, label=_short(score.variant), color=f"C{number}")
        axes.errorbar(shift, heights, np.maximum(around, 0), fmt="none", ecolor="0.3", elinewidth=0.8)
        tops = [100 * found[name].top1 if name in found else np.nan for name in names]
        axes.plot(shift, tops, "k_", markersize=9, label="Top-1" if number == 0 else None)
    chances = [100 / len(one.options) for one in scores[0].categories]
    axes.hlines(chances, places - 0.42, places + 0.42, colors="0.5", linestyles="dotted", label="chance")
    most = [100 * one.majority for one in scores[0].categories]
    axes.hlines(most, places - 0.42, places + 0.42, colors="0.2", linestyles="dashed", label="always the commonest")
    axes.set_xticks(places, [*map(_short, names)], rotation=20, ha="right")
    axes.set(ylabel="%", ylim=(0, 128), title="Balanced accuracy by category, with its 95 % interval")
    axes.set_yticks(range(0, 101, 20))
    axes.legend(ncols=5, fontsize=9, loc="upper left")


def _curves(axes: Any, scores: Sequence[Score]) -> None:
    for number, score in enumerate(scores):
        means = [100 * np.mean([accuracy_at(coverage)(one) for one in score.categories]) for coverage in COVERAGES]
        shares = [100 * coverage for coverage in COVERAGES]
        axes.plot(shares, means, f"C{number}", label=_short(score.variant), linewidth=2)
    for one in scores[-1].categories if len(scores) == 1 else ():
        axes.plot([100 * c for c in COVERAGES], [100 * value for value in one.coverage], "0.7", linewidth=0.7)
        axes.annotate(_short(one.name), (101, 100 * one.coverage[-1]), fontsize=7, color="0.4", va="center")
    what = {"xlabel": "% of the people answered, the surest first", "ylabel": "% right"}
    axes.set(**what, xlim=(0, 118 if len(scores) == 1 else 102), title="What saying less is worth")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def _gains(axes: Any, points: Sequence[CurvePoint], score: Score) -> None:
    if points:
        places = range(len(points))
        axes.plot(places, [100 * point.mean for point in points], "C2o-")
        lows, highs = [100 * p.interval.low for p in points], [100 * p.interval.high for p in points]
        axes.fill_between(places, lows, highs, color="C2", alpha=0.2)
        axes.set_xticks(places, ["all" if point.labels is None else str(point.labels) for point in points])
        axes.set(xlabel="labels per option", ylabel="balanced accuracy, %", title="What labels are worth")
        axes.grid(alpha=0.3)
        return
    names = _heights(score)
    found = [_mean_height(score, number) for number in range(len(names))]
    axes.bar(names, [0 if value is None else 100 * value for value in found], color="C0")
    axes.set(ylabel="Top-1, %", ylim=(0, 100), title="By the height of the picture")


def _matrix(axes: Any, one: CategoryScore) -> None:
    cells = np.array(one.confusion)
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1e-9)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(*shares.shape):
        if shares[row, column] >= 0.005:
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=7)
    labels = [f"{_short(name)} ({count:.0f})" for name, count in zip(one.options, cells.sum(axis=1), strict=True)]
    axes.set_xticks(range(len(one.options)), [*map(_short, one.options)], rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(one.options)), labels, fontsize=7)
    axes.set_title(f"{_short(one.name)}: {100 * one.balanced:.0f} % balanced", fontsize=10)


def _short(name: str) -> str:
    """A name that leaves room for the picture."""
    return _plain(name if len(name) <= LONGEST else name[: LONGEST - 1] + "…")


def _plain(text: str) -> str:
    """What matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def percent(share: float | None) -> str:
    """As the tables show it."""
    return NOT_THERE if share is None else f"{100 * share:.1f}"


def _cells(one: CategoryScore) -> list[str]:
    error = float(np.sqrt(max(one.calibration2, 0)))
    spread = (one.top1_interval.high - one.top1_interval.low) / 2
    shares = (one.top1, spread, one.top3, one.top5, one.balanced, one.majority, error, accuracy_at(0.8)(one))
    return [percent(share) for share in (*shares, one.known, one.known_top1)]


def _means(score: Score) -> list[str]:
    figures = (lambda one: one.top1, lambda one: one.top3, lambda one: one.top5, lambda one: one.balanced)
    top1, *tops = (percent(score.mean(figure)) for figure in figures)
    rest = (score.mean(lambda one: one.majority), score.calibration, score.mean(accuracy_at(0.8)))
    known = (score.mean(lambda one: one.known), score.mean(lambda one: one.known_top1))
    return [top1, "", *tops, *map(percent, (*rest, *known))]


def _heights(score: Score) -> list[str]:
    """One name for each group by height, none where heights are not known."""
    if not score.categories[0].by_height:
        return []
    return [f"{a}–{b} px" for a, b in pairwise(HEIGHTS)] + [f"{HEIGHTS[-1]}+ px"]


def _mean_height(score: Score, number: int) -> float | None:
    found = [value for one in score.categories if (value := one.by_height[number]) is not None]
    return float(np.mean(found)) if found else None


def _range(interval: Interval, digits: int) -> str:
    return f"{100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f}"


def _table(first: str, *titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column(Text(first), overflow="fold")  # names are not rich's markup
    for title in titles:
        table.add_column(Text(title), justify="right", overflow="fold")
    return table
