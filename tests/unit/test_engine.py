"""The builder of engines against a TensorRT of each of seven versions: the path it takes, and every way it can end."""

from __future__ import annotations

import functools
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge.errors import BackendError, ModelError
from export.clip import onnx_from_clip
from export.engine import Build, Progress, engine_from_onnx, strongly_typed
from export.hold import float32_nodes
from tests.clip_states import random_state
from tests.fake_tensorrt import VERSIONS, Watch, fake_tensorrt
from tests.fake_tensorrt_builder import MAGIC

WEAK = ("8.6.1",)  # networks are not strongly typed
TYPED = tuple(version for version in VERSIONS if version not in WEAK)
SILENT = ("8.6.1",)  # no IProgressMonitor
BATCHES, WORKSPACE = (1, 8, 32), 256 << 20

every = pytest.mark.parametrize("version", VERSIONS)
typed = pytest.mark.parametrize("version", TYPED)


@functools.cache
def graph(precision: Any) -> onnx.ModelProto:
    return onnx_from_clip(random_state(), precision=precision).image


def build_for(trt: Any, **changes: Any) -> Build:
    if strongly_typed(trt):
        facts: dict[str, Any] = {"graph": graph("fp16").SerializeToString()}
    else:
        facts = {"graph": graph("fp32").SerializeToString(), "float32": float32_nodes(graph("fp16"))}
    return Build(**{"batches": BATCHES, "workspace": WORKSPACE, **facts, **changes})


class Told:
    """What the builder says; `when` may act on it."""

    def __init__(self, when: Callable[[str, int], None] = lambda stage, done: None) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self._when = when

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.lines.append((stage, done, total))
        self._when(stage, done)


def run(trt: Any, build: Build | None = None, timing: bytes = b"", say: Progress | None = None) -> tuple[bytes, bytes]:
    return engine_from_onnx(build or build_for(trt), trt, name="image.onnx", timing=timing, say=say or Told())


def nodes(model: onnx.ModelProto, *operators: str) -> set[str]:
    return {node.name for node in model.graph.node if node.op_type in operators}


# --- which way ------------------------------------------------------------------------------------------------------


@every
def test_the_path_to_fp16(version: str) -> None:
    watch = Watch()
    trt = fake_tensorrt(version, watch)
    assert strongly_typed(trt) == (version in TYPED)
    run(trt)
    (built,) = watch.builds
    assert built["strongly_typed"] == (version in TYPED)
    assert built["flags"] == ([] if version in TYPED else ["FP16", "OBEY_PRECISION_CONSTRAINTS"])
    assert bool(built["precisions"]) == (version in WEAK)


@pytest.mark.parametrize(("version", "says"), [("8.6.1", "11.9.0"), ("10.3.0", "7.2.0"), ("11.4.0", "")])
def test_what_a_version_is_called_decides_nothing(version: str, says: str) -> None:
    watch = Watch()
    trt = fake_tensorrt(version, watch)
    trt.__version__ = says
    run(trt, build_for(trt))
    assert watch.builds[0]["strongly_typed"] == (version in TYPED)


@every
@pytest.mark.parametrize("batches", [(1,), (4,), (1, 4), (1, 8, 32), (2, 3)])
def test_a_profile_for_each_built_size(version: str, batches: tuple[int, ...]) -> None:
    watch = Watch()
    trt = fake_tensorrt(version, watch)
    run(trt, build_for(trt, batches=batches))
    spans = [1, *(size + 1 for size in batches)]
    expected = [
        {"image": [(low, 64, 64, 3), (high, 64, 64, 3), (high, 64, 64, 3)]}
        for low, high in zip(spans, batches, strict=False)
    ]
    assert watch.builds[0]["profiles"] == expected


@every
def test_the_workspace_is_kept(version: str) -> None:
    watch = Watch(workspace=WORKSPACE)
    trt = fake_tensorrt(version, watch)
    run(trt)
    assert watch.builds[0]["pools"] == {"WORKSPACE": WORKSPACE}
    watch.workspace += 1
    with pytest.raises(BackendError, match=r"insufficient workspace.* a larger workspace_mib"):
        run(trt)


@every
def test_the_plan_is_what_the_builder_gave_and_nothing_else(version: str) -> None:
    """As trtexec loads it: no header of the project's own before or behind."""
    watch = Watch()
    trt = fake_tensorrt(version, watch)
    build = build_for(trt)
    plan, _ = run(trt, build)
    header = json.dumps(watch.builds[0]).encode()
    assert type(plan) is bytes
    assert plan == MAGIC + len(header).to_bytes(4, "little") + header + build.graph


# --- pins -----------------------------------------------------------------------------------------------------------


def test_what_is_pinned_where_types_are_the_builders_choice() -> None:
    watch = Watch()
    trt = fake_tensorrt("8.6.1", watch)
    run(trt)
    built = watch.builds[0]
    names = {node.name for node in graph("fp32").graph.node}
    pinned = float32_nodes(graph("fp16")) & names
    assert {"image/centred", "image/block0/ln_1", "image/block1/attention/softmax", "embedding"} <= pinned < names
    assert set(built["output_types"]) == pinned
    assert set(built["precisions"]) == pinned - {"image/pixels"}  # its input is uint8
    assert {*built["output_types"].values(), *built["precisions"].values()} == {"FLOAT"}


def test_norms_and_softmax_are_pinned_unasked_and_others_are_not() -> None:
    watch = Watch()
    trt = fake_tensorrt("8.6.1", watch)
    run(trt, build_for(trt, float32=frozenset()))
    assert set(watch.builds[0]["precisions"]) == nodes(graph("fp32"), "LayerNormalization", "Softmax")


def test_what_is_no_float_is_not_pinned() -> None:
    """The fake refuses a precision on such a layer, as TensorRT does."""
    tower = onnx_from_clip(random_state(), precision="fp32").text  # its ArgMax gives int64
    watch = Watch()
    trt = fake_tensorrt("8.6.1", watch)
    names = frozenset(node.name for node in tower.graph.node)
    run(trt, build_for(trt, graph=tower.SerializeToString(), float32=names))
    assert "text/end" in names
    assert set(watch.builds[0]["output_types"]) == names - {"text/end"}


# --- timing cache ---------------------------------------------------------------------------------------------------


@every
def test_a_timing_cache_comes_out_and_serves_the_next_build(version: str, caplog: pytest.LogCaptureFixture) -> None:
    trt = fake_tensorrt(version)
    _, first = run(trt)
    assert first.startswith(b"timing")
    with caplog.at_level(logging.WARNING):
        _, second = run(trt, timing=first)
        assert second == first  # nothing was timed that it did not hold
        _, grown = run(trt, build_for(trt, float32=frozenset({"image/patches"})), timing=first)
    assert not caplog.records
    assert set(first.split(b"\n")) <= set(grown.split(b"\n"))


@every
@pytest.mark.parametrize("kind", ["bytes", "version"])
def test_a_timing_cache_that_is_refused_is_replaced_and_that_is_said(
    version: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trt = fake_tensorrt(version)
    other = next(name for name in VERSIONS if name != version)
    timing = b"no cache" if kind == "bytes" else run(fake_tensorrt(other))[1]
    _, fresh = run(trt)
    with caplog.at_level(logging.WARNING, "export.engine"):
        _, after = run(trt, timing=timing)
    assert after == fresh
    (said,) = [record.getMessage() for record in caplog.records if record.name == "export.engine"]
    assert said == f"image.onnx: TensorRT does not take the timing cache of {len(timing)} bytes; all is timed anew"


# --- progress, and its end ------------------------------------------------------------------------------------------


@every
def test_progress_is_told_where_tensorrt_tells_it(version: str) -> None:
    told = Told()
    run(fake_tensorrt(version), say=told)
    stages = list(dict.fromkeys(stage for stage, _, _ in told.lines))
    own = ["reading the graph", "building the engine"]
    assert stages == (own if version in SILENT else [*own, "Building Engine", "Tactic Selection"])
    if version not in SILENT:
        steps = [(done, total) for stage, done, total in told.lines if stage == "Tactic Selection"]
        total = steps[0][1]
        assert total > 10
        assert steps == [*((done, total) for done in range(total + 1)), (total, total)]


@every
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the screen is gone")])
def test_what_say_raises_ends_the_build_and_comes_out(version: str, error: BaseException) -> None:
    watch = Watch()
    stage, step = ("building the engine", 0) if version in SILENT else ("Tactic Selection", 3)

    def fail(at: str, done: int) -> None:
        if (at, done) == (stage, step):
            raise error

    told = Told(fail)
    with pytest.raises(type(error)) as caught:
        run(fake_tensorrt(version, watch), say=told)
    assert caught.value is error
    assert told.lines[-1][:2] == (stage, step)  # nothing is said after it
    assert not watch.builds


@pytest.fixture
def foreground() -> Iterator[None]:
    """As a terminal leaves it: what is started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@typed
@pytest.mark.usefixtures("foreground")
def test_ctrl_c_ends_the_build_at_its_next_step(version: str) -> None:
    watch = Watch()

    def press(stage: str, done: int) -> None:
        if (stage, done) == ("Tactic Selection", 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(fake_tensorrt(version, watch), say=Told(press))
    assert not watch.builds
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Press(logging.Handler):
    """Ctrl-C while TensorRT logs."""

    def emit(self, record: logging.LogRecord) -> None:
        signal.raise_signal(signal.SIGINT)


@every
@pytest.mark.usefixtures("foreground")
def test_ctrl_c_inside_tensorrts_logger_is_not_lost(version: str) -> None:
    """TensorRT drops what a logger raises."""
    handler, logger = Press(), logging.getLogger("edge.trt")
    logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(fake_tensorrt(version), timing=b"refused, which is logged")
    finally:
        logger.removeHandler(handler)


def test_who_handles_ctrl_c_otherwise_goes_on_doing_so() -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        plan, _ = run(fake_tensorrt("10.3.0"), say=Told(lambda stage, done: signal.raise_signal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert plan
    assert len(pressed) > 10


def test_a_build_in_another_thread() -> None:
    plans: list[bytes] = []
    thread = threading.Thread(target=lambda: plans.append(run(fake_tensorrt("10.3.0"))[0]))
    thread.start()
    thread.join(30)
    assert len(plans) == 1


# --- errors ---------------------------------------------------------------------------------------------------------


@every
def test_an_operator_that_is_not_known(version: str) -> None:
    watch = Watch(unsupported=frozenset({"Softmax"}))
    with pytest.raises(ModelError) as caught:
        run(fake_tensorrt(version, watch))
    text = "No importer registered for op: Softmax. Attempting to import as plugin."
    place = "node 'image/block0/attention/softmax' (Softmax)"
    assert str(caught.value) == f"image.onnx: TensorRT does not take {place}: {text}"
    assert not watch.builds


@every
def test_bytes_that_are_no_graph(version: str) -> None:
    trt = fake_tensorrt(version)
    with pytest.raises(ModelError, match=r"image\.onnx: TensorRT cannot read the graph: Failed to parse the ONNX"):
        run(trt, build_for(trt, graph=b"no graph"))


@every
def test_a_builder_that_gives_nothing_is_quoted(version: str) -> None:
    with pytest.raises(BackendError) as caught:
        run(fake_tensorrt(version, Watch(refuse_build="Error Code 2: OutOfMemory (no further information)")))
    assert str(caught.value).startswith(
        "image.onnx: TensorRT builds no engine of it: Error Code 2: OutOfMemory (no further information); "
        "where memory is short, a smaller workspace_mib"
    )


@every
@pytest.mark.parametrize("error", [TypeError("factory function returned nullptr"), RuntimeError("CUDA"), MemoryError()])
def test_a_builder_that_cannot_be_made(version: str, error: Exception) -> None:
    trt = fake_tensorrt(version)

    def refuse(logger: Any) -> Any:
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise error

    trt.Builder = refuse
    with pytest.raises(BackendError, match=r"builder failed.*CUDA initialization failure with error: 35") as caught:
        run(trt)
    assert caught.value.__cause__ is error


@typed
def test_a_mistyped_graph_is_refused_with_its_node(version: str) -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph("fp16"))
    weight = next(tensor for tensor in wrong.graph.initializer if tensor.name == "image/block0/mlp/up/weight")
    value = numpy_helper.to_array(weight).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    trt = fake_tensorrt(version)
    with pytest.raises((BackendError, ModelError), match=r"image/block0/mlp/up.*types Half and Float"):
        run(trt, build_for(trt, graph=wrong.SerializeToString()))
