"""A labelled set: pictures of people, who is on them, and what is true of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import reprlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from edge.errors import ConfigError
from edge.values import Category, Floats
from export.label_map import check_option, guess, listed, read_label_map

CSV = "labels.csv"
JSON = "labels.json"
VECTORS = "embeddings.npz"
GUESS = " guess"
_SEPARATORS = {";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """n pictures of people.

    source: the folder. images: (n), paths relative to it. people: (n), who is on each. labels: category -> (n) names of
    its options, None where nobody said. sha256: names pictures, people and labels, whatever their order. vectors:
    (n, d) float32, what the encoder of the manifest with the sha256 `encoder` made of the pictures; None where the
    pictures have to be encoded. skipped_categories: those the file answers and the bank does not ask. unseen_words:
    those the map asks for and no row has, so that a mistyped one can be told.
    """

    source: Path
    images: tuple[str, ...]
    people: tuple[str, ...]
    labels: Mapping[str, tuple[str | None, ...]]
    sha256: str
    vectors: Floats | None = None
    encoder: str | None = None
    skipped_categories: tuple[str, ...] = ()
    unseen_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        if len(self.people) != n or any(len(options) != n for options in self.labels.values()):
            raise ValueError(f"LabelledSet must have a person and a label or None for each of {n} images")
        if (self.vectors is None) != (self.encoder is None):
            raise ValueError("LabelledSet.vectors and .encoder must stand together")
        if self.vectors is not None:
            shape, dtype = self.vectors.shape, self.vectors.dtype
            if dtype != np.float32 or len(shape) != 2 or shape[0] != n:
                raise ValueError(f"LabelledSet.vectors must be float32 ({n}, d), got {dtype} {shape}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, mask: NDArray[np.bool_]) -> LabelledSet:
        """The pictures where `mask` (n,) is true, with a sha256 of their own. Raises ValueError for another mask."""
        if mask.dtype != np.bool_ or mask.shape != (len(self),):
            raise ValueError(f"mask must be bool ({len(self)},), got {mask.dtype} {mask.shape}")
        images, people = tuple(compress(self.images, mask)), tuple(compress(self.people, mask))
        labels = {name: tuple(compress(options, mask)) for name, options in self.labels.items()}
        vectors = None if self.vectors is None else self.vectors[mask]
        sha256 = _sha256(images, people, labels)
        return replace(self, images=images, people=people, labels=labels, sha256=sha256, vectors=vectors)

    def half(self) -> NDArray[np.bool_]:
        """(n,) true where the person belongs to the half that is learned from, the rest being there to judge by.

        A person's name alone decides: nobody is on both sides, and every run, command and set splits alike. Of few
        people one side may be empty.
        """
        sides = {person: _digest(person)[0] % 2 == 0 for person in set(self.people)}
        return np.array([sides[person] for person in self.people], np.bool_)


@dataclass(frozen=True)
class _Row:
    where: str  # "line 7": of the file, for whoever has to mend it
    image: str
    person: str
    labels: Mapping[str, str | None]


@dataclass(frozen=True)
class _Table:
    rows: Sequence[_Row]
    categories: Sequence[str]  # all that the file answers, asked by the bank or not
    unseen_words: tuple[str, ...] = ()


def read_labels(folder: Path, categories: Sequence[Category], mapping: Path | None) -> LabelledSet:
    """Read labels.csv, or labels.json by way of the map `mapping`. categories: what the bank asks.

    `vectors` are there where embeddings.npz names every row's picture; else every picture must be a file. Raises
    ConfigError with file and line or row: no such folder, both forms or none, a map too many or too few, a file that is
    not UTF-8 or not in its form, an option the bank has not, a picture that is missing, named twice or outside of the
    folder, a row without a person, no row, category or label at all.
    """
    path = _labels_file(folder, mapping)
    table = _csv_table(path, categories) if mapping is None else _json_table(path, categories, mapping)
    if not table.rows:
        raise ConfigError(f"{path}: an empty set: no row names a picture")
    asked = [category.name for category in categories if category.name in table.categories]
    if not asked:
        expected, got = listed(category.name for category in categories), ", ".join(map(repr, table.categories))
        raise ConfigError(f"{mapping or path}: no category that the bank asks", expected=expected, got=got or "none")
    images = _images(path, table.rows)
    people = tuple(row.person for row in table.rows)
    labels = {name: tuple(row.labels.get(name) for row in table.rows) for name in asked}
    if all(option is None for options in labels.values() for option in options):
        raise ConfigError(f"{path}: no row has a label in any of {len(asked)} categories that the bank asks")
    vectors, encoder = _vectors_of(folder, path, table.rows, images)
    skipped = tuple(name for name in table.categories if name not in asked)
    sha256 = _sha256(images, people, labels)
    return LabelledSet(folder, images, people, labels, sha256, vectors, encoder, skipped, table.unseen_words)


def _labels_file(folder: Path, mapping: Path | None) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    found = [name for name in (CSV, JSON) if (folder / name).exists()]
    if not found:
        raise ConfigError(f"{folder}: no labelled set", expected=f"{CSV} or {JSON} in it")
    if len(found) > 1:
        raise ConfigError(f"{folder}: both {CSV} and {JSON}", expected="one of them", remedy="move the other away")
    if found == [CSV] and mapping is not None:
        raise ConfigError(f"{folder / CSV}: a map is for {JSON}", got=mapping, remedy="leave out --map")
    if found == [JSON] and mapping is None:
        remedy = "name one with --map, such as configs/labels-peta.toml"
        raise ConfigError(f"{folder / JSON}: needs a map from its words to the bank's options", remedy=remedy)
    return folder / found[0]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: not UTF-8 text: {error}", remedy="save it as UTF-8") from error


def _csv_table(path: Path, categories: Sequence[Category]) -> _Table:
    """A header `image,person,<category>,...` in any order, then a row per picture; spaces around a cell are no part of
    it, and a blank cell is no label. A column named as another with " guess" behind it is none of a category."""
    lines = _csv_lines(path)
    header = lines[0][1] if lines else []
    for name in ("image", "person"):
        if name not in header:
            for separator, parted in _SEPARATORS.items():
                if len(header) == 1 and separator in header[0]:
                    raise ConfigError(f"{path}: cells are parted by {parted}", remedy="save it with commas")
            got = ", ".join(map(repr, header)) or "nothing"
            raise ConfigError(f"{path}: no column {name!r} in the first line", got=got, remedy=guess(name, header))
    for number, name in enumerate(header, 1):
        if not name or name in header[: number - 1]:
            raise ConfigError(f"{path}: column {number}: " + (f"a second {name!r}" if name else "has no name"))
    guesses = {f"{name}{GUESS}" for name in header}  # what a box said, for whoever fills in the columns beside
    answered = [name for name in header if name not in ("image", "person") and name not in guesses]
    options = {category.name: category.options for category in categories if category.name in answered}
    rows = []
    for line, cells in lines[1:]:
        where = f"line {line}"
        if len(cells) != len(header):
            remedy = "put a cell that holds a comma in double quotes" if len(cells) > len(header) else None
            got = f"{len(cells)} cells"
            raise ConfigError(f"{path}: {where}", expected=f"{len(header)} cells", got=got, remedy=remedy)
        cell = dict(zip(header, cells, strict=True))
        labels = {name: cell[name] or None for name in options}
        for name, option in labels.items():
            if option is not None:
                check_option(f"{path}: {where}: {name}: no such option", option, options[name])
        rows.append(_Row(where, cell["image"], cell["person"], labels))
    return _Table(rows, answered)


def _csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Every row that is not blank, with the number of its first line."""
    rows, end = [], 0
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                rows.append((end + 1, stripped))
            end = reader.line_num
    except csv.Error as error:
        raise ConfigError(f"{path}: line {end + 1}: not CSV: {error}") from error
    return rows


class _JsonRow(BaseModel):
    """One row of labels.json; what else it holds is its owner's."""

    model_config = ConfigDict(strict=True)

    image: str
    person: str
    labels: list[str]


def _json_table(path: Path, categories: Sequence[Category], mapping: Path) -> _Table:
    words = read_label_map(mapping, categories)
    try:
        found = TypeAdapter(list[_JsonRow]).validate_python(json.loads(_text(path)))
    except ValidationError as error:
        raise _row_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    rows = []
    for number, row in enumerate(found, 1):
        labels = {category.name: category.option_of(row.labels) for category in words.category}
        rows.append(_Row(f"row {number}", row.image, row.person, labels))
    unseen = words.words.difference(*(row.labels for row in found))
    return _Table(rows, [category.name for category in words.category], tuple(sorted(unseen)))


def _row_error(path: Path, error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    expected = 'a list of {"image": "…", "person": "…", "labels": ["…"]}'
    if not first["loc"]:
        return ConfigError(f"{path}: wrong shape", expected=expected, got=type(first["input"]).__name__)
    number, *key = first["loc"]
    where = ": ".join([f"row {int(number) + 1}", *map(str, key[:1])])
    if first["type"] == "missing":
        return ConfigError(f"{path}: {where}: missing", expected=expected)
    return ConfigError(f"{path}: {where}: wrong shape", expected=expected, got=reprlib.repr(first["input"]))


def _images(path: Path, rows: Sequence[_Row]) -> tuple[str, ...]:
    """Each row's picture as a plain relative path. Raises ConfigError."""
    seen: dict[str, str] = {}
    for row in rows:
        image, where = PurePosixPath(row.image), f"{path}: {row.where}"
        if not row.image.strip():
            raise ConfigError(f"{where}: blank image")
        if image.is_absolute() or ".." in image.parts or not image.name:
            inside = "a path within the set's folder, relative to it"
            raise ConfigError(f"{where}: image", expected=inside, got=repr(row.image))
        if not row.person.strip():
            unknown = "give everybody a name; two pictures of one person need the same"
            raise ConfigError(f"{where}: blank person", remedy=unknown)
        if (name := str(image)) in seen:
            raise ConfigError(f"{where}: image {name!r} again; it stands in {seen[name]}")
        seen[name] = row.where
    return tuple(seen)


def _vectors_of(
    folder: Path, path: Path, rows: Sequence[_Row], images: tuple[str, ...]
) -> tuple[Floats | None, str | None]:
    """(n, d) float32 and their encoder, or None where the pictures have to be encoded, which are then there."""
    named: Mapping[str, int] = {}
    if (folder / VECTORS).exists():
        names, vectors, encoder = _read_vectors(folder / VECTORS)
        named = {name: i for i, name in enumerate(names)}
        if all(image in named for image in images):
            return vectors[[named[image] for image in images]].astype(np.float32), encoder
    missing = [i for i, image in enumerate(images) if not (folder / image).is_file()]
    if missing:
        first = f"{rows[missing[0]].where} names {images[missing[0]]!r}"
        what = f"{path}: {len(missing)} of {len(images)} images are no files in {folder}: {first}"
        known = sum(image in named for image in images)
        remedy = f"{VECTORS} replaces the files only where it has every image; it has {known}" if named else None
        raise ConfigError(what, remedy=remedy)
    return None, None


def _read_vectors(path: Path) -> tuple[list[str], NDArray[np.floating], str]:
    """m images' names, their vectors (m, d) float16 or float32, and the encoder's sha256. Raises ConfigError."""
    try:
        with zipfile.ZipFile(path) as archive:
            images, vectors, encoder = (
                np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
                for name in ("images", "vectors", "encoder")
            )
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]}", expected="the arrays images, vectors and encoder") from error
    except Exception as error:  # zipfile and numpy have many ways to say that a file is none of theirs
        raise ConfigError(f"{path}: not an .npz of plain arrays: {error}") from error
    for name, array, kinds, axes, expected in (
        ("images", images, "U", 1, "text (m,)"),
        ("vectors", vectors, "ef", 2, "float16 or float32 (m, d)"),
        ("encoder", encoder, "U", 0, "one text"),
    ):
        if array.dtype.char not in kinds or array.ndim != axes or not array.size:
            raise ConfigError(f"{path}: {name}", expected=expected, got=f"{array.dtype} {array.shape}")
    if len(vectors) != len(images):
        raise ConfigError(f"{path}: vectors", expected=f"a row for each of {len(images)} images", got=len(vectors))
    names = [str(PurePosixPath(name)) for name in images.tolist()]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: an image is named twice")
    if not np.isfinite(vectors).all():
        raise ConfigError(f"{path}: vectors hold what is no number")
    return names, vectors, str(encoder)


def _sha256(images: Sequence[str], people: Sequence[str], labels: Mapping[str, Sequence[str | None]]) -> str:
    given = (
        {name: options[i] for name, options in labels.items() if options[i] is not None} for i in range(len(images))
    )
    rows = sorted(json.dumps(row, sort_keys=True) for row in zip(images, people, given, strict=True))
    return _digest("\n".join(rows)).hex()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # a JSON file may hold half a character
