"""What is told: tables that show any name as it is, JSON that reads back, pictures that open."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console

from export.evaluate import HEIGHTS, CategoryScore, Score
from export.learn import LABELS_PER_OPTION, CurvePoint
from export.metrics import COVERAGES, Interval
from export.report import Judged, percent, print_comparison, print_curve, print_score, write_json, write_picture

JUDGED = Judged("people", 1234, 5678, True)
NAMES = ["[bold]", "[/]", "[link=x]y[/link]", ":smile:", "\\[red]", "a" * 200, "名前 と 色", "$a_b$ and $", "%", "<b>"]


def category(name: str = "hat", options: int = 3, seed: int = 0, **changes: object) -> CategoryScore:
    random = np.random.default_rng(seed)
    top1, balanced, low, high = random.uniform(0.2, 0.9), random.uniform(0.2, 0.9), 0.15, 0.95
    score = CategoryScore(
        name=name,
        options=tuple(f"{name} {i}" for i in range(options)),
        pictures=60,
        people=40,
        top1=top1,
        top1_interval=Interval(low, high),
        top3=min(top1 + 0.05, 1) if options > 3 else None,
        top5=None,
        balanced=balanced,
        balanced_interval=Interval(low, high),
        majority=0.5,
        ece=0.1,
        calibration2=-0.001,
        coverage=tuple(np.linspace(1, top1, len(COVERAGES)).tolist()),
        known=0.8,
        known_top1=0.75,
        confusion=tuple(map(tuple, random.uniform(0, 9, (options, options)).tolist())),
        by_height=(0.5, None, 0.25, 0.75),
    )
    return replace(score, **changes)  # type: ignore[arg-type]


def variant(name: str = "as it is", categories: int = 4, seed: int = 0) -> Score:
    return Score(name, tuple(category(f"category {i}", 2 + i, seed + i) for i in range(categories)), 4.2)


def points() -> list[CurvePoint]:
    return [
        CurvePoint(labels, {"hat": 0.5}, 0.5 + n / 100, Interval(0.4, 0.6), n / 100, Interval(-0.01, 0.1))
        for n, labels in enumerate((*LABELS_PER_OPTION, None))
    ]


def console(width: int = 160) -> Console:
    return Console(file=io.StringIO(), width=width)


def told(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def numbers(found: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(found, dict):
        return [one for key, value in found.items() for one in numbers(value, f"{path}.{key}")]
    if isinstance(found, list):
        return [one for value in found for one in numbers(value, path)]
    return [(path, found)] if isinstance(found, (int, float)) and not isinstance(found, bool) else []


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_score_in_a_table() -> None:
    to = console()
    print_score(to, JUDGED, Score("tuned", (category(options=4), category("bag", 2, 5)), 4.25))
    lines = told(to).splitlines()
    assert lines[1] == (
        "people: 1,234 people, 5,678 pictures, the half that nothing was learned from; each person counts once"
    )
    assert lines[2] == "tuned:"
    hat = category(options=4)
    assert hat.top3 is not None
    (row,) = (line.split() for line in lines if line.split()[:2] == ["hat", "40"])
    figures = (hat.top1, 0.4, hat.top3, None, hat.balanced, 0.5, 0, hat.coverage[COVERAGES.index(0.8)], 0.8, 0.75)
    assert row == ["hat", "40", *map(percent, figures)]
    (row,) = (line.split() for line in lines if line.split()[:2] == ["hat", "50.0"])
    assert row[1:] == ["50.0", "–", "25.0", "75.0"]
    assert f"{HEIGHTS[-1]}+ px" in told(to)
    assert "4.2 ms a picture" in told(to)


def test_heights_that_nobody_knows_are_not_told() -> None:
    to = console()
    print_score(to, JUDGED, Score("v", (category(by_height=()),), 0.0))
    assert "height" not in told(to)


def test_a_mean_of_nothing_is_a_dash() -> None:
    to = console()
    print_score(to, JUDGED, Score("v", (category(options=2, known=0.0, known_top1=None),), 0.0))
    print_comparison(to, JUDGED, [Score("v", (category(options=2, known=0.0, known_top1=None),), 0.0)])
    assert "nan" not in told(to)
    (row,) = (line.split() for line in told(to).splitlines() if line.split()[:1] == ["v"])
    assert (row[2], row[3], row[-2]) == ("–", "–", "–")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_comparison_has_a_row_and_a_column_per_variant(count: int) -> None:
    scores, to = [variant(f"v{i}", seed=10 * i) for i in range(count)], console()
    print_comparison(to, JUDGED, scores)
    lines = [line.split() for line in told(to).splitlines()]
    assert sum(line[:1] == [f"v{i}"] for i in range(count) for line in lines) == count
    assert [f"v{i}" for i in range(count)] in [line[2:] for line in lines if line[:2] == ["balanced", "accuracy"]]
    for number in range(4):
        (row,) = (line for line in lines if line[:2] == ["category", str(number)])
        assert row[2:] == [percent(score.categories[number].balanced) for score in scores]


def test_the_best_variants_are_bold() -> None:
    scores = [Score(name, (category(balanced=balanced),), 0.0) for name, balanced in (("a", 0.5), ("b", 0.7))]
    to = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor", legacy_windows=False)
    print_comparison(to, JUDGED, scores)
    assert "\x1b[1m70.0" in told(to)
    assert "\x1b[1m50.0" not in told(to)


def test_categories_that_one_variant_lacks() -> None:
    one = Score("one", (category("hat"), category("bag", seed=1)), 0.0)
    other = Score("other", (category("bag", seed=2), category("shoes", seed=3)), 0.0)
    to = console()
    print_comparison(to, JUDGED, [one, other])
    rows = {line.split()[0]: line.split()[1:] for line in told(to).splitlines() if line.split()}
    assert rows["hat"] == [percent(one.categories[0].balanced), "–"]
    assert rows["shoes"] == ["–", percent(other.categories[1].balanced)]
    assert rows["bag"] == [percent(one.categories[1].balanced), percent(other.categories[0].balanced)]


def test_what_labels_are_worth() -> None:
    to = console()
    print_curve(to, points())
    rows = [line.split() for line in told(to).splitlines() if line.split()[:1] != ["labels"] and "to" in line.split()]
    assert [row[0] for row in rows] == [*map(str, LABELS_PER_OPTION), "all"]
    assert rows[2][1:] == ["52.0", "40.0", "to", "60.0", "+2.0", "-1.0", "to", "10.0"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str) -> None:
    to, judged = console(2000), replace(JUDGED, labels=name)
    score = Score(name, (category(name), category("bag", seed=1)), 0.0)
    print_score(to, judged, score)
    print_comparison(to, judged, [score, score])
    # the set and the variant, the row, the row by height; the set, two rows, two columns, the row
    assert told(to).count(name) >= 10


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal(width: int) -> None:
    to, scores = console(width), [variant(f"a rather long name {i}", categories=13) for i in range(8)]
    print_score(to, JUDGED, scores[0])
    print_comparison(to, JUDGED, scores)
    print_curve(to, points())
    if width == 80:
        assert "category 12" in told(to)


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_reads_back(tmp_path: Path) -> None:
    scores = [variant("as it is"), variant("[bold] 名\udcff", seed=5)]
    path = tmp_path / "new/folder/report.json"
    write_json(path, JUDGED, scores, points())
    text = path.read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["judged"] == {"labels": "people", "people": 1234, "pictures": 5678, "held_out": True}
    assert [one["variant"] for one in found["variants"]] == ["as it is", "[bold] 名\udcff"]
    assert (found["coverages"], found["heights_px"]) == (list(COVERAGES), list(HEIGHTS))
    hat = found["variants"][0]["categories"][2]
    assert hat["options"] == list(scores[0].categories[2].options)
    assert hat["balanced_interval"] == {"low": 0.15, "high": 0.95}
    assert found["variants"][0]["calibration"] == scores[0].calibration
    assert [point["labels"] for point in found["labels_per_option"]] == [*LABELS_PER_OPTION, None]
    beyond = ("people", "pictures", "heights_px", "labels", "ms", "confusion", "calibration2", "gain", "low")
    for path_, number in numbers(found):
        assert 0 <= number <= 1 or path_.rsplit(".", 1)[-1] in beyond, (path_, number)


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    bad = Score("v", (category(top1=float("nan")),), 0.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", JUDGED, [bad])
    assert not (tmp_path / "report.json").exists()


# --- the picture ------------------------------------------------------------------------------------------------------


def check(path: Path) -> None:
    image = cv2.imread(str(path))
    height, width = image.shape[:2]
    assert width >= 1200
    assert height >= 900
    assert image.std() > 5, "there is something on it"


@pytest.mark.parametrize("categories", [1, 4, 13])
def test_a_picture_of_one_variant(tmp_path: Path, categories: int) -> None:
    write_picture(tmp_path / "new/report.png", JUDGED, [variant(categories=categories)])
    check(tmp_path / "new/report.png")


def test_a_picture_of_many_variants_with_a_curve(tmp_path: Path) -> None:
    scores = [variant(f"v{i}", seed=10 * i) for i in range(8)]
    write_picture(tmp_path / "report.png", JUDGED, scores, points())
    check(tmp_path / "report.png")


def test_a_picture_where_variants_ask_other_things_and_no_heights_are_known(tmp_path: Path) -> None:
    one = Score("one", (category("hat", by_height=()),), 0.0)
    other = Score("other", (category("bag", by_height=(), known_top1=None),), 0.0)
    write_picture(tmp_path / "report.png", JUDGED, [one, other])
    check(tmp_path / "report.png")


def test_a_picture_takes_any_name(tmp_path: Path) -> None:
    names = [*NAMES, "_hidden", "^", "{", "\\frac", "$\\frac{$"]
    scores = [Score(name, tuple(map(category, names)), 0.0) for name in names]
    write_picture(tmp_path / "report.png", replace(JUDGED, labels=" ".join(names)), scores)
    check(tmp_path / "report.png")
