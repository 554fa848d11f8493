"""Builds a TensorRT engine from an ONNX graph: the only code that speaks to TensorRT's builder.

Which way it goes is asked of the module that it is given, never of a version's number. Where networks can be strongly
typed (TensorRT 10 and later, always from 11 on), a typed fp16 graph is taken at its word. Where they cannot (8.6), the
fp32 graph goes in with the FP16 flag, and the layers that must not round to float16 are pinned.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import onnx

from edge.errors import BackendError, ModelError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (stage, done, total), from any thread; total 0: nobody knows

_ALWAYS_FLOAT32 = ("NORMALIZATION", "SOFTMAX")  # squares and exponentials leave float16's range
_REMEDY = (
    "where memory is short, a smaller workspace_mib or smaller batches in the recipe's [engine], and end what else "
    "uses memory; where workspace is, a larger workspace_mib"
)


@dataclass(frozen=True)
class Build:
    """What an engine is built from."""

    graph: bytes  # ONNX: the typed fp16 graph where strongly_typed(trt), the fp32 one elsewhere
    batches: tuple[int, ...]  # ascending; profile i takes batches[i - 1] + 1 to batches[i] pictures, the first from 1
    workspace: int  # bytes that one layer may take for its intermediate results
    float32: frozenset[str] = (
        frozenset()
    )  # names of nodes that compute in fp32, where the network is not strongly typed


def strongly_typed(trt: Any) -> bool:
    """Whether a typed fp16 graph is what this TensorRT wants: it has such networks, or has no others."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(trt.BuilderFlag, "FP16")


def engine_from_onnx(build: Build, trt: Any, *, name: str, timing: bytes, say: Progress) -> tuple[bytes, bytes]:
    """(the plan as TensorRT serialises it, its timing cache after the build).

    trt: the module `tensorrt`, or one with its classes. name: of the graph, for errors. timing: a timing cache, or b"";
    one that this TensorRT refuses is replaced by an empty one, and the log says so. say: is told of each phase where
    TensorRT tells; what it raises ends the build and comes out. Ctrl-C ends the build at its next step, or after it
    where TensorRT cannot be stopped (8.6), as KeyboardInterrupt.

    Raises ModelError: the parser refuses a node; BackendError: no builder here, or it gives no engine.
    """
    from edge.trt import logger_of

    said = _Said(say)
    logger = logger_of(trt)
    logger.errors.clear()
    with _ctrl_c(said):
        said("reading the graph", 0, 0)
        try:
            # A failed build must leave nothing behind, so whatever TensorRT makes belongs to this function alone. The
            # parser is kept to the end: the network's weights may lie in its memory.
            builder = trt.Builder(logger)
            network = builder.create_network(_network_flags(trt))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse(build.graph):
                raise _refused(parser, build.graph, name)
            config = _config(build, trt, builder, network, name)
            cache = _timing_cache(config, timing, name)
            if hasattr(trt, "IProgressMonitor"):
                config.progress_monitor = _monitor(trt, said)
            said("building the engine", 0, 0)
            plan = None if said.stop else builder.build_serialized_network(network, config)
        except (RuntimeError, TypeError, MemoryError) as error:  # pybind11: TypeError where a constructor gave nothing
            said.raise_stop()
            text = f"{name}: TensorRT's builder failed: {error}: {logger.quote()}"
            raise BackendError(text, remedy=_REMEDY) from error
    said.raise_stop()
    if plan is None:
        raise BackendError(f"{name}: TensorRT builds no engine of it: {logger.quote()}", remedy=_REMEDY)
    return bytes(plan), b"" if cache is None else bytes(cache.serialize())


def _network_flags(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    wanted = "STRONGLY_TYPED" if strongly_typed(trt) else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, wanted)) if hasattr(flags, wanted) else 0  # a flag goes when nothing else is left


def _config(build: Build, trt: Any, builder: Any, network: Any, name: str) -> Any:
    """The workspace, a profile per built size, and how exact the layers compute."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace)
    # TensorFloat-32 is on by default, and has no more digits than float16: what is held in fp32 shall have fp32's.
    config.clear_flag(trt.BuilderFlag.TF32)
    if not strongly_typed(trt):
        config.set_flag(trt.BuilderFlag.FP16)
        # not PREFER…: a pin that TensorRT may drop is none, and the gate would only say that numbers are wrong
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        _pin(trt, [network.get_layer(i) for i in range(network.num_layers)], build.float32)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]  # `image` (n, H, W, 3), n as -1
    fewest = 1
    for most in build.batches:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            row = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (fewest, *row), (most, *row), (most, *row))
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"{name}: TensorRT takes no batches of {fewest} to {most}")
        fewest = most + 1
    return config


def _pin(trt: Any, layers: list[Any], float32: Collection[str]) -> None:
    """Hold in fp32: the layers of the nodes in `float32`, all of _ALWAYS_FLOAT32, and the constants that these take.

    The parser names a layer after its node; a second layer of the same node has "_" and a number behind that.
    Constants come through layers of the parser's own, and would else be rounded on their way: anchors, mean and std.
    """
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def constants(layer: Any) -> Iterator[Any]:
        for tensor in (layer.get_input(i) for i in range(layer.num_inputs)):
            path = []
            maker = makers.get(tensor.name) if tensor is not None else None
            while maker is not None and maker.type.name == "SHUFFLE":
                path.append(maker)
                maker = makers.get(maker.get_input(0).name)
            if maker is not None and maker.type.name == "CONSTANT":
                yield from (*path, maker)

    for layer in layers:
        node = layer.name if layer.name in float32 else re.sub(r"_\d+$", "", layer.name)
        if node in float32 or layer.type.name in _ALWAYS_FLOAT32:
            for held in (layer, *constants(layer)):
                _hold(trt, held)


def _hold(trt: Any, layer: Any) -> None:
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)  # shapes and indices stay what they are
    source = layer.get_input(0) if layer.num_inputs else None
    outputs = [i for i in range(layer.num_outputs) if layer.get_output(i).dtype in floats]
    if outputs and (source is None or source.dtype in floats):  # a Cast of pixels takes uint8
        layer.precision = trt.DataType.FLOAT
    for i in outputs:
        layer.set_output_type(i, trt.DataType.FLOAT)


def _timing_cache(config: Any, timing: bytes, name: str) -> Any:
    """The cache that the build will use and fill; None where TensorRT has none, as TensorRT-RTX is to have none."""
    if not hasattr(config, "create_timing_cache"):
        return None
    for data in dict.fromkeys((timing, b"")):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):  # False: not one of another GPU or version
            return cache
        log.warning("%s: TensorRT does not take the timing cache of %d bytes; all is timed anew", name, len(data))
    return None


def _refused(parser: Any, graph: bytes, name: str) -> ModelError:
    """The parser's first error in words; older parsers tell the node's number alone."""
    if not parser.num_errors:
        return ModelError(f"{name}: TensorRT cannot read the graph, and does not say why")
    error = parser.get_error(0)
    text, number = error.desc(), error.node()
    node, operator = (error.node_name(), error.node_operator()) if hasattr(error, "node_name") else ("", "")
    if not operator and number >= 0:
        found = onnx.load_from_string(graph).graph.node[number]
        node, operator = found.name, found.op_type
    where = f"does not take node {node!r} ({operator})" if operator else "cannot read the graph"
    return ModelError(f"{name}: TensorRT {where}: {text}")


class _Said:
    """`say`, of which nothing may come out while TensorRT calls it: an exception would be lost there, or end all.

    stop: what shall end the build, an exception of `say` or a Ctrl-C.
    """

    def __init__(self, say: Progress) -> None:
        self._say = say
        self.stop: BaseException | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        try:
            if self.stop is None:
                self._say(stage, done, total)
        except BaseException as error:  # not swallowed: raise_stop
            self.stop = error

    def raise_stop(self) -> None:
        if self.stop is not None:
            raise self.stop


@contextmanager
def _ctrl_c(said: _Said) -> Iterator[None]:
    """Ctrl-C is noted: Python would raise it in whichever callback comes next, and TensorRT's logger drops it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # another's own way of ending
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        said.stop = said.stop or KeyboardInterrupt()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _monitor(trt: Any, said: _Said) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind11 refuses the object without it
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            said(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            said(phase_name, step + 1, self._steps.get(phase_name, 0))
            return said.stop is None  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            said(phase_name, steps, steps)

    return Monitor()
