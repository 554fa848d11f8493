"""CLIP's byte-pair encoding, run by the `tokenizers` library on OpenAI's merges file.

Texts are cleaned as CLIP cleans them (HTML entities, white space, lower case), except that mojibake is not repaired
and Unicode not normalised: the original's `ftfy` step is left out, and a phrase is tokenised as it was typed.
CLIP's start and end markers, spelled out inside a phrase, are ordinary characters here.
"""

from __future__ import annotations

import gzip
import html
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edge.errors import ConfigError, ModelError

Tokens: TypeAlias = npt.NDArray[np.int64]

CONTEXT = 77  # tokens in a row of the text tower's input, start and end among them
START, END = 49406, 49407
_MERGES = END + 1 - 2 - 2 * 256  # what is left of the ids: 256 bytes, 256 bytes ending a word, the two markers
_FILE_LIMIT = 16 << 20  # bytes unpacked; the real one has 3.2 million
_WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of anything else: how CLIP (after GPT-2) cuts a text into words.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns phrases into the text tower's input.

    `vocab` is OpenAI's bpe_simple_vocab_16e6.txt.gz; ModelError if it is missing or damaged. ConfigError where the
    package tokenizers is missing: a box, which only builds engines, has none.
    """

    def __init__(self, vocab: Path) -> None:
        try:
            import tokenizers
            from tokenizers import models, pre_tokenizers
        except ModuleNotFoundError as error:
            remedy = "python -m pip install tokenizers; a box gets prompts.npz from where words are embedded"
            raise ConfigError("words are embedded with the package tokenizers: not here", remedy=remedy) from error
        merges = _merges(vocab)
        symbols = [*_bytes(), *(byte + _WORD_END for byte in _bytes()), *(left + right for left, right in merges)]
        ids = {symbol: number for number, symbol in enumerate(symbols)}
        self._bpe = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix=_WORD_END))
        words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def encode(self, texts: Sequence[str]) -> Tokens:
        """(n, 77) int64: start, the phrase, end, zeros. ConfigError with the phrase that is too long or no text."""
        tokens = np.zeros((len(texts), CONTEXT), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._ids(text)
            if len(ids) > CONTEXT:
                raise ConfigError(
                    f"the phrase {text!r} is too long", expected=f"at most {CONTEXT} tokens", got=len(ids)
                )
            row[: len(ids)] = ids
        return tokens

    def _ids(self, text: str) -> list[int]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"the phrase {text!r} is no text", expected="no unpaired surrogates")
        cleaned = " ".join(html.unescape(html.unescape(text)).split()).lower()  # twice, as the original: &amp;lt;
        return [START, *self._bpe.encode(cleaned, add_special_tokens=False).ids, END]


def _bytes() -> list[str]:
    """A printable character for each of the 256 bytes, in the vocabulary's order (GPT-2's byte-level alphabet).

    First the bytes that are printable in Latin-1, as themselves; then the other 68 as U+0100, U+0101 and so on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in (*printable, *range(0x100, 0x100 + 256 - len(printable)))]


def _merges(vocab: Path) -> list[tuple[str, str]]:
    """The 48894 merges in order; each must join two symbols known by then into a new one."""
    try:
        with gzip.open(vocab) as file:
            data = file.read(_FILE_LIMIT + 1)
        lines = data.decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ModelError(f"{vocab}: no gzipped merges file: {error}") from error
    if len(data) > _FILE_LIMIT:
        raise ModelError(f"{vocab}: unpacks to more than {_FILE_LIMIT} bytes")
    if "#version" not in lines[0] or len(lines) <= _MERGES:
        expected = f"a line with #version and {_MERGES} merges"
        raise ModelError(f"{vocab}: no merges file", expected=expected, got=f"{len(lines)} lines, {lines[0][:40]!r}")
    merges: list[tuple[str, str]] = []
    known: set[str] = {symbol for byte in _bytes() for symbol in (byte, byte + _WORD_END)}
    for number, line in enumerate(lines[1 : _MERGES + 1], start=2):  # the rest of the file is not CLIP's
        match line.split():
            case [left, right] if left in known and right in known and left + right not in known:
                merges.append((left, right))
                known.add(left + right)
            case _:
                raise ModelError(
                    f"{vocab}: line {number}", expected="two known symbols that make a new one", got=repr(line[:80])
                )
    return merges
