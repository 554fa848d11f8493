"""Token ids against CLIP's own, and every damaged vocabulary one ModelError."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import ConfigError, ModelError
from export.tokenizer import END, START, Tokenizer

VOCAB = Path("export/mini/bpe_simple_vocab_16e6.txt.gz")
REFERENCE = Path("tests/golden/clip-mini.reference.npz")

# From open_clip's SimpleTokenizer on the same vocabulary, with its ftfy step left out.
GOLDEN: list[tuple[str, list[int]]] = [
    ("", []),
    ("a photo of a man", [320, 1125, 539, 320, 786]),
    ("  A\tPhoto\n of   a PERSON ", [320, 1125, 539, 320, 2533]),
    (
        "it's they'RE don't we'd i'm she'll you've",
        [585, 568, 889, 982, 847, 713, 649, 1896, 328, 880, 1043, 1342, 592, 1200],
    ),
    ("12345 & 3rd: $5.00!", [272, 273, 274, 275, 276, 261, 274, 1973, 281, 259, 276, 269, 271, 271, 256]),
    ("Ben &amp;amp; Jerry&#39;s &lt;b&gt;", [3518, 261, 9164, 568, 283, 321, 285]),
    ("naïve café, Straße, İstanbul", [1097, 35689, 563, 15304, 267, 1894, 127, 253, 324, 267, 328, 16384, 11231]),
    (
        "Жёлтая куртка",
        [140, 114, 141, 239, 47611, 17875, 16912, 141, 493, 27152, 39729, 16370, 17875, 27152, 27080],
    ),
    ("黒いコートの人", [165, 119, 240, 33523, 3909, 111, 18584, 230, 21575, 21078, 374]),
    ("검은 모자", [35555, 222, 8276, 478, 36311, 101, 20849, 494]),
    ("👩\u200d👩\u200d👧 🇩🇪 😀!!", [26304, 26304, 964, 356, 21531, 12832, 748]),
    ("person’s “T-shirt”", [2533, 728, 503, 338, 728, 506, 339, 268, 2523, 728, 507]),
    ("''tis ½ ² Ⅷ ①", [8445, 7394, 33613, 41175, 158, 227, 371, 158, 239, 510]),
    ("e\u0301 é ﬁ Å", [324, 136, 479, 4166, 171, 105, 479, 127, 354]),  # not normalised: e + accent is not é
    ("\ufeff\u200bx\xadx", [171, 119, 123, 9844, 343, 22618, 343]),
    ("'ſ", [6, 129, 379]),
    ("<|endoftext|>", [27, 347, 40786, 4160, 91, 285]),  # ordinary characters
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB)


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_golden(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    tokens = tokenizer.encode([text])
    expected = [START, *ids, END]
    assert tokens.shape == (1, 77)
    assert tokens.dtype == np.int64
    assert tokens[0].tolist() == expected + [0] * (77 - len(expected))


def test_mini_reference(tokenizer: Tokenizer) -> None:
    with np.load(REFERENCE) as reference:
        tokens = tokenizer.encode([str(prompt) for prompt in reference["prompts"]])
        np.testing.assert_array_equal(tokens, reference["token_ids"])


def test_several_and_none(tokenizer: Tokenizer) -> None:
    texts = [text for text, _ in GOLDEN]
    together = tokenizer.encode(texts)
    np.testing.assert_array_equal(together, np.concatenate([tokenizer.encode([text]) for text in texts]))
    assert tokenizer.encode([]).shape == (0, 77)


def test_length(tokenizer: Tokenizer) -> None:
    fits = "red " * 75
    assert tokenizer.encode([fits])[0, -1] == END
    with pytest.raises(ConfigError) as caught:
        tokenizer.encode(["a man", fits + "hat"])
    assert (caught.value.expected, caught.value.got) == ("at most 77 tokens", 78)
    assert "red red hat' is too long" in str(caught.value)


def test_unpaired_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no text"):
        tokenizer.encode(["a \udc80 man"])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=15))  # of any script, it fits into 77 tokens
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    row = tokenizer.encode([text])[0]
    end = int(row.argmax())  # the text tower pools where the highest id is
    assert (row[0], row[end]) == (START, END)
    assert not row[end + 1 :].any()


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return gzip.decompress(VOCAB.read_bytes()).decode().split("\n")[:48895]


def refusal(folder: Path, data: bytes) -> str:
    path = folder / "vocab.txt.gz"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        Tokenizer(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def packed(lines: list[str]) -> bytes:
    return gzip.compress("\n".join(lines).encode(), 1)


def test_just_the_merges_are_enough(tmp_path: Path, lines: list[str], tokenizer: Tokenizer) -> None:
    (tmp_path / "vocab.txt.gz").write_bytes(packed(lines))
    texts = [text for text, _ in GOLDEN]
    np.testing.assert_array_equal(Tokenizer(tmp_path / "vocab.txt.gz").encode(texts), tokenizer.encode(texts))


@pytest.mark.parametrize(
    ("line", "text", "says"),
    [
        (0, "i n", "no merges file: expected a line with #version and 48894 merges"),
        (7, "", "line 8: expected two known symbols"),
        (7, "a", "line 8"),
        (7, "a b c", "line 8"),
        (7, "i n", "line 8"),  # a merge made before
        (7, "zebra n", "line 8: expected two known symbols that make a new one, got 'zebra n'"),
        (48894, "q qqqqq", "line 48895"),
    ],
)
def test_a_wrong_line(tmp_path: Path, lines: list[str], line: int, text: str, says: str) -> None:
    assert says in refusal(tmp_path, packed([*lines[:line], text, *lines[line + 1 :]]))


def test_other_files(tmp_path: Path, lines: list[str]) -> None:
    real = VOCAB.read_bytes()
    assert "48894 merges, got 48894 lines" in refusal(tmp_path, packed(lines[:-1]))
    assert "48894 merges, got 1 lines" in refusal(tmp_path, b"")
    assert "no gzipped merges file" in refusal(tmp_path, "\n".join(lines).encode())
    assert "no gzipped merges file" in refusal(tmp_path, real[: len(real) // 2])
    for at in (0, len(real) // 3, len(real) // 2, len(real) - 8):
        refusal(tmp_path, real[:at] + bytes([real[at] ^ 1]) + real[at + 1 :])
    assert "no gzipped merges file" in refusal(tmp_path, gzip.compress(b'"#version\n\xff\xff'))
    assert "unpacks to more than" in refusal(tmp_path, gzip.compress(bytes(32 << 20)))
    with pytest.raises(ModelError, match="No such file"):
        Tokenizer(tmp_path / "nowhere")
