"""TensorRT behind the seam, in seven versions: what it is asked for, what it answers, and what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge.backend import OnDevice, TensorSpec
from edge.cuda import Gpu
from edge.errors import BackendError, BundleError
from edge.ort import OrtSession
from edge.trt import TrtSession, logger_of, platform, runs
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import VERSIONS, Watch, fake_tensorrt

ROOT = Path(__file__).parents[2]
BATCHES = (1, 8, 32)


def pictures_model() -> bytes:
    """image uint8 (n, 4, 6, 3) -> mean float32 (n, 3), shown float32 (n, 4, 6, 3): twice the pixel plus 1."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], "mean", axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["pixels", "two"], ["doubled"], "double"),
        helper.make_node("Add", ["doubled", "one"], ["shown"], "shift"),
    ]
    graph = helper.make_graph(
        nodes,
        "pictures",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 4, 6, 3])],
        [
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("shown", TensorProto.FLOAT, ["n", 4, 6, 3]),
        ],
        [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("two", 2.0), ("one", 1.0))],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


GRAPH = pictures_model()


def built(trt: Any, graph: bytes = GRAPH, batches: Sequence[int] = BATCHES) -> bytes:
    """A plan by the fake builder, with profiles as edge.trt.runs has them."""
    flags = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):
        if hasattr(trt.NetworkDefinitionCreationFlag, name):
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    builder = trt.Builder(logger_of(trt))
    network, config = builder.create_network(flags), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger_of(trt))
    assert parser.parse(graph)
    for low, high in zip((1, *(size + 1 for size in batches)), batches, strict=False):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            row = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (low, *row), (high, *row), (high, *row))
        config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


class Bench:
    """A fake TensorRT of one version on a fake GPU, with a plan of GRAPH."""

    def __init__(self, version: str = "10.3.0") -> None:
        self.watch, self.cuda = Watch(), FakeCuda()
        self.trt = fake_tensorrt(version, self.watch)
        self.plan = built(self.trt)

    def session(self, **changes: Any) -> TrtSession:
        made = {"plan": self.plan, "cuda": self.cuda, "name": "engine", "batches": BATCHES, "trt": self.trt, **changes}
        return TrtSession(made.pop("plan"), made.pop("cuda"), **made)

    def check_clean(self) -> None:
        """Nothing is left, and all went in the reverse of the order in which it came."""
        assert not self.cuda.live
        assert not self.cuda.pinned
        assert not self.watch.mistakes
        gone = [event[1:] for event in self.watch.events if event[0] == "-"]
        made = [event[1:] for event in self.watch.events if event[0] == "+"]
        self.watch.events.clear()
        assert gone == made[::-1]


@pytest.fixture(params=VERSIONS)
def every(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def images(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 6, 3), np.uint8)


def wanted(pictures: Any, graph: bytes = GRAPH, name: str = "image") -> dict[str, Any]:
    with OrtSession(graph) as session:
        return session.run({name: pictures})


def same(answers: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(answers) == list(expected)
    for name, answer in answers.items():
        assert answer.dtype == expected[name].dtype
        np.testing.assert_allclose(answer, expected[name], rtol=1e-6, atol=1e-6)


# --- how many pictures in which run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "batches", "expected"),
    [
        (0, (1, 8, 32), []),
        (1, (1, 8, 32), [(0, 0, 1)]),
        (2, (1, 8, 32), [(1, 0, 2)]),
        (8, (1, 8, 32), [(1, 0, 8)]),
        (9, (1, 8, 32), [(2, 0, 9)]),
        (32, (1, 8, 32), [(2, 0, 32)]),
        (33, (1, 8, 32), [(2, 0, 32), (0, 32, 33)]),
        (70, (1, 8, 32), [(2, 0, 32), (2, 32, 64), (1, 64, 70)]),
        (3, (1,), [(0, 0, 1), (0, 1, 2), (0, 2, 3)]),
        (5, (4,), [(0, 0, 4), (0, 4, 5)]),
    ],
)
def test_runs(total: int, batches: tuple[int, ...], expected: list[tuple[int, int, int]]) -> None:
    assert runs(total, batches) == expected


@given(st.integers(0, 400), st.sets(st.integers(1, 50), min_size=1, max_size=5).map(lambda sizes: tuple(sorted(sizes))))
def test_runs_take_every_picture_once_in_order_in_as_few_runs_as_can_be(total: int, batches: tuple[int, ...]) -> None:
    lows = (1, *(size + 1 for size in batches))
    made = runs(total, batches)
    assert [row for _, start, stop in made for row in range(start, stop)] == list(range(total))
    assert all(lows[profile] <= stop - start <= batches[profile] for profile, start, stop in made)
    assert len(made) == -(-total // batches[-1])


# --- what it answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 8, 9, 32, 33, 70])
def test_answers_are_those_of_onnx_runtime(every: Bench, n: int) -> None:
    with every.session() as session:
        assert session.inputs == {"image": TensorSpec(np.dtype(np.uint8), (None, 4, 6, 3))}
        assert session.outputs == {
            "mean": TensorSpec(np.dtype(np.float32), (None, 3)),
            "shown": TensorSpec(np.dtype(np.float32), (None, 4, 6, 3)),
        }
        for seed in range(4):  # the first run, one that is recorded, replays
            same(session.run({"image": images(n, seed)}), wanted(images(n, seed)))
        addresses = {name: session._device[name] for name in ("image", "mean", "shown")}
        assert [(profile, shapes) for profile, shapes, _ in every.watch.runs[: len(runs(n, BATCHES))]] == [
            (profile, {"image": (stop - start, 4, 6, 3)}) for profile, start, stop in runs(n, BATCHES)
        ]
        assert all(given == addresses for _, _, given in every.watch.runs)
        assert len(set(addresses.values())) == 3
    every.check_clean()


def test_answers_belong_to_the_caller(bench: Bench) -> None:
    with bench.session() as session:
        first = session.run({"image": images(9)})
        kept = {name: answer.copy() for name, answer in first.items()}
        session.run({"image": images(9, 1)})
    same(first, kept)


def test_feeds_of_any_layout_are_read_and_left_alone(bench: Bench) -> None:
    wide = images(40)
    every_second, mirrored = wide[::2], wide[:, :, ::-1]
    before = wide.copy()
    with bench.session() as session:
        same(session.run({"image": every_second}), wanted(every_second))
        same(session.run({"image": mirrored}), wanted(mirrored))
        read_only = images(3)
        read_only.flags.writeable = False
        same(session.run({"image": read_only}), wanted(images(3)))
    assert (wide == before).all()


@pytest.mark.parametrize("n", [0, 1, 9, 33])
def test_pictures_on_the_device_are_copied_there(every: Bench, n: int) -> None:
    pictures = images(n)
    with every.session() as session:
        address = every.cuda.allocate(max(1, pictures.nbytes))
        every.cuda.upload(address, pictures)
        every.cuda.synchronize()
        uploads = every.cuda.count("upload")
        same(session.run({"image": OnDevice(address, pictures.shape)}), wanted(pictures))
        assert every.cuda.count("upload") == uploads, "they never go by way of the host"
        every.cuda.free(address)
    every.check_clean()


@pytest.mark.parametrize("network", ["detector", "image"])
@pytest.mark.parametrize("version", ["8.6.1", "11.4.0"])
def test_the_mini_networks(network: str, version: str) -> None:
    from export.checkpoint import read_checkpoint
    from export.clip import onnx_from_clip
    from export.darknet import onnx_from_darknet

    mini = ROOT / "export/mini"
    model: Any
    if network == "detector":
        model = onnx_from_darknet(mini / "yolov4-mini.cfg", mini / "yolov4-mini.weights", bn_epsilon=1e-6)
    else:
        model = onnx_from_clip(read_checkpoint(mini / "clip-mini.safetensors")).image
    graph = bytes(model.SerializeToString())
    trt, cuda = fake_tensorrt(version), FakeCuda()
    with TrtSession(built(trt, graph, (1, 4)), cuda, name=network, batches=(1, 4), trt=trt) as session:
        shape = session.inputs["image"].shape[1:]
        pictures = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
        answers, expected = session.run({"image": pictures}), wanted(pictures, graph)
    assert set(answers) == set(expected)
    for name, answer in answers.items():
        np.testing.assert_allclose(answer, expected[name], rtol=1e-3, atol=1e-4)
    assert not cuda.live


def test_who_answers(every: Bench) -> None:
    gpu = Gpu("Orin", "8.7", 1 << 33)
    version = every.trt.__version__
    assert platform(every.trt, gpu).model_dump() == {"tensorrt": version, "compute_capability": "8.7", "gpu": "Orin"}
    with every.session(cuda=FakeCuda(gpu=gpu), precision="fp32") as session:
        assert session.precision == "fp32"
        assert session.about == f"TensorRT {version} on Orin, fp32"


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BATCHES)
def test_a_run_of_a_built_size_is_recorded_the_second_time_and_replayed(every: Bench, size: int) -> None:
    with every.session() as session:
        for turn in range(5):
            same(session.run({"image": images(size, turn)}), wanted(images(size, turn)))
            assert every.cuda.count("record") == (turn >= 1)
            assert every.cuda.count("replay") == turn
    every.check_clean()


def test_other_sizes_are_not_recorded(bench: Bench) -> None:
    with bench.session() as session:
        for turn in range(5):
            same(session.run({"image": images(5, turn)}), wanted(images(5, turn)))
    assert bench.cuda.count("record") == 0


def test_a_graph_is_dropped_when_its_context_takes_another_shape(bench: Bench) -> None:
    sizes = [8, 8, 8, 5, 8, 8, 8, 1, 1, 1, 40, 32, 32, 32, 12, 32, 70]
    with bench.session() as session:
        for turn, size in enumerate(sizes):
            same(session.run({"image": images(size, turn)}), wanted(images(size, turn)))
    assert bench.cuda.count("record") == 3, "each profile once: those that meet several sizes go on without"
    bench.check_clean()  # the fake sees a replay after a change


class Unrecordable(FakeCuda):
    """A GPU whose driver records nothing: it says so, or raises."""

    raises = False

    def record(self, work: Callable[[], None]) -> Any:
        if self.raises:
            raise BackendError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        return super().record(work) and None


@pytest.mark.parametrize("raises", [True, False])
def test_what_cannot_be_recorded_is_said_once_and_runs_without(
    bench: Bench, raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = Unrecordable()
    cuda.raises = raises
    with bench.session(cuda=cuda) as session:
        for turn in range(4):
            same(session.run({"image": images(8, turn)}), wanted(images(8, turn)))
    assert [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()] == [
        "engine: batches of 8 run without a CUDA graph: "
        + ("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" if raises else "CUDA does not record it")
    ]


def test_an_enqueue_that_is_refused_while_recording_runs_without(bench: Bench) -> None:
    with bench.session() as session:
        session.run({"image": images(8)})
        bench.watch.refuse_enqueue = 1
        same(session.run({"image": images(8, 1)}), wanted(images(8, 1)))
        assert bench.cuda.count("replay") == 0


# --- what goes wrong ------------------------------------------------------------------------------------------------


class Failing(FakeCuda):
    """A GPU whose nth call of the driver fails."""

    left = -1

    def _asked(self, verb: str, detail: int | str, *, recordable: bool = True) -> None:
        super()._asked(verb, detail, recordable=recordable)
        if self.left >= 0 and verb not in ("free", "unpin"):
            self.left -= 1
            if self.left < 0:
                raise BackendError(f"CUDA_ERROR_UNKNOWN in {verb}")


@pytest.mark.parametrize(
    ("feeds", "part"),
    [
        ({}, "expected ['image'], got []"),
        ({"other": images(1)}, "got ['other']"),
        ({"image": images(1), "more": images(1)}, "got ['image', 'more']"),
        ({"image": images(1).astype(np.float32)}, "got float32 (1, 4, 6, 3)"),
        ({"image": images(1)[0]}, "expected uint8 ('n', 4, 6, 3), got uint8 (4, 6, 3)"),
        ({"image": images(1)[:, :3]}, "got uint8 (1, 3, 6, 3)"),
        ({"image": None}, "got NoneType ()"),
        ({"image": [[1]]}, "got list ()"),
        ({"image": OnDevice(1, (1, 6, 4, 3))}, "got uint8 (1, 6, 4, 3)"),
    ],
)
def test_wrong_feeds(bench: Bench, feeds: dict[str, Any], part: str) -> None:
    with bench.session() as session:
        with pytest.raises(BackendError) as caught:
            session.run(feeds)
        assert str(caught.value).startswith("engine: input")
        assert part in str(caught.value)
        same(session.run({"image": images(2)}), wanted(images(2)))


def test_feeds_of_two_lengths() -> None:
    from tests.unit.test_ort import A, B, model

    trt = fake_tensorrt("10.3.0")
    cuda = FakeCuda()
    with TrtSession(built(trt, model(), (4,)), cuda, name="sums", batches=(4,), trt=trt) as session:
        with pytest.raises(BackendError, match=r"as many rows in each, got \{'a': 1, 'b': 2\}"):
            session.run({"a": A, "b": np.concatenate([B, B])})
        assert session.run({"a": A, "b": B})["sum"].tolist() == [[11, 22, 33]]


@pytest.mark.parametrize("n", [1, 33])
def test_a_refused_run_says_tensorrts_words_and_the_next_one_works(every: Bench, n: int) -> None:
    with every.session() as session:
        every.watch.refuse_enqueue = 1
        with pytest.raises(BackendError, match=r"engine: TensorRT refuses to run: .*illegal memory access"):
            session.run({"image": images(n)})
        for seed in range(1, 4):
            same(session.run({"image": images(n, seed)}), wanted(images(n, seed)))
    every.check_clean()


def flipped(plan: bytes) -> bytes:
    return plan[:-9] + bytes([plan[-9] ^ 1]) + plan[-8:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda plan: b"", "Magic tag"),
        (lambda plan: b"\0" * 4096, "Magic tag"),
        (lambda plan: plan[: len(plan) // 2], "Error Code 1"),
        (lambda plan: plan[:-1], "checksum"),
        (flipped, "checksum"),
    ],
)
def test_what_is_no_plan(every: Bench, spoil: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(BackendError, match=r"engine: TensorRT does not take the plan: .*make export") as caught:
        every.session(plan=spoil(every.plan))
    assert words in str(caught.value)
    del caught
    every.check_clean()


def test_a_plan_of_another_version_or_gpu(every: Bench) -> None:
    other = next(version for version in VERSIONS if version != every.trt.__version__)
    with pytest.raises(BackendError, match=f"not compatible with this version of TensorRT: {other}"):
        every.session(plan=built(fake_tensorrt(other)))
    with pytest.raises(BackendError, match="incompatible device"):
        every.session(plan=built(fake_tensorrt(every.trt.__version__, Watch(capability="9.0"))))


@pytest.mark.parametrize("batches", [(1, 8), (1, 8, 16), (8, 32), (1, 4, 32), (2, 8, 32), (1, 8, 32, 64)])
def test_a_plan_of_other_batches(bench: Bench, batches: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match=r"input image was built for other batches: .*got \[\(1, 1\), \(2, 8\)"):
        bench.session(batches=batches)
    bench.check_clean()


def test_a_plan_that_wants_host_memory(bench: Bench) -> None:
    bench.watch.on_host = frozenset({"mean"})
    with pytest.raises(BundleError, match=r"tensor mean .*HOST"):
        bench.session()
    bench.check_clean()


@pytest.mark.parametrize("shape", [(1, 3), (32, -1)])
def test_a_plan_whose_output_has_no_row_per_picture(bench: Bench, shape: tuple[int, ...]) -> None:
    bench.watch.answer_shape["mean"] = shape
    with pytest.raises(BundleError, match="output mean does not have one row per picture"):
        bench.session()
    bench.check_clean()


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_no_memory_for_a_context(every: Bench, number: int) -> None:
    every.watch.refuse_context = number
    with pytest.raises(BackendError) as caught:
        every.session()
    assert f"no context for batches up to {BATCHES[number]}" in str(caught.value)
    assert "out of memory" in str(caught.value)
    assert "expected up to 1.0 MiB free, got 1024.0 of 1024.0 MiB" in str(caught.value)
    every.check_clean()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("set_optimization_profile_async", "refuses profile 0: Error in set optimization profile async."),
        ("set_input_shape", "refuses 32 rows"),
        ("infer_shapes", "cannot infer the shapes of 32 rows: infer_shapes error code: -1"),
        ("set_tensor_address", "refuses the memory of image"),
    ],
)
def test_a_context_that_refuses_while_it_is_opened(every: Bench, method: str, words: str) -> None:
    every.watch.refuse = method
    with pytest.raises(BackendError, match=rf"engine: TensorRT {words}: IExecutionContext::{method}: refused"):
        every.session()
    every.check_clean()


def test_a_runtime_that_cannot_be_made(every: Bench) -> None:
    every.watch.refuse = "Runtime"
    with pytest.raises(BackendError, match=r"engine: TensorRT has no runtime here: .*nullptr: CUDA initialization"):
        every.session()
    every.check_clean()


@pytest.mark.parametrize("method", ["set_input_shape", "infer_shapes"])
def test_a_shape_that_is_refused_is_asked_for_again(bench: Bench, method: str) -> None:
    with bench.session() as session:
        session.run({"image": images(5)})
        bench.watch.refuse = method
        for _ in range(2):
            with pytest.raises(BackendError, match="refused"):
                session.run({"image": images(4)})
        bench.watch.refuse = ""
        same(session.run({"image": images(5, 1)}), wanted(images(5, 1)))
        same(session.run({"image": images(4, 2)}), wanted(images(4, 2)))
    bench.check_clean()


def test_what_is_told_is_of_this_run_and_its_first_mistake(bench: Bench) -> None:
    bench.cuda = cuda = Failing()
    with bench.session() as session:
        logger_of(bench.trt).log(bench.trt.ILogger.Severity.ERROR, "of long ago")
        bench.watch.refuse_enqueue, cuda.left = 1, 1  # after the upload: waiting for it fails too
        with pytest.raises(BackendError, match=r"engine: TensorRT refuses to run: IExecutionContext::enqueueV3"):
            session.run({"image": images(1)})
        assert cuda.left == -1


@pytest.mark.parametrize("output", ["flag", "count"])
def test_a_plan_with_an_output_that_is_none_for_a_session(bench: Bench, output: str) -> None:
    """BOOL, which no contract speaks of, and a scalar."""
    nodes = [
        helper.make_node("Cast", ["image"], ["flag"], "cast", to=TensorProto.BOOL),
        helper.make_node("Cast", ["image"], ["pixels"], "pixels", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["count"], "mean", keepdims=0),
    ]
    kind, shape = {"flag": (TensorProto.BOOL, ["n", 2]), "count": (TensorProto.FLOAT, [])}[output]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 2])],
        [helper.make_tensor_value_info(output, kind, shape)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(BundleError, match=f"tensor {output} is none for a session"):
        bench.session(plan=built(bench.trt, bytes(made.SerializeToString())))
    bench.check_clean()


def test_no_memory_for_a_buffer(bench: Bench) -> None:
    """Whatever allocation it is that fails, nothing is left."""
    with bench.session():
        needed = sum(bench.cuda.live.values())
    for capacity in (0, 32 * 72, needed - 1):
        bench.cuda.capacity = capacity
        with pytest.raises(BackendError, match="out of GPU memory"):
            bench.session()
        bench.check_clean()
    bench.cuda.capacity = needed
    bench.session().close()


@pytest.mark.parametrize("nth", range(7))  # synchronize, three allocations, three pins
def test_a_failure_at_any_call_while_it_opens_leaves_nothing(bench: Bench, nth: int) -> None:
    bench.cuda = cuda = Failing()
    cuda.left = nth
    with pytest.raises(BackendError, match="CUDA_ERROR_UNKNOWN"):
        bench.session()
    bench.check_clean()
    cuda.left = 7
    bench.session().close()  # there is no eighth call
    assert cuda.left == 0


@pytest.mark.parametrize("nth", range(8))  # two runs of upload, two downloads, synchronize
def test_a_failure_at_any_call_of_a_run_is_told_and_the_next_run_works(bench: Bench, nth: int) -> None:
    bench.cuda = cuda = Failing()
    with bench.session() as session:
        cuda.left = nth
        with pytest.raises(BackendError, match="CUDA_ERROR_UNKNOWN"):
            session.run({"image": images(33)})
        cuda.left = -1
        same(session.run({"image": images(33, 1)}), wanted(images(33, 1)))
    bench.check_clean()


# --- letting go -----------------------------------------------------------------------------------------------------


def test_what_was_taken_is_let_go_in_order(every: Bench) -> None:
    session = every.session()
    session.run({"image": images(70)})
    assert every.watch.events == ["+runtime", "+engine", "+context 0", "+context 1", "+context 2"]
    session.close()
    assert every.watch.events[5:] == ["-context 2", "-context 1", "-context 0", "-engine", "-runtime"]
    every.check_clean()
    session.close()  # twice is no mistake
    with pytest.raises(BackendError, match="engine: the session is closed"):
        session.run({"image": images(1)})


def test_the_session_closes_also_after_an_error(bench: Bench) -> None:
    with pytest.raises(BackendError, match="inputs"), bench.session() as session:
        session.run({})
    bench.check_clean()


def test_memory_is_taken_once_for_the_largest_batch(bench: Bench) -> None:
    with bench.session() as session:
        live = dict(bench.cuda.live)
        assert sorted(live.values()) == sorted([32 * 72, 32 * 3 * 4, 32 * 72 * 4])
        for n in (70, 1, 32):
            session.run({"image": images(n)})
        assert bench.cuda.live == live
        assert (bench.cuda.count("allocate"), bench.cuda.count("pin")) == (3, 3)


def test_two_sessions_of_one_gpu_hear_tensorrt_by_one_log(bench: Bench) -> None:
    with bench.session(name="first") as first, bench.session(name="second") as second:
        bench.watch.refuse_enqueue = 1
        with pytest.raises(BackendError, match=r"second: .*illegal memory access"):
            second.run({"image": images(1)})
        same(first.run({"image": images(1)}), wanted(images(1)))
    bench.check_clean()


def test_tensorrts_log_goes_to_ours(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logger, severity = logger_of(bench.trt), bench.trt.ILogger.Severity
    for level in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        logger.log(severity[level], f"{level} told")
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "told" in record.getMessage()]
    assert told == [
        ("ERROR", "TensorRT: INTERNAL_ERROR told"),
        ("ERROR", "TensorRT: ERROR told"),
        ("WARNING", "TensorRT: WARNING told"),
        ("DEBUG", "TensorRT: INFO told"),
        ("DEBUG", "TensorRT: VERBOSE told"),
    ]
    assert logger.quote() == "INTERNAL_ERROR told / ERROR told"
    assert logger.quote() == "it gives no reason"
