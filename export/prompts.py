"""The words: prompts/*.toml, and their vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from edge.backend import Session, open_session
from edge.bank import MAX_MARGIN, MIN_MARGIN, Look, PromptBank, SquareMode
from edge.bundle import IMAGE, TEXT, VOCABULARY, Bundle, EncoderFacts
from edge.config import Settings, read_toml, repeated
from edge.errors import ConfigError, LookoutError
from edge.values import Category, Floats, Region
from export.tokenizer import Tokenizer, Tokens

_BATCH = 64  # phrases in one run of the text tower
Words = Annotated[str, Field(min_length=1, max_length=1000)]


class OptionPrompts(Settings):
    """One possible answer, said in several ways."""

    name: Words
    label: Words | None = Field(default=None, description="the name in a second language")
    phrases: tuple[str, ...] = Field(min_length=1, strict=False, description="their vectors are averaged: an ensemble")


class CategoryPrompts(Settings):
    """One [[category]]: a question and its options."""

    name: Words
    question: Words = Field(description="how a report begins: 'gender of this person is'")
    sensitive: bool = Field(default=False, description="answered only where the box's [match] sensitive names it")
    region: Region = Field(default="whole", description="the part of the box that is looked at")
    option: tuple[OptionPrompts, ...] = Field(strict=False)


class LookPrompts(Settings):
    """[look]: how a person becomes the picture that the encoder sees."""

    square: SquareMode | None = Field(default=None, description="as in the recipe, which it overrides")
    margin: float = Field(
        default=0.0,
        ge=MIN_MARGIN,
        le=MAX_MARGIN,
        description="added on each side, as a share of the box's width and height; less than 0 cuts off",
    )
    flip: bool = Field(default=False, description="look at the mirror image too, at twice the cost")


class Prompts(Settings):
    """prompts/*.toml."""

    look: LookPrompts = LookPrompts()
    category: tuple[CategoryPrompts, ...] = Field(min_length=1, strict=False)


def read_prompts(path: Path) -> Prompts:
    """Raises ConfigError with file, category and phrase: fewer than two options, a duplicate, an empty phrase."""
    prompts = read_toml(path, Prompts)
    for twice in repeated(category.name for category in prompts.category):
        raise ConfigError(f"{path}: two categories are named {twice!r}")
    for category in prompts.category:
        where = f"{path}: category {category.name!r}"
        if len(category.option) < 2:
            raise ConfigError(f"{where}: too few options", expected="two or more", got=len(category.option))
        for twice in repeated(option.name for option in category.option):
            raise ConfigError(f"{where}: two options are named {twice!r}")
        for option in category.option:
            if any(not phrase.strip() for phrase in option.phrases):
                raise ConfigError(f"{where}: option {option.name!r} has an empty phrase")
        for twice in repeated(
            " ".join(phrase.lower().split()) for option in category.option for phrase in option.phrases
        ):
            raise ConfigError(f"{where}: the phrase {twice!r} stands twice")
    return prompts


def embed_prompts(path: Path, bundle: Bundle, *, first_phrase: bool = False) -> PromptBank:
    """The bank of one prompt file for this bundle. Raises ConfigError, ModelError, BackendError.

    first_phrase: each option by its first phrase alone, to see what the others are worth.
    """
    prompts = read_prompts(path)
    if first_phrase:
        prompts = _first_phrases(prompts)
    tokens = prompt_tokens(path, prompts, Tokenizer(bundle.file(VOCABULARY)))
    return bank_in(bundle.path, path.name, prompts, tokens, bundle.manifest.files, bundle.manifest.encoder)


def bank_in(
    folder: Path, source: str, prompts: Prompts, tokens: Tokens, sha256s: Mapping[str, str], facts: EncoderFacts
) -> PromptBank:
    """The bank by the text tower that lies in `folder`.

    sha256s: of the files there. facts: of their image encoder. The others, and what is raised: see `bank_from_prompts`.
    """
    with open_session(folder / TEXT) as text:
        sums = {"text_sha256": sha256s[TEXT], "image_sha256": sha256s[IMAGE]}
        return bank_from_prompts(source, prompts, tokens, text, facts.square, **sums)


def bank_from_prompts(
    source: str,
    prompts: Prompts,
    tokens: Tokens,
    text: Session,
    square: SquareMode,
    *,
    text_sha256: str,
    image_sha256: str,
) -> PromptBank:
    """Embed the words: an option's vector is the renormalised mean of its phrases' unit vectors.

    source: the prompt file's name. tokens: (p, 77), what `prompt_tokens` made of the prompts. text: a session of
    text.onnx. square: the bundle's, where the prompts name none. Raises BackendError.
    """
    runs = [text.run({"tokens": tokens[i : i + _BATCH]})["embedding"] for i in range(0, len(tokens), _BATCH)]
    embeddings: Floats = np.concatenate(runs)  # (p, d)
    counts = [len(option.phrases) for category in prompts.category for option in category.option]
    means = np.stack([part.mean(axis=0) for part in np.split(embeddings, np.cumsum(counts)[:-1])])  # (m, d)
    vectors = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    categories = tuple(
        Category(
            c.name, c.question, tuple(o.name for o in c.option), tuple(o.label for o in c.option), c.sensitive, c.region
        )
        for c in prompts.category
    )
    look = Look(prompts.look.square or square, prompts.look.margin, prompts.look.flip)
    return PromptBank(categories, vectors, text_sha256, image_sha256, source, look)


def _first_phrases(prompts: Prompts) -> Prompts:
    def shortened(category: CategoryPrompts) -> CategoryPrompts:
        options = tuple(one.model_copy(update={"phrases": one.phrases[:1]}) for one in category.option)
        return category.model_copy(update={"option": options})

    return prompts.model_copy(update={"category": tuple(map(shortened, prompts.category))})


def prompt_tokens(path: Path, prompts: Prompts, tokenizer: Tokenizer) -> Tokens:
    """(p, context) int64, all phrases in order. Raises ConfigError for a phrase of too many tokens."""
    rows = []
    for category in prompts.category:
        for option in category.option:
            try:
                rows.append(tokenizer.encode(option.phrases))
            except LookoutError as error:
                where = f"{path}: category {category.name!r}: option {option.name!r}"
                raise ConfigError(f"{where}: {error.what}", expected=error.expected, got=error.got) from error
    return np.concatenate(rows)
