"""Stored people become a labelled set that the export reads, each track once, and what people say comes back."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from collector.labelling import Corrected, Written, ask_people, read_set, write_set
from collector.people import LAST, MOST_LOOKS, Encoder, Place, file_name, place_of
from collector.store import Store
from collector.table import in_words
from edge.errors import ConfigError
from edge.events import Answer, Choice, Event, Header, Person
from edge.values import Category
from export.labels import read_labels
from tests.fakes import item, unit_rows

DIM = 16
JPEG = b"\xff\xd8 a picture"
BANK = (
    Category("hat", "hat of this person is", ("cap", "helmet", "none"), (None,) * 3),
    Category("bag", "bag of this person is", ("big", "small"), (None,) * 2),
)


def person(
    track: int | None = None, looks: int | None = None, crop: bool = False, unknown: bool = False, **options: str
) -> Person:
    """Each category's best options in order, each half as probable as the one before; _ for a space in a name."""
    answers = tuple(
        Answer(
            category=category.replace("_", " "),
            top=tuple(
                Choice(option=option.replace("_", " "), probability=0.75 / 2**i)
                for i, option in enumerate(best.split())
            ),
            unknown=unknown or None,
        )
        for category, best in options.items()
    )
    return Person(box=(1, 2.4, 30, 40), score=0.5, answers=answers, crop=crop, track=track, looks=looks)


def seen(
    seq: int,
    *people: Person,
    device: str = "box",
    epoch: int = 7,
    camera: str = "door",
    bundle: str = "b",
    dim: int = DIM,
) -> Event:
    header = Header(
        device=device, epoch=epoch, seq=seq, camera=camera, frame=seq, captured_at=1.7e9 + seq, frame_size=(640, 480),
        bundle=bundle, bank="c", embedding_dim=dim, people=people,
    )  # fmt: skip
    vectors = unit_rows(len(people), dim, seed=seq).astype(np.float16)
    return Event(header, vectors, tuple(JPEG if one.crop else None for one in people))


def add(store: Store, *events: Event) -> None:
    store.add([item(event) for event in events], received_at=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db", create=True) as store:
        yield store


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(folder: Path, **cells: Iterable[str]) -> Path:
    """Write these into the columns of the table, as a person in a spreadsheet would."""
    rows = table(folder)
    for column, texts in cells.items():
        for row, text in zip(rows, texts, strict=True):
            row[column] = text
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


# --- names ------------------------------------------------------------------------------------------------------------

DEVICES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    st.sampled_from(["box", "box-7-1", "a/b", "a_b", "..", ".", "-x", "BOX~0", "größe", "a\0b", "x" * 200, " "]),
    st.sampled_from(["a/b", "größe"]).map(file_name),
)


@given(st.sets(DEVICES, min_size=1, max_size=4), st.tuples(*[st.integers(0, 2**63 - 1)] * 3))
def test_whatever_a_device_calls_itself_its_people_have_file_names_of_their_own(
    devices: set[str], numbers: tuple[int, int, int]
) -> None:
    places = [Place(device, *numbers) for device in devices]
    images = {place.image for place in places}
    assert len(images) == len(places)
    names = {file_name(device): device for device in devices}
    for place in places:
        folder, name = place.image.split("/")
        assert (folder, name[0] in ".-", len(name) < 200, name.isascii()) == ("images", False, True, True)
        assert place_of(place.image, names) == place


@pytest.mark.parametrize(
    "image",
    ["", "images/box-1-2.jpg", "images/box-1-2-3.png", "box-1-2-3.jpg", "images/box-1-2-x.jpg", "images/bux-1-2-3.jpg",
     "images/box-1-2-9223372036854775808.jpg", "images/box-1-2-3.jpg\n", "images/box-1-2-٣.jpg"],
)  # fmt: skip
def test_what_names_nobody(image: str) -> None:
    assert place_of(image, {"box": "box"}) is None


# --- each track once --------------------------------------------------------------------------------------------------

TRACKED = st.tuples(
    st.sampled_from(["box", "bax"]), st.integers(1, 2), st.sampled_from(["door", "yard"]), st.sampled_from(["b", "c"]),
    st.lists(st.tuples(st.none() | st.integers(1, 2), st.none() | st.integers(1, 3)), max_size=3),
)  # fmt: skip
EVENTS = st.lists(TRACKED, max_size=12)


@pytest.fixture(scope="module")
def folder() -> Iterator[Iterator[Path]]:
    """File names, never the same."""
    with TemporaryDirectory() as name:
        yield (Path(name) / f"{i}.db" for i in count())


@given(plan=EVENTS)
def test_each_track_counts_once_and_who_has_none_each_time(folder: Iterator[Path], plan: list) -> None:
    events, sightings = [], []
    for seq, (device, epoch, camera, bundle, people) in enumerate(plan):
        everyone = [person(track=track, looks=looks) for track, looks in people]
        events.append(seen(seq, *everyone, device=device, epoch=epoch, camera=camera, bundle=bundle))
        for number, (track, looks) in enumerate(people):
            who = (device, epoch, camera, track) if track is not None else (seq, number)
            sightings.append((who, looks or 0, seq, number, device, bundle))
    with Store(next(folder), create=True) as store:
        add(store, *events)
        for which, rank in ((MOST_LOOKS, lambda one: (one[1], -one[2])), (LAST, lambda one: one[2])):
            best: dict[object, tuple] = {}
            for one in sightings:
                known = best.get(one[0])
                if known is None or rank(one) > rank(known):
                    best[one[0]] = one
            expected = sorted(best.values(), key=lambda one: (-one[2], one[3]))
            for device, bundle in ((None, None), ("box", None), (None, "b"), ("box", "b")):
                encoder = None if bundle is None else Encoder(bundle, DIM)
                keys = store.people.each(which, device)
                keys = keys if encoder is None else store.people.made_by(encoder, keys)
                found = [store.people.sighting(key) for key in keys]
                wanted = [one[2:4] for one in expected if one[4] == (device or one[4]) and one[5] == (bundle or one[5])]
                assert [(one.place.seq, one.place.number) for one in found] == wanted
            assert store.people.count() == len(expected)
        keys = [key for keys, _ in store.people.vectors(("b", "a"), DIM, 2) for key in keys.tolist()]
        assert sorted(keys) == sorted(store.people.made_by(Encoder("b", DIM), store.people.each(LAST)).tolist())


def test_a_sighting_is_what_was_sent(store: Store) -> None:
    event = seen(3, person(hat="cap"), person(track=5, looks=2, crop=True, unknown=True, bag="big small"), camera="dör")
    add(store, event)
    one = store.people.at(Place("box", 7, 3, 1))
    assert one is not None
    assert (one.camera, one.captured_at, one.encoder, one.crop) == ("dör", 1.7e9 + 3, Encoder("b", DIM), JPEG)
    assert one.person == event.header.people[1]
    assert one.vector.dtype == np.float16
    assert one.vector.tolist() == event.embeddings[1].tolist()
    assert one.who == ("box", 7, "dör", 5)
    assert store.people.at(Place("box", 7, 3, 2)) is None


# --- a set out --------------------------------------------------------------------------------------------------------


def test_a_set_is_what_the_export_reads(store: Store, tmp_path: Path) -> None:
    events = [
        seen(0, person(hat="cap"), device="the box"),
        seen(1, person(track=4, looks=1, hat="none"), person(hat="helmet cap", bag="big", crop=True)),
        seen(2, person(track=4, looks=9, hat="cap none", crop=True)),
        seen(3, person(track=4, looks=9, hat="cap", unknown=True)),
        seen(4, person(track=4, looks=3, hat="helmet")),
    ]
    add(store, *events)
    place = Place("box", 7, 1, 1)
    store.correct([(place, "hat", "none"), (Place("box", 7, 1, 0), "hat", "helmet")], 5.0)
    store.correct([(place, "bag", "big"), (Place("box", 7, 2, 0), "hat", "cap")], 6.0)
    store.correct([(Place("the box", 7, 0, 0), "hat", "bonnet"), (place, "age", "old")], 6.0)  # other words
    out = tmp_path / "sets" / "first"
    assert write_set(store, BANK, out, None, 10) == Written(people=3, crops=2, others=0, left=0)
    assert [list(row.values()) for row in table(out)] == [
        ["images/box-7-2-0.jpg", "box/7/door/4", "cap", "", "cap", ""],
        ["images/box-7-1-1.jpg", "images/box-7-1-1.jpg", "none", "big", "helmet", "big"],
        [Place("the box", 7, 0, 0).image, Place("the box", 7, 0, 0).image, "", "", "cap", ""],
    ], "newest first; of the track the first with the most looks; what was said last of any of its sightings"
    assert list(table(out)[0]) == ["image", "person", "hat", "bag", "hat guess", "bag guess"]
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == [
        "embeddings.npz", "images/box-7-1-1.jpg", "images/box-7-2-0.jpg", "labels.csv",
    ]  # fmt: skip
    assert (out / "images/box-7-1-1.jpg").read_bytes() == JPEG
    assert (out / "labels.csv").read_bytes().startswith(b"\xef\xbb\xbfimage,"), "Excel reads it as ANSI otherwise"
    read = read_labels(out, BANK, None)
    assert (read.encoder, read.skipped_categories) == ("b", ())
    assert read.labels == {"hat": ("cap", "none", None), "bag": (None, "big", None)}
    assert read.vectors is not None
    wanted = [events[2].embeddings[0], events[1].embeddings[1], events[0].embeddings[0]]
    assert np.array_equal(read.vectors, np.stack(wanted).astype(np.float32))


def test_nobody_is_a_set_too(store: Store, tmp_path: Path) -> None:
    for events in ([], [seen(0)]):
        add(store, *events)
        out = tmp_path / str(len(events))
        assert write_set(store, BANK, out, None, 10) == Written(0, 0, 0, 0)
        assert [file.name for file in out.iterdir()] == ["labels.csv"]
        assert read_set(store, BANK, out / "labels.csv") == Corrected(0, 0, 0, 0, ())


def test_a_set_has_one_encoder_and_no_more_than_asked_for(store: Store, tmp_path: Path) -> None:
    add(store, *(seen(seq, person(hat="cap"), bundle="old") for seq in range(3)))
    add(store, *(seen(seq, person(hat="cap"), dim=8) for seq in range(3, 5)))
    add(store, *(seen(seq, person(hat="cap"), person(hat="cap")) for seq in range(5, 10)))
    add(store, seen(0, person(hat="cap"), bundle="old", device="other"))
    assert write_set(store, BANK, tmp_path / "a", "box", 3) == Written(people=3, crops=0, others=5, left=7)
    assert [row["image"] for row in table(tmp_path / "a")] == [
        f"images/box-7-{seq}-{number}.jpg" for seq, number in ((9, 0), (9, 1), (8, 0))
    ]
    assert write_set(store, BANK, tmp_path / "b", None, 99) == Written(people=4, crops=0, others=12, left=0)
    with np.load(tmp_path / "b" / "embeddings.npz") as arrays:
        assert (str(arrays["encoder"]), arrays["vectors"].shape, arrays["vectors"].dtype) == (
            "old",
            (4, DIM),
            "float16",
        )
        assert arrays["images"].tolist() == [row["image"] for row in table(tmp_path / "b")]


def test_a_set_overwrites_none_and_a_device_that_is_not_there_is_told(store: Store, tmp_path: Path) -> None:
    add(store, seen(0, person(hat="cap")))
    write_set(store, BANK, tmp_path / "a", None, 1)
    with pytest.raises(ConfigError, match=r"labels\.csv exists already; read it with --read, and name another folder"):
        write_set(store, BANK, tmp_path / "a", None, 1)
    with pytest.raises(ConfigError, match="--device: the store has nothing of 'bax'; did you mean 'box'"):
        write_set(store, BANK, tmp_path / "b", "bax", 1)
    assert not (tmp_path / "b").exists()


def test_a_spreadsheet_runs_nothing_and_a_column_has_one_meaning(store: Store, tmp_path: Path) -> None:
    names = ("image", "hat guess", "hat", "a,b")
    categories = [Category(name, "", ("cap", "-"), (None, None)) for name in names]
    answers = tuple(Answer(category=name, top=(Choice(option="+cmd", probability=1),)) for name in (*names, "=1+1"))
    one = person(track=1).model_copy(update={"answers": answers})
    add(store, seen(0, one, device="@evil\x1b[2J/../x", camera="-1"))
    write_set(store, categories, tmp_path / "a", None, 9)
    (row,) = table(tmp_path / "a")
    assert list(row) == ["image", "person", "hat", "a,b", "hat guess", "a,b guess"]
    assert (row["person"], row["hat guess"]) == ("'@evil?[2J/../x/7/-1/1", "'+cmd")
    file = fill(tmp_path / "a", hat=["-"], **{"a,b": ["cap"]})
    assert read_set(store, categories, file) == Corrected(2, 1, 0, 0, ()), "a - that is an option takes nothing back"
    assert list(store.people.corrections().values()) == [{"hat": "-", "a,b": "cap"}]


# --- and in again -----------------------------------------------------------------------------------------------------


def test_what_a_person_wrote_comes_back(store: Store, tmp_path: Path) -> None:
    add(store, seen(0, person(hat="cap helmet", bag="big")), seen(1, person(track=4, hat="none"), person(bag="small")))
    write_set(store, BANK, tmp_path / "a", None, 9)
    file = fill(tmp_path / "a", hat=["helmet", "", " cap "], bag=["", "big", "small"], note=["x", "", ""])
    assert read_set(store, BANK, file) == Corrected(new=4, people=3, known=0, taken_back=0, ignored=("note",))
    assert store.people.corrections() == {
        ("box", 7, "door", 4): {"hat": "helmet"},
        Place("box", 7, 1, 1): {"bag": "big"},
        Place("box", 7, 0, 0): {"hat": "cap", "bag": "small"},
    }
    assert read_set(store, BANK, file) == Corrected(new=0, people=0, known=4, taken_back=0, ignored=("note",))
    add(store, seen(2, person(track=4, looks=8, hat="none")))
    write_set(store, BANK, tmp_path / "b", None, 9)
    rows = table(tmp_path / "b")
    assert [(row["image"][-7:], row["hat"], row["bag"]) for row in rows] == [
        ("2-0.jpg", "helmet", ""), ("1-1.jpg", "", "big"), ("0-0.jpg", "cap", "small"),
    ], "the track's sighting is another now, and what was said of it stays"  # fmt: skip
    assert read_set(store, BANK, fill(tmp_path / "b", hat=["none", "", ""])) == Corrected(1, 1, 2, 0, ())
    assert store.people.corrections()["box", 7, "door", 4] == {"hat": "none"}


def test_what_was_said_is_taken_back(store: Store, tmp_path: Path) -> None:
    add(store, *(seen(seq, person(track=4, looks=seq), person(track=4), camera=f"door{seq // 2}") for seq in range(4)))
    add(store, seen(4, person(hat="cap")))
    store.correct([(Place("box", 7, seq, 0), "hat", "cap") for seq in range(5)], 5.0)
    store.correct([(Place("box", 7, 3, 0), "hat", "bonnet"), (Place("box", 7, 3, 0), "bag", "big")], 6.0)
    write_set(store, BANK, tmp_path / "a", None, 9)
    assert [row["hat"] for row in table(tmp_path / "a")] == ["cap", "", "cap"]
    file = fill(tmp_path / "a", hat=["cap", "-", ""], bag=["-", "", ""])
    assert read_set(store, BANK, file) == Corrected(new=0, people=0, known=1, taken_back=1, ignored=())
    assert store.people.corrections() == {
        ("box", 7, "door0", 4): {"hat": "cap"},
        ("box", 7, "door1", 4): {"bag": "big"},
        Place("box", 7, 4, 0): {"hat": "cap"},
    }, "of all sightings of the track, and of nobody else"
    assert read_set(store, BANK, fill(tmp_path / "a", hat=["-", "-", ""])).taken_back == 1
    assert store.correct([(Place("box", 7, 9, 9), "hat", None), (Place("box", 7, 4, 0), "hat", None)], 7.0) == 0


HEAD = "image,person,hat,bag,hat guess\n"
GOOD = "images/box-7-0-0.jpg,x,cap,,\n"
BAD_TABLES = [
    ("", "no column 'image' in the first line"),
    ("image;person;hat\n", "no column 'image' in the first line: .*; save it as CSV with commas"),
    ("image,hat,hat\n", "two columns are named 'hat'"),
    (HEAD + GOOD + "images/box-7-9-0.jpg,x,cap,,\n", "line 3: the store has no person 'images/box-7-9-0.jpg'; leave"),
    (HEAD + GOOD + "images/box-7-0-1.jpg,x,,,\n", "line 3: the store has no person"),
    (HEAD + GOOD + "../../etc/passwd,x,,,\n", "line 3: the store has no person"),
    (HEAD + GOOD + "\n" + GOOD, "line 4: 'images/box-7-0-0.jpg' again; it stands in line 2"),
    (
        HEAD + GOOD + "images/box-7-1-0.jpg,x,helmt,,\n",
        "line 3: hat: no such option: got 'helmt'; did you mean 'helmet'",
    ),
    (HEAD + GOOD + "images/box-7-1-0.jpg,x,,cap,\n", "line 3: bag: no such option: got 'cap'; there is 'big', 'small'"),
    (HEAD + GOOD + "images/box-7-1-0.jpg,x,\n", "line 3: expected 5 cells, got 3"),
    (HEAD + GOOD + 'images/box-7-1-0.jpg,x,"cap,,\n', "line 3: not CSV"),
    (HEAD.encode() + b"images/box-7-1-0.jpg,\xff,,,\n", "not UTF-8 text: .*; save it as UTF-8"),
]


@pytest.mark.parametrize(("text", "says"), BAD_TABLES)
def test_a_table_with_a_mistake_is_one_error_and_nothing_of_it_is_kept(
    store: Store, tmp_path: Path, text: str | bytes, says: str
) -> None:
    add(store, seen(0, person(hat="cap helmet")), seen(1, person(bag="big", hat="cap")))
    file = tmp_path / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        read_set(store, BANK, file)
    assert str(file) in str(caught.value)
    assert store.people.corrections() == {}
    with pytest.raises(ConfigError, match="No such file"):
        read_set(store, BANK, tmp_path / "none.csv")


# --- one question after the other -------------------------------------------------------------------------------------


class Typist:
    """Answers in turn; then wants no more. shown: every line, and every question."""

    def __init__(self, *answers: str) -> None:
        self._answers = iter(answers)
        self.shown: list[str] = []

    def ask(self, question: str) -> str:
        self.shown.append(question)
        return next(self._answers, "q")

    def say(self, line: str) -> None:
        self.shown.append(line)


KEYS = "Enter: the guess is right (without one: skip); a number: that one; s: skip; b: one back; q: quit"
FIRST = "  hat: unknown; 1 none 75 %, 2 cap, 3 helmet"
NEXT = "  hat: 1 cap 75 % (guess), 2 helmet 38 %, 3 none"


def test_questions_are_answered_one_by_one_and_kept_at_once(store: Store) -> None:
    add(
        store,
        seen(0, person(hat="cap helmet bonnet", bag="huge big", age="old")),
        seen(1, person(track=4, looks=2, hat="none", unknown=True), camera="d\x1b[2J"),
        seen(2),
    )
    typist = Typist("2", "", "x", "4", "s", "")
    assert ask_people(store, BANK, typist.ask, typist.say, None, 9) == 1
    assert typist.shown == [
        KEYS,
        "\nno picture: box/d?[2J, 2023-11-14T22:13:21.000+00:00, box 1 2 30 40, track 4 of 2 looks",
        FIRST,
        "  bag: 1 big, 2 small",
        "\nno picture: box/door, 2023-11-14T22:13:20.000+00:00, box 1 2 30 40",
        *[NEXT, KEYS] * 2,
        NEXT,
        "  bag: 1 big 38 %, 2 small",
    ], "what is no option of the bundle is no guess"
    assert store.people.corrections() == {("box", 7, "d\x1b[2J", 4): {"hat": "cap"}}
    again = Typist("s", " 3 ", "2")
    assert ask_people(store, BANK, again.ask, again.say, None, 9) == 2, "what was said is not asked again"
    assert store.people.corrections()[Place("box", 7, 0, 0)] == {"bag": "small", "hat": "none"}
    store.correct([(Place("box", 7, 1, 0), "bag", "huge")], 9.0)
    words = Typist("1")
    assert ask_people(store, BANK, words.ask, words.say, None, 9) == 1, "but what is no option of the bundle is"
    assert ask_people(store, BANK, words.ask, words.say, None, 9) == 0
    assert len(words.shown) == 4, "and then there is nobody left"


def test_an_answer_can_be_taken_back(store: Store) -> None:
    add(store, seen(0, person(hat="cap")), seen(1, person(hat="cap", bag="big")))
    typist = Typist("b", "", "2", "b", "b", "b", "s", "1", "2", "b", "3")
    assert ask_people(store, BANK, typist.ask, typist.say, None, 9) == 2
    asked = [line.split(":")[0].strip() for line in typist.shown[1:]]
    assert asked == [
        "no picture", "hat", "hat", "bag", "no picture", "hat", "no picture", "bag", "hat", "hat", "bag",
        "no picture", "hat", "bag", "hat", "bag",
    ]  # fmt: skip
    assert store.people.corrections() == {
        Place("box", 7, 1, 0): {"bag": "big"},
        Place("box", 7, 0, 0): {"hat": "none"},
    }


def test_a_picture_is_there_while_its_person_is_asked_about(store: Store) -> None:
    add(store, seen(0, person(crop=True), device="a/b"))
    typist = Typist()
    there = []

    def ask(question: str) -> str:
        file = Path(typist.shown[-1].strip().partition(": a/b/door, ")[0])
        there.append((file, file.read_bytes()))
        return "q"

    ask_people(store, BANK, ask, typist.say, None, 9)
    ((file, content),) = there
    assert (content, file.suffix, file.parent.exists()) == (JPEG, ".jpg", False)


@pytest.mark.parametrize(("limit", "asked"), [(1, 1), (3, 3), (9, 5)])
def test_no_more_people_are_asked_about_than_wished(store: Store, limit: int, asked: int) -> None:
    add(store, *(seen(seq, person(hat="cap")) for seq in range(5)))
    typist = Typist(*["", "s"] * 9)
    assert ask_people(store, BANK, typist.ask, typist.say, "box", limit) == asked


def test_quit_keeps_what_was_said_before(store: Store) -> None:
    add(store, seen(0, person(hat="cap", bag="big")))
    typist = Typist("", "Q")
    assert ask_people(store, BANK, typist.ask, typist.say, None, 9) == 1
    assert store.people.corrections() == {Place("box", 7, 0, 0): {"hat": "cap"}}


def test_a_person_whom_retention_removes_meanwhile_is_passed_over(store: Store) -> None:
    add(store, seen(0, person(hat="cap")), seen(1, person(hat="cap", bag="big")))

    def ask(question: str) -> str:
        store.prune(99.0, max_age_s=1)
        add(store, seen(2, person(hat="cap")), seen(3, person(hat="cap", bag="small")))  # their rows' numbers again
        return ""

    assert ask_people(store, BANK, ask, lambda line: None, None, 9) == 0
    assert store.people.corrections() == {}


def test_words_about_a_person_leave_out_what_is_not_known() -> None:
    assert in_words(person(hat="cap", unknown=True)) == Text("a person", "dim")
    known, unknown = person(hat="cap"), person(bag="big", unknown=True)
    both = known.model_copy(update={"answers": (*unknown.answers, *known.answers)})
    assert in_words(both).plain == "cap 75 %"
