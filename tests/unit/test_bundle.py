"""CONTRACT 1: what is written comes back, and no damaged byte of a bundle passes or raises anything but BundleError."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bank import MEND_BANK, SEAL, Fit, Look, PromptBank
from edge.bundle import (
    DETECTOR,
    GOLDEN,
    IMAGE,
    MANIFEST,
    MEND,
    PROMPTS,
    SMALLER,
    TEXT,
    VOCABULARY,
    Manifest,
    open_bundle,
    sha256_of,
)
from edge.errors import BundleError
from edge.values import Category, Region
from tests.fakes import (
    CONTENTS,
    DETECTOR_FACTS,
    ENCODER_FACTS,
    SMALLER_FACTS,
    bank,
    manifest,
    sha256,
    unit_rows,
    write_bundle,
)


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Every byte with all its bits flipped, with one, and with the one that turns small letters into capitals."""
    for i in range(len(data)):
        for mask in (0xFF, 1 << i % 8, 0x20):
            yield i, data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]


def refuses(read: Callable[[Path], object], path: Path, *parts: str) -> None:
    """One line that names the file and holds these parts."""
    with pytest.raises(BundleError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- sha256_of ----


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_a_file_is_that_of_its_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(1021)) * (size // 1021 + 1)
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    assert sha256_of(path) == hashlib.sha256(data[:size]).hexdigest()


# ---- Manifest ----


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / MANIFEST


def test_a_manifest_comes_back(path: Path) -> None:
    for one in (
        manifest(),
        manifest(name="grün 绿", files={}, steps={}),
        manifest(detector=DETECTOR_FACTS.model_copy(update={"classes": ("person", "car"), "resize": "letterbox"})),
        manifest(encoder=ENCODER_FACTS.model_copy(update={"logit_scale": 1e-300, "square": "crop"})),
        manifest(smaller=SMALLER_FACTS),
    ):
        path.write_text(one.to_json(), encoding="utf-8")
        assert Manifest.read(path) == one
        assert Manifest.read(path).seal() == one.seal()
        assert json.loads(one.to_json())["sha256"] == one.seal()


def test_the_seal_does_not_depend_on_the_order_of_names() -> None:
    files = dict(manifest().files)
    assert manifest(files=dict(reversed(files.items()))).seal() == manifest().seal()
    assert manifest(files={**files, DETECTOR: sha256(b"other")}).seal() != manifest().seal()
    assert manifest(name="other").seal() != manifest().seal()


def test_without_a_smaller_detector_manifest_and_seal_are_those_of_before_there_was_one() -> None:
    """So bundles in use stay valid, and an older box reads a new bundle that has none."""
    assert manifest().seal() == "26f658d442a5bbe0c70b5cf72c8b90396fdc0a67f09bef256368556890d9fcfd"
    assert "smaller" not in json.loads(manifest().to_json())
    with_one = manifest(smaller=SMALLER_FACTS)
    assert json.loads(with_one.to_json())["smaller"]["height"] == SMALLER_FACTS.height
    taller = SMALLER_FACTS.model_copy(update={"height": 8})
    assert len({manifest().seal(), with_one.seal(), manifest(smaller=taller).seal()}) == 3


def test_every_flipped_byte_of_a_manifest_is_refused(path: Path) -> None:
    """The one that passes is no damage: 1e-05 and 1E-05 are the same number, and so are the bundles."""
    text = manifest().to_json().encode()
    harmless, text = [], manifest().to_json().encode()
    for i, damaged in flips(text):
        path.write_bytes(damaged)
        with suppress(BundleError):
            assert Manifest.read(path) == manifest()
            harmless.append(text[i - 1 : i + 4])
    assert harmless == [b"1e-05"]


def test_every_cut_manifest_is_refused(path: Path) -> None:
    text = manifest().to_json().rstrip().encode()
    for end in range(len(text)):
        path.write_bytes(text[:end])
        refuses(Manifest.read, path, MEND)


def resealed(**changes: object) -> bytes:
    """A manifest with an edited field and a seal over just that: what a program with another idea would write."""
    fields = {**manifest().model_dump(mode="json"), **changes}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "sha256": sha256(text.encode())}).encode()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "no manifest"),
        (b"[]", "no manifest"),
        (b'"sha256"', "no manifest"),
        (b"5", "no manifest"),
        (b"null", "no manifest"),
        (b"{}", "sha256"),
        (b'{"sha256": "x"}', "Field required"),
        (b'{"sha256": "x", "name": "\\ud800"}', "JSON"),
        (b"\xff\xfe{}", "no manifest"),
        (b"[" * 100_000, "no manifest"),
        (b'{"sha256": ' + b"9" * 5000 + b"}", "manifest"),
        (resealed(format="lookout.bundle/1"), "format: Input should be 'lookout.bundle/2': got 'lookout.bundle/1'; "),
        (resealed(colour="red"), "colour: Extra inputs are not permitted"),
        (resealed(name=5), "name: Input should be a valid string"),
        (resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "size": 0}), "encoder.size"),
        (resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "size": "16"}), "encoder.size"),
        (resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "size": True}), "encoder.size"),
        (
            resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "logit_scale": float("nan")}),
            "encoder.logit_scale",
        ),
        (resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "fill_bgr": [1, 2]}), "encoder.fill_bgr"),
        (resealed(encoder={**ENCODER_FACTS.model_dump(mode="json"), "square": "round"}), "encoder.square"),
        (resealed(detector={**DETECTOR_FACTS.model_dump(mode="json"), "classes": []}), "detector.classes"),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, part: str, path: Path) -> None:
    path.write_bytes(content)
    refuses(Manifest.read, path, part, MEND)


def test_an_edited_manifest_is_refused(path: Path) -> None:
    text = manifest().to_json()
    path.write_text(text.replace('"height": 32', '"height": 64'), encoding="utf-8")
    refuses(Manifest.read, path, "changed by hand or damaged", manifest().seal(), MEND)
    path.write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    assert Manifest.read(path) == manifest(), "the seal is over the fields, not over line ends"


def test_a_manifest_that_is_not_there(path: Path) -> None:
    refuses(Manifest.read, path, "No such file", MEND)
    path.mkdir()
    refuses(Manifest.read, path, "Is a directory", MEND)


# ---- PromptBank ----

F32 = np.float32
REGIONS: tuple[Region, ...] = ("whole", "head", "upper", "lower", "feet")
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
plain_floats = st.floats(allow_nan=False, allow_infinity=False)
looks = st.builds(Look, st.sampled_from([None, "pad", "squash", "crop"]), st.floats(-0.3, 1), st.booleans())
counts = st.integers(0, 10**9)
fits = st.builds(Fit, st.sampled_from(["calibrated", "adapted"]), words, words, counts, counts, st.booleans())


@st.composite
def banks(draw: st.DrawFn) -> PromptBank:
    """0 to 3 categories with words of any script, calibrated or not; a look; and what was learned, or nothing."""
    categories = []
    for _ in range(draw(st.integers(0, 3))):
        options = tuple(draw(st.lists(words, min_size=2, max_size=4, unique=True)))
        labels = tuple(draw(st.none() | words) for _ in options)
        one = Category(draw(words), draw(words), options, labels, draw(st.booleans()), draw(st.sampled_from(REGIONS)))
        if draw(st.booleans()):
            bias = tuple(draw(st.lists(plain_floats, min_size=len(options), max_size=len(options))))
            temperature, threshold = draw(st.floats(1e-300, 1e300)), draw(st.floats(0, 1))
            one = replace(one, temperature=temperature, bias=bias, threshold=threshold)
        categories.append(one)
    rows = unit_rows(sum(len(one.options) for one in categories), draw(st.integers(1, 9)))
    known = PromptBank(tuple(categories), rows, draw(words), draw(words), draw(words), draw(looks))
    if draw(st.booleans()):
        known = replace(known, fits=tuple(draw(st.lists(fits, max_size=2))), words_sha256=draw(words))
    return replace(known, text=rows, vectors=rows * F32(draw(st.floats(0, 99)))) if draw(st.booleans()) else known


@given(banks())
def test_a_bank_comes_back(tmp_path_factory: pytest.TempPathFactory, one: PromptBank) -> None:
    path = tmp_path_factory.getbasetemp() / "bank.npz"
    path.write_bytes(one.to_bytes())
    again = PromptBank.read(path)
    for name in (
        "categories",
        "text_sha256",
        "image_sha256",
        "source",
        "look",
        "fits",
        "words_sha256",
        "words",
        "regions",
    ):
        assert getattr(again, name) == getattr(one, name)
    assert again.vectors.dtype == again.from_text.dtype == np.float32
    assert np.array_equal(again.vectors, one.vectors)
    assert np.array_equal(again.from_text, one.from_text)
    assert (again.text is None) == (one.text is None)
    assert again.to_bytes() == one.to_bytes(), "the same bank, the same bytes"
    assert again.sha256 == one.sha256


def test_a_bank_is_an_npz_that_numpy_opens() -> None:
    with np.load(io.BytesIO(bank().to_bytes())) as arrays:
        assert np.array_equal(arrays["vectors"], bank().vectors)


def test_a_bank_holds_no_time() -> None:
    """So that equal words give equal bytes on any day."""
    with zipfile.ZipFile(io.BytesIO(bank().to_bytes())) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_layout_in_memory_does_not_change_the_sum() -> None:
    wide = np.zeros((5, 8), np.float32)
    wide[:, ::2] = bank().vectors
    for vectors in (np.asfortranarray(bank().vectors), wide[:, ::2]):
        other = replace(bank(), vectors=vectors)
        assert np.array_equal(other.vectors, bank().vectors)
        assert other.sha256 == bank().sha256


FIT = Fit("adapted", "pets", sha256(b"labels"), 12, 340, False)
OWN = ({"region": "head"}, {"temperature": 2.0}, {"bias": (0.0, 0.0, 1.0)}, {"threshold": 0.25})  # of a category


def test_another_bank_has_another_sum() -> None:
    sums = [
        bank().sha256,
        bank(seed=1).sha256,
        bank(image_sha256="other").sha256,
        replace(bank(), source="other.toml").sha256,
        bank().permitted([]).sha256,
        replace(bank(), look=Look("squash")).sha256,
        replace(bank(), look=Look(margin=0.1)).sha256,
        replace(bank(), look=Look(flip=True)).sha256,
        replace(bank(), fits=(FIT,)).sha256,
        replace(bank(), text=bank().vectors).sha256,
        *(
            replace(bank(), categories=(replace(bank().categories[0], **one), bank().categories[1])).sha256
            for one in OWN
        ),
    ]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (unit_rows(5, 4).astype(np.float64), r"must be float32 \(5, d\), got float64 \(5, 4\)"),
        (unit_rows(4, 4), r"must be float32 \(5, d\), got float32 \(4, 4\)"),
        (unit_rows(5, 4)[0], r"must be float32 \(5, d\), got float32 \(4,\)"),
        (unit_rows(5, 4) * np.float32(1.01), "must have unit rows"),
        (np.full((5, 4), np.nan, np.float32), "must have unit rows"),
        (np.zeros((5, 0), np.float32), "must have unit rows"),
    ],
)
def test_a_bank_refuses(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(bank(), vectors=vectors)


@pytest.mark.parametrize(
    ("named", "kept", "rows"),
    [
        ([], ["sleeve length"], slice(0, 3)),
        (["gender"], ["sleeve length", "gender"], slice(0, 5)),
        (["age", "sleeve length"], ["sleeve length"], slice(0, 3)),
    ],
)
def test_sensitive_categories_are_answered_only_where_named(named: list[str], kept: list[str], rows: slice) -> None:
    allowed = bank().permitted(named)
    assert [category.name for category in allowed.categories] == kept
    assert np.array_equal(allowed.vectors, bank().vectors[rows])
    assert allowed.image_sha256 == bank().image_sha256


def test_of_no_category_none_is_permitted() -> None:
    all_sensitive = replace(bank(), categories=bank().categories[1:], vectors=bank().vectors[3:])
    none = all_sensitive.permitted([])
    assert none.categories == ()
    assert none.vectors.shape == (0, 4)
    assert none.permitted(["gender"]).vectors.shape == (0, 4)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tmp_path / PROMPTS


# ---- what was learned ----


def adapted(vectors: np.ndarray) -> PromptBank:
    return replace(bank(), vectors=vectors, text=bank().vectors, fits=(FIT,), words_sha256=bank().sha256)


@pytest.mark.parametrize("length", [0.0, 0.01, 1.0, 3.0, 99.9])
def test_adapted_vectors_may_have_other_lengths_beside_those_of_the_words(length: float, prompts: Path) -> None:
    vectors = bank(seed=3).vectors * F32(length)
    prompts.write_bytes(adapted(vectors).to_bytes())
    again = PromptBank.read(prompts)
    assert np.array_equal(again.vectors, vectors)
    assert np.array_equal(again.from_text, bank().vectors)
    assert again.fits == (FIT,)


@pytest.mark.parametrize(
    ("vectors", "text", "message"),
    [
        (bank().vectors * F32(1.01), None, "must have unit rows"),
        (bank().vectors, bank().vectors * F32(1.01), "must have unit rows"),
        (bank().vectors, np.full((5, 4), np.nan, F32), "must have unit rows"),
        (bank().vectors, bank().vectors.astype(np.float64), r"text must be float32 \(5, 4\), got float64 \(5, 4\)"),
        (bank().vectors, bank().vectors[:4], r"text must be float32 \(5, 4\), got float32 \(4, 4\)"),
        (bank().vectors, bank(dim=5).vectors, r"text must be float32 \(5, 4\), got float32 \(5, 5\)"),
        (np.full((5, 4), np.nan, F32), bank().vectors, "must have rows shorter than 100"),
        (np.full((5, 4), np.inf, F32), bank().vectors, "must have rows shorter than 100"),
        (bank().vectors * F32(100.1), bank().vectors, "must have rows shorter than 100"),
    ],
)
def test_a_bank_that_learned_refuses(vectors: np.ndarray, text: np.ndarray | None, message: str, prompts: Path) -> None:
    with pytest.raises(ValueError, match=message):
        replace(bank(), vectors=vectors, text=text, fits=(FIT,))
    arrays = {"vectors_npy": vectors} | ({} if text is None else {"text_npy": text})
    prompts.write_bytes(sealed(words_json=parts()["words_json"], **{name: npy(one) for name, one in arrays.items()}))
    refuses(PromptBank.read, prompts, "no prompt bank")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_the_words_of_a_bank_stay_who_they_are_whatever_is_learned() -> None:
    plain = bank()
    assert plain.words == plain.sha256
    calibrated = replace(plain, fits=(replace(FIT, how="calibrated"),), words_sha256=plain.words)
    assert calibrated.words == plain.sha256 != calibrated.sha256
    again = replace(adapted(bank(seed=3).vectors), words_sha256=calibrated.words)
    assert again.words == plain.sha256
    assert replace(plain, look=Look(flip=True)).words != plain.words, "another look is another bank"


def test_a_bank_without_its_sensitive_categories_keeps_what_it_learned() -> None:
    allowed = replace(adapted(bank(seed=3).vectors * F32(2)), look=Look("crop", 0.1, True)).permitted([])
    assert np.array_equal(allowed.vectors, bank(seed=3).vectors[:3] * F32(2))
    assert np.array_equal(allowed.from_text, bank().vectors[:3])
    assert (allowed.look, allowed.fits) == (Look("crop", 0.1, True), (FIT,))
    assert allowed.words == bank().sha256


@pytest.mark.parametrize(
    ("asked", "encoded"),
    [
        ((), ("whole",)),
        (("whole", "whole"), ("whole",)),
        (("head",), ("whole", "head")),
        (("upper", "head", "upper", "whole", "feet"), ("whole", "feet", "head", "upper")),
    ],
)
def test_the_regions_of_a_bank_are_the_whole_person_and_each_other_once(
    asked: tuple[Region, ...], encoded: tuple[Region, ...]
) -> None:
    categories = tuple(Category(str(i), "q", ("x", "y"), (None, None), region=one) for i, one in enumerate(asked))
    assert PromptBank(categories, unit_rows(2 * len(asked), 4), "t", "i", "s").regions == encoded


def test_a_bank_of_version_0_2_0_is_read_as_it_was_meant(prompts: Path) -> None:
    """Its words.json had these keys and no others; nothing was calibrated, and all of a person was looked at."""
    fields = json.loads(parts()["words_json"])
    keys = ("name", "question", "options", "labels", "sensitive")
    old = {name: fields[name] for name in ("text_sha256", "image_sha256", "source")}
    old["categories"] = [{key: category[key] for key in keys} for category in fields["categories"]]
    prompts.write_bytes(sealed(vectors_npy=parts()["vectors_npy"], words_json=json.dumps(old).encode()))
    again = PromptBank.read(prompts)
    assert again.categories == bank().categories
    assert np.array_equal(again.vectors, bank().vectors)
    assert (again.look, again.fits, again.words_sha256, again.text) == (Look(), (), "", None)
    assert again.regions == ("whole",)
    for category in again.categories:
        assert (category.region, category.temperature, category.bias, category.threshold) == ("whole", 1, (), 0)
    assert again.sha256 == again.words == bank().sha256, "and it has the name of the same words today"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("look", {"margins": 1}),
        ("look", {"square": "round", "margin": 0.0, "flip": False}),
        ("look", {"square": "pad", "margin": -0.5, "flip": False}),
        ("look", []),
        ("fits", [{"how": "adapted"}]),
        ("fits", 5),
        ("categories", [{"name": "c", "question": "q", "options": ["x", "y"], "labels": [None, None], "colour": 1}]),
        ("categories", [{"name": "c", "question": "q", "options": ["x", "y"]}]),
    ],
)
def test_a_bank_with_keys_of_another_version_is_refused(key: str, value: object, prompts: Path) -> None:
    fields = json.loads(parts()["words_json"]) | {key: value}
    prompts.write_bytes(sealed(vectors_npy=parts()["vectors_npy"], words_json=json.dumps(fields).encode()))
    refuses(PromptBank.read, prompts, "no prompt bank", MEND_BANK)


@pytest.mark.parametrize(
    "own",
    [{"temperature": 0}, {"temperature": float("nan")}, {"threshold": 2}, {"bias": [1.0]}, {"bias": [1.0, 2.0, None]}],
)
def test_a_bank_with_a_calibration_that_is_none_is_refused(own: dict[str, object], prompts: Path) -> None:
    fields = json.loads(parts()["words_json"])
    fields["categories"][0] |= own
    prompts.write_bytes(sealed(vectors_npy=parts()["vectors_npy"], words_json=json.dumps(fields).encode()))
    refuses(PromptBank.read, prompts, "no prompt bank", MEND_BANK)


def test_every_flipped_byte_of_a_bank_is_refused(prompts: Path) -> None:
    data = bank().to_bytes()
    for _, damaged in flips(data):
        prompts.write_bytes(damaged)
        refuses(PromptBank.read, prompts, "damaged", MEND_BANK)


def test_every_cut_or_lengthened_bank_is_refused(prompts: Path) -> None:
    data = bank().to_bytes()
    for damaged in [*(data[:end] for end in range(len(data))), data + b"\0", b"\0" + data, data + data]:
        prompts.write_bytes(damaged)
        refuses(PromptBank.read, prompts, "damaged", MEND_BANK)


def test_a_bank_that_is_not_there(prompts: Path) -> None:
    refuses(PromptBank.read, prompts, "No such file", MEND_BANK)
    prompts.mkdir()
    refuses(PromptBank.read, prompts, "Is a directory", MEND_BANK)


def sealed(**members: bytes) -> bytes:
    """A zip with a right seal and these members, which need not make a bank."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
        archive.comment = b"0" * SEAL
    body = buffer.getvalue()[:-SEAL]
    return body + sha256(body).encode()


def parts() -> dict[str, bytes]:
    """The members of a good bank."""
    with zipfile.ZipFile(io.BytesIO(bank().to_bytes())) as archive:
        return {"vectors_npy": archive.read("vectors.npy"), "words_json": archive.read("words.json")}


@pytest.mark.parametrize(
    "content",
    [
        sha256(b"").encode(),
        b"no zip" + sha256(b"no zip").encode(),
        sealed(),
        sealed(words_json=parts()["words_json"]),
        sealed(vectors_npy=parts()["vectors_npy"]),
        sealed(**{**parts(), "words_json": b"{"}),
        sealed(**{**parts(), "words_json": b"[]"}),
        sealed(**{**parts(), "words_json": b'{"categories": [5]}'}),
        sealed(**{**parts(), "words_json": b"\xff"}),
        sealed(**{**parts(), "words_json": b"[" * 100_000}),
        sealed(**{**parts(), "vectors_npy": b""}),
        sealed(**{**parts(), "vectors_npy": b"abc"}),
        sealed(**{**parts(), "vectors_npy": parts()["vectors_npy"][:-1]}),
        sealed(**{**parts(), "vectors_npy": bank().to_bytes()}),
    ],
)
def test_a_seal_alone_makes_no_bank(content: bytes, prompts: Path) -> None:
    prompts.write_bytes(content)
    refuses(PromptBank.read, prompts, "no prompt bank", MEND_BANK)


def test_the_helper_makes_a_bank_of_good_parts(prompts: Path) -> None:
    prompts.write_bytes(sealed(**parts()))
    assert PromptBank.read(prompts).categories == bank().categories


# ---- open_bundle ----


def test_a_good_bundle_opens(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    assert bundle.manifest == manifest()
    assert bundle.path == bundle_folder
    assert bundle.bank.sha256 == bank().sha256
    assert bundle.read_bank().sha256 == bank().sha256
    assert bundle.file(IMAGE).read_bytes() == CONTENTS[IMAGE]


def test_files_that_the_manifest_does_not_name_are_nobodys_business(bundle_folder: Path) -> None:
    (bundle_folder / "notes.txt").write_text("mine")
    open_bundle(bundle_folder)


@pytest.mark.parametrize("name", [DETECTOR, IMAGE, TEXT, VOCABULARY, GOLDEN])
def test_each_file_must_be_there_and_whole(name: str, bundle_folder: Path) -> None:
    path = bundle_folder / name
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(BundleError, match=f"{name}: damaged: expected sha256 {sha256(good)}, got .*{MEND}"):
            open_bundle(bundle_folder)
    path.write_bytes(good[:-1])
    with pytest.raises(BundleError, match=f"{name}: damaged"):
        open_bundle(bundle_folder)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name}: No such file.*{MEND}"):
        open_bundle(bundle_folder)
    left = {key: value for key, value in manifest().files.items() if key != name}
    (bundle_folder / MANIFEST).write_text(manifest(files=left).to_json())
    with pytest.raises(BundleError, match=f"files: no {name}; {MEND}"):
        open_bundle(bundle_folder)


def test_a_smaller_detector_must_be_there_where_the_manifest_has_its_facts(bundle_folder: Path) -> None:
    assert open_bundle(bundle_folder).manifest.networks == (DETECTOR, IMAGE)
    (bundle_folder / MANIFEST).write_text(manifest(smaller=SMALLER_FACTS).to_json())
    with pytest.raises(BundleError, match=f"files: no {SMALLER}; {MEND}"):
        open_bundle(bundle_folder)
    (bundle_folder / SMALLER).write_bytes(b"fewer pixels")
    files = {**manifest().files, SMALLER: sha256(b"fewer pixels")}
    (bundle_folder / MANIFEST).write_text(manifest(smaller=SMALLER_FACTS, files=files).to_json())
    assert open_bundle(bundle_folder).manifest.networks == (DETECTOR, SMALLER, IMAGE)
    (bundle_folder / SMALLER).write_bytes(b"fewer pixelz")
    with pytest.raises(BundleError, match=f"{SMALLER}: damaged"):
        open_bundle(bundle_folder)


def test_no_bundle_here(tmp_path: Path) -> None:
    refuses(open_bundle, tmp_path / "missing", "no bundle here", "a folder with manifest.json", MEND)
    (tmp_path / "file").write_text("")
    refuses(open_bundle, tmp_path / "file", "no bundle here", MEND)
    with pytest.raises(BundleError, match="No such file"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (bank(image_sha256=sha256(b"another encoder")), ["another encoder", sha256(CONTENTS[IMAGE])[:12]]),
        (replace(bank(), text_sha256=sha256(b"another encoder")), ["another encoder", sha256(CONTENTS[TEXT])[:12]]),
        (bank(dim=5), ["vectors of the wrong length", "expected 4, got 5"]),
        (bank(dim=3), ["vectors of the wrong length", "expected 4, got 3"]),
    ],
)
def test_a_bank_for_another_encoder_is_refused(other: PromptBank, parts: list[str], tmp_path: Path) -> None:
    good = open_bundle(write_bundle(tmp_path / "bundle"))
    good.file(PROMPTS).write_bytes(other.to_bytes())
    for read in (lambda _: good.read_bank(), lambda path: open_bundle(path.parent)):
        refuses(read, good.file(PROMPTS), *parts, MEND_BANK)


def test_a_bank_under_a_bundle_that_was_built_anew_asks_for_a_restart(tmp_path: Path) -> None:
    old = open_bundle(write_bundle(tmp_path / "bundle"))
    facts = old.manifest.encoder.model_copy(update={"logit_scale": 2.0})
    (old.path / MANIFEST).write_text(old.manifest.model_copy(update={"encoder": facts}).to_json())
    refuses(lambda _: old.read_bank(), old.path, "the bundle was built anew", "restart the box")


def test_a_missing_or_damaged_bank_is_refused_and_a_new_one_is_taken(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    bundle.file(PROMPTS).write_bytes(bank(seed=9).to_bytes())
    assert bundle.read_bank().sha256 == bank(seed=9).sha256
    assert bundle.bank.sha256 == bank().sha256, "the opened one stays as it was"
    bundle.file(PROMPTS).write_bytes(b"")
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle_folder)
    bundle.file(PROMPTS).unlink()
    with pytest.raises(BundleError, match=r"prompts\.npz: No such file.*python -m export prompts"):
        open_bundle(bundle_folder)
