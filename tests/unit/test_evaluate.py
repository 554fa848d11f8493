"""How right a bank is: scores against plain loops, variants as people write them, and who may judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bank import Fit, Look, PromptBank
from edge.bundle import PROMPTS, Bundle, open_bundle
from edge.errors import BundleError, ConfigError
from edge.match import match
from edge.values import Category, Floats, Region
from export.evaluate import (
    Score,
    Variant,
    accuracy_at,
    best_regions,
    people_judged,
    people_of,
    score,
    variant_from,
    views_of,
)
from export.labels import LabelledSet
from export.looks import Seen, View
from export.metrics import COVERAGES
from tests.fakes import ENCODER_FACTS, GENDER, SLEEVE, bank, manifest, unit_rows, write_bundle

DIM, SCALE = ENCODER_FACTS.dim, 10.0
CALIBRATED = Fit("calibrated", "people", "5" * 64, 3, 4, False)


class Planted(Seen):
    """Vectors as they were planted, whoever looks."""

    def __init__(self, vectors: dict[Region, Floats], heights: Sequence[int] = ()) -> None:
        self._planted = vectors
        self._seen_heights = np.array(heights or [0] * len(vectors["whole"]), np.int64)
        self.asked: list[View] = []

    @property
    def heights(self) -> NDArray[np.int64]:
        return self._seen_heights

    def vectors(self, looks: Sequence[View]) -> dict[Region, Floats]:
        self.asked += looks
        return {view.region: self._planted[view.region] for view in looks}

    def ms(self, looks: Sequence[View]) -> float:
        return 2.5 * len(looks)


def a_set(people: Sequence[str], **labels: Sequence[str | None]) -> LabelledSet:
    images = tuple(f"{i}.png" for i in range(len(people)))
    named = {name.replace("_", " "): tuple(options) for name, options in labels.items()}
    return LabelledSet(Path("the set"), images, tuple(people), named, "5" * 64)


def of_vectors(vectors: Floats, encoder: str) -> LabelledSet:
    people = tuple(map(str, range(len(vectors))))
    labels = {"gender": ("male",) * len(vectors)}
    return LabelledSet(Path("the set"), people, people, labels, "5" * 64, vectors, encoder)


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return open_bundle(bundle_folder)


# --- scores -----------------------------------------------------------------------------------------------------------

PEOPLE = "aabcdeffffgh"
SLEEVES = ["long", "long", "short", "none", None, "none", "short", "short", "short", "short", "long", "long"]
GENDERS = [None, None, "male", "male", "female", "male", None, "female", "female", "male", "male", "male"]
HEIGHTS = [40, 63, 64, 100, 127, 128, 150, 191, 192, 300, 50, 70]


def planted() -> tuple[LabelledSet, Planted, Variant]:
    seen = Planted({"whole": unit_rows(12, DIM, seed=3)}, HEIGHTS)
    words = replace(bank(), categories=(replace(SLEEVE, temperature=2.0, bias=(0.2, 0.0, -0.1), threshold=0.5), GENDER))
    return a_set(PEOPLE, sleeve_length=SLEEVES, gender=GENDERS), seen, Variant("as it is", words)


def test_a_score_against_plain_loops() -> None:
    labelled, seen, variant = planted()
    keep = np.array([person != "h" for person in PEOPLE])
    found = score(variant, labelled, keep, seen, SCALE)
    shares = match({"whole": seen.vectors([View(Look())])["whole"]}, variant.bank, SCALE).probabilities.tolist()
    assert (found.variant, found.ms, len(found.categories)) == ("as it is", 2.5, 2)
    for one, names, columns in zip(found.categories, (SLEEVES, GENDERS), (range(3), range(3, 5)), strict=True):
        rows = [i for i in range(12) if names[i] is not None and PEOPLE[i] != "h"]
        weight = {i: 1 / sum(PEOPLE[j] == PEOPLE[i] for j in rows) for i in rows}
        total = sum(weight.values())
        right = {i: one.options.index(str(names[i])) for i in rows}
        row = {i: [shares[i][k] for k in columns] for i in rows}
        said = {i: row[i].index(max(row[i])) for i in rows}
        hit = [i for i in rows if said[i] == right[i]]

        def share(chosen: Sequence[int], weight=weight, total=total) -> float:  # type: ignore[no-untyped-def]
            return float(sum(weight[i] for i in chosen) / total)

        def accuracy(chosen: Sequence[int], hit=hit, weight=weight) -> float:  # type: ignore[no-untyped-def]
            return float(sum(weight[i] for i in chosen if i in hit) / sum(weight[i] for i in chosen))

        assert (one.pictures, one.people) == (len(rows), len({PEOPLE[i] for i in rows}))
        assert one.top1 == pytest.approx(share(hit))
        assert one.top1_interval.low <= one.top1 <= one.top1_interval.high
        assert (one.top3, one.top5) == (None, None), "as many options as that, or fewer"
        occurring = sorted(set(right.values()))
        recalls = [accuracy([i for i in rows if right[i] == k]) for k in occurring]
        assert one.balanced == pytest.approx(sum(recalls) / len(recalls))
        assert one.majority == pytest.approx(max(share([i for i in rows if right[i] == k]) for k in occurring))
        for k, cells in enumerate(one.confusion):
            assert cells == pytest.approx(
                [sum(weight[i] for i in rows if (right[i], said[i]) == (k, j)) for j in range(len(cells))]
            )
        known = [i for i in rows if max(row[i]) >= (0.5 if one.name == "sleeve length" else 0)]
        assert one.known == pytest.approx(share(known))
        assert one.known_top1 == pytest.approx(accuracy(known))
        assert accuracy_at(1.0)(one) == pytest.approx(one.top1)
        assert len(one.coverage) == len(COVERAGES)
        for number, (low, high) in enumerate(((0, 64), (64, 128), (128, 192), (192, 9999))):
            group = [i for i in rows if low <= HEIGHTS[i] < high]
            assert one.by_height[number] == (pytest.approx(accuracy(group)) if group else None)


def test_top3_and_top5_where_there_are_more_options() -> None:
    options = tuple(map(str, range(7)))
    words = PromptBank((Category("c", "q", options, (None,) * 7),), unit_rows(7, DIM, 1), "t", "i", "s")
    vectors = unit_rows(30, DIM, 2)
    truth = np.random.default_rng(0).integers(0, 7, 30)
    labelled = a_set([str(i) for i in range(30)], c=[options[k] for k in truth])
    (one,) = score(Variant("v", words), labelled, np.ones(30, bool), Planted({"whole": vectors}), SCALE).categories
    shares = vectors @ words.vectors.T
    for k, got in ((1, one.top1), (3, one.top3), (5, one.top5)):
        ranks = [sorted(row, reverse=True).index(row[right]) for row, right in zip(shares, truth, strict=True)]
        assert got == pytest.approx(sum(rank < k for rank in ranks) / 30)
    assert one.by_height == ()


def test_without_any_option_above_three_there_is_no_mean_of_it() -> None:
    labelled, seen, variant = planted()
    found = score(variant, labelled, np.ones(12, bool), seen, SCALE)
    assert found.mean(lambda one: one.top3) is None
    assert found.mean(lambda one: one.top1) == pytest.approx(sum(one.top1 for one in found.categories) / 2)
    assert found.calibration >= 0


def test_a_threshold_that_nobody_reaches() -> None:
    labelled, seen, variant = planted()
    sure = replace(variant.bank, categories=(SLEEVE, replace(GENDER, threshold=1.0)))
    gender = score(Variant("v", sure), labelled, np.ones(12, bool), seen, 0.1).categories[1]
    assert (gender.known, gender.known_top1) == (0, None)


def test_categories_that_nobody_labelled_are_left_out() -> None:
    labelled, seen, variant = planted()
    less = replace(labelled, labels={"gender": labelled.labels["gender"]})
    found: Score = score(variant, less, np.ones(12, bool), seen, SCALE)
    assert [one.name for one in found.categories] == ["gender"]
    with pytest.raises(ConfigError, match="the set: as it is: no picture to judge by has a label"):
        score(variant, less, np.arange(12) < 2, seen, SCALE)


def test_each_category_is_judged_where_it_looks() -> None:
    words = replace(bank(), categories=(replace(SLEEVE, region="upper"), replace(GENDER, region="head")))
    vectors: dict[Region, Floats] = {
        "whole": -bank().vectors[:3], "upper": bank().vectors[:3], "head": bank().vectors[[4, 3, 4]],
    }  # fmt: skip
    labelled = a_set("abc", sleeve_length=SLEEVE.options, gender=["male", "female", "male"])
    seen = Planted(vectors)
    found = score(Variant("v", words), labelled, np.ones(3, bool), seen, SCALE)
    assert [one.top1 for one in found.categories] == [1, 1]
    assert found.ms == 7.5
    assert seen.asked == views_of(words) == [View(Look(), region) for region in ("whole", "head", "upper")]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_the_region_where_the_answer_lies_is_found() -> None:
    random = np.random.default_rng(0)
    truth, halves = random.integers(0, 2, 40), np.arange(40) % 2 == 0
    noise: dict[Region, Floats] = {
        region: unit_rows(40, DIM, seed)
        for seed, region in enumerate(("whole", "head", "upper", "lower", "feet"), 20)  # type: ignore[misc]
    }
    noise["feet"] = np.where(halves[:, None], bank().vectors[3:][truth], -bank().vectors[3:][truth])
    labelled = a_set([str(i) for i in range(40)], gender=[GENDER.options[k] for k in truth])
    found = best_regions(bank(), labelled, halves, Planted(noise), SCALE)
    assert [category.region for category in found.categories] == ["whole", "feet"], "nobody labelled sleeves"
    assert best_regions(bank(), labelled, ~halves, Planted(noise), SCALE).categories[1].region != "feet"
    assert found.vectors is bank().vectors or np.array_equal(found.vectors, bank().vectors)


def test_where_all_regions_are_as_good_the_whole_person_is_looked_at() -> None:
    same: dict[Region, Floats] = dict.fromkeys(("whole", "head", "upper", "lower", "feet"), unit_rows(6, DIM))  # type: ignore[arg-type]
    labelled = a_set("abcdef", gender=["male", "female"] * 3)
    found = best_regions(bank(), labelled, np.ones(6, bool), Planted(same), SCALE)
    assert {category.region for category in found.categories} == {"whole"}


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "look", "region"),
    [
        ("square=squash", "square=squash", Look("squash"), "whole"),
        ("tight: margin=-0.1", "tight", Look(None, -0.1), "whole"),
        ("margin=1,flip=yes", "margin=1,flip=yes", Look(None, 1.0, True), "whole"),
        ("a , b:square = crop , flip=no", "a , b", Look("crop"), "whole"),
        ("region=head", "region=head", Look(), "head"),
        ("heads: first try: region=head", "heads: first try", Look(), "head"),
        (": square=pad", "square=pad", Look("pad"), "whole"),
    ],
)
def test_variants_of_the_look(bundle: Bundle, spec: str, name: str, look: Look, region: str) -> None:
    found = variant_from(spec, bundle)
    assert (found.name, found.bank.look) == (name, look)
    assert [category.region for category in found.bank.categories] == [region] * 2
    assert np.array_equal(found.bank.vectors, bundle.bank.vectors)


def test_what_is_not_asked_for_stays_as_the_bank_has_it(bundle: Bundle) -> None:
    look = Look("crop", 0.1, True)
    own = replace(bundle, bank=replace(bundle.bank, look=look, categories=(SLEEVE, replace(GENDER, region="head"))))
    found = variant_from("margin=0.2", own).bank
    assert found.look == replace(look, margin=0.2)
    assert [category.region for category in found.categories] == ["whole", "head"]
    assert variant_from("flip=no", own).bank.look == replace(look, flip=False)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "--compare : ''.*KEY=VALUE, KEY being one of square, margin, flip, region, phrases, prompts, bank"),
        ("squash", "'squash'.*KEY=VALUE"),
        ("sqare=pad", "'sqare=pad'.*did you mean square"),
        ("square=", "'square='.*KEY=VALUE"),
        ("square=pad,", "''.*KEY=VALUE"),
        ("name:", "KEY=VALUE"),
        ("a: b: c", "KEY=VALUE"),
        ("square=round", "expected pad or squash or crop, got round"),
        ("square=pad,square=crop", "square twice"),
        ("margin=wide", "margin=wide.*wide"),
        ("margin=nan", "margin is from -0.3 to 1"),
        ("margin=1.01", "margin is from -0.3 to 1"),
        ("margin=-0.31", "margin is from -0.3 to 1"),
        ("flip=1", "flip: expected yes or no, got 1"),
        ("region=hand", "expected whole or head or upper or lower or feet, got hand"),
        ("phrases=first", "phrases: expected phrases=first, beside prompts=FILE"),
        ("phrases=all,prompts=x.toml", "phrases: expected phrases=first"),
        ("bank=a.npz,prompts=b.toml", "bank and prompts: expected one of them"),
        ("prompts=none.toml", "none.toml"),
    ],
)
def test_variants_that_are_none(bundle: Bundle, spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        variant_from(spec, bundle)
    assert "\n" not in str(caught.value)


def test_a_bank_from_a_file(bundle: Bundle, tmp_path: Path) -> None:
    other = replace(bank(seed=9), look=Look("squash"))
    (tmp_path / "other.npz").write_bytes(other.to_bytes())
    found = variant_from(f"tuned: bank={tmp_path / 'other.npz'},flip=yes", bundle)
    assert found.name == "tuned"
    assert np.array_equal(found.bank.vectors, other.vectors)
    assert found.bank.look == Look("squash", 0.0, True)
    (tmp_path / "alien.npz").write_bytes(bank(image_sha256="f" * 64).to_bytes())
    with pytest.raises(BundleError, match=r"alien\.npz: its words were embedded for another encoder"):
        variant_from(f"bank={tmp_path / 'alien.npz'}", bundle)
    with pytest.raises(BundleError, match=r"none\.npz: No such file"):
        variant_from(f"bank={tmp_path / 'none.npz'}", bundle)
    (tmp_path / "torn.npz").write_bytes(other.to_bytes()[:-1])
    with pytest.raises(BundleError, match=r"torn\.npz: damaged"):
        variant_from(f"bank={tmp_path / 'torn.npz'}", bundle)


# --- who may judge ----------------------------------------------------------------------------------------------------


def variants(*fits: Fit) -> list[Variant]:
    return [Variant("as it is", bank()), Variant("tuned", replace(bank(), fits=fits))]


def test_who_judges() -> None:
    labelled = a_set("abcdefgh", gender=["male", "female"] * 4)
    half = labelled.half()
    assert half.any()
    assert not half.all()
    everybody, learned = np.ones(8, bool), replace(CALIBRATED, sha256="6" * 64)
    cases = [
        ([], True, everybody),
        ([], False, ~half),
        ([CALIBRATED], True, ~half),
        ([CALIBRATED], False, ~half),
        ([learned], True, ~half),  # of other labels, of the same people perhaps
        ([replace(learned, everyone=True)], True, ~half),
    ]
    for fits, both, wanted in cases:
        assert people_judged(labelled, variants(*fits), both).tolist() == wanted.tolist()
    for fits in ([replace(CALIBRATED, everyone=True)], [CALIBRATED, replace(CALIBRATED, how="adapted", everyone=True)]):
        with pytest.raises(ConfigError, match=rf"the set: tuned: the bank was {fits[-1].how} on all of these people"):
            people_judged(labelled, variants(*fits), True)
    assert people_of(labelled, half) + people_of(labelled, ~half) == 8
    assert people_of(a_set("aab", gender=["male"] * 3), np.array([True, True, False])) == 1


def test_one_person_can_judge_words_and_not_what_was_learned() -> None:
    for name in "abcdef":
        labelled = a_set([name], gender=["male"])
        assert people_judged(labelled, variants(), True).all()
        if labelled.half().all():
            with pytest.raises(ConfigError, match=r"too few people to judge by: expected two or more, got 1"):
                people_judged(labelled, variants(CALIBRATED), True)


# --- vectors in the place of pictures ---------------------------------------------------------------------------------


def test_vectors_alone_are_enough_for_the_words_look(bundle: Bundle) -> None:
    vectors = unit_rows(3, DIM)
    seen = Seen(of_vectors(vectors, bundle.manifest.seal()), bundle)
    assert np.array_equal(seen.vectors([View(bundle.bank.look)])["whole"], vectors)
    assert seen.ms([View(bundle.bank.look)]) == 0
    assert not seen.heights.any()
    found = score(Variant("v", bundle.bank), of_vectors(vectors, bundle.manifest.seal()), np.ones(3, bool), seen, SCALE)
    assert found.categories[0].by_height == ()


def test_the_look_may_be_spelled_out(bundle: Bundle) -> None:
    """A bank without a square of its own takes the bundle's."""
    seen = Seen(of_vectors(unit_rows(3, DIM), bundle.manifest.seal()), bundle)
    assert len(seen.vectors([View(Look(bundle.manifest.encoder.square))])["whole"]) == 3


@pytest.mark.parametrize(
    "view", [View(Look("squash")), View(Look(margin=0.1)), View(Look(flip=True)), View(Look(), "head")]
)
def test_vectors_say_nothing_of_another_look(bundle: Bundle, view: View) -> None:
    seen = Seen(of_vectors(unit_rows(3, DIM), bundle.manifest.seal()), bundle)
    with pytest.raises(ConfigError, match=r"the set: no pictures.*label pictures of people to try this"):
        seen.vectors([View(Look()), view])


def test_vectors_of_another_encoder_are_refused(bundle: Bundle) -> None:
    other = manifest(name="other").seal()
    with pytest.raises(ConfigError, match=rf"embeddings\.npz: made by another bundle's encoder.*got {other[:12]}"):
        Seen(of_vectors(unit_rows(3, DIM), other), bundle)


def test_the_bank_under_a_bundle_is_no_part_of_its_seal(tmp_path: Path) -> None:
    """New words do not make the vectors that a box sent worthless."""
    folder = write_bundle(tmp_path / "bundle")
    before = open_bundle(folder)
    (folder / PROMPTS).write_bytes(bank(seed=5).to_bytes())
    Seen(of_vectors(unit_rows(3, DIM), before.manifest.seal()), open_bundle(folder))
