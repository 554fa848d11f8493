"""Stored people, a track counting once: where they were seen, their vectors, and what people said is true of them."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from edge.events import Answer, Half, Person

ANSWERS = TypeAdapter(tuple[Answer, ...])
PERSON = "score, answers, crop IS NOT NULL, track, looks, x1, y1, x2, y2"  # the columns of `person_of`
MAX_NUMBER = 2**63  # that SQLite does not know any more

Keys = NDArray[np.int64]  # (n, 2): an event's row, and the person's number in it
Who: TypeAlias = tuple[str, int, str | int, int]  # device, epoch, camera and track; without a track the place

LAST = "seq DESC"  # which of a track's events stands for it: the last
MOST_LOOKS = "looks DESC, seq ASC"  # the first of those that rest on the most looks: where the last look was taken

# the people, each track once; of two in one event with the same track, which no box sends, the first
_EACH = (
    "SELECT event, number FROM (SELECT event, number,"
    " row_number() OVER (PARTITION BY device, epoch, camera, track ORDER BY {which}, number) AS place"
    " FROM tracks JOIN events ON id = event WHERE track IS NOT NULL) WHERE place = 1"
    " UNION ALL SELECT event, number FROM people LEFT JOIN tracks USING (event, number) WHERE track IS NULL"
)
_ENCODER = "ifnull(encoder, bundle)"  # its name
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")  # names of devices that are names of files
_IMAGE = re.compile(r"images/(.+)-([0-9]{1,19})-([0-9]{1,19})-([0-9]{1,19})\.jpg")


class Place(NamedTuple):
    """Names a person for ever: the event, and the person's number in it, from 0."""

    device: str
    epoch: int
    seq: int
    number: int

    @property
    def image(self) -> str:
        """The name of this person's picture, whether there is one or not."""
        return f"images/{file_name(self.device)}-{self.epoch}-{self.seq}-{self.number}.jpg"


class Encoder(NamedTuple):
    """What made a vector, and how many numbers the vector has.

    name: sha256 of the image encoder; where a box of before 0.3 did not say, of its bundle's manifest.
    """

    name: str
    dim: int


@dataclass(frozen=True, eq=False)
class Sighting:
    """A person in an event. vector: (d,) float16, unit length. crop: a JPEG.

    captured_at: seconds since 1970, UTC; clock: as in the event's header, whether that can be believed.
    """

    place: Place
    camera: str
    captured_at: float
    clock: str | None
    encoder: Encoder
    person: Person
    vector: Half
    crop: bytes | None

    @property
    def who(self) -> Who:
        """The same for every sighting of a track."""
        track = self.person.track
        return self.place if track is None else (self.place.device, self.place.epoch, self.camera, track)


class People:
    """The people in a store's database. The caller keeps the transactions."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def count(self) -> int:
        """How many they are, each track once."""
        (number,) = self._db.execute(f"SELECT count(*) FROM ({_EACH.format(which=LAST)})").fetchone()
        return int(number)

    def each(self, which: str, device: str | None = None) -> Keys:
        """(n, 2) the people, or those of one device, each track once, newest first.

        which: the event that stands for a track, LAST or MOST_LOOKS.
        """
        rows = self._db.execute(
            f"SELECT event, number FROM ({_EACH.format(which=which)}) JOIN events ON id = event"
            " WHERE device = ifnull(?, device) ORDER BY event DESC, number",
            (device,),
        )
        return np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, 2)

    def made_by(self, encoder: Encoder, keys: Keys) -> Keys:
        """(k, 2) those of `keys` (n, 2) whose vectors this encoder made."""
        rows = self._db.execute(f"SELECT id FROM events WHERE {_ENCODER} = ? AND embedding_dim = ?", encoder)
        return keys[np.isin(keys[:, 0], np.fromiter(chain.from_iterable(rows), np.int64))]

    def vectors(self, names: tuple[str, str], dim: int, rows: int) -> Iterator[tuple[Keys, Half]]:
        """(k, 2) and (k, d) float16, the last of each track, of all people of this encoder; k is at most `rows`.

        names: what an Encoder may be called, d: its `dim`.
        """
        found = self._db.execute(
            f"SELECT event, number, embedding FROM ({_EACH.format(which=LAST)}) JOIN people USING (event, number)"
            f" JOIN events ON id = event WHERE {_ENCODER} IN (?, ?) AND embedding_dim = ?",
            (*names, dim),
        )
        while some := found.fetchmany(rows):
            keys = np.array([row[:2] for row in some], np.int64)
            yield keys, np.frombuffer(b"".join(row[2] for row in some), "<f2").reshape(len(some), dim)

    def sighting(self, key: Iterable[int]) -> Sighting | None:
        """The person with this key (2,), or None: retention has removed them."""
        return self._sighting("event = ? AND number = ?", *map(int, key))

    def at(self, place: Place) -> Sighting | None:
        """The person at this place, or None: nobody was there, or not any more."""
        return self._sighting("device = ? AND epoch = ? AND seq = ? AND number = ?", *place)

    def _sighting(self, where: str, *values: str | int) -> Sighting | None:
        row = self._db.execute(
            f"SELECT device, epoch, seq, number, camera, captured_at, clock, {_ENCODER}, embedding_dim, embedding,"
            f" crop, {PERSON} FROM people JOIN events ON id = event LEFT JOIN tracks USING (event, number)"
            f" WHERE {where}",
            values,
        ).fetchone()
        if row is None:
            return None
        vector = np.frombuffer(row[9], "<f2").astype(np.float16)
        place, encoder, person = Place(*row[:4]), Encoder(*row[7:9]), person_of(*row[11:])
        return Sighting(place, row[4], row[5], row[6], encoder, person, vector, row[10])

    def corrections(self) -> dict[Who, dict[str, str]]:
        """Person -> category -> what people said last."""
        query = (
            "SELECT device, epoch, seq, number, camera, track, category, option"
            " FROM labels JOIN events ON id = event LEFT JOIN tracks USING (event, number) ORDER BY labelled_at, event"
        )
        said: dict[Who, dict[str, str]] = {}
        for device, epoch, seq, number, camera, track, category, option in self._db.execute(query):
            who = Place(device, epoch, seq, number) if track is None else (device, epoch, camera, track)
            said.setdefault(who, {})[category] = option
        return said

    def correct(self, place: Place, category: str, option: str | None, labelled_at: float) -> int:
        """Note what is true of a person; None takes back what was said, at whichever of a track's events.

        How many that were: 0 where retention has removed them, or nothing was said.
        """
        if option is None:
            one = self.at(place)
            return 0 if one is None else self._take_back(one, category)
        return self._db.execute(
            "INSERT INTO labels SELECT event, number, ?, ?, ? FROM people JOIN events ON id = event"
            " WHERE device = ? AND epoch = ? AND seq = ? AND number = ?"
            " ON CONFLICT DO UPDATE SET option = excluded.option, labelled_at = excluded.labelled_at",
            (category, option, labelled_at, *place),
        ).rowcount

    def _take_back(self, one: Sighting, category: str) -> int:
        names = {**one.place._asdict(), "camera": one.camera, "track": one.person.track, "category": category}
        taken = self._db.execute(
            "DELETE FROM labels WHERE category = :category AND (event, number) IN"
            " (SELECT event, number FROM labels JOIN events ON id = event LEFT JOIN tracks USING (event, number)"
            " WHERE device = :device AND epoch = :epoch"
            " AND (camera = :camera AND track = :track OR track IS NULL AND seq = :seq AND number = :number))",
            names,
        )
        return min(taken.rowcount, 1)


def person_of(
    score: float,
    answers: str,
    crop: int,
    track: int | None,
    looks: int | None,
    x1: float,
    y1: float,
    x2: float,
    y2: float,
) -> Person:
    """A person as their row says, see PERSON."""
    given = ANSWERS.validate_json(answers)
    return Person(box=(x1, y1, x2, y2), score=score, answers=given, crop=bool(crop), track=track, looks=looks)


def file_name(device: str) -> str:
    """A device's name as a part of a file's name: no two devices have the same, whatever they call themselves."""
    if _PLAIN.fullmatch(device):
        return device
    short = re.sub(r"[^A-Za-z0-9_-]+", "_", device)[:40].lstrip("-")
    return f"{short}~{hashlib.sha256(device.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def place_of(image: str, names: Mapping[str, str]) -> Place | None:
    """The inverse of Place.image; names: of every device the `file_name`, and the device. None: it names nobody."""
    found = _IMAGE.fullmatch(image)
    if found is None or found[1] not in names or any(int(number) >= MAX_NUMBER for number in found.groups()[1:]):
        return None
    return Place(names[found[1]], int(found[2]), int(found[3]), int(found[4]))
