"""The builder's half of the fake TensorRT: networks, the ONNX parser, profiles, timing caches, and plans.

A plan is MAGIC, the length of a JSON header, the header, and the ONNX graph that went in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
from onnx import TensorProto

from tests.fake_tensorrt import Gated

MAGIC = b"fake plan"
_KINDS = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
_FLOATS = ("FLOAT", "HALF")
_TYPES = (
    {"Conv": "CONVOLUTION", "MatMul": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "Cast": "CAST", "Shape": "SHAPE"}
    | {
        "LayerNormalization": "NORMALIZATION",
        "Constant": "CONSTANT",
        "Gather": "GATHER",
        "MaxPool": "POOLING",
        "Resize": "RESIZE",
        "Concat": "CONCATENATION",
        "Reshape": "SHUFFLE",
        "Transpose": "SHUFFLE",
        "Slice": "SLICE",
    }
    | dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"), "ELEMENTWISE")
)


class IHostMemory(Gated, bytes):
    """Bytes by the buffer protocol: `bytes(memory)`, `memoryview(memory)`; it has no len()."""

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")


class ITensor(Gated):
    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
        self._name, self._dtype, self._shape = name, dtype, shape

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """-1 is a free axis."""
        return self._shape


class ILayer(Gated):
    def __init__(self, node: Any, kind: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._name, self._type, self._inputs, self._outputs = node.name, kind, list(inputs), list(outputs)
        self._precision: Any = None
        self._types: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def type(self) -> Any:
        return self._type

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if index < len(self._inputs) else None

    def get_output(self, index: int) -> Any:
        return self._outputs[index] if index < len(self._outputs) else None

    def get_output_type(self, index: int) -> Any:
        return self._types.get(index, self._outputs[index]._dtype)

    @property
    def precision(self) -> Any:
        return self._precision or self._outputs[0]._dtype

    @precision.setter
    def precision(self, dtype: Any) -> None:
        self._precision = dtype

    @property
    def precision_is_set(self) -> bool:
        return self._precision is not None

    def reset_precision(self) -> None:
        self._precision = None

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._types[index] = dtype

    def output_type_is_set(self, index: int) -> bool:
        return index in self._types


class INetworkDefinition(Gated):
    def __init__(self, flags: int) -> None:
        self._flags, self._graph = flags, b""
        self._layers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._name = ""

    def _has(self, flag: str) -> bool:
        known = self._home._classes.NetworkDefinitionCreationFlag.__members__
        return flag in known and bool(self._flags >> int(known[flag]) & 1)

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def flags(self) -> int:
        return self._flags

    @property
    def name(self) -> str:
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class ParserError(Gated):
    def __init__(self, code: Any, desc: str, node: int = -1, name: str = "", operator: str = "") -> None:
        self._facts = (code, desc, node, name, operator)

    def code(self) -> Any:
        return self._facts[0]

    def desc(self) -> str:
        return self._facts[1]

    def node(self) -> int:
        return self._facts[2]

    def node_name(self) -> str:
        return self._facts[3]

    def node_operator(self) -> str:
        return self._facts[4]

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 1

    def func(self) -> str:
        return "parse"


class OnnxParser(Gated):
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network
        self._errors: list[Any] = []

    def parse(self, model: Any, path: str | None = None) -> bool:
        """One layer per node, named as it is; a node without a name is "(Unnamed Layer* i)"."""
        kinds, codes = self._home._classes.DataType.__members__, self._home._classes.ErrorCode
        if self._home.__version__.startswith("8.") and not self._network._has("EXPLICIT_BATCH"):
            return self._refuse(codes.INVALID_VALUE, "only networks with an explicit batch dimension are supported")
        try:
            proto = onnx.load_from_string(bytes(model))
            onnx.checker.check_model(proto)
        except Exception as error:
            return self._refuse(codes.MODEL_DESERIALIZE_FAILED, f"Failed to parse the ONNX model: {error}")
        proto = onnx.shape_inference.infer_shapes(proto)
        for index, node in enumerate(proto.graph.node):
            if node.op_type in self._home._watch.unsupported:
                text = f"No importer registered for op: {node.op_type}. Attempting to import as plugin."
                return self._refuse(codes.UNSUPPORTED_NODE, text, index, node.name, node.op_type)
        tensors = dict(self._tensors(proto, kinds))
        made = self._home._classes
        for index, node in enumerate(proto.graph.node):
            kind = made.LayerType[_TYPES.get(node.op_type, "IDENTITY")]
            layer = made.ILayer(node, kind, [tensors.get(n) for n in node.input], [tensors.get(n) for n in node.output])
            layer._name = node.name or f"(Unnamed Layer* {index}) [{kind.name.title()}]"
            self._network._layers.append(layer)
        self._network._inputs += [tensors[value.name] for value in proto.graph.input]
        self._network._outputs += [tensors[value.name] for value in proto.graph.output]
        self._network._graph = bytes(model)
        return True

    def _tensors(self, proto: Any, kinds: Any) -> Iterator[tuple[str, Any]]:
        graph, made = proto.graph, self._home._classes.ITensor
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = _KINDS.get(value.type.tensor_type.elem_type, "FLOAT")
            dims = value.type.tensor_type.shape.dim
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
            yield value.name, made(value.name, kinds[kind if kind in kinds else "INT32"], shape)
        for constant in graph.initializer:
            kind = _KINDS.get(constant.data_type, "FLOAT")
            yield constant.name, made(constant.name, kinds[kind if kind in kinds else "INT32"], tuple(constant.dims))

    def _refuse(self, code: Any, *facts: Any) -> bool:
        self._errors.append(self._home._classes.ParserError(code, *facts))
        self._home._log("ERROR", facts[0])
        return False

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()


class IOptimizationProfile(Gated):
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = [tuple(int(size) for size in shape) for shape in (min, opt, max)]
        if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)) or len({len(s) for s in shapes}) > 1:
            raise ValueError("Shape provided for min is inconsistent with other shapes.")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[tuple[int, ...]]:
        return self._shapes[input]

    def __bool__(self) -> bool:
        return bool(self._shapes)


class ITimingCache(Gated):
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines  # the version that made it, and one per layer that was timed

    def serialize(self) -> Any:
        return self._home._classes.IHostMemory("\n".join(["timing", *self._lines]).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._lines += [line for line in input_cache._lines if line not in self._lines]
        return True

    def reset(self) -> bool:
        del self._lines[1:]
        return True


class IBuilderConfig(Gated):
    def __init__(self) -> None:
        self._set: set[Any] = set()
        self._pools: dict[Any, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: Any = None
        self._choices: dict[str, Any] = {"progress_monitor": None, "builder_optimization_level": 3}

    def set_flag(self, flag: Any) -> None:
        self._set.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._set.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._set

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, 1 << 40)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        """None for what is no timing cache."""
        text = bytes(serialized_timing_cache).decode(errors="replace")
        lines = text.split("\n") if text else ["timing", self._home.__version__]
        if lines[0] != "timing" or len(lines) < 2:
            self._home._log("ERROR", "Deserialization of the timing cache failed")
            return None
        return self._home._classes.ITimingCache(lines[1:])

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._lines[0] != self._home.__version__ and not ignore_mismatch:
            self._home._log("ERROR", "The timing cache was made by another version of TensorRT")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    @property
    def progress_monitor(self) -> Any:
        return self._choices["progress_monitor"]

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        if monitor is not None and not getattr(monitor, "_made", False):
            raise TypeError("IProgressMonitor.__init__() must be called when overriding __init__")
        self._choices["progress_monitor"] = monitor

    @property
    def builder_optimization_level(self) -> int:
        return int(self._choices["builder_optimization_level"])

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._choices["builder_optimization_level"] = level

    @property
    def profiling_verbosity(self) -> Any:
        return self._choices.get("profiling_verbosity", self._home._classes.ProfilingVerbosity.LAYER_NAMES_ONLY)

    @profiling_verbosity.setter
    def profiling_verbosity(self, verbosity: Any) -> None:
        self._choices["profiling_verbosity"] = verbosity


class Builder(Gated):
    def __init__(self, logger: Any) -> None:
        self._home._register(self, logger)
        self._logger = logger

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def platform_has_fast_fp16(self) -> bool:
        return True

    def create_network(self, flags: int = 0) -> Any:
        return self._home._classes.INetworkDefinition(flags)

    def create_builder_config(self) -> Any:
        return self._home._classes.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._home._classes.IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        """The plan; None, with an error in the log, where TensorRT would refuse."""
        watch = self._home._watch
        for problem in self._problems(network, config):
            self._home._log("ERROR", problem)
            return None
        if not self._timed(network, config):
            return None
        header = {
            "version": self._home.__version__,
            "capability": watch.capability,
            "inputs": [[tensor._name, tensor._dtype.name, tensor._shape] for tensor in network._inputs],
            "outputs": [[tensor._name, tensor._dtype.name, tensor._shape] for tensor in network._outputs],
            "profiles": [profile._shapes for profile in config._profiles],
            "flags": sorted(flag.name for flag in config._set),
            "strongly_typed": network._has("STRONGLY_TYPED"),
            "precisions": {layer._name: layer._precision.name for layer in network._layers if layer._precision},
            "output_types": {layer._name: layer._types[0].name for layer in network._layers if 0 in layer._types},
            "pools": {pool.name: size for pool, size in config._pools.items()},
            "layers": len(network._layers),
            "sha256": hashlib.sha256(network._graph).hexdigest(),
        }
        watch.builds.append(header)
        text = json.dumps(header).encode()
        return self._home._classes.IHostMemory(MAGIC + len(text).to_bytes(4, "little") + text + network._graph)

    def _problems(self, network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
        watch, pools = self._home._watch, self._home._classes.MemoryPoolType
        if watch.refuse_build:
            yield watch.refuse_build
        if not network._outputs:
            yield "Network must have at least one output"
        for tensor in network._inputs:
            if -1 in tensor._shape and not config._profiles:
                yield f"Network has dynamic inputs, but no optimization profile has been defined: {tensor._name}"
            for profile in config._profiles:
                shapes = profile._shapes.get(tensor._name)
                if shapes is None or any(
                    len(shape) != len(tensor._shape)
                    or any(want not in (-1, got) for want, got in zip(tensor._shape, shape, strict=True))
                    for shape in shapes
                ):
                    yield f"{tensor._name}: dynamic input is missing dimensions in profile, or they differ: {shapes}"
        if network._has("STRONGLY_TYPED"):
            if forbidden := {flag.name for flag in config._set} & {
                "FP16",
                "BF16",
                "INT8",
                "OBEY_PRECISION_CONSTRAINTS",
            }:
                yield f"In a strongly typed network these flags may not be set: {sorted(forbidden)}"
            yield from _mistyped(network._graph)
        for layer in network._layers:
            dtype = layer._outputs[0]._dtype.name if layer._outputs[0] else "FLOAT"
            wanted = {given.name for given in (layer._precision, layer._types.get(0)) if given}
            if wanted & set(_FLOATS) and dtype not in _FLOATS:
                yield f"{layer._name}: precision {sorted(wanted)} cannot be set on a layer whose output is {dtype}"
        if config._pools.get(pools.WORKSPACE, watch.workspace) < watch.workspace:
            yield (
                f"Could not find any implementation for node {network._layers[0]._name} due to insufficient workspace. "
                "See verbose log for requested sizes."
            )

    def _timed(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        """Time the layers that the cache does not know. False: the monitor has called it off."""
        monitor = config._choices["progress_monitor"]
        if monitor:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactic Selection", "Building Engine", len(network._layers))
        goes_on = True
        for index, layer in enumerate(network._layers):
            entry = f"{layer._type.name} {layer._name} {layer._precision and layer._precision.name}"
            if config._cache and entry not in config._cache._lines:
                config._cache._lines.append(entry)
            if monitor and not (goes_on := monitor.step_complete("Tactic Selection", index)):
                break
        if monitor:
            monitor.phase_finish("Tactic Selection")
            monitor.phase_finish("Building Engine")
        if not goes_on:
            self._home._log("ERROR", "Build cancelled by the progress monitor")
        return bool(goes_on)


def _mistyped(graph: bytes) -> Iterator[str]:
    """Nodes that ONNX's own definition gives one float type, and that were given two."""
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.input)}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in proto.graph.output}
    kinds |= {constant.name: constant.data_type for constant in proto.graph.initializer}
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    for node in proto.graph.node:
        declared = onnx.defs.get_schema(node.op_type, opset, node.domain).inputs
        by_letter: dict[str, set[str]] = {}
        for index, name in enumerate(node.input):
            letter = declared[min(index, len(declared) - 1)].type_str
            if kinds.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16):
                by_letter.setdefault(letter, set()).add("Float" if kinds[name] == TensorProto.FLOAT else "Half")
        for letter, found in by_letter.items():
            if len(found) > 1 and not letter.startswith("tensor("):
                yield f"{node.name}: {node.op_type} must have same input types. But they are of types Half and Float."
