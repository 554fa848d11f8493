"""Labelled sets: what is read, what is refused and in which words, and how a set is split."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge.values import Category
from export.label_map import LabelMap, read_label_map
from export.labels import LabelledSet, read_labels
from export.prompts import read_prompts

ROOT = Path(__file__).parents[2]
PETA = Path(__file__).parents[3] / "shared/data/peta-dev"
CARD = Path(__file__).parents[3] / "shared/models/mini/categories.json"  # the words behind each option, as trained on

HEADWEAR = Category("headwear", "headwear of this person is", ("hat", "no hat"), (None, None))
TOP = Category("top colour", "top colour of this person is", ("black", "white", "red, striped"), (None, None, None))
BANK = (HEADWEAR, TOP)

MAP = """
[[category]]
name = "headwear"
option = [ { name = "hat", any = ["cap", "bonnet"] }, { name = "no hat", none = ["cap", "bonnet", "scarf"] } ]
[[category]]
name = "top colour"
option = [ { name = "black", any = ["topBlack"] }, { name = "white", any = ["topWhite"] } ]
"""
ROWS: list[dict[str, object]] = [
    {"image": "a.png", "person": "anna", "labels": ["cap", "topBlack"]},
    {"image": "b.png", "person": "anna", "labels": ["topBlack", "topWhite"]},
    {"image": "c.png", "person": "bert", "labels": ["scarf", "topWhite", "shoes"], "camera": 7},
]
TABLE = "image,person,headwear,top colour\na.png,anna,hat,black\nb.png,bert,,white\n"


def a_set(
    folder: Path, table: str | bytes | None = None, rows: object = None, words: str | None = None, pictures: str = "abc"
) -> Path | None:
    """A folder with pictures a.png, b.png, c.png, whichever files are given, and the map's path where there is one."""
    folder.mkdir(exist_ok=True)
    for name in pictures:
        (folder / f"{name}.png").touch()
    if table is not None:
        (folder / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    if rows is not None:
        (folder / "labels.json").write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
    if words is None:
        return None
    path = folder.parent / "map.toml"
    path.write_text(words)
    return path


def refusal(folder: Path, mapping: Path | None = None, bank: Sequence[Category] = BANK) -> str:
    """The one line with which the set is refused, its folder left out."""
    with pytest.raises(ConfigError) as caught:
        read_labels(folder, bank, mapping)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{folder.parent}/", "")


def test_a_table(tmp_path: Path) -> None:
    a_set(tmp_path / "set", TABLE)
    found = read_labels(tmp_path / "set", BANK, None)
    assert (found.source, len(found)) == (tmp_path / "set", 2)
    assert (found.images, found.people) == (("a.png", "b.png"), ("anna", "bert"))
    assert found.labels == {"headwear": ("hat", None), "top colour": ("black", "white")}
    assert (found.vectors, found.encoder, found.skipped_categories, found.unseen_words) == (None, None, (), ())


def test_words_and_a_map(tmp_path: Path) -> None:
    mapping = a_set(tmp_path / "set", rows=ROWS, words=MAP)
    found = read_labels(tmp_path / "set", BANK, mapping)
    assert (found.images, found.people) == (("a.png", "b.png", "c.png"), ("anna", "anna", "bert"))
    # of b.png two options of the top are true, of c.png none of headwear
    assert found.labels == {"headwear": ("hat", "no hat", None), "top colour": ("black", None, "white")}
    assert found.unseen_words == ("bonnet",)


@pytest.mark.parametrize(
    "table",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n"),
        TABLE.rstrip("\n"),
        TABLE + ",,,\n ,\n",
        TABLE.replace(",", " , "),
        TABLE.replace("a.png", "./a.png").replace("b.png", '"b.png"'),
        "headwear,person,top colour,image\n,bert,white,b.png\nhat,anna,black,a.png\n",
        "image,notes,person,headwear,shoes,top colour\na.png,tall,anna,hat,red,black\nb.png,,bert,,boots,white\n",
    ],
)
def test_what_does_not_matter(tmp_path: Path, table: str) -> None:
    a_set(tmp_path / "plain", TABLE)
    a_set(tmp_path / "set", table)
    plain, found = (read_labels(tmp_path / name, BANK, None) for name in ("plain", "set"))
    assert found.sha256 == plain.sha256
    order = [found.images.index(image) for image in plain.images]
    assert plain.labels == {name: tuple(of[i] for i in order) for name, of in found.labels.items()}


def test_the_same_facts_in_both_forms_are_one_set(tmp_path: Path) -> None:
    a_set(tmp_path / "table", "image,person,headwear,top colour\nc.png,bert,,white\nb.png,anna,no hat,\n")
    mapping = a_set(tmp_path / "words", rows=ROWS[1:], words=MAP)
    assert read_labels(tmp_path / "table", BANK, None).sha256 == read_labels(tmp_path / "words", BANK, mapping).sha256


@pytest.mark.parametrize(
    ("before", "after"), [("a.png", "c.png"), ("anna", "bert"), (",hat", ",no hat"), ("bert,,", "bert,hat,")]
)
def test_another_picture_person_or_label_is_another_set(tmp_path: Path, before: str, after: str) -> None:
    a_set(tmp_path / "plain", TABLE)
    a_set(tmp_path / "set", TABLE.replace(before, after))
    plain, found = (read_labels(tmp_path / name, BANK, None) for name in ("plain", "set"))
    assert found.sha256 != plain.sha256


def test_categories_that_the_bank_does_not_ask_are_skipped_and_told(tmp_path: Path) -> None:
    a_set(tmp_path / "set", TABLE)
    found = read_labels(tmp_path / "set", (TOP,), None)
    assert (tuple(found.labels), found.skipped_categories) == (("top colour",), ("headwear",))
    mapping = a_set(tmp_path / "words", rows=ROWS, words=MAP)
    found = read_labels(tmp_path / "words", (TOP,), mapping)
    assert (tuple(found.labels), found.skipped_categories) == (("top colour",), ("headwear",))


def test_a_category_of_the_name_of_a_column_is_not_that_column(tmp_path: Path) -> None:
    a_set(tmp_path / "set", TABLE)
    found = read_labels(tmp_path / "set", (*BANK, Category("person", "this is", ("one", "two"), (None, None))), None)
    assert tuple(found.labels) == ("headwear", "top colour")


HEAD = "image,person,headwear\n"
BAD_TABLES: list[tuple[str | bytes, str]] = [
    ("", "set/labels.csv: no column 'image' in the first line: got nothing"),
    (HEAD, "set/labels.csv: an empty set: no row names a picture"),
    ("images,person,headwear\n", "no column 'image' in the first line: got 'images', 'person', 'headwear'; did you"),
    ("image,headwear,Person\n", "no column 'person' in the first line.*; did you mean 'Person'?"),
    ("image,hat\na.png,hat\n", "no column 'person' in the first line: got 'image', 'hat'"),
    ("image;person;headwear\na.png;anna;hat\n", "set/labels.csv: cells are parted by semicolons; save it with commas"),
    ("image\tperson\na.png\tanna\n", "set/labels.csv: cells are parted by tabs; save it with commas"),
    ("image,person,headwear,headwear\n", "set/labels.csv: column 4: a second 'headwear'"),
    ("image,person,headwear,\n", "set/labels.csv: column 4: has no name"),
    (
        HEAD + "a.png,anna,hta\n",
        "line 2: headwear: no such option: expected 'hat' or 'no hat', got 'hta'; did you mean",
    ),
    (HEAD + "a.png,anna,Sombrero\n", "line 2: headwear: no such option: expected 'hat' or 'no hat', got 'Sombrero'"),
    (HEAD + '"a\n.png",anna,\n\nb.png,bert,x\n', "set/labels.csv: line 5: headwear: no such option"),
    (HEAD + "a.png,anna,red, striped\n", "line 2: expected 3 cells, got 4 cells; put a cell that holds a comma in"),
    (HEAD + "a.png,anna\n", "set/labels.csv: line 2: expected 3 cells, got 2 cells"),
    (HEAD + 'a.png,"anna,hat\n', "set/labels.csv: line 2: not CSV: unexpected end of data"),
    (HEAD + 'a.png,"an"na,hat\n', "set/labels.csv: line 2: not CSV:"),
    (HEAD + "a.png,anna,hat\nb.png, ,hat\n", "line 3: blank person; give everybody a name"),
    (HEAD + ",anna,hat\n", "set/labels.csv: line 2: blank image"),
    (HEAD + "a.png,anna,hat\nb.png,bert,\n./a.png,cleo,\n", "line 4: image 'a.png' again; it stands in line 2"),
    (HEAD + "../a.png,anna,hat\n", "line 2: image: expected a path within the set's folder, .*, got '../a.png'"),
    (HEAD + "c/../../a.png,anna,hat\n", "line 2: image: expected a path within"),
    (HEAD + "/etc/a.png,anna,hat\n", "line 2: image: expected a path within the set's folder, .*, got '/etc/a.png'"),
    (HEAD + ".,anna,hat\n", "line 2: image: expected a path within"),
    (HEAD + "a.png,anna,hat\nx.png,bert,\ny.png,cleo,\n", "2 of 3 images are no files in .*set: line 3 names 'x.png'"),
    (HEAD + "a\0.png,anna,hat\n", "set/labels.csv: "),
    (HEAD + "a.png,anna,\nb.png,bert,\n", "set/labels.csv: no row has a label in any of 1 categories that the bank"),
    ("image,person\na.png,anna\n", "no category that the bank asks: expected 'headwear' or 'top colour', got none"),
    ("image,person,hats,shoes\na.png,anna,1,2\n", "set/labels.csv: no category .*, got 'hats', 'shoes'"),
    (HEAD.encode() + b"a.png,an\xf1a,hat\n", "set/labels.csv: line 2: not UTF-8 text: .*; save it as UTF-8"),
    (TABLE.encode("utf-16"), "set/labels.csv: line 1: not UTF-8 text"),
]


@pytest.mark.parametrize(("table", "said"), BAD_TABLES)
def test_a_bad_table(tmp_path: Path, table: str | bytes, said: str) -> None:
    a_set(tmp_path / "set", table)
    assert re.search(said.replace("?", r"\?"), refusal(tmp_path / "set"))


def row(**changed: object) -> list[dict[str, object]]:
    return [ROWS[0], {**ROWS[1], **changed}]


BAD_ROWS: list[tuple[object, str]] = [
    (b"{", "set/labels.json: not JSON: "),
    (b"[" * 100_000, "set/labels.json: not JSON"),
    (b'["\xff"]', "set/labels.json: line 1: not UTF-8 text"),
    ({}, 'set/labels.json: wrong shape: expected a list of {"image": "…", .*}, got dict'),
    ([], "set/labels.json: an empty set"),
    ([ROWS[0], 7], "set/labels.json: row 2: wrong shape: expected .*, got 7"),
    ([ROWS[0], {"image": "b.png", "labels": []}], "set/labels.json: row 2: person: missing: expected a list of"),
    (row(person=129), "set/labels.json: row 2: person: wrong shape: expected .*, got 129"),
    (row(labels="hat"), "set/labels.json: row 2: labels: wrong shape: expected .*, got 'hat'"),
    (row(labels=["hat", None]), "set/labels.json: row 2: labels: wrong shape: expected .*, got None"),
    (row(image="\ud800.png"), r"1 of 2 images are no files in .*set: row 2 names '\\ud800.png'"),
    (row(person=" "), "set/labels.json: row 2: blank person"),
    (row(image=""), "set/labels.json: row 2: blank image"),
    (row(image="a.png"), "set/labels.json: row 2: image 'a.png' again; it stands in row 1"),
    (row(image="../b.png"), "set/labels.json: row 2: image: expected a path within the set's folder"),
    (row(image="x/b.png"), "1 of 2 images are no files in .*set: row 2 names 'x/b.png'"),
    ([{**ROWS[0], "labels": ["scarf"]}], "set/labels.json: no row has a label in any of 2 categories"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, rows: object, said: str) -> None:
    mapping = a_set(tmp_path / "set", rows=rows, words=MAP)
    assert re.search(said, refusal(tmp_path / "set", mapping))


def category(name: str, *options: str) -> str:
    return f'[[category]]\nname = "{name}"\noption = [{", ".join(options)}]\n'


HAT = '{ name = "hat", any = ["cap"] }'
BAD_MAPS = [
    ("", "map.toml: category: missing"),
    ("category = []", "map.toml: category: "),
    ("category = 7", "map.toml: category: "),
    (category("headwear"), "map.toml: category.0.option: "),
    (category("headwear", '{ name = "hat", some = ["cap"] }'), "map.toml: category.0.option.0.some: unknown key"),
    (category("headwear", '{ name = "hat", any = ["cap", ""] }'), "map.toml: category.0.option.0.any.1: "),
    (category("headwear", '{ name = "hat" }'), "category 'headwear': option 'hat' names no words; give it any or none"),
    (category("headwear", HAT, HAT), "map.toml: category 'headwear': two options are named 'hat'"),
    (category("headwear", HAT) * 2, "map.toml: two categories are named 'headwear'"),
    (
        category("headwear", '{ name = "hut", any = ["cap"] }'),
        "category 'headwear': no such option in the bank: expected 'hat' or 'no hat', got 'hut'; did you mean 'hat'?",
    ),
    (
        category("head-wear", HAT),
        "map.toml: no category that the bank asks: expected 'headwear' or 'top colour', got 'head-wear'",
    ),
]


@pytest.mark.parametrize(("words", "said"), BAD_MAPS)
def test_a_bad_map(tmp_path: Path, words: str, said: str) -> None:
    mapping = a_set(tmp_path / "set", rows=ROWS, words=words)
    assert said in refusal(tmp_path / "set", mapping)


def test_the_wrong_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "set") == "set: no such folder"
    mapping = a_set(tmp_path / "set", words=MAP)
    assert refusal(tmp_path / "set") == "set: no labelled set: expected labels.csv or labels.json in it"
    a_set(tmp_path / "set", TABLE)
    assert refusal(tmp_path / "set", mapping) == (
        "set/labels.csv: a map is for labels.json: got map.toml; leave out --map"
    )
    a_set(tmp_path / "set", rows=ROWS)
    assert refusal(tmp_path / "set") == (
        "set: both labels.csv and labels.json: expected one of them; move the other away"
    )
    (tmp_path / "set" / "labels.csv").unlink()
    assert refusal(tmp_path / "set") == (
        "set/labels.json: needs a map from its words to the bank's options; "
        "name one with --map, such as configs/labels-peta.toml"
    )
    assert refusal(tmp_path / "set", tmp_path / "no.toml") == "no.toml: No such file or directory"
    (tmp_path / "set" / "labels.json").unlink()
    (tmp_path / "set" / "labels.csv").mkdir()
    assert refusal(tmp_path / "set") == "set/labels.csv: Is a directory"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["cap"], "hat"),
        (["bonnet", "cap"], "hat"),
        (["cap", "scarf"], "hat"),
        (["scarf"], None),
        ([], "no hat"),
        (["shoes"], "no hat"),
        (["Cap"], "no hat"),
        (["winter"], None),  # hood and no hat
        (["winter", "cap"], "hat"),
    ],
)
def test_a_row_counts_where_one_option_is_true(words: list[str], option: str | None) -> None:
    options = [
        {"name": "hat", "any": ["cap", "bonnet"]},
        {"name": "no hat", "none": ["cap", "bonnet", "scarf"]},
        {"name": "hood", "any": ["winter"], "none": ["cap"]},
    ]
    mapping = LabelMap.model_validate({"category": [{"name": "headwear", "option": options}]})
    assert mapping.category[0].option_of(words) == option


ENCODER = "ab" * 32


def vectors(folder: Path, images: object = ("b.png", "a.png", "d.png"), **changed: object) -> None:
    arrays: dict[str, object] = {"images": images, "vectors": np.eye(3, 4, dtype=np.float16), "encoder": ENCODER}
    kept = {name: np.array(array) for name, array in {**arrays, **changed}.items() if array is not None}
    with (folder / "embeddings.npz").open("wb") as file:
        np.savez(file, **kept)  # type: ignore[arg-type]  # mypy takes the arrays for savez's own allow_pickle


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
def test_vectors_replace_the_pictures(tmp_path: Path, dtype: type[np.floating] | str) -> None:
    a_set(tmp_path / "set", TABLE, pictures="")
    vectors(tmp_path / "set", vectors=np.eye(3, 4).astype(dtype))
    found = read_labels(tmp_path / "set", BANK, None)
    assert found.vectors is not None
    assert found.vectors.dtype == np.dtype(np.float32)  # in the machine's own order of bytes
    assert found.encoder == ENCODER
    assert found.vectors.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    part = found.subset(np.array([False, True]))
    assert part.vectors is not None
    assert (part.vectors.tolist(), part.encoder) == ([[1, 0, 0, 0]], ENCODER)


def test_vectors_of_some_replace_nothing(tmp_path: Path) -> None:
    a_set(tmp_path / "set", TABLE)
    vectors(tmp_path / "set", images=["b.png", "c.png", "d.png"])
    found = read_labels(tmp_path / "set", BANK, None)
    assert (found.vectors, found.encoder) == (None, None)
    (tmp_path / "set" / "b.png").unlink()  # a.png has to be encoded, and so has b.png
    assert refusal(tmp_path / "set").endswith(
        ": line 3 names 'b.png'; embeddings.npz replaces the files only where it has every image; it has 1"
    )


BAD_VECTORS: list[tuple[dict[str, object], str]] = [
    ({"encoder": None}, "expected the arrays images, vectors and encoder"),
    ({"encoder": [ENCODER]}, "encoder: expected one text, got <U64 (1,)"),
    ({"encoder": 7}, "encoder: expected one text, got int64 ()"),
    ({"images": "a.png"}, "images: expected text (m,), got <U5 ()"),
    ({"images": [1, 2, 3]}, "images: expected text (m,), got int64 (3,)"),
    ({"images": np.array(["a.png", None], object)}, "not an .npz of plain arrays: Object arrays cannot be loaded"),
    ({"images": ["a.png", "b.png"]}, "vectors: expected a row for each of 2 images, got 3"),
    ({"images": ["a.png", "b.png", "./a.png"]}, "an image is named twice"),
    ({"vectors": np.eye(3)}, "vectors: expected float16 or float32 (m, d), got float64 (3, 3)"),
    ({"vectors": np.zeros(3, np.float32)}, "vectors: expected float16 or float32 (m, d), got float32 (3,)"),
    ({"vectors": np.zeros((3, 0), np.float32)}, "vectors: expected float16 or float32 (m, d), got float32 (3, 0)"),
    ({"vectors": np.full((3, 2), np.nan, np.float16)}, "vectors hold what is no number"),
]


@pytest.mark.parametrize(("changed", "said"), BAD_VECTORS)
def test_bad_vectors(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    a_set(tmp_path / "set", TABLE)
    vectors(tmp_path / "set", **changed)
    line = refusal(tmp_path / "set")
    assert line.startswith("set/embeddings.npz: ")
    assert said in line


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_holds_no_vectors(tmp_path: Path, data: bytes) -> None:
    a_set(tmp_path / "set", TABLE)
    (tmp_path / "set" / "embeddings.npz").write_bytes(data)
    assert refusal(tmp_path / "set").startswith("set/embeddings.npz: ")


def test_a_set_that_does_not_fit_itself_is_no_set() -> None:
    one: Mapping[str, tuple[str | None, ...]] = {"headwear": ("hat",)}
    vector = np.zeros((1, 2), np.float32)
    for people, labels in (((), one), (("anna",), {"headwear": ()})):
        with pytest.raises(ValueError, match="a person and a label"):
            LabelledSet(Path(), ("a.png",), people, labels, "")
    with pytest.raises(ValueError, match="together"):
        LabelledSet(Path(), ("a.png",), ("anna",), one, "", vector)
    wrongs: list[Any] = [vector.astype(np.float16), vector[0], np.zeros((2, 2), np.float32)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"float32 \(1, d\), got"):
            LabelledSet(Path(), ("a.png",), ("anna",), one, "", wrong, "e")
    whole = LabelledSet(Path(), ("a.png",), ("anna",), one, "")
    for mask in (np.array([0]), np.array([True, False])):
        with pytest.raises(ValueError, match=r"mask must be bool \(1,\)"):
            whole.subset(mask)
    assert len(whole.subset(np.array([False]))) == 0


# a spreadsheet's cells lose the spaces around them; everything else has to come back
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and text not in (".", "..")
)
CELLS = CELL | st.sampled_from([",", '"', 'a,"b"\nc', "ü, ß", "眼镜", "\ufeffx", "a\r\nb", "'", ";"])


@st.composite
def sets(draw: st.DrawFn) -> tuple[LabelledSet, tuple[Category, ...]]:
    """A set with vectors, whose row i has the vector [i, 0]; and the bank that asks its categories."""
    names = draw(
        st.lists(CELLS.filter(lambda name: name not in ("image", "person")), min_size=1, max_size=3, unique=True)
    )
    options = [tuple(draw(st.lists(CELLS, min_size=2, max_size=4, unique=True))) for _ in names]
    bank = tuple(Category(name, name, of, (None,) * len(of)) for name, of in zip(names, options, strict=True))
    images = tuple(draw(st.lists(CELLS, min_size=1, max_size=8, unique=True)))
    people = tuple(draw(st.lists(CELLS, min_size=len(images), max_size=len(images))))
    labels = {one.name: tuple(draw(st.sampled_from((*one.options, None))) for _ in images) for one in bank}
    labels[bank[0].name] = (bank[0].options[0], *labels[bank[0].name][1:])  # a set without any label is refused
    rows = np.array([[i, 0] for i in range(len(images))], np.float32)
    return LabelledSet(Path(), images, people, labels, "", rows, ENCODER), bank


def read_back(given: LabelledSet, bank: tuple[Category, ...], order: Sequence[int]) -> LabelledSet:
    """The set as labels.csv in this order, read again."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "person", *given.labels])
    for i in order:
        writer.writerow([given.images[i], given.people[i], *(of[i] or "" for of in given.labels.values())])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "labels.csv").write_bytes(text.getvalue().encode())
        vectors(Path(name), images=given.images, vectors=given.vectors)
        return read_labels(Path(name), bank, None)


@given(sets(), st.randoms())
def test_a_table_comes_back_as_it_was_written(
    written: tuple[LabelledSet, tuple[Category, ...]], random: Random
) -> None:
    given_set, bank = written
    order = list(range(len(given_set)))
    found = read_back(given_set, bank, order)
    assert (found.images, found.people, found.labels) == (given_set.images, given_set.people, given_set.labels)
    assert found.vectors is not None
    assert found.vectors.tolist() == [[i, 0] for i in order]
    random.shuffle(order)
    shuffled = read_back(given_set, bank, order)
    assert shuffled.sha256 == found.sha256
    assert shuffled.images == tuple(found.images[i] for i in order)


@given(sets(), st.data())
def test_a_part_keeps_its_rows_together(written: tuple[LabelledSet, tuple[Category, ...]], data: st.DataObject) -> None:
    whole, _ = written
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))))
    part = whole.subset(mask)
    kept = np.flatnonzero(mask).tolist()
    assert part.images == tuple(whole.images[i] for i in kept)
    assert part.people == tuple(whole.people[i] for i in kept)
    assert part.labels == {name: tuple(of[i] for i in kept) for name, of in whole.labels.items()}
    assert part.vectors is not None
    assert part.vectors[:, 0].tolist() == kept
    assert part.half().tolist() == whole.half()[mask].tolist()
    assert part.subset(np.ones(len(part), np.bool_)).sha256 == part.sha256


@given(st.lists(st.text(max_size=3) | st.just("\ud800"), max_size=20))
def test_nobody_is_in_both_halves(people: list[str]) -> None:
    n = len(people)
    found = LabelledSet(Path(), tuple(map(str, range(n))), tuple(people), {}, "")
    half = found.half()
    assert half.dtype == np.dtype(np.bool_)
    assert half.shape == (n,)
    fit, judge = ({people[i] for i in np.flatnonzero(side)} for side in (half, ~half))
    assert not fit & judge


def test_the_halves_are_the_same_for_ever() -> None:
    people = tuple(f"person {i}" for i in range(1000))
    half = LabelledSet(Path(), people, people, {}, "").half()
    assert half[:8].tolist() == [True, True, False, True, True, False, True, True]  # as sha256sum says
    assert 450 < half.sum() < 550


def test_the_map_of_peta_has_the_options_of_the_small_models_words() -> None:
    prompts = read_prompts(ROOT / "prompts/person-mini.toml")
    mapping = read_label_map(ROOT / "configs/labels-peta.toml", ())
    assert [(one.name, [option.name for option in one.option]) for one in mapping.category] == [
        (one.name, [option.name for option in one.option]) for one in prompts.category
    ]


@pytest.mark.skipif(not (PETA.is_dir() and CARD.is_file()), reason="PETA's labelled pedestrians are not here")
def test_peta_is_read_as_a_recount_reads_it() -> None:
    prompts = read_prompts(ROOT / "prompts/person-mini.toml")
    bank = [
        Category(one.name, one.question, tuple(o.name for o in one.option), (None,) * len(one.option))
        for one in prompts.category
    ]
    path = ROOT / "configs/labels-peta.toml"
    found = read_labels(PETA, bank, path)
    assert (len(found), len(set(found.people))) == (1691, 892)
    assert (found.skipped_categories, found.unseen_words) == ((), ())

    answers = json.loads(CARD.read_text())["categories"]
    counts: dict[str, dict[str, int]] = {}
    for row in json.loads((PETA / "labels.json").read_text()):
        for one in bank:
            true = []
            for option in answers["sleeves" if one.name == "sleeve length" else one.name]:
                here = [word for word in row["labels"] if word in (option["labels_any"] or option["labels_none"])]
                if bool(here) == bool(option["labels_any"]):
                    true.append(option["option"])
            if len(true) == 1:
                of = counts.setdefault(one.name, {})
                of[true[0]] = of.get(true[0], 0) + 1
    assert counts == {
        name: {option: options.count(option) for option in set(options) - {None}}
        for name, options in found.labels.items()
    }
    assert sum(counts["headwear"].values()) == 1691 - 67  # 67 wear a kerchief, and none of them a hat
    assert 0.4 < found.half().mean() < 0.6


def test_what_a_box_guessed_is_no_label(tmp_path: Path) -> None:
    text = "image,person,headwear,headwear guess,colour guess\na.png,p,,hat,red\nb.png,q,hat,no hat,red\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    read = read_labels(tmp_path, [HEADWEAR], None)
    assert read.labels == {"headwear": (None, "hat")}
    assert read.skipped_categories == ("colour guess",), "no other column has its name"
