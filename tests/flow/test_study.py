"""Words judged, calibrated and adapted by labelled people, as a user does it, and what that is worth on PETA."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.bank import PromptBank
from edge.bundle import PROMPTS, Bundle, open_bundle
from edge.describe import Words
from edge.values import Floats, Region
from export.evaluate import Score, Variant, accuracy_at, score, views_of
from export.labels import LabelledSet, read_labels
from export.learn import Mask, adapt, calibrate, curve
from export.looks import Seen
from tests.flow.conftest import PICTURE, ROOT, command

PETA = ROOT.parent / "shared/data/peta-dev"
MAP = ROOT / "configs/labels-peta.toml"
TINTS = {"black": (1, 1, 1), "blue": (2.5, 0.7, 0.5), "red": (0.5, 0.5, 2.5)}  # factors on B, G, R


@pytest.fixture(scope="module")
def crowd(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set: the people of the golden picture in three lights, each mirrored too."""
    folder = tmp_path_factory.mktemp("labelled") / "the [red] crowd"
    command("edge", "describe", PICTURE, "--bundle", mini, "--save-crops", folder / "crops")
    rows = []
    for number, path in enumerate(sorted((folder / "crops").iterdir())):
        for colour, factors in TINTS.items():
            image = np.clip(cv2.imread(str(path)) * np.array(factors), 0, 255).astype(np.uint8)
            for side, picture in (("left", image), ("right", image[:, ::-1])):
                name = f"{number}-{colour}-{side}.png"
                cv2.imwrite(str(folder / name), picture)
                bag = "backpack" if number % 2 else "no backpack"
                rows.append([name, f"{number} in {colour}", colour, bag, "no sunglasses"])
    shutil.rmtree(folder / "crops")
    write(folder, ["image", "person", "top colour", "backpack", "glasses"], rows)
    return folder


@pytest.fixture
def bundle(mini: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return Path(shutil.copytree(mini, tmp_path / "engines/mini"))


def write(folder: Path, header: list[str], rows: list[list[str]]) -> None:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def like(crowd: Path, folder: Path, change: Callable[[list[list[str]]], object]) -> Path:
    """The same pictures, and a changed table (a header and its rows)."""
    shutil.copytree(crowd, folder)
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    write(folder, rows[0], rows[1:])
    return folder


def test_from_words_to_an_adapted_and_calibrated_bank(crowd: Path, bundle: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    running = Words(open_bundle(bundle), ())
    words = running.bank

    told = command("export", "evaluate", crowd, "--bundle", bundle).stdout
    assert "the [red] crowd: 18 people, 36 pictures; each person counts once" in told
    assert [line.split()[:2] for line in told.splitlines() if line.strip()][4][0] == "top"

    done = command("export", "calibrate", crowd, "--bundle", bundle, "--to", tmp_path / "new/tuned.npz")
    assert "glasses: nothing learned: labels of 1 options" in done.stderr
    assert "the half that nothing was learned from" in done.stdout
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == files
    tuned = PromptBank.read(tmp_path / "new/tuned.npz")
    assert f"{tmp_path / 'new/tuned.npz'}: calibrated on " in done.stdout
    assert done.stdout.endswith(f"people of {crowd.name}, bank {tuned.sha256[:12]}\n")
    changed = [one.name for one, old in zip(tuned.categories, words.categories, strict=True) if one != old]
    assert changed == ["top colour", "backpack"]

    command("export", "calibrate", crowd, "--bundle", bundle)
    assert {path.name for path in bundle.iterdir() if path.read_bytes() != files.get(path.name)} == {PROMPTS}
    assert (bundle / PROMPTS).read_bytes() == (tmp_path / "new/tuned.npz").read_bytes()
    running.refresh()
    assert running.bank.sha256 == tuned.sha256

    done = command("export", "adapt", crowd, "--bundle", bundle)
    assert "no label says brown" in done.stderr
    assert "labels per option" in done.stdout
    running.refresh()
    assert [fit.how for fit in running.bank.fits] == ["adapted"], "an earlier calibration does not hold"
    assert running.bank.categories == words.categories
    moved = np.flatnonzero(np.abs(running.bank.vectors - words.vectors).max(axis=1) > 0)
    options = [option for category in words.categories for option in category.options]
    assert len(moved) == 5
    assert {options[i] for i in moved} == {"black", "blue", "red", "backpack", "no backpack"}

    done = command("export", "calibrate", crowd, "--bundle", bundle)
    assert "each person is judged by vectors adapted without them" in done.stderr
    running.refresh()
    last = running.bank
    assert [fit.how for fit in last.fits] == ["adapted", "calibrated"]
    assert last.words == words.sha256
    half = read_labels(crowd, words.categories, None).half()
    assert {(fit.labels, fit.crops, fit.everyone) for fit in last.fits} == {(crowd.name, int(half.sum()), False)}

    variants = ["words: prompts=prompts/person-mini.toml", f"tuned [1]: bank={tmp_path / 'new/tuned.npz'}"]
    compare = [word for spec in (*variants, "square=squash") for word in ("--compare", spec)]
    done = command("export", "evaluate", crowd, "--bundle", bundle, *compare, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [one["variant"] for one in report["variants"]] == ["as it is", "words", "tuned [1]", "square=squash"]
    assert all(name in done.stdout for name in ("as it is", "words", "tuned [1]", "square=squash"))
    assert report["judged"] == {
        "labels": crowd.name, "people": len(set(report_people(crowd, ~half))),
        "pictures": int((~half).sum()), "held_out": True,
    }  # fmt: skip
    assert cv2.imread(str(tmp_path / "out/report.png")) is not None

    said = command("export", "build", "configs/models-mini.toml", "--engines", bundle.parent).stderr
    assert f"unchanged, adapted on {crowd.name}, calibrated on {crowd.name}" in said
    assert open_bundle(bundle).bank.sha256 == last.sha256

    recipe = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
    other = tmp_path / "words.toml"
    other.write_text((ROOT / "prompts/person-mini.toml").read_text().replace("a photo of a man", "one photo of a man"))
    (tmp_path / "recipe.toml").write_text(recipe.replace(f"{ROOT}/prompts/person-mini.toml", str(other)))
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", bundle.parent).stderr
    assert "the bank before was adapted and calibrated; these words are others, and are not" in said
    assert open_bundle(bundle).bank.fits == ()


def report_people(crowd: Path, keep: Mask) -> list[str]:
    with (crowd / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["person"] for row, kept in zip(rows, keep, strict=True) if kept]


def test_a_bank_that_learned_from_everyone_is_judged_by_nobody_there(crowd: Path, bundle: Path) -> None:
    told = command("export", "adapt", crowd, "--bundle", bundle, "--everyone").stdout
    assert "adapted on 18 people" in told
    assert "balanced" not in told
    done = command("export", "evaluate", crowd, "--bundle", bundle, code=78)
    assert done.stderr.splitlines()[-1].endswith(
        f"error: {crowd}: as it is: the bank was adapted on all of these people; "
        "judge it by others, or learn without --everyone"
    )
    done = command("export", "calibrate", crowd, "--bundle", bundle, code=78)
    assert "calibrate with --everyone too" in done.stderr
    assert "calibrated on 18 people" in command("export", "calibrate", crowd, "--bundle", bundle, "--everyone").stdout
    done = command("export", "adapt", crowd, "--bundle", bundle)
    assert "the bank before was adapted on all of these people, and is not judged by them" in done.stderr
    assert "variant" not in done.stdout
    assert [fit.everyone for fit in open_bundle(bundle).bank.fits] == [False]


def test_mistakes_are_one_line_and_an_exit_code(crowd: Path, bundle: Path, tmp_path: Path) -> None:
    def keep(*numbers: int) -> Callable[[list[list[str]]], object]:
        return lambda rows: rows.__setitem__(slice(1, None), [rows[n] for n in numbers])

    def blank(rows: list[list[str]]) -> None:
        for row in rows[1:]:
            row[2:] = [""] * 3

    def mistype(rows: list[list[str]]) -> None:
        rows[3][2] = "blck"

    def redden(rows: list[list[str]]) -> None:
        for row in rows[1:]:
            row[2:4] = ["red", ""]

    sets = {
        "unlabelled": like(crowd, tmp_path / "unlabelled", blank),
        "one": like(crowd, tmp_path / "one", keep(1, 2)),
        "mistyped": like(crowd, tmp_path / "mistyped", mistype),
        "lost": like(crowd, tmp_path / "lost", lambda rows: None),
        "torn": like(crowd, tmp_path / "torn", lambda rows: None),
        "same": like(crowd, tmp_path / "same", redden),
    }  # fmt: skip
    (sets["lost"] / "0-red-left.png").unlink()
    torn = sets["torn"] / "0-red-left.png"
    torn.write_bytes(torn.read_bytes()[:60])
    alien = replace(open_bundle(bundle).bank, image_sha256="f" * 64)
    (tmp_path / "alien.npz").write_bytes(alien.to_bytes())
    (tmp_path / "other.toml").write_text(
        '[[category]]\nname = "backpack"\nquestion = "q"\noption = [\n'
        '{ name = "bag", phrases = ["a bag"] }, { name = "none", phrases = ["no bag"] }]\n'
    )
    table: list[tuple[tuple[object, ...], int, str]] = [
        (("evaluate", sets["unlabelled"]), 78, "unlabelled/labels.csv: no row has a label"),
        (("calibrate", sets["one"]), 78, "one: too few people to learn from one half and judge by the other: got 1; "),
        (("calibrate", sets["same"], "--everyone"), 78, "same: nothing to learn from"),
        (("adapt", sets["mistyped"]), 78, "line 4: top colour: no such option: expected 'black'"),
        (("calibrate", crowd, "--coverage", "nan"), 78, "--coverage: expected more than 0, at most 1, got nan"),
        (("adapt", crowd, "--map", MAP), 78, "labels.csv: a map is for labels.json"),
        (("evaluate", sets["lost"]), 78, "1 of 36 images are no files"),
        (("evaluate", sets["torn"]), 66, "torn/0-red-left.png"),
        (("evaluate", crowd, "--compare", f"bank={tmp_path / 'alien.npz'}"), 72, "alien.npz: its words were embedded"),
        (("evaluate", crowd, "--compare", f"prompts={tmp_path / 'other.toml'}"), 78, "backpack: a label that these"),
        (("evaluate", crowd, "--compare", "sqare=pad"), 78, "did you mean square?"),
    ]
    before = (bundle / PROMPTS).read_bytes()
    for words, code, said in table:
        done = command("export", *words, "--bundle", bundle, code=code)
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1, done.stderr
        assert said in errors[0]
        assert errors[0] == done.stderr.splitlines()[-1]
        assert (bundle / PROMPTS).read_bytes() == before


# --- what it is worth -------------------------------------------------------------------------------------------------


class Peta:
    """PETA's labels before the mini bundle, encoded once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.bank = bundle, bundle.bank
        self.labelled: LabelledSet = read_labels(PETA, self.bank.categories, MAP)
        self.seen = Seen(self.labelled, bundle)
        self.vectors: dict[Region, Floats] = self.seen.vectors(views_of(self.bank))
        self.learners: Mask = self.labelled.half()
        self.scale = bundle.manifest.encoder.logit_scale

    def judged(self, bank: PromptBank) -> Score:
        """By the people that nothing was learned from."""
        return score(Variant("v", bank), self.labelled, ~self.learners, self.seen, self.scale)

    def calibrated(self, bank: PromptBank) -> PromptBank:
        return calibrate(bank, self.labelled, self.learners, self.vectors, self.scale, 0.8, print)


@pytest.fixture(scope="module")
def peta(mini: Path) -> Peta:
    if not PETA.is_dir():
        pytest.skip(f"{PETA.name} is not here: its terms do not allow it in this repository")
    return Peta(open_bundle(mini))


def mean(found: Score, coverage: float) -> float:
    share = found.mean(accuracy_at(coverage))
    assert share is not None
    return share


def test_calibrated_probabilities_come_true(peta: Peta) -> None:
    before, after = peta.judged(peta.bank), peta.judged(peta.calibrated(peta.bank))
    assert before.calibration > 0.02, "there is something to mend"
    assert after.calibration <= before.calibration / 2
    for found in (before, after):
        assert mean(found, 0.8) >= mean(found, 1.0) + 0.03
    known = after.mean(lambda one: one.known)
    assert known == pytest.approx(0.8, abs=0.05)
    assert mean(after, 1.0) > mean(before, 1.0) - 0.01


def test_labels_are_worth_something_and_never_cost_much(peta: Peta) -> None:
    points = curve(peta.bank, peta.labelled, peta.learners, peta.vectors, peta.scale)
    assert all(point.gain_interval.high >= 0 for point in points), "nowhere surely below the words alone"
    last = points[-1]
    assert last.gain_interval.low > 0, "surely above them"
    assert last.gain > points[1].gain
    assert len(last.by_category) == len(peta.bank.categories)


def test_an_adapted_bank_calibrated_on_the_same_people_comes_true_for_others(peta: Peta) -> None:
    adapted = adapt(peta.bank, peta.labelled, peta.learners, peta.vectors, peta.scale, print)
    before, after = peta.judged(adapted), peta.judged(peta.calibrated(adapted))
    assert after.calibration <= before.calibration / 2
    assert mean(after, 0.8) >= mean(after, 1.0) + 0.03
