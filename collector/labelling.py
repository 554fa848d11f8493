"""What people say is true of stored people: as a labelled set for a spreadsheet, or one question after the other."""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import TypeAlias

import numpy as np

from collector.people import MOST_LOOKS, Keys, Place, Sighting, file_name, place_of
from collector.report import when
from collector.sheet import cell, said
from collector.stats import harmless
from collector.store import Store
from edge.errors import ConfigError
from edge.values import Category

CSV = "labels.csv"
VECTORS = "embeddings.npz"
GUESS = "guess"  # what the column of a category's name ends with that holds what the box said
TAKE_BACK = "-"  # the cell that says so; where a category has an option of this name, it is that
KEYS = "Enter: the guess is right (without one: skip); a number: that one; s: skip; b: one back; q: quit"

Question: TypeAlias = tuple[Sighting, Category]
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
    """How many cells were new, of how many people; known already; taken back; columns that are none of a category."""

    new: int
    people: int
    known: int
    taken_back: int
    ignored: tuple[str, ...]


def write_set(store: Store, categories: Sequence[Category], folder: Path, device: str | None, limit: int) -> Written:
    """Write the newest people, each track once, as a labelled set that export/labels.py reads.

    labels.csv: image, person, per category what people said so far, blank also where it is no option of this bundle,
    and what the box said as "<category> guess", which is no category of anyone's. images/: the crops that were kept.
    embeddings.npz: the vectors of all, where there is anybody; so only people of one encoder, the one seen last, are in
    the set. A cell from the wire that a spreadsheet would run begins with an apostrophe. Raises ConfigError where there
    is a labels.csv or no such device, OSError.
    """
    file = folder / CSV
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists already", remedy="read it with --read, and name another folder")
    columns = _columns(categories)
    with store.snapshot():
        everyone, corrections = _people(store, device), store.people.corrections()
        newest = store.people.sighting(everyone[0]) if len(everyone) else None
        keys = everyone if newest is None else store.people.made_by(newest.encoder, everyone)
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["image", "person", *columns, *map(_guess, columns)])
        folder.mkdir(parents=True, exist_ok=True)
        images, vectors, crops = [], [], 0
        for one in _sightings(store, keys[:limit]):
            known, image = corrections.get(one.who, {}), one.place.image
            answers = {answer.category: said(answer) for answer in one.person.answers}
            cells = [known[name] if _is_said(known, category) else "" for name, category in columns.items()]
            rows.writerow([image, _name(one), *cells, *(answers.get(name, "") for name in columns)])
            images.append(image)
            vectors.append(one.vector)
            if one.crop is not None:
                (folder / image).parent.mkdir(exist_ok=True)
                (folder / image).write_bytes(one.crop)
                crops += 1
        if newest is not None:
            encoder = np.array(newest.encoder.name)
            np.savez(folder / VECTORS, images=np.array(images), vectors=np.array(vectors), encoder=encoder)
        # at the end: what is half written is no set; with a mark at its beginning, without which Excel reads it as ANSI
        file.write_text(table.getvalue(), encoding="utf-8-sig")
    return Written(len(images), crops, len(everyone) - len(keys), len(keys) - len(images))


def read_set(store: Store, categories: Sequence[Category], file: Path) -> Corrected:
    """Note every cell that is not blank in a labels.csv of `write_set`, all or none.

    A cell TAKE_BACK takes back what was said. Raises ConfigError with file and line: no such table, a picture that is
    nobody's or stands twice, no option of its category.
    """
    columns = _columns(categories)
    with store.snapshot():
        corrections = store.people.corrections()
        names = {file_name(device): device for device, _, _ in store.streams()}
        header, rows = _rows(file)
        new: list[tuple[Place, str, str | None]] = []
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
            before = corrections.get(one.who, {})
            for name, category in columns.items():
                if text := row.get(name, ""):
                    option = _option(f"{where}: {name}", text, category.options)
                    if before.get(name) != option:
                        new.append((place, name, option))
                    elif option is not None:
                        known += 1
    store.correct(new, time())
    given = [place for place, _, option in new if option is not None]
    mine = {"", "image", "person", *columns, *map(_guess, columns)}
    ignored = tuple(name for name in header if name not in mine)
    return Corrected(len(given), len(set(given)), known, len(new) - len(given), ignored)


def ask_people(store: Store, categories: Sequence[Category], ask: Ask, say: Say, device: str | None, limit: int) -> int:
    """Ask of the newest `limit` people, each track once, what nobody has said yet; how many answers came.

    Each answer is kept at once; where there is a crop, a file shows it meanwhile. Raises ConfigError where there is no
    such device, OSError.
    """
    with store.snapshot():
        keys, corrections = _people(store, device), store.people.corrections()
    everyone = (
        (one, [category for category in categories if not _is_said(corrections.get(one.who, {}), category)])
        for one in _sightings(store, keys)
    )
    people = islice((found for found in everyone if found[1]), limit)
    coming = ((one, category) for one, unsaid in people for category in unsaid)
    again: list[Question] = []
    done: list[tuple[Question, int]] = []  # and how many answers it gave: 0 or 1
    shown: Sighting | None = None
    say(KEYS)
    with TemporaryDirectory(prefix="lookout-") as folder:
        while question := again.pop() if again else next(coming, None):
            one, category = question
            if one is not shown:
                say(f"\n{_described(one, Path(folder))}")
                shown = one
            text, choices = _asked(one, category)
            typed = ask(text).strip().lower()
            if typed == "q":
                break
            if typed in choices:
                done.append((question, store.correct([(one.place, category.name, choices[typed])], time())))
            elif typed in ("", "s"):
                done.append((question, 0))
            else:
                again.append(question)
                if typed != "b":
                    say(KEYS)
                elif done:
                    (one, category), given = done.pop()
                    again.append((one, category))
                    if given:
                        store.correct([(one.place, category.name, None)], time())
    return sum(given for _, given in done)


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


def _columns(categories: Sequence[Category]) -> dict[str, Category]:
    """Column of the table -> category; without those whose name is another column's."""
    taken = {"image", "person", *(_guess(category.name) for category in categories)}
    return {category.name: category for category in categories if category.name not in taken}


def _is_said(known: Mapping[str, str], category: Category) -> bool:
    """Whether people said of somebody which of these options is true."""
    return known.get(category.name) in category.options


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


def _option(where: str, text: str, options: Sequence[str]) -> str | None:
    """The option that a cell means, None for TAKE_BACK. Raises ConfigError."""
    if text in options:
        return text
    if text == TAKE_BACK:
        return None
    raise ConfigError(f"{where}: no such option", got=repr(text), remedy=_near(text, options))


def _near(got: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(got, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(map(repr, known)) or 'none'}"


def _described(one: Sighting, folder: Path) -> str:
    """Where a person is to be found, and the file in `folder` that shows them now."""
    track, looks = one.person.track, one.person.looks
    box = " ".join(f"{edge:.0f}" for edge in one.person.box)
    followed = "" if track is None else f", track {track}" + (f" of {looks} looks" if looks else "")
    where = f"{harmless(f'{one.place.device}/{one.camera}')}, {when(one.captured_at, one.clock)}, box {box}{followed}"
    if one.crop is None:
        return f"no picture: {where}"
    picture = folder / Path(one.place.image).name
    picture.write_bytes(one.crop)
    return f"{picture}: {where}"


def _asked(one: Sighting, category: Category) -> tuple[str, dict[str, str]]:
    """A question, and what may be typed -> the option it means; "" only where the box's best is to be believed."""
    answer = next((answer for answer in one.person.answers if answer.category == category.name), None)
    top = () if answer is None else answer.top
    sure = {choice.option: f" {100 * choice.probability:.0f} %" for choice in top if choice.option in category.options}
    options = [*sure, *(option for option in category.options if option not in sure)]
    choices = {str(number): option for number, option in enumerate(options, 1)}
    told = [f"{number} {option}{sure.get(option, '')}" for number, option in choices.items()]
    unknown = ""
    if answer is not None and answer.unknown:
        unknown = "unknown; "
    elif top and top[0].option in sure:
        choices[""] = top[0].option
        told[0] += " (guess)"
    return harmless(f"  {category.name}: {unknown}{', '.join(told)}"), choices
