"""From a data set's own words to the bank's options: the model of configs/labels-*.toml."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edge.config import Settings, read_toml, repeated
from edge.errors import ConfigError
from edge.values import Category

Word = Annotated[str, Field(min_length=1, max_length=1000)]


class OptionWords(Settings):
    """One option, and when it is true of a row."""

    name: Word = Field(description="the option as the prompt file names it")
    any: tuple[Word, ...] = Field(default=(), strict=False, description="true when one of these is among the words")
    none: tuple[Word, ...] = Field(default=(), strict=False, description="true when none of these is among the words")

    def holds(self, words: Collection[str]) -> bool:
        """Whether this option is true of a row with these words; where `any` and `none` both stand, both must hold."""
        return (not self.any or any(word in words for word in self.any)) and not any(
            word in words for word in self.none
        )


class CategoryWords(Settings):
    """One [[category]]: a row counts where exactly one of its options is true."""

    name: Word = Field(description="the category as the prompt file names it")
    option: tuple[OptionWords, ...] = Field(min_length=1, strict=False, description="its options")

    def option_of(self, words: Collection[str]) -> str | None:
        """The one option that is true of a row with these words; None where several are, or none is."""
        true = [option.name for option in self.option if option.holds(words)]
        return true[0] if len(true) == 1 else None


class LabelMap(Settings):
    """configs/labels-*.toml."""

    category: tuple[CategoryWords, ...] = Field(min_length=1, strict=False, description="one [[category]] per question")

    @property
    def words(self) -> frozenset[str]:
        """Every word of the data set that an option asks for."""
        return frozenset(
            word for category in self.category for option in category.option for word in option.any + option.none
        )


def read_label_map(path: Path, categories: Sequence[Category]) -> LabelMap:
    """Read a map. categories: the bank's; categories of the map that are not among them stay unchecked.

    Raises ConfigError with file, category and option: two of one name, an option without words, one the bank has not.
    """
    mapping = read_toml(path, LabelMap)
    bank = {category.name: category.options for category in categories}
    for twice in repeated(category.name for category in mapping.category):
        raise ConfigError(f"{path}: two categories are named {twice!r}")
    for category in mapping.category:
        where = f"{path}: category {category.name!r}"
        for twice in repeated(option.name for option in category.option):
            raise ConfigError(f"{where}: two options are named {twice!r}")
        for option in category.option:
            if not option.any and not option.none:
                raise ConfigError(f"{where}: option {option.name!r} names no words", remedy="give it any or none")
            if category.name in bank:
                check_option(f"{where}: no such option in the bank", option.name, bank[category.name])
    return mapping


def check_option(what: str, got: str, options: Sequence[str]) -> None:
    """Raise ConfigError saying `what`, with the nearest of `options`, unless `got` is one of them."""
    if got not in options:
        raise ConfigError(what, expected=listed(options), got=repr(got), remedy=guess(got, options))


def listed(names: Iterable[str]) -> str:
    """'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def guess(got: str, known: Iterable[str]) -> str | None:
    """A remedy for a mistyped name; None where nothing is near."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None
