"""From a bundle to engines to a box that runs on them: all of it but TensorRT and the GPU, for which the fakes stand.

Their engines compute, by ONNX Runtime, in memory that is the device's, and the pictures are made by the real kernels.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

import edge.cli
import edge.cuda
import export.cli
from edge.backend import open_sessions
from edge.bundle import DETECTOR, GOLDEN, HALF, IMAGE, MANIFEST, SMALLER, TIMING, Bundle, open_bundle, sha256_of
from edge.capture import Cameras
from edge.config import CameraConfig, DescribeConfig, MatchConfig
from edge.cuda import Gpu
from edge.describe import Described, Describer
from edge.detect import Detector
from edge.encode import Encoder
from edge.golden import Answers, Golden
from edge.values import Frame
from export.hold import float32_nodes
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import Watch, fake_tensorrt
from tests.flow.conftest import PICTURE
from tests.rounding import rounded

ORIN = Gpu("Orin", "8.7", 8 << 30)
FRAMES = 10  # of two cameras together
THREE = pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0"])


@dataclass
class Board:
    """A machine with a GPU and TensorRT; gpu None: without a GPU."""

    version: str = "10.3.0"
    gpu: Gpu | None = ORIN
    watch: Watch = field(default_factory=Watch)
    opened: list[FakeCuda] = field(default_factory=list)

    def open_cuda(self) -> FakeCuda:
        assert self.gpu is not None
        self.opened.append(FakeCuda(self.gpu.memory, self.gpu))
        return self.opened[-1]

    @contextmanager
    def here(self) -> Iterator[None]:
        """Everything that asks finds this board; afterwards nothing of it is left in use."""
        with pytest.MonkeyPatch.context() as patch:
            trt = fake_tensorrt(self.version, self.watch)
            trt.__spec__ = ModuleSpec("tensorrt", None)
            patch.setitem(sys.modules, "tensorrt", trt)
            patch.setattr(edge.cuda, "open_cuda", self.open_cuda)
            patch.setattr(edge.cuda, "gpu_count", lambda: int(self.gpu is not None))
            yield
        assert not self.watch.mistakes
        for cuda in self.opened:
            assert (cuda.closed, cuda.live, cuda.pinned) == (1, {}, {})

    def run(self, *words: object, code: int = 0) -> Result:
        """`edge …` or `export …` on this board."""
        main = {"edge": edge.cli.main, "export": export.cli.main}[str(words[0])]
        with self.here():
            done = CliRunner().invoke(main, [str(word) for word in words[1:]])
        assert done.exit_code == code, f"{words}: exit code {done.exit_code}\n{done.output}"
        return done


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture(scope="module")
def plain(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini bundle from a workstation, with a quarter of its golden inputs: the gate is the long part."""
    folder = shutil.copytree(mini, tmp_path_factory.mktemp("plain") / "mini")
    golden = Golden.read(folder / GOLDEN)
    seen, fewer = (
        Answers(one.frames[:1], one.boxes[:1], one.scores[:1]) for one in map(golden.answers, (DETECTOR, SMALLER))
    )
    opened = open_bundle(folder)
    Golden(**vars(seen), crops=golden.crops[:2], embeddings=golden.embeddings[:2], smaller=fewer).write(folder / GOLDEN)
    resealed(opened)
    return folder


@pytest.fixture
def bundle(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "engines/mini")


@pytest.fixture(scope="module")
def built_on(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle with engines for a board with this TensorRT, for reading only."""

    @functools.cache
    def build(version: str) -> Path:
        folder = shutil.copytree(plain, tmp_path_factory.mktemp("built") / "mini")
        Board(version).run("export", "engines", folder)
        return folder

    return build


@pytest.fixture
def built(built_on: Callable[[str], Path]) -> Path:
    return built_on("10.3.0")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resealed(bundle: Bundle) -> None:
    """Take what lies in its files now for right, as nobody but a test does."""
    files = {name: sha256_of(bundle.file(name)) for name in bundle.manifest.files}
    manifest = bundle.manifest.model_copy(update={"files": files})
    bundle.file(MANIFEST).write_text(manifest.to_json())


# ---- engines are built ----


@THREE
def test_a_bundle_alone_is_enough_to_build_engines_from(version: str, bundle: Path) -> None:
    board, before = Board(version), contents(bundle)
    said = board.run("export", "engines", bundle).stderr
    opened = open_bundle(bundle)
    typed = version != "8.6.1"
    for network, head in ((DETECTOR, "detector-"), (SMALLER, "detector-smaller-"), (IMAGE, "image-")):
        ((name, facts),) = [(name, f) for name, f in opened.manifest.engines.items() if f.network == network]
        one = facts.fingerprint
        assert name == f"{head}{one.short()}.engine"
        assert (str(one.platform), one.precision) == (f"Orin (sm_87), TensorRT {version}", "fp16")
        assert facts.graph == (HALF[network] if typed else network)
        assert one.onnx_sha256 == opened.manifest.files[facts.graph]
        assert one.batches == ((1, 8, 32) if network == IMAGE else (1, 4))
        assert (facts.held, facts.verified in said) == ((), True)
    assert len(board.watch.builds) == 3, "one each"
    after = contents(bundle)
    added = {*opened.manifest.engines, TIMING}
    assert {*after} - {*before} == added
    assert all(after[name] == before[name] for name in before if name != MANIFEST), "what was there stays as it was"
    assert not [path for path in bundle.parent.iterdir() if path.name != "mini"]

    board.watch.builds.clear()
    assert "unchanged" in board.run("export", "engines", bundle).stderr
    assert not board.watch.builds
    assert contents(bundle) == after


def test_make_export_builds_them_too_and_later_builds_keep_them(board: Board, tmp_path: Path) -> None:
    recipe = "configs/models-mini.toml"
    board.run("export", "build", recipe, "--engines", tmp_path)
    bundle = tmp_path / "mini"
    before, engines = contents(bundle), open_bundle(bundle).manifest.engines
    assert len(engines) == 3
    board.run("export", "build", recipe, "--engines", tmp_path)
    assert contents(bundle) == before
    said = Board(gpu=None).run("export", "build", recipe, "--engines", tmp_path).stderr
    assert "none: no NVIDIA GPU here; `python -m export engines` builds them on the box" in said
    assert contents(bundle) == before, "a workstation keeps what a box built"


def test_one_bundle_serves_two_kinds_of_box(built: Path, tmp_path: Path) -> None:
    bundle, newer = shutil.copytree(built, tmp_path / "mini"), Board("10.7.0")
    newer.run("export", "engines", bundle)
    assert len(open_bundle(bundle).manifest.engines) == 6
    for one in (Board(), newer):
        one.run("edge", "selftest", "--bundle", bundle)


def test_other_weights_or_batches_make_an_engine_void(board: Board, built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "mini")
    text = (Path(__file__).parents[2] / "configs/models-mini.toml").read_text()
    recipe = tmp_path / "recipe.toml"
    text = text.replace('"../', f'"{Path(__file__).parents[2]}/').replace("[1, 8, 32]", "[1, 16]")
    recipe.write_text(text.replace("size = 416", "size = 320").replace("smaller = 288", "smaller = 256"))
    said = Board(gpu=None).run("export", "build", recipe, "--engines", tmp_path).stderr
    assert "none: no NVIDIA GPU" in said
    assert open_bundle(bundle).manifest.engines == {}
    assert not list(bundle.glob("*.engine"))
    board.run("export", "build", recipe, "--engines", tmp_path)
    shapes = [facts.fingerprint.batches for facts in open_bundle(bundle).manifest.engines.values()]
    assert sorted(shapes) == [(1, 4), (1, 4), (1, 16)]


def test_a_recipe_without_a_smaller_size_drops_its_engine_alone(built: Path, tmp_path: Path) -> None:
    bundle, before = shutil.copytree(built, tmp_path / "mini"), open_bundle(built).manifest.engines
    text = (Path(__file__).parents[2] / "configs/models-mini.toml").read_text()
    text = text.replace('"../', f'"{Path(__file__).parents[2]}/').replace("smaller = 288", "")
    (tmp_path / "recipe.toml").write_text(text)
    Board(gpu=None).run("export", "build", tmp_path / "recipe.toml", "--engines", tmp_path)
    engines = open_bundle(bundle).manifest.engines
    assert engines == {name: facts for name, facts in before.items() if facts.network != SMALLER}
    assert len(engines) == 2
    said = Board().run("edge", "selftest", "--bundle", bundle).stdout
    assert "TensorRT" in said
    assert SMALLER not in said


# ---- the gate ----


def spoiled(wrong: Callable[[frozenset[str]], bool], initializer: str) -> Callable[[bytes], bytes]:
    """An engine in whose graph this weight is wrong, as long as `wrong` is true of the nodes that compute in fp32."""

    def compute(graph: bytes) -> bytes:
        model = onnx.load_model_from_string(graph)
        if wrong(float32_nodes(model)):
            for tensor in model.graph.initializer:
                if tensor.name == initializer:
                    array = numpy_helper.to_array(tensor)
                    noise = np.random.default_rng(0).normal(1, 0.3, array.shape).astype(array.dtype)
                    tensor.CopyFrom(numpy_helper.from_array(array * noise, initializer))
        return model.SerializeToString()

    return compute


def test_an_engine_that_rounds_as_float16_does_passes(board: Board, bundle: Path) -> None:
    board.watch.compute = lambda graph: rounded(onnx.load_model_from_string(graph)).SerializeToString()
    said = board.run("export", "engines", bundle).stderr
    assert "0 of 832 decisions another" in said
    board.run("edge", "selftest", "--bundle", bundle)


@pytest.mark.parametrize(
    ("node", "held"),
    [
        ("image/block0/attention/logits", ("attention",)),
        ("image/block0/mlp/gelu", ("attention", "norms", "blocks")),
    ],
)
def test_a_wrong_encoder_is_built_again_with_more_of_it_in_fp32(
    node: str, held: tuple[str, ...], board: Board, bundle: Path
) -> None:
    board.watch.compute = spoiled(lambda floats: node not in floats, "image/projection/weight")
    said = board.run("export", "engines", bundle).stderr
    (facts,) = [f for f in open_bundle(bundle).manifest.engines.values() if f.network == IMAGE]
    assert facts.held == held
    assert said.count("is built again with its") == len(held)
    assert f"with its {' and '.join(held)} in fp32" in said
    assert len(board.watch.builds) == 3 + len(held)
    board.run("edge", "selftest", "--bundle", bundle)


@pytest.mark.parametrize(
    ("weight", "output", "builds"),
    [("image/projection/weight", "embedding", 6), ("gain", "boxes", 1)],
)
def test_an_engine_that_stays_wrong_is_not_packed(
    weight: str, output: str, builds: int, board: Board, bundle: Path
) -> None:
    before = contents(bundle)
    board.watch.compute = spoiled(lambda floats: True, weight)
    said = board.run("export", "engines", bundle, code=72).stderr
    assert f"{output} of " in said
    assert "is not what the fp32 graph says: expected " in said
    assert "; try another TensorRT" in said
    assert len(board.watch.builds) == builds, "each detector once; the encoder, and it with each rung"
    assert contents(bundle) == before
    assert not [path for path in bundle.parent.iterdir() if path.name != "mini"]


def test_a_build_that_fails_or_is_broken_off_leaves_the_bundle(board: Board, bundle: Path) -> None:
    before = contents(bundle)
    board.watch.refuse_build = "Could not find any implementation for node 12_convolutional"
    said = board.run("export", "engines", bundle, code=69).stderr
    assert "Could not find any implementation" in said
    assert contents(bundle) == before


def test_a_bundle_without_fp16_graphs_says_how_to_get_them(board: Board, bundle: Path) -> None:
    opened = open_bundle(bundle)
    files = {name: sha for name, sha in opened.manifest.files.items() if name not in HALF.values()}
    manifest = opened.manifest.model_copy(update={"engine": None, "files": files})
    opened.file(MANIFEST).write_text(manifest.to_json())
    said = board.run("export", "engines", bundle, code=72).stderr
    assert "give its recipe a part [engine]" in said


# ---- a box on engines ----


def described(bundle: Path, board: Board, video: Path, backend: str) -> list[Described]:
    opened, config = open_bundle(bundle), DescribeConfig(match=MatchConfig(sensitive=("gender",)))
    results: list[Described] = []
    with board.here(), open_sessions(opened, backend) as on:  # type: ignore[arg-type]
        facts = opened.manifest
        built = {one.network: one.fingerprint.short() for one in facts.engines.values()}
        assert on.engines == ({} if backend == "onnxruntime" else built)
        detector = Detector(on.detector, facts.detector, config.detect, config.track.low, on.imaging)
        assert on.smaller is not None
        assert facts.smaller is not None
        smaller = Detector(on.smaller, facts.smaller, config.detect, config.track.low, on.imaging)
        encoder = Encoder(on.encoder, facts.encoder)
        describer = Describer(opened, detector, encoder, config, imaging=on.imaging, smaller=smaller)
        for number, pair in enumerate(pairs(video)):
            describer.use_smaller(number in (2, 3))  # there and back
            results += describer(pair)
    return results


def pairs(video: Path) -> Iterator[list[Frame]]:
    """One frame each of two cameras, FRAMES in all."""
    with Cameras((CameraConfig(name="pan", source=str(video)),)) as camera:
        frames: list[Frame] = []
        while len(frames) < FRAMES // 2:
            frames += camera.next(0.2)
    for frame in frames:
        yield [replace(frame, camera="left"), replace(frame, camera="right", image=frame.image[:, ::-1].copy())]


@THREE
def test_a_box_says_the_same_on_engines_as_on_the_cpu(
    version: str, built_on: Callable[[str], Path], video: Path
) -> None:
    board, bundle = Board(version), built_on(version)
    on_gpu = described(bundle, board, video, "auto")
    assert len(board.opened) == 1
    log = board.opened[0].log
    on_cpu = described(bundle, board, video, "onnxruntime")
    assert len(board.opened) == 1, "the CPU asks for no GPU"
    assert len(on_gpu) == len(on_cpu) == FRAMES
    people = decisions = same = 0
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert (one.frame.camera, one.frame.number) == (other.frame.camera, other.frame.number)
        assert len(one.people) == len(other.people)
        np.testing.assert_allclose(one.people.boxes, other.people.boxes, atol=1.5)
        np.testing.assert_allclose(one.people.scores, other.people.scores, atol=0.01)
        assert ((one.vectors * other.vectors).sum(axis=1) > 0.99).all()
        people += len(one.people)
        for i in range(len(one.people)):
            pairs = zip(one.matches.answers(i, 1), other.matches.answers(i, 1), strict=True)
            equal = [a.top[0].option == b.top[0].option for a, b in pairs]
            decisions, same = decisions + len(equal), same + sum(equal)
    assert people > 3 * FRAMES
    assert same / decisions > 0.98, f"{same} of {decisions}"
    whole = int(np.prod(on_gpu[0].frame.image.shape))
    assert sum(size == whole for verb, size in log if verb == "upload") == FRAMES, "each frame crosses once"
    crops = open_bundle(bundle).manifest.encoder.size ** 2 * 3
    assert not [size for verb, size in log if verb == "download" and size % crops == 0], "no crop comes back"


def test_the_command_line_runs_on_engines(
    board: Board, built: Path, video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    said = board.run("edge", "selftest", "--bundle", built).stdout
    assert f"{DETECTOR} on TensorRT 10.3.0 on Orin, fp16: " in said
    assert f"{IMAGE} on TensorRT 10.3.0 on Orin, fp16: 2 embeddings" in said
    assert f"{SMALLER} on TensorRT 10.3.0 on Orin, fp16: " in said
    assert board.opened[-1].count("launch") == 4, "its frame, twice, and its two crops come by way of the kernels"
    shown = json.loads(board.run("edge", "describe", PICTURE, "--bundle", built, "--json").stdout)
    assert len(shown["people"]) == 6
    config = tmp_path / "edge.toml"
    config.write_text(
        f'device = "box"\nbundle = "{built}"\n[[camera]]\nname = "pan"\nsource = "{video}"\n'
        '[publish]\naddress = "tcp://127.0.0.1:1"\nlinger_ms = 0\n[runtime]\nbackend = "tensorrt"\n'
        f'[health]\naddress = ""\n[spool]\npath = "{tmp_path / "spool.db"}"\n'
    )
    said = board.run("edge", "run", "--config", config).output
    assert "20 frames in" in said
    assert "1 camera(s), bundle" in caplog.text
    assert "TensorRT 10.3.0 on Orin, fp16" in caplog.text


def test_two_boards_are_not_one(built: Path, tmp_path: Path) -> None:
    for other, what in (
        (Board("10.7.0"), "another TensorRT: expected 10.7.0, got 10.3.0"),
        (Board(gpu=Gpu("Orin", "8.9", 1 << 30)), "another compute capability: expected 8.9, got 8.7"),
        (Board(gpu=Gpu("Thor", "8.7", 1 << 30)), "another GPU: expected Thor, got Orin"),
        (Board(gpu=Gpu("Orin", "8.7", 1 << 30, 16)), "another GPU: expected Orin, 16 multiprocessors, got Orin"),
    ):
        said = other.run("edge", "selftest", "--bundle", built, code=72).stderr
        assert what in said
        assert "build it on this machine with `make export`, or `python -m export engines" in said
        assert not other.watch.runs


def test_a_gpu_without_engines_is_told_of_and_asking_for_one_is_an_error(
    board: Board, bundle: Path, video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board.run("edge", "selftest", "--bundle", bundle)
    assert "which stays idle; `make export` builds one" in caplog.text
    config = tmp_path / "edge.toml"
    config.write_text(
        f'device = "box"\nbundle = "{bundle}"\n[[camera]]\nname = "pan"\nsource = "{video}"\n'
        '[runtime]\nbackend = "tensorrt"\n'
    )
    for machine, word in ((board, "run"), (Board(gpu=None), "run"), (board, "check")):
        words = ["--config", config] if word == "run" else [config]
        said = machine.run("edge", word, *words, code=72).stderr
        assert f"no engine for {DETECTOR}" in said
        assert "`make export`" in said


def test_engines_without_a_gpu_are_told_of_and_the_cpu_runs(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = Board(gpu=None).run("edge", "selftest", "--bundle", built).stdout
    assert "on the CPU" in said
    assert "no NVIDIA GPU answers here for the engines of" in caplog.text


# ---- damage ----


def test_an_engine_is_refused_before_it_is_read(board: Board, built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "mini")
    (engine,) = bundle.glob("image-*.engine")
    whole = engine.read_bytes()
    for damaged in (whole[: len(whole) // 2], np.random.default_rng(0).bytes(len(whole)), b"", whole[:-1] + b"\0"):
        engine.write_bytes(damaged)
        said = board.run("edge", "selftest", "--bundle", bundle, code=72).stderr
        assert f"{engine}: damaged: expected sha256 " in said
        assert "`make export`" in said
        assert not board.opened, "nobody asked the GPU"


@pytest.mark.parametrize("damage", ["truncated", "random"])
def test_a_plan_that_tensorrt_does_not_take_is_said_so(damage: str, board: Board, built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "mini")
    opened = open_bundle(bundle)
    (engine,) = bundle.glob("image-*.engine")
    whole = engine.read_bytes()
    engine.write_bytes(whole[:1000] if damage == "truncated" else np.random.default_rng(0).bytes(len(whole)))
    resealed(opened)
    said = board.run("edge", "selftest", "--bundle", bundle, code=69).stderr
    assert f"{engine.name}: TensorRT does not take the plan" in said
    assert "`make export`" in said
    again = board.run("export", "engines", bundle).stderr  # what mends it
    assert f"{engine.name}: TensorRT does not take the plan" in again
    assert "it is built again" in again
    assert engine.read_bytes() == whole
    board.run("edge", "selftest", "--bundle", bundle)


def test_a_box_whose_engine_answers_otherwise_does_not_serve(board: Board, built: Path, video: Path) -> None:
    """As after an update of the driver: the plan is whole and right, its answers are not."""
    board.watch.compute = spoiled(lambda floats: True, "image/projection/weight")
    said = board.run("edge", "selftest", "--bundle", built, code=72).stderr
    assert f"{IMAGE}: embeddings differ from the fp32 reference" in said
    said = board.run("edge", "describe", PICTURE, "--bundle", built, code=72).stderr
    assert "embeddings differ" in said
    said = board.run("export", "engines", built, code=72).stderr
    assert "it is built again" in said


def test_altered_golden_outputs_stop_an_engine(board: Board, built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "mini")
    opened = open_bundle(bundle)
    golden = Golden.read(bundle / GOLDEN)
    altered = replace(golden, embeddings=golden.embeddings[::-1].copy())
    altered.write(bundle / GOLDEN)
    assert "golden.npz: damaged" in board.run("edge", "selftest", "--bundle", bundle, code=72).stderr
    resealed(opened)
    assert "embeddings differ" in board.run("edge", "selftest", "--bundle", bundle, code=72).stderr
