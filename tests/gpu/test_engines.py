"""A real TensorRT on a real GPU: engines are built, held against ONNX Runtime, and serve.

Written on machines without either: whatever says otherwise, this has been tried with stand-ins alone.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest

from edge import trt
from edge.backend import OnDevice, open_session, open_sessions
from edge.bundle import DETECTOR, GOLDEN, HALF, IMAGE, MANIFEST, SMALLER, Bundle, Network, Platform, open_bundle
from edge.config import DescribeConfig, MatchConfig, TrackConfig
from edge.cuda import Cuda
from edge.describe import Described, Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.errors import BackendError, BundleError
from edge.golden import MAX_SCORE_GAP, MIN_COSINE, Golden
from edge.images import read_image
from edge.trt import TrtSession
from edge.values import Backend, Floats, Frame, Image
from export.engine import strongly_typed
from export.engines import build_engines
from export.verify import detector_answers, gate_crops, gate_detector, gate_frames
from tests.full_size import full_size
from tests.gpu.conftest import ROOT, free_now

PICTURE = ROOT / "export/mini/pets-650.jpg"
MIB = 1 << 20
NETWORKS: tuple[Network, ...] = (DETECTOR, SMALLER, IMAGE)
COUNTS = (0, 1, 8, 9, 33, 8, 8, 8, 1, 32, 32, 32, 0)  # of pictures: sizes in a row are replayed as a CUDA graph


def engines_of(bundle: Bundle) -> list[str]:
    """What was said while its engines were built, which is shown where a test fails, and with -s."""
    said: list[str] = []

    def say(step: str, became: str) -> None:
        said.append(became)
        print(f"{step}: {became}")

    build_engines(bundle.path, say, lambda stage, done, total: None)
    return said


@pytest.fixture(scope="module")
def said_and_built(tensorrt: Any, mini: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Bundle]:
    folder = shutil.copytree(mini.path, tmp_path_factory.mktemp("built") / "mini")
    said = engines_of(open_bundle(folder))
    return said, open_bundle(folder)


@pytest.fixture(scope="module")
def built(said_and_built: tuple[list[str], Bundle]) -> Bundle:
    """The mini bundle with engines for this machine, for reading only."""
    return said_and_built[1]


def engine(bundle: Bundle, network: Network, cuda: Cuda) -> TrtSession:
    """The session that a box opens, for a test that wants it alone."""
    name, facts = bundle.engine_for(network, trt.platform(trt.load(), cuda.gpu))
    batches, plan = facts.fingerprint.batches, bundle.file(name).read_bytes()
    return TrtSession(plan, cuda, name=name, batches=batches, precision=facts.fingerprint.precision)


@pytest.fixture
def encoder(built: Bundle, chosen: Cuda) -> Iterator[TrtSession]:
    with engine(built, IMAGE, chosen) as session:
        yield session


@pytest.fixture(scope="module")
def crops(mini: Bundle) -> Image:
    """64 of the gate's."""
    return gate_crops(Golden.read(mini.file(GOLDEN)))[:64]


@pytest.fixture(scope="module")
def vectors(mini: Bundle, crops: Image) -> Floats:
    """What ONNX Runtime says of them."""
    with open_session(mini.file(IMAGE)) as session:
        return np.asarray(session.run({"image": crops})["embedding"], np.float32)


def assert_near(got: Floats, wanted: Floats) -> None:
    """As near as the gate asks of fp16."""
    assert (got.shape, got.dtype) == (wanted.shape, np.float32)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-3)
    assert ((got * wanted).sum(axis=1) >= MIN_COSINE["fp16"]).all()


# --- built and held against ONNX Runtime ----------------------------------------------------------------------------


def test_all_engines_are_built_and_pass_the_gate(
    said_and_built: tuple[list[str], Bundle], tensorrt: Any, chosen: Cuda
) -> None:
    said, bundle = said_and_built
    here, plan = trt.platform(tensorrt, chosen.gpu), bundle.manifest.engine
    assert plan is not None
    assert len(bundle.manifest.engines) == len(NETWORKS)
    for network in NETWORKS:
        name, facts = bundle.engine_for(network, here)
        assert bundle.file(name).stat().st_size > 1000
        assert facts.graph == (HALF[network] if strongly_typed(tensorrt) else network)
        assert (facts.fingerprint.platform, facts.fingerprint.batches) == (here, plan.batches(network))
        assert f"{network}: {facts.verified}" in said
        assert ("smallest cosine" if network == IMAGE else "smallest IoU") in facts.verified
        if facts.held:
            warnings.warn(f"{network} needs its {' and '.join(facts.held)} in fp32 on {here}", stacklevel=1)


def test_a_second_call_builds_nothing(built: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(built.path, tmp_path / "mini")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    (said,) = engines_of(open_bundle(folder))
    assert said.startswith("unchanged, for ")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_golden_answers_come_back(built: Bundle) -> None:
    golden = Golden.read(built.file(GOLDEN))
    with open_sessions(built, "tensorrt") as on:
        assert on.smaller is not None
        for session in (on.detector, on.smaller, on.encoder):
            assert session.about.startswith("TensorRT ")
            assert session.precision == "fp16"
        assert " boxes, smallest IoU" in golden.check_detector(on.detector, DETECTOR)
        assert " boxes, smallest IoU" in golden.check_detector(on.smaller, SMALLER, network=SMALLER)
        assert " embeddings, smallest cosine" in golden.check_encoder(on.encoder, IMAGE, on.encoder.precision)


def test_auto_is_tensorrt_here(built: Bundle, mini: Bundle) -> None:
    with open_sessions(built) as on:
        assert on.encoder.about.startswith("TensorRT ")
    with open_sessions(mini) as on:
        assert on.encoder.about.startswith("ONNX Runtime "), "no engine"


# --- any number of pictures -----------------------------------------------------------------------------------------


def test_any_number_of_crops_is_encoded_as_on_the_cpu(
    encoder: TrtSession, crops: Image, vectors: Floats, chosen: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "edge.lane")
    for turn, count in enumerate(COUNTS):
        rows = (np.arange(count) + turn) % len(crops)  # others each time: old answers do not pass
        assert_near(encoder.run({"image": crops[rows]})["embedding"], vectors[rows])
    if chosen.about.startswith("cuda.bindings"):
        assert "without a CUDA graph" not in caplog.text


def test_pictures_that_are_on_the_gpu_already_are_the_same(
    encoder: TrtSession, crops: Image, vectors: Floats, chosen: Cuda
) -> None:
    address = chosen.allocate(crops.nbytes)
    chosen.upload(address, crops)
    chosen.synchronize()
    there = OnDevice(address, crops.shape)  # type: ignore[arg-type]
    for count in (1, 8, 33, 33):
        rows = slice(3, 3 + count)
        assert_near(encoder.run({"image": there[rows]})["embedding"], vectors[rows])
    chosen.free(address)


@pytest.mark.parametrize("network", [DETECTOR, SMALLER])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_any_number_of_frames_is_seen_as_on_the_cpu(count: int, network: Network, built: Bundle, chosen: Cuda) -> None:
    frames = gate_frames(Golden.read(built.file(GOLDEN)), network)
    frames = frames[np.arange(count) % len(frames)]
    with engine(built, network, chosen) as session, open_session(built.file(network)) as reference:
        got = session.run({"image": frames})
        if not count:
            facts = built.manifest.detector if network == DETECTOR else built.manifest.smaller
            assert facts is not None
            assert got["boxes"].shape == (0, facts.anchors, 4)
            assert got["scores"].shape == (0, facts.anchors, len(facts.classes))
            return
        print(gate_detector(session, detector_answers(reference, frames), (count,), network))


def test_wrong_pictures_are_refused_and_the_next_run_goes_on(
    encoder: TrtSession, crops: Image, vectors: Floats
) -> None:
    for wrong in (crops[:2].astype(np.float32), crops[:2, :-1], crops[0]):
        with pytest.raises(BackendError, match="input image"):
            encoder.run({"image": wrong})
    assert_near(encoder.run({"image": crops[:2]})["embedding"], vectors[:2])


def test_memory_does_not_grow(encoder: TrtSession, crops: Image, chosen: Cuda) -> None:
    """Over 200 runs of all profiles. What else runs on this GPU disturbs it."""

    def use(times: int) -> None:
        for turn in range(times):
            encoder.run({"image": crops[: COUNTS[turn % len(COUNTS)]]})

    process = psutil.Process()
    use(50)
    on_gpu, on_host = free_now(chosen), process.memory_info().rss
    use(200)
    assert on_gpu - free_now(chosen) <= 2 * MIB
    assert process.memory_info().rss - on_host <= 32 * MIB


def test_opening_and_closing_gives_everything_back(built: Bundle, chosen: Cuda) -> None:
    free = []
    for _ in range(4):
        with engine(built, DETECTOR, chosen) as session:
            session.run({"image": Golden.read(built.file(GOLDEN)).frames[:1]})
        free.append(free_now(chosen))
    assert free[1] - free[-1] <= 4 * MIB, "after the first, which loads what stays"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gpu": "another GPU"}, "another GPU"),
        ({"compute_capability": "1.0"}, "another compute capability"),
        ({"tensorrt": "1.0.0"}, "another TensorRT"),
    ],
    ids=str,
)
def test_an_engine_of_another_machine_is_refused(
    change: dict[str, str], what: str, built: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(built.path, tmp_path / "mini")
    engines = {}
    for name, facts in built.manifest.engines.items():
        other: Platform = facts.fingerprint.platform.model_copy(update=change)
        fingerprint = facts.fingerprint.model_copy(update={"platform": other})
        engines[name] = facts.model_copy(update={"fingerprint": fingerprint})
    (folder / MANIFEST).write_text(built.manifest.model_copy(update={"engines": engines}).to_json())
    altered, backends = open_bundle(folder), get_args(Backend)
    for backend in set(backends) - {"onnxruntime"}:
        with pytest.raises(BundleError, match=f"built for {what}.*make export"), open_sessions(altered, backend):
            pass


@pytest.mark.parametrize("damage", ["truncated", "random", "empty"])
def test_a_damaged_plan_is_not_taken(damage: str, built: Bundle, chosen: Cuda) -> None:
    name, facts = built.engine_for(IMAGE, trt.platform(trt.load(), chosen.gpu))
    whole = built.file(name).read_bytes()
    plan = {"truncated": whole[:1000], "random": np.random.default_rng(0).bytes(len(whole)), "empty": b""}[damage]
    with pytest.raises(BackendError, match="does not take the plan"):
        TrtSession(plan, chosen, name=name, batches=facts.fingerprint.batches)
    with engine(built, IMAGE, chosen) as session:
        assert len(session.run({"image": Golden.read(built.file(GOLDEN)).crops[:1]})["embedding"]) == 1


# --- described as on the CPU ----------------------------------------------------------------------------------------


def described(bundle: Bundle, backend: Backend, frames: list[Frame], smaller: bool) -> list[Described]:
    """By every stage that a box has. smaller: found by the smaller detector."""
    match = MatchConfig(sensitive=tuple(category.name for category in bundle.bank.categories))
    config, facts = DescribeConfig(track=TrackConfig(enabled=False), match=match), bundle.manifest
    with open_sessions(bundle, backend) as on:
        detector = Detector(on.detector, facts.detector, config.detect, imaging=on.imaging)
        assert on.smaller is not None
        assert facts.smaller is not None
        fewer = Detector(on.smaller, facts.smaller, config.detect, imaging=on.imaging)
        encoder = Encoder(on.encoder, facts.encoder)
        describer = Describer(bundle, detector, encoder, config, imaging=on.imaging, smaller=fewer)
        describer.use_smaller(smaller)
        return [one for at in range(0, len(frames), 2) for one in describer(frames[at : at + 2])]


def options_of(one: Described) -> list[list[str]]:
    """The best option of every question, person by person."""
    people = range(len(one.people))
    return [[answer.top[0].option for answer in one.matches.answers(person, 1)] for person in people]


@pytest.mark.parametrize("smaller", [False, True])
def test_the_picture_is_described_as_on_the_cpu(smaller: bool, built: Bundle) -> None:
    image = read_image(PICTURE)
    views = (image, image, image[:, ::-1], image[::2, ::2], np.roll(image, 40, axis=1))
    frames = [Frame("pets", number, 0.0, np.ascontiguousarray(view)) for number, view in enumerate(views)]
    backends: tuple[Backend, Backend] = ("tensorrt", "onnxruntime")
    on_gpu, on_cpu = (described(built, backend, frames, smaller) for backend in backends)
    assert len(on_cpu[0].people) >= (5 if smaller else 6)
    decisions = same = 0
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert len(one.people) == len(other.people)
        np.testing.assert_allclose(one.people.boxes, other.people.boxes, atol=2)
        np.testing.assert_allclose(one.people.scores, other.people.scores, atol=MAX_SCORE_GAP)
        for mine, its in zip(options_of(one), options_of(other), strict=True):
            decisions += len(its)
            same += sum(a == b for a, b in zip(mine, its, strict=True))
    assert options_of(on_gpu[0]) == options_of(on_cpu[0]), "the picture itself"
    assert same / decisions >= 0.98, f"{same} of {decisions}"


# --- full size ------------------------------------------------------------------------------------------------------


def test_models_of_full_size_build_and_pass_the_gate(tensorrt: Any, tmp_path: Path) -> None:
    """YOLOv4-416 and ViT-B/32 with weights spread as trained ones; minutes. A refusal says what differs most."""
    bundle = full_size(tmp_path)
    print(*engines_of(bundle), sep="\n")
    bundle = open_bundle(bundle.path)
    golden = Golden.read(bundle.file(GOLDEN))
    with open_sessions(bundle, "tensorrt") as on:
        assert on.smaller is not None
        print(golden.check_detector(on.detector, DETECTOR))
        print(golden.check_detector(on.smaller, SMALLER, network=SMALLER))
        print(golden.check_encoder(on.encoder, IMAGE, on.encoder.precision))
