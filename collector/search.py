"""Old people, new questions: the stored vectors against words that no box was asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from collector.people import Keys, Sighting
from collector.report import when
from collector.stats import harmless
from collector.store import Store
from edge.bank import PromptBank
from edge.bundle import IMAGE, Bundle
from edge.errors import ConfigError
from edge.match import match
from edge.values import Category, Floats, columns_of

ROWS = 4096  # people in memory at once
EXAMPLES = 3  # of each option


@dataclass(frozen=True, eq=False)
class Example:
    """Somebody of whom an option is probable, 0..1."""

    sighting: Sighting
    probability: float


@dataclass(frozen=True, eq=False)
class Found:
    """An option, and of whom it is the best: how many, their mean probability (None of nobody), the surest of them."""

    option: str
    label: str | None
    people: int
    probability: float | None
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Answered:
    """A category's options in their order; unknown: people of whom even the best is not to be believed."""

    category: Category
    unknown: int
    options: tuple[Found, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """What came of it. people: who was asked. others: whose vectors another encoder made. left_out: category, why."""

    bank: str
    people: int
    others: int
    left_out: tuple[tuple[str, str], ...]
    answers: tuple[Answered, ...]


def ask_store(store: Store, bundle: Bundle, prompts: Path | None, sensitive: Sequence[str], rows: int = ROWS) -> Asked:
    """Ask all people of this bundle's encoder, each track once: its last event, whose vector is the track's mean.

    prompts: the words; None: the bundle's own, with what was learned for them. sensitive: categories marked so that
    are asked all the same. Only questions about the whole person can be: of the parts no vector is stored. How the
    stored people were looked at (margin, square, flip) cannot be known; a look that the words name changes nothing.
    rows: of people in memory at once.

    Raises ConfigError: no such category in `sensitive`, no question that can be asked, nobody of this encoder where
    there are others; and what reading and embedding the words raise.
    """
    words = bundle.bank if prompts is None else embedded(prompts, bundle)
    bank, left_out = _askable(words, sensitive)
    facts = bundle.manifest
    names = (facts.files[IMAGE], facts.seal())
    tallies = [_Tally(category) for category in bank.categories]
    people = 0
    with store.snapshot():
        for keys, vectors in store.people.vectors(names, facts.encoder.dim, rows):
            people += len(keys)
            found = match({"whole": vectors.astype(np.float32)}, bank, facts.encoder.logit_scale)
            for tally, (_, columns) in zip(tallies, columns_of(bank.categories), strict=True):
                tally.add(keys, found.probabilities[:, columns])
        others = store.people.count() - people
        if others and not people:
            raise ConfigError(
                f"store {store.path}: nobody was seen by the encoder of {bundle.path}",
                expected=f"events of encoder {names[0][:12]}",
                got=f"{others} people of others",
                remedy="name the bundle that the boxes run",
            )
        answers = tuple(tally.answered(store) for tally in tallies)
    return Asked(words.sha256, people, others, left_out, answers)


def embedded(prompts: Path, bundle: Bundle) -> PromptBank:
    """The words as vectors, by the bundle's text tower.

    The one import from export: how words become vectors is written once, and the collector needs it here only.
    """
    try:
        from export.prompts import embed_prompts
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"to embed {prompts} needs the package {missing.name}",
            got="none",
            remedy="python -m pip install 'lookout[export]'",
        ) from missing
    return embed_prompts(prompts, bundle)


def permitted(bank: PromptBank, sensitive: Sequence[str]) -> PromptBank:
    """The bank without its sensitive categories, but for those named. Raises ConfigError: no such category."""
    names = [category.name for category in bank.categories]
    for name in sensitive:
        if name not in names:
            expected = " or ".join(map(repr, names))
            raise ConfigError(f"--sensitive: the words have no category {name!r}", expected=expected)
    return bank.permitted(sensitive)


def _askable(bank: PromptBank, sensitive: Sequence[str]) -> tuple[PromptBank, tuple[tuple[str, str], ...]]:
    """The bank's questions that may and can be asked, and the others with the reason. Raises ConfigError."""
    may = permitted(bank, sensitive)
    allowed = {category.name for category in may.categories}
    names = [category.name for category in bank.categories if category.name not in allowed]
    left_out = [(name, f"sensitive: --sensitive '{name}' asks it") for name in names]
    parts = [category for category in may.categories if category.region != "whole"]
    left_out += [(part.name, f"looks at {part.region}, of which no vector is stored") for part in parts]
    rows = [category.region == "whole" for category in may.categories for _ in category.options]
    kept = tuple(category for category in may.categories if category.region == "whole")
    if not kept:
        reasons = "; ".join(f"{name!r} {why}" for name, why in left_out)
        raise ConfigError(f"{bank.source}: no question that stored people can be asked", got=reasons)
    return replace(may, categories=kept, vectors=may.vectors[np.array(rows, bool)]), tuple(left_out)


class _Tally:
    """Counts one category's answers, some people at a time."""

    def __init__(self, category: Category) -> None:
        options = len(category.options)
        self._category = category
        self._counts = np.zeros(options, np.int64)
        self._sums = np.zeros(options, np.float64)  # of the probabilities
        self._unknown = 0
        self._best = [(np.zeros(0, np.float64), np.zeros((0, 2), np.int64)) for _ in range(options)]

    def add(self, keys: Keys, probabilities: Floats) -> None:
        """keys: (k, 2). probabilities: (k, options)."""
        best: NDArray[np.intp] = probabilities.argmax(axis=1)
        top = probabilities[np.arange(len(best)), best].astype(np.float64)
        known = top >= self._category.threshold
        self._unknown += int((~known).sum())
        self._counts += np.bincount(best[known], minlength=len(self._counts))
        self._sums += np.bincount(best[known], weights=top[known], minlength=len(self._counts))
        for option, (surest, places) in enumerate(self._best):
            these = known & (best == option)
            values, found = np.concatenate([surest, top[these]]), np.concatenate([places, keys[these]])
            order = np.lexsort((found[:, 1], -found[:, 0], -values))[:EXAMPLES]  # of equally sure ones the newest
            self._best[option] = values[order], found[order]

    def answered(self, store: Store) -> Answered:
        """What it came to; within a snapshot."""
        options = []
        for i, (option, label) in enumerate(zip(self._category.options, self._category.labels, strict=True)):
            people = int(self._counts[i])
            seen = [(store.people.sighting(key), value) for value, key in zip(*self._best[i], strict=True)]
            examples = tuple(Example(one, float(value)) for one, value in seen if one is not None)
            options.append(Found(option, label, people, self._sums[i] / people if people else None, examples))
        return Answered(self._category, self._unknown, tuple(options))


def report_asked(asked: Asked, as_json: bool) -> None:
    """Each category as a table, or all as one JSON object."""
    if as_json:
        click.echo(json.dumps(_as_json(asked), ensure_ascii=False))
        return
    click.echo(
        f"{asked.people:,} people asked" + (f", {asked.others:,} more of another encoder" if asked.others else "")
    )
    for name, why in asked.left_out:
        click.echo(f"left out: {harmless(name)}: {harmless(why)}")
    for answered in asked.answers:
        unknown = f" ({answered.unknown:,} unknown)" if answered.unknown else ""
        click.echo(f"\n{answered.category.name}{unknown}")
        width = max(len(found.option) for found in answered.options)
        for found in answered.options:
            mean = "" if found.probability is None else f"  mean {100 * found.probability:.0f} %"
            share = found.people / max(asked.people, 1)
            click.echo(f"  {found.option:{width}}  {found.people:>9,}  {100 * share:>5.1f} %{mean}")
            for example in found.examples:
                one = example.sighting
                box = " ".join(f"{edge:.0f}" for edge in one.person.box)
                where = harmless(f"{one.place.device}/{one.camera}")
                click.echo(
                    f"      {100 * example.probability:3.0f} %  {where}  {when(one.captured_at, one.clock)}  box {box}"
                )


def _as_json(asked: Asked) -> dict[str, object]:
    return {
        "bank": asked.bank,
        "people": asked.people,
        "other_encoders": asked.others,
        "left_out": [{"category": name, "reason": why} for name, why in asked.left_out],
        "categories": [
            {
                "category": answered.category.name,
                "question": answered.category.question,
                "unknown": answered.unknown,
                "options": [
                    {
                        "option": found.option,
                        "label": found.label,
                        "people": found.people,
                        "share": found.people / max(asked.people, 1),
                        "probability": found.probability,
                        "examples": [
                            {
                                **example.sighting.place._asdict(),
                                "camera": example.sighting.camera,
                                "captured_at": example.sighting.captured_at,
                                "clock": example.sighting.clock,
                                "box": example.sighting.person.box,
                                "track": example.sighting.person.track,
                                "probability": example.probability,
                            }
                            for example in found.examples
                        ],
                    }
                    for found in answered.options
                ],
            }
            for answered in asked.answers
        ],
    }
