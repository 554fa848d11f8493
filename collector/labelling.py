"""What people say is true of stored people: as a labelled set for a spreadsheet, or one question after the other."""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import time

import numpy as np

from collector.people import MOST_LOOKS, Keys, Place, Sighting, file_name, place_of
from collector.report import utc
from collector.sheet import cell, said
from collector.stats import harmless
from collector.store import Store
from edge.errors import ConfigError
from edge.events import Answer

CSV = "labels.csv"
VECTORS = "embeddings.npz"
GUESS = "guess"  # what the column of a category's name ends with that holds what the box said
KEYS = "Enter: the first is right; a number: that one; s: skip; q: quit"

Ask = Callable[[str], str]  # shows a question, returns what was typed; "" for Enter alone
Say = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """How many people a set has; of how many there was a crop; who is not in it: made by another encoder, too many."""

    people: int
    crops: int
    others: int
    left: int


@dataclass(frozen=True)
class Corrected:
    """How many cells were new, of how many people; how many were known; columns that are no category of the store."""

    new: int
    people: int
    known: int
    ignored: tuple[str, ...]


def write_set(store: Store, folder: Path, device: str | None, limit: int) -> Written:
    """Write the newest people, each track once, as a labelled set that export/labels.py reads.

    labels.csv: image, person, per category what people said so far, and what the box says as "<category> guess", which
    is no category of anyone's. images/: the crops that were kept. embeddings.npz: the vectors of all, where there is
    anybody; so only people of one encoder, the one seen last, are in the set. A cell that a spreadsheet would run
    begins with an apostrophe. Raises ConfigError where there is a labels.csv or no such device, OSError.
    """
    file = folder / CSV
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists already", remedy="read it with --read, and name another folder")
    with store.snapshot():
        everyone = _people(store, device)
        newest = store.people.sighting(everyone[0]) if len(everyone) else None
        keys = everyone if newest is None else store.people.each(MOST_LOOKS, device, newest.encoder)
        columns, corrections = _columns(store.people.options()), store.people.corrections()
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["image", "person", *columns, *(_guess(column) for column in columns)])
        folder.mkdir(parents=True, exist_ok=True)
        images, vectors, crops = [], [], 0
        for one in _sightings(store, keys[:limit]):
            known, image = corrections.get(one.who, {}), one.place.image
            answers = {answer.category: answer for answer in one.person.answers}
            cells = [cell(known.get(category, "")) for category in columns.values()]
            guesses = [said(answers[category]) if category in answers else "" for category in columns.values()]
            rows.writerow([image, _name(one), *cells, *guesses])
            images.append(image)
            vectors.append(one.vector)
            if one.crop is not None:
                (folder / image).parent.mkdir(exist_ok=True)
                (folder / image).write_bytes(one.crop)
                crops += 1
        if newest is not None:
            encoder = np.array(newest.encoder.name)
            np.savez(folder / VECTORS, images=np.array(images), vectors=np.array(vectors), encoder=encoder)
        file.write_text(table.getvalue(), encoding="utf-8")  # at the end: what is half written is no set
    return Written(len(images), crops, len(everyone) - len(keys), len(keys) - len(images))


def read_set(store: Store, file: Path) -> Corrected:
    """Note every cell that is not blank in a labels.csv of `write_set`, all or none.

    Raises ConfigError with file and line: no such table, a picture that is nobody's or stands twice, an option that
    the store never had among the best of its category.
    """
    with store.snapshot():
        options = store.people.options()
        columns, corrections = _columns(options), store.people.corrections()
        names = {file_name(device): device for device, _, _ in store.streams()}
        header, rows = _rows(file)
        new: list[tuple[Place, str, str]] = []
        places: dict[Place, int] = {}
        known = 0
        for line, row in rows:
            where, image = f"{file}: line {line}", row["image"]
            place = place_of(image, names)
            if place is None or (one := store.people.at(place)) is None:
                remedy = "leave its name as it was written, or remove the row"
                raise ConfigError(f"{where}: the store has no person {image!r}", remedy=remedy)
            if place in places:
                raise ConfigError(f"{where}: {image!r} again; it stands in line {places[place]}")
            places[place] = line
            for column, category in columns.items():
                if text := row.get(column, ""):
                    option = _option(f"{where}: {column}", text, options[category])
                    if corrections.get(one.who, {}).get(category) == option:
                        known += 1
                    else:
                        new.append((place, category, option))
    store.correct(new, time())
    guesses = [_guess(column) for column in columns]
    ignored = tuple(name for name in header if name not in ("image", "person", *columns, *guesses))
    return Corrected(len(new), len({place for place, _, _ in new}), known, ignored)


def ask_people(store: Store, ask: Ask, say: Say, device: str | None, limit: int) -> int:
    """Ask of the newest `limit` people, each track once, what nobody has said yet; how many answers came.

    Each answer is kept at once. Raises ConfigError where there is no such device.
    """
    with store.snapshot():
        keys = _people(store, device)
        options, corrections = store.people.options(), store.people.corrections()
    given = shown = 0
    say(KEYS)
    for one in _sightings(store, keys):
        known = corrections.setdefault(one.who, {})
        open_ = [answer for answer in one.person.answers if answer.category not in known]
        if not open_:
            continue
        if shown == limit:
            break
        shown += 1
        say(f"\n{_described(one)}")
        for answer in open_:
            typed = _answered(ask, answer, options.get(answer.category, ()))
            if typed is None:
                return given
            if typed:
                known[answer.category] = typed
                given += store.correct([(one.place, answer.category, typed)], time())
    return given


def _people(store: Store, device: str | None) -> Keys:
    """(n, 2) all people or those of `device`, newest first. Raises ConfigError."""
    known = sorted({name for name, _, _ in store.streams()})
    if device is not None and device not in known:
        raise ConfigError(f"--device: the store has nothing of {device!r}", remedy=_near(device, known))
    return store.people.each(MOST_LOOKS, device)


def _sightings(store: Store, keys: Keys) -> Iterator[Sighting]:
    """Those of `keys` that are there when their turn comes."""
    for key in keys:
        with store.snapshot():  # ends before a person is asked: a long one would keep the log from shrinking
            one = store.people.sighting(key)
        if one is not None:
            yield one


def _columns(categories: Iterable[str]) -> dict[str, str]:
    """Column of the table -> category; without those whose name cannot be a column's of its own."""
    columns: dict[str, str] = {}
    taken = {"image", "person", ""}
    for category in categories:
        column = cell(category).strip()
        if not {column, _guess(column)} & taken:
            columns[column] = category
            taken |= {column, _guess(column)}
    return columns


def _guess(column: str) -> str:
    return f"{column} {GUESS}"


def _name(one: Sighting) -> str:
    """The same for every sighting of a track."""
    device, epoch, camera, track = one.who
    return one.place.image if one.person.track is None else cell(f"{device}/{epoch}/{camera}/{track}")


def _rows(file: Path) -> tuple[list[str], list[tuple[int, Mapping[str, str]]]]:
    """The header, and each row with the number of its line, 1 being the header's. Raises ConfigError."""
    rows: list[tuple[int, Mapping[str, str]]] = []
    line = 0
    try:
        reader = csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if "image" not in header:
            remedy = "save it as CSV with commas"
            raise ConfigError(f"{file}: no column 'image' in the first line", got=header, remedy=remedy)
        for name in header:
            if name and header.count(name) > 1:  # spreadsheets add columns without a name
                raise ConfigError(f"{file}: two columns are named {name!r}")
        line = reader.line_num
        for cells in reader:
            if any(text.strip() for text in cells):
                if len(cells) != len(header):
                    raise ConfigError(f"{file}: line {line + 1}", expected=f"{len(header)} cells", got=len(cells))
                rows.append((line + 1, {name: text.strip() for name, text in zip(header, cells, strict=True)}))
            line = reader.line_num
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}", remedy="save it as UTF-8") from error
    except csv.Error as error:
        raise ConfigError(f"{file}: line {line + 1}: not CSV: {error}") from error
    return header, rows


def _option(where: str, text: str, options: Iterable[str]) -> str:
    """The option that a cell means. Raises ConfigError."""
    cells = {cell(option).strip(): option for option in options}
    if text not in cells:
        raise ConfigError(f"{where}: no such option", got=repr(text), remedy=_near(text, cells))
    return cells[text]


def _near(got: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(got, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the store knows {', '.join(map(repr, names)) or 'none'}"


def _described(one: Sighting) -> str:
    """Where a person is to be found."""
    place, track, looks = one.place, one.person.track, one.person.looks
    box = " ".join(f"{edge:.0f}" for edge in one.person.box)
    followed = "" if track is None else f", track {track}" + (f" of {looks} looks" if looks else "")
    name = harmless(f"{place.device}/{one.camera}")
    return f"{name}  {utc(one.captured_at)}  box {box}{followed}  {place.image}"


def _answered(ask: Ask, answer: Answer, options: Iterable[str]) -> str | None:
    """The option that a person chose; "" where they skip the question, None where they want no more."""
    best = [choice.option for choice in answer.top]
    choices = [*best, *(option for option in options if option not in best)]
    sure = [f" {100 * choice.probability:.0f} %" for choice in answer.top] + [""] * len(choices)
    told = [f"{i} {harmless(option)}{sure[i - 1]}" for i, option in enumerate(choices, 1)]
    unknown = "unknown; " if answer.unknown else ""
    question = f"  {harmless(answer.category)}: {unknown}{', '.join(told)}"
    while True:
        match typed := ask(question).strip().lower():
            case "":
                return choices[0]
            case "s":
                return ""
            case "q":
                return None
            case _ if typed.isascii() and typed.isdigit() and len(typed) < 6 and 1 <= int(typed) <= len(choices):
                return choices[int(typed) - 1]
