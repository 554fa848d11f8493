"""Stored people are asked as the box would ask them: the counts, means and examples of plain arithmetic, one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collector.search import Asked, ask_store, report_asked
from collector.store import Store
from edge.bank import PromptBank
from edge.bundle import IMAGE, Bundle
from edge.errors import ConfigError
from edge.events import Event
from edge.values import Category
from tests.fakes import ENCODER_FACTS, bank, manifest, unit_rows
from tests.unit.test_labelling import add, person, seen

SEAL, DIM, SCALE = manifest().seal(), ENCODER_FACTS.dim, ENCODER_FACTS.logit_scale
HAT = Category(
    "hat", "hat of this person is", ("cap", "helmet", "none"), ("Kappe", None, None), threshold=0.6, temperature=30.0
)
SHOES = Category("shoes", "shoes of this person are", ("red", "blue"), (None, None), region="feet")
AGE = Category("age", "age of this person is", ("old", "young"), (None, None), sensitive=True)
BAG = Category("bag", "bag of this person is", ("big", "small"), (None, None), temperature=30.0, bias=(0.5, -0.5))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db", create=True) as store:
        yield store


def words(*categories: Category) -> PromptBank:
    vectors = unit_rows(sum(len(category.options) for category in categories), DIM, seed=5)
    return replace(bank(), categories=categories, vectors=vectors)


def bundle(*categories: Category) -> Bundle:
    return Bundle(Path("engines/fake"), manifest(), words(*categories))


def street() -> list[Event]:
    """40 events: in each two passers-by, and one of four people who stay; one event of another bundle, one of a lie."""
    events = [
        seen(seq, person(), person(track=seq % 4, looks=40 - seq), person(), bundle=SEAL, dim=DIM) for seq in range(40)
    ]
    return [*events, seen(50, person(), bundle="another", dim=DIM), seen(51, person(), bundle=SEAL, dim=DIM + 1)]


def by_hand(events: list[Event], category: Category, vectors: np.ndarray) -> tuple[dict[str, list[tuple]], int]:
    """Option -> (probability, seq, number) of all of whom it is the best, the surest first; how many are unknown."""
    last: dict[object, tuple[int, int, np.ndarray]] = {}
    for event in events:
        for number, one in enumerate(event.header.people):
            who = (event.header.seq, number) if one.track is None else one.track
            last[who] = (event.header.seq, number, event.embeddings[number].astype(np.float64))
    found: dict[str, list[tuple]] = {option: [] for option in category.options}
    unknown = 0
    for seq, number, vector in last.values():
        logits = SCALE * vectors.astype(np.float64) @ vector / category.temperature + np.array(category.bias or 0.0)
        powers = np.exp(logits - logits.max())
        best = int(powers.argmax())
        if (top := powers[best] / powers.sum()) < category.threshold:
            unknown += 1
        else:
            found[category.options[best]].append((top, seq, number))
    return {option: sorted(people, key=lambda one: (-one[0], -one[1])) for option, people in found.items()}, unknown


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_it_counts_what_plain_arithmetic_counts(store: Store, rows: int) -> None:
    events = street()
    add(store, *events)
    asked = ask_store(store, bundle(HAT, BAG), None, (), rows)
    assert (asked.people, asked.others, asked.left_out, asked.bank) == (84, 2, (), words(HAT, BAG).sha256)
    assert [answered.category for answered in asked.answers] == [HAT, BAG]
    vectors = words(HAT, BAG).vectors
    for answered, these in zip(asked.answers, (vectors[:3], vectors[3:]), strict=True):
        expected, unknown = by_hand(events[:40], answered.category, these)
        assert (answered.unknown, unknown > 0) == (unknown, answered.category is HAT)
        for found, label in zip(answered.options, answered.category.labels, strict=True):
            people = expected[found.option]
            assert (found.people, found.label) == (len(people), label)
            assert found.probability == pytest.approx(np.mean([one[0] for one in people]), abs=1e-5)
            places = [(one.sighting.place.seq, one.sighting.place.number) for one in found.examples]
            assert places == [(seq, number) for _, seq, number in people[:3]]
            assert [one.probability for one in found.examples] == pytest.approx(
                [one[0] for one in people[:3]], abs=1e-5
            )
    assert sum(found.people for found in asked.answers[1].options) == 84


def test_nobody_and_one(store: Store) -> None:
    asked = ask_store(store, bundle(BAG), None, ())
    assert (asked.people, asked.others) == (0, 0)
    assert [(found.people, found.probability, found.examples) for found in asked.answers[0].options] == [
        (0, None, ())
    ] * 2
    add(store, seen(0, person(track=3), bundle=SEAL, dim=DIM))
    (answered,) = ask_store(store, bundle(BAG), None, ()).answers
    assert sorted(found.people for found in answered.options) == [0, 1]
    assert [example.sighting.person.track for found in answered.options for example in found.examples] == [3]


def test_only_people_of_this_encoder_can_be_asked(store: Store) -> None:
    add(store, seen(0, person(), person(), bundle="another", dim=DIM))
    with pytest.raises(
        ConfigError, match=f"events of encoder {manifest().files[IMAGE][:12]}, got 2 people of others; name the bundle"
    ):
        ask_store(store, bundle(BAG), None, ())


def test_a_bundle_built_anew_asks_the_people_of_its_encoder_still(store: Store) -> None:
    """New words or another detector are another bundle; what the embeddings are is the image encoder's."""
    one = seen(0, person(), bundle="built before", dim=DIM)
    header = one.header.model_copy(update={"encoder": manifest().files[IMAGE]})
    add(store, Event(header, one.embeddings, one.crops))
    assert ask_store(store, bundle(BAG), None, ()).people == 1


def test_what_may_not_or_cannot_be_asked_is_left_out_with_the_reason(store: Store) -> None:
    add(store, seen(0, person(), bundle=SEAL, dim=DIM))
    asked = ask_store(store, bundle(AGE, SHOES, BAG), None, ())
    assert [answered.category for answered in asked.answers] == [BAG]
    assert asked.left_out == (
        ("age", "sensitive: --sensitive 'age' asks it"),
        ("shoes", "looks at feet, of which no vector is stored"),
    )
    alone = ask_store(store, Bundle(Path("x"), manifest(), words(AGE, SHOES, BAG)), None, ("age",))
    assert [answered.category for answered in alone.answers] == [AGE, BAG]
    for categories, says in (((AGE, SHOES), "'age' sensitive: .*; 'shoes' looks at feet"), ((SHOES,), "looks at feet")):
        with pytest.raises(ConfigError, match=f"no question that stored people can be asked: got .*{says}"):
            ask_store(store, bundle(*categories), None, ())
    with pytest.raises(ConfigError, match="--sensitive: the words have no category 'ages': expected 'age' or 'bag'"):
        ask_store(store, bundle(AGE, BAG), None, ("ages",))


def told(asked: Asked, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report_asked(asked, as_json=True)
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_time_that_cannot_be_believed_is_marked(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    one = seen(0, person(), bundle=SEAL, dim=DIM)
    add(store, Event(one.header.model_copy(update={"clock": "unsynchronised"}), one.embeddings, one.crops))
    asked = ask_store(store, bundle(replace(HAT, threshold=0.0)), None, ())
    report_asked(asked, as_json=False)
    assert "2023-11-14T22:13:20.000+00:00 (clock not set)  box" in capsys.readouterr().out
    assert '"clock": "unsynchronised"' in json.dumps(told(asked, capsys))


def test_it_is_told_to_people_and_to_programs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add(store, seen(0, person(track=3), bundle=SEAL, dim=DIM, camera="d\x1b[2J"), seen(1, person(), dim=DIM))
    sure = replace(HAT, threshold=0.0)
    asked = ask_store(store, bundle(sure, AGE), None, ())
    (best,) = (found for found in asked.answers[0].options if found.people)
    report_asked(asked, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "1 people asked, 1 more of another encoder",
        "left out: age: " + asked.left_out[0][1],
        "",
        "hat",
    ]
    percent = f"{100 * best.examples[0].probability:.0f}"
    assert f"  {best.option:6}          1  100.0 %  mean {percent} %" in lines
    assert f"      {percent:>3} %  box/d?[2J  2023-11-14T22:13:20.000+00:00  box 1 2 30 40" in lines
    assert sum("0.0 %" in line for line in lines) == 3, "and the others are there with nobody"
    answer = told(asked, capsys)
    assert (answer["people"], answer["other_encoders"], answer["left_out"][0]["category"]) == (1, 1, "age")
    (hat,) = answer["categories"]
    assert (hat["category"], hat["question"], hat["unknown"]) == ("hat", HAT.question, 0)
    (option,) = (option for option in hat["options"] if option["people"])
    assert option["share"] == 1
    assert option["examples"][0] == {
        "device": "box", "epoch": 7, "seq": 0, "number": 0, "camera": "d\x1b[2J", "captured_at": 1.7e9, "clock": None,
        "box": [1, 2.4, 30, 40], "track": 3, "probability": option["probability"],
    }  # fmt: skip


def test_what_is_not_to_be_believed_is_told_apart(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add(store, seen(0, person(), bundle=SEAL, dim=DIM))
    asked = ask_store(store, bundle(replace(HAT, threshold=1.0, temperature=1000.0)), None, ())
    assert [found.people for found in asked.answers[0].options] == [0, 0, 0]
    report_asked(asked, as_json=False)
    assert "hat (1 unknown)" in capsys.readouterr().out.splitlines()
