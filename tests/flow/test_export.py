"""The export commands on real files: bundles, skipped steps, kills, new words."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edge.backend import open_session
from edge.bank import PromptBank
from edge.bundle import DETECTOR, GOLDEN, HALF, IMAGE, SMALLER, TEXT, VOCABULARY, open_bundle
from edge.config import DetectConfig
from edge.detect import Detector
from edge.errors import BundleError
from edge.golden import Golden
from edge.images import read_image
from edge.imaging import crops_of
from edge.values import Frame
from export.darknet import onnx_from_darknet
from export.pack import alone
from export.tokenizer import Tokenizer
from export.verify import PHRASES, verify
from tests.flow.conftest import ROOT, command, starter

MINI = ROOT / "export/mini"


def test_bundle_holds_what_the_contract_says(mini: Path) -> None:
    bundle = open_bundle(mini)
    assert sorted(path.name for path in mini.iterdir()) == sorted(
        [*bundle.manifest.files, "manifest.json", "prompts.npz"]
    )
    detector, encoder = bundle.manifest.detector, bundle.manifest.encoder
    smaller = bundle.manifest.smaller
    assert smaller is not None
    assert smaller.height < detector.height
    for name, facts in ((DETECTOR, detector), (SMALLER, smaller)):
        session = onnxruntime.InferenceSession(str(mini / name))
        pictures = np.zeros((3, facts.height, facts.width, 3), np.uint8)
        boxes, scores = session.run(["boxes", "scores"], {"image": pictures})
        assert boxes.shape == (3, facts.anchors, 4)
        assert scores.shape == (3, facts.anchors, len(facts.classes))
    session = onnxruntime.InferenceSession(str(mini / "image.onnx"))
    (vectors,) = session.run(["embedding"], {"image": np.zeros((2, encoder.size, encoder.size, 3), np.uint8)})
    assert vectors.shape == (2, encoder.dim) == (2, bundle.bank.vectors.shape[1])
    assert len(bundle.bank.categories) == 13


def test_second_build_skips_every_step_and_a_changed_input_only_its_own(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "engines/mini")
    before = (mini / "manifest.json").read_bytes()
    said = command("export", "build", "configs/models-mini.toml", "--engines", tmp_path / "engines").stderr
    assert said.count("unchanged") == 5, said
    assert (tmp_path / "engines/mini/manifest.json").read_bytes() == before

    recipe = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
    words = tmp_path / "words.toml"
    words.write_text((ROOT / "prompts/person-mini.toml").read_text().replace("a photo of a man", "one photo of a man"))
    (tmp_path / "recipe.toml").write_text(recipe.replace(f"{ROOT}/prompts/person-mini.toml", str(words)))
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path / "engines").stderr
    assert [line.split()[0] for line in said.splitlines() if "unchanged" in line] == [
        "detector",
        "smaller",
        "encoder",
        "verify",
    ], said

    (tmp_path / "recipe.toml").write_text(recipe.replace("size = 416", "size = 320"))
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path / "engines").stderr
    assert [line.split()[0] for line in said.splitlines() if "unchanged" in line] == ["smaller", "encoder"], said
    assert open_bundle(tmp_path / "engines/mini").manifest.detector.width == 320

    (tmp_path / "recipe.toml").write_text(recipe.replace("size = 416", "size = 320").replace("r = 288", "r = 256"))
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path / "engines").stderr
    assert [line.split()[0] for line in said.splitlines() if "unchanged" in line] == [
        "detector",
        "encoder",
        "prompts",
    ], said
    facts = open_bundle(tmp_path / "engines/mini").manifest.smaller
    assert facts is not None
    assert facts.width == 256


def test_without_a_smaller_size_a_bundle_is_what_it_was_before_there_was_one(mini: Path, tmp_path: Path) -> None:
    """Its manifest has no word of one; the step that made one is gone, and what it made, too."""
    shutil.copytree(mini, tmp_path / "mini")
    recipe = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
    (tmp_path / "recipe.toml").write_text(recipe.replace("smaller = 288", ""))
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path).stderr
    unchanged = [line.split()[0] for line in said.splitlines() if "unchanged" in line]
    assert unchanged == ["detector", "encoder", "prompts"], said
    bundle, whole = open_bundle(tmp_path / "mini"), open_bundle(mini)
    assert {*whole.manifest.files} - {*bundle.manifest.files} == {SMALLER, HALF[SMALLER]}
    assert "smaller" not in (tmp_path / "mini/manifest.json").read_text()
    assert Golden.read(tmp_path / "mini/golden.npz").smaller is None
    assert SMALLER not in command("edge", "selftest", "--bundle", tmp_path / "mini").stdout


def test_without_engines_a_bundle_has_no_fp16_graphs_and_says_the_same(mini: Path, tmp_path: Path) -> None:
    recipe = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
    (tmp_path / "recipe.toml").write_text(recipe.partition("[engine]")[0])
    said = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path).stderr
    assert "engines" not in {line.split()[0] for line in said.splitlines()}
    bundle, whole = open_bundle(tmp_path / "mini"), open_bundle(mini)
    assert bundle.manifest.engine is None
    assert {*whole.manifest.files} - {*bundle.manifest.files} == {*HALF.values()}
    for name, sha256 in bundle.manifest.files.items():
        assert name == GOLDEN or sha256 == whole.manifest.files[name], name
    failed = command("export", "engines", tmp_path / "mini", code=69).stderr
    assert "no NVIDIA GPU here" in failed or "TensorRT cannot be imported" in failed or "no Python binding" in failed


def test_fp16_graphs_are_half_as_large_and_pass_the_self_tests_thresholds(mini: Path) -> None:
    manifest, golden = open_bundle(mini).manifest, Golden.read(mini / GOLDEN)
    for network, half in HALF.items():
        assert half in manifest.files
        assert (mini / half).stat().st_size < 0.6 * (mini / network).stat().st_size
    with open_session(mini / HALF[DETECTOR]) as detector:
        assert not np.array_equal(detector.run({"image": golden.frames})["scores"], golden.scores), "another graph"
        golden.check_detector(detector, "half")
    with open_session(mini / HALF[SMALLER]) as smaller:
        golden.check_detector(smaller, "half", network=SMALLER)
    with open_session(mini / HALF[IMAGE]) as encoder:
        golden.check_encoder(encoder, "half", "fp16")


def test_verify_sees_the_pixels_that_the_box_sees(mini: Path) -> None:
    """Preprocessing is written once: the golden crops are what the box's own stages cut from the same picture."""
    manifest, golden = open_bundle(mini).manifest, Golden.read(mini / "golden.npz")
    frame = Frame("golden", 0, 0.0, read_image(ROOT / "export/mini/pets-650.jpg"))
    with open_session(mini / "detector.onnx") as session:
        (people,) = Detector(session, manifest.detector, DetectConfig())([frame])
    crops = crops_of(frame, people, manifest.encoder)
    assert np.array_equal(golden.crops[: min(len(crops), 4)], crops[:4])


def test_verify_refuses_a_smaller_detector_that_is_another(mini: Path, tmp_path: Path) -> None:
    """As an exporter would make it that forgot the recipe's epsilon at the second size."""
    shutil.copytree(mini, tmp_path / "mini")
    golden, tokens = Golden.read(mini / GOLDEN), Tokenizer(mini / VOCABULARY).encode(PHRASES)
    with open_session(mini / TEXT) as text:
        words = text.run({"tokens": tokens})["embedding"]
    assert "; smaller: " in verify(tmp_path / "mini", golden, tokens, words)
    assert golden.smaller is not None
    size = golden.smaller.frames.shape[1]
    other = onnx_from_darknet(MINI / "yolov4-mini.cfg", MINI / "yolov4-mini.weights", size=size, bn_epsilon=0.1)
    onnx.save(other, tmp_path / "mini" / SMALLER)
    with pytest.raises(BundleError, match=f"{SMALLER}: (boxes|scores) differ"):
        verify(tmp_path / "mini", golden, tokens, words)


def test_damaged_bundle_is_built_anew(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    data = bytearray((tmp_path / "mini/image.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "mini/image.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"image\.onnx: damaged.*make export"):
        open_bundle(tmp_path / "mini")
    said = command("export", "build", "configs/models-mini.toml", "--engines", tmp_path).stderr
    assert "unchanged" not in said
    open_bundle(tmp_path / "mini")


def test_killed_at_any_moment_the_old_bundle_is_whole(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    recipes = []
    for size in (320, 352):  # each build has work to do, and its result is told from the one before
        text = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
        recipes.append(tmp_path / f"{size}.toml")
        recipes[-1].write_text(text.replace("size = 416", f"size = {size}"))
    start = time.monotonic()
    command("export", "build", recipes[0], "--engines", tmp_path)
    whole = time.monotonic() - start
    seed = random.randrange(1000)
    chance = random.Random(seed)
    for turn in range(8):
        wait = chance.uniform(0.3, 1.05) * whole
        with subprocess.Popen(
            [sys.executable, *starter("export"), "build", recipes[(turn + 1) % 2], "--engines", tmp_path],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        assert open_bundle(tmp_path / "mini").manifest.detector.width in (320, 352), (
            f"seed {seed}, killed after {wait:.2f} s"
        )
    command("export", "build", recipes[0], "--engines", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")], "a killed export's remains stay"


def test_prompts_change_the_bank_alone(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mini").iterdir()}
    words = tmp_path / "words.toml"
    words.write_text(
        '[[category]]\nname = "top"\nquestion = "top is"\noption = [\n'
        '{ name = "red", label = "赤", phrases = ["a person wearing a red top"] },\n'
        '{ name = "black", phrases = ["a person wearing a black top", "black top"] },\n]\n'
    )
    command("export", "prompts", words, "--bundle", tmp_path / "mini")
    after = {path.name: path.read_bytes() for path in (tmp_path / "mini").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"prompts.npz"}
    assert set(before) == set(after)
    bank = PromptBank.read(tmp_path / "mini/prompts.npz")
    assert bank.categories[0].options == ("red", "black")
    assert bank.categories[0].labels == ("赤", None)


@pytest.mark.parametrize("there", [b"", b"garbage", None])
def test_a_damaged_bank_is_mended_by_the_command_that_its_error_names(
    mini: Path, tmp_path: Path, there: bytes | None
) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    bank = tmp_path / "mini/prompts.npz"
    bank.unlink()
    if there is not None:
        bank.write_bytes(there)
    words = ROOT / "prompts/person-mini.toml"
    failed = command("edge", "selftest", "--bundle", tmp_path / "mini", code=72)
    assert "run `python -m export prompts FILE --bundle DIR`" in failed.stderr
    command("export", "prompts", words, "--bundle", tmp_path / "mini")
    assert bank.read_bytes() == (mini / "prompts.npz").read_bytes()


def _words(options: str) -> str:
    return f'[[category]]\nname = "top"\nquestion = "q"\noption = [{options}]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_words('{ name = "red", phrases = ["red"] }'), "category 'top': too few options"),
        (_words('{ name = "a", phrases = ["x"] }, { name = "a", phrases = ["y"] }'), "two options are named 'a'"),
        (_words('{ name = "a", phrases = ["x"] }, { name = "b", phrases = ["X "] }'), "the phrase 'x' stands twice"),
        (_words('{ name = "a", phrases = ["x"] }, { name = "b", phrases = [" "] }'), "option 'b' has an empty phrase"),
        (_words('{ name = "a", phrases = ["x"] }, { name = "b", phrases = [] }'), "phrases"),
        (_words('{ name = "a", phrases = ["x"] }, { name = "b", phrases = ["' + 90 * "red " + '"] }'), "at most 77"),
        (_words('{ name = "a", phrase = ["x"] }, { name = "b", phrases = ["y"] }'), "did you mean 'phrases'?"),
        (
            2 * _words('{ name = "a", phrases = ["x"] }, { name = "b", phrases = ["y"] }'),
            "two categories are named 'top'",
        ),
        ("category = []", "category"),
        ("[[category]", "not TOML"),
    ],
)
def test_wrong_words_are_refused_and_the_bank_stays(mini: Path, tmp_path: Path, text: str, said: str) -> None:
    before = (mini / "prompts.npz").read_bytes()
    (tmp_path / "words.toml").write_text(text)
    done = command("export", "prompts", tmp_path / "words.toml", "--bundle", mini, code=78)
    assert done.stderr.startswith(f"error: {tmp_path / 'words.toml'}")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert (mini / "prompts.npz").read_bytes() == before


def test_single_steps_are_commands(tmp_path: Path) -> None:
    cfg, weights = MINI / "yolov4-mini.cfg", MINI / "yolov4-mini.weights"
    command(
        "export", "darknet", cfg, weights, tmp_path / "d.onnx", "--size", 320, "--keep", "person", "--precision", "fp16"
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    assert session.get_inputs()[0].shape == ["n", 320, 320, 3]
    command("export", "clip", MINI / "clip-mini.safetensors", tmp_path / "clip", "--precision", "fp16")
    for name in ("image.onnx", "text.onnx"):
        onnxruntime.InferenceSession(str(tmp_path / "clip" / name))
    done = command("export", "darknet", cfg, weights, tmp_path / "e.onnx", "--keep", "persn", code=78)
    assert "did you mean 'person'?" in done.stderr
    command("export", "darknet", cfg, weights, tmp_path / "new/folder/d.onnx")
    command("export", "darknet", cfg, weights, tmp_path / "e.onnx", "--keep", "9" * 5000, code=78)


def test_two_exports_do_not_meet(mini: Path, tmp_path: Path) -> None:
    shutil.copytree(mini, tmp_path / "mini")
    with alone(tmp_path):
        for words in (
            ("build", "configs/models-mini.toml", "--engines", tmp_path),
            ("prompts", "prompts/person-mini.toml", "--bundle", tmp_path / "mini"),
        ):
            assert "another export is at work" in command("export", *words, code=78).stderr


def test_recipe_mistakes_name_file_and_key(tmp_path: Path) -> None:
    recipe = (ROOT / "configs/models-mini.toml").read_text().replace('"../', f'"{ROOT}/')
    table = [
        ("size = 416", "sice = 416", 78, "did you mean 'size'?"),
        ("size = 416", "size = 400", 65, "multiples of 32"),
        ("smaller = 288", "smaller = 300", 78, "detector.smaller: Input should be a multiple of 32"),
        ("smaller = 288", "smaller = 416", 78, "smaller should be below size"),
        ('classes = ["person"]', 'classes = ["dog"]', 78, "detector.keep"),
        ("yolov4-mini.weights", "none.weights", 78, "no such file"),
        (f"{ROOT}/export/mini/clip-mini.safetensors", "official:nothing", 78, "ViT-B-32.pt"),
        ("clip-mini.safetensors", "yolov4-mini.cfg", 65, "yolov4-mini.cfg"),
        ("yolov4-mini.weights", "clip-mini.safetensors", 65, "clip-mini.safetensors"),
        ('name = "mini"', 'name = "../mini"', 78, "name"),
        ('name = "mini"', 'name = "file"', 78, "a bundle is a folder"),
        ('name = "mini"', 'name = "link"', 78, "a bundle is a folder"),
        ('classes = ["person"]', 'classes = ["person", "car"]\nkeep = ["car"]', 78, "'person'"),
        ("[encoder]", "[encoder]\nfill_rgb = [300, -1, 0]", 78, "fill_rgb"),
        ("pets-650.jpg", "README.md", 66, "README.md"),
        ("pets-650.jpg", "a\\u0000b", 66, "null"),
        ("person-mini.toml", "a\\u0000b", 78, "null"),
    ]
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/file").touch()
    (tmp_path / "engines/link").symlink_to(tmp_path)
    for old, new, code, said in table:
        assert old in recipe
        (tmp_path / "recipe.toml").write_text(recipe.replace(old, new))
        done = command("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path / "engines", code=code)
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert said in line
        assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == ["file", "link"]
