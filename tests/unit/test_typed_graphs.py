"""Both networks through a real compiler of NVIDIA's, which needs no GPU: TensorRT-RTX, whose networks are all typed.

It proves that the graphs parse and that their types are right, for the mini models and at full size. It says nothing
of what an engine answers, of its speed, or of the tactics that TensorRT finds on another GPU.
"""

from __future__ import annotations

import functools
import gc
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge.bundle import Precision
from edge.errors import BackendError, ModelError
from export.checkpoint import read_checkpoint
from export.clip import onnx_from_clip
from export.darknet import onnx_from_darknet
from export.engine import Build, engine_from_onnx, strongly_typed
from export.hold import RUNGS, float32_nodes, held_in_fp32
from tests import darknet_nets
from tests.clip_states import random_state

rtx = pytest.importorskip("tensorrt_rtx", reason="the compiler is not here: pip install -e '.[compilers]'")

# What it says of its own timing caches; TensorRT's are of use.
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")

MINI = Path("export/mini")
BATCHES = {"detector": (1, 4), "image": (1, 8, 32)}
WORKSPACE = 1 << 30

networks = pytest.mark.parametrize("network", ["detector", "image"])


def mini(network: str, precision: Precision) -> onnx.ModelProto:
    if network == "detector":
        return onnx_from_darknet(MINI / "yolov4-mini.cfg", MINI / "yolov4-mini.weights", precision=precision)
    return onnx_from_clip(read_checkpoint(MINI / "clip-mini.safetensors"), precision=precision).image


@functools.cache
def typed(network: str) -> onnx.ModelProto:
    """The mini's in fp16; not to be changed."""
    return mini(network, "fp16")


@pytest.fixture(scope="module")
def yolov4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cfg, weights) of YOLOv4 at 416 pixels, all 161 layers; the weights are random."""
    cfg = tmp_path_factory.mktemp("yolov4") / "yolov4.cfg"
    cfg.write_text(darknet_nets.yolov4(416, 416))
    return cfg, darknet_nets.write_weights(cfg, cfg.with_suffix(".weights"))


def full(network: str, precision: Precision, yolov4: tuple[Path, Path]) -> onnx.ModelProto:
    """As `mini`, with the structures of YOLOv4 and of the image tower of CLIP ViT-B/32."""
    if network == "detector":
        return onnx_from_darknet(*yolov4, precision=precision)
    state = random_state(image_size=224, patch=32, width=768, layers=12, dim=512)
    return onnx_from_clip(state, precision=precision).image


class Module:
    """Stands for a module `tensorrt`."""

    def __init__(self, **members: Any) -> None:
        vars(self).update(members)


class Recorded:
    """TensorRT-RTX as the builder of engines sees it, with what passed through it kept."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.flags: list[int] = []
        self.networks: list[Any] = []
        self.plans: list[bytes] = []
        seen = self

        class Builder(rtx.Builder):  # type: ignore[misc]
            def create_network(self, flags: int) -> Any:
                seen.flags.append(flags)
                seen.networks.append(super().create_network(flags))
                return seen.networks[-1]

            def create_builder_config(self) -> Any:
                seen.configs.append(super().create_builder_config())
                return seen.configs[-1]

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                plan = super().build_serialized_network(network, config)
                seen.plans += [] if plan is None else [bytes(plan)]
                return plan

        self.trt = Module(**{**vars(rtx), "Builder": Builder})


def run(model: onnx.ModelProto, batches: tuple[int, ...] = (1,), trt: Any = rtx, say: Any = None) -> bytes:
    build = Build(model.SerializeToString(), batches, WORKSPACE)
    plan, _ = engine_from_onnx(build, trt, name="graph.onnx", timing=b"", say=say or (lambda *line: None))
    return plan


@networks
@pytest.mark.parametrize(("size", "precision"), [("mini", "fp32"), ("mini", "fp16"), ("full", "fp16")])
def test_the_graphs_build_as_strongly_typed_engines(
    size: str, network: str, precision: Precision, yolov4: tuple[Path, Path]
) -> None:
    model = mini(network, precision) if size == "mini" else full(network, precision, yolov4)
    batches = BATCHES[network]
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    rows = tuple(axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim)[1:]
    seen, stages = Recorded(), set[str]()
    assert strongly_typed(seen.trt)
    plan = run(model, batches, seen.trt, lambda stage, done, total: stages.add(stage))
    assert [plan] == seen.plans  # byte for byte what the compiler gave
    assert len(plan) > 0.9 * weights
    assert seen.flags == [1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    (config,) = seen.configs
    assert config.num_optimization_profiles == len(batches)
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == WORKSPACE
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    image = seen.networks[0].get_input(0)
    assert (image.name, tuple(image.shape), image.dtype) == ("image", (-1, *rows), rtx.DataType.UINT8)
    outputs = [seen.networks[0].get_output(i) for i in range(seen.networks[0].num_outputs)]
    assert {output.name for output in outputs} == {output.name for output in model.graph.output}
    assert {output.dtype for output in outputs} == {rtx.DataType.FLOAT}
    assert {"reading the graph", "building the engine"} < stages
    seen.networks.clear()
    gc.collect()


@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_held_in_fp32_is_still_typed(rung: str) -> None:
    """The graphs that are tried where float16 does not carry the encoder."""
    assert run(held_in_fp32(typed("image"), RUNGS[rung]))


# --- graphs that are wrong ------------------------------------------------------------------------------------------


def widened(weight: str) -> Callable[[onnx.GraphProto], None]:
    """That weight in float32."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == weight)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), weight))

    return change


def without(cast: str) -> Callable[[onnx.GraphProto], None]:
    """That Cast left out."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == cast and node.op_type == "Cast")
        source, made = node.input[0], node.output[0]
        graph.node.remove(node)
        for other in graph.node:
            other.input[:] = [source if name == made else name for name in other.input]

    return change


@pytest.mark.parametrize(
    ("network", "change", "node"),
    [
        ("image", widened("image/block0/mlp/up/weight"), "image/block0/mlp/up"),
        ("image", widened("image/block1/mlp/down/bias"), "image/block1/mlp/down/biased"),
        ("image", widened("image/positions/weight"), "image/positions"),
        ("image", without("image/block0/attention/softmax/float16"), "image/block0/attention/mix"),
        ("image", without("image/block0/ln_1/float16"), "image/block0/attention/query"),
        ("image", without("image/positions/float32"), "image/ln_pre"),  # a LayerNormalization with float32 scale
        ("image", without("image/ln_pre/float16"), "image/block0/attention/residual"),
        ("image", without("image/pixels"), "image/channels_first"),  # uint8 is taken by a Cast alone
        ("detector", widened("4_convolutional/kernel"), "4_convolutional"),
        ("detector", widened("95_convolutional/kernel"), "95_convolutional"),
        ("detector", without("pixels"), "planes"),
    ],
)
def test_a_mistyped_graph_is_refused_and_its_node_named(
    network: str, change: Callable[[onnx.GraphProto], None], node: str
) -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(typed(network))
    change(wrong.graph)
    operator = next(other.op_type for other in wrong.graph.node if other.name == node)
    with pytest.raises(ModelError) as caught:
        run(wrong)
    assert str(caught.value).startswith(f"graph.onnx: TensorRT does not take node {node!r} ({operator}): ")
    assert "type" in str(caught.value)


def test_an_operator_that_is_not_known() -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(typed("image"))
    node = next(node for node in wrong.graph.node if node.op_type == "Sigmoid")
    node.op_type = "Sigmoidal"
    with pytest.raises(ModelError, match=rf"does not take node '{node.name}' \(Sigmoidal\)"):
        run(wrong)


def test_bytes_that_are_no_graph() -> None:
    build = Build(b"no graph", (1,), WORKSPACE)
    with pytest.raises(ModelError, match=r"graph\.onnx: TensorRT cannot read the graph: .*Failed to parse"):
        engine_from_onnx(build, rtx, name="graph.onnx", timing=b"", say=lambda *line: None)


def test_a_workspace_that_is_too_small_is_a_refusal_with_the_compilers_words() -> None:
    build = Build(mini("image", "fp32").SerializeToString(), (256,), 1 << 10)
    with pytest.raises(BackendError, match=r"graph\.onnx: TensorRT builds no engine of it: .+; where memory is short"):
        engine_from_onnx(build, rtx, name="graph.onnx", timing=b"", say=lambda *line: None)


# --- what the real callbacks do -------------------------------------------------------------------------------------


@pytest.fixture
def foreground() -> Iterator[None]:
    """As a terminal leaves it: what is started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_ends_a_real_build() -> None:
    stages: list[str] = []

    def press(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if stage == "Building engine":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(typed("image"), say=press)
    assert stages[-1] == "Building engine"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(typed("image"))  # the next one is not harmed


class Press(logging.Handler):
    """Ctrl-C at the first thing that is logged."""

    pressed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_inside_the_logger_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    """The bindings drop what a logger raises, print it, and build on."""
    press, stages, plans = Press(), list[str](), list[bytes]()
    logger = logging.getLogger("edge.trt")
    logger.addHandler(press)
    try:
        with caplog.at_level(logging.DEBUG, "edge.trt"), pytest.raises(KeyboardInterrupt):
            plans.append(run(typed("image"), say=lambda stage, done, total: stages.append(stage)))
    finally:
        logger.removeHandler(press)
    assert press.pressed
    assert not plans
    assert "Building engine" not in stages


def test_what_say_raises_comes_out_of_a_real_build() -> None:
    def fail(stage: str, done: int, total: int) -> None:
        if stage == "Building engine":
            raise ValueError("the screen is gone")

    with pytest.raises(ValueError, match="the screen is gone"):
        run(typed("image"), say=fail)


# --- pins by the names that the real parser gives -------------------------------------------------------------------


class Layer:
    """A layer of the real parser's, with the members of 8.6 that set its precision."""

    def __init__(self, layer: Any) -> None:
        self.name, self.type, self.metadata = layer.name, layer.type, layer.metadata
        self.num_inputs, self.num_outputs = layer.num_inputs, layer.num_outputs
        self.get_input, self.get_output = layer.get_input, layer.get_output
        self.precision: Any = None
        self.output_types: dict[int, Any] = {}

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.output_types[index] = dtype


class Untyped:
    """TensorRT-RTX in the clothes of 8.6: the real parser's layers can be pinned, and none is built."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        seen = self

        class Config:
            def add_optimization_profile(self, profile: Any) -> int:
                return 0

            def __getattr__(self, name: str) -> Any:
                if name in ("set_flag", "clear_flag", "set_memory_pool_limit"):
                    return lambda *arguments: None
                raise AttributeError(name)

        class Network:
            def __init__(self, real: Any) -> None:
                self._real = real
                self.num_inputs, self.get_input = real.num_inputs, real.get_input

            @property
            def num_layers(self) -> int:
                seen.layers = [Layer(self._real.get_layer(i)) for i in range(self._real.num_layers)]
                return len(seen.layers)

            def get_layer(self, index: int) -> Layer:
                return seen.layers[index]

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._real = rtx.Builder(logger)
                self.create_optimization_profile = self._real.create_optimization_profile

            def create_network(self, flags: int) -> Network:
                return Network(self._real.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))

            def create_builder_config(self) -> Config:
                return Config()

            def build_serialized_network(self, network: Any, config: Any) -> bytes:
                return b"plan"

        class Parser:
            def __init__(self, network: Network, logger: Any) -> None:
                self._network, self._real = network, rtx.OnnxParser(network._real, logger)

            def parse(self, graph: bytes) -> bool:
                parsed = bool(self._real.parse(graph))
                self._network.num_inputs = self._network._real.num_inputs
                return parsed

        flags = SimpleNamespace(FP16=0, TF32=1, OBEY_PRECISION_CONSTRAINTS=2)
        self.trt = Module(
            BuilderFlag=flags,
            NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0),
            Builder=Builder,
            OnnxParser=Parser,
            **{name: getattr(rtx, name) for name in ("ILogger", "DataType", "MemoryPoolType")},
        )


@networks
def test_pins_find_the_layers_that_the_real_parser_makes(network: str) -> None:
    half, whole = typed(network), mini(network, "fp32")
    names = float32_nodes(half) & {node.name for node in whole.graph.node}
    untyped = Untyped()
    build = Build(whole.SerializeToString(), (1,), WORKSPACE, names)
    plan, timing = engine_from_onnx(build, untyped.trt, name="graph.onnx", timing=b"", say=lambda *line: None)
    assert (plan, timing) == (b"plan", b"")
    held = {layer.name for layer in untyped.layers if layer.output_types}
    for layer in untyped.layers:
        assert set(layer.output_types.values()) <= {rtx.DataType.FLOAT}
        # the parser itself tells which node a layer comes from, in a member that 8.6 leaves empty
        if layer.metadata:
            node = layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]")
            assert (layer.name in held) == (node in names), layer.name
    assert names <= held
    constants = {
        "detector": {"scale", "gain", "offset", "half"},
        "image": {"image/mean", "image/scale", "image/ln_pre/scale", "image/ln_pre/shift", "image/projection/weight"},
    }
    assert constants[network] <= held
    if network == "detector":
        slices = {layer.name for layer in untyped.layers if layer.name.startswith("split_")}
        assert len(slices) == 3  # of one Split: its first layer alone has its name
        assert slices <= held
    assert not {layer.name for layer in untyped.layers if layer.type.name == "CONVOLUTION"} & held
