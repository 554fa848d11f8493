"""A typed fp16 graph with some of its nodes held in fp32: what is tried where float16 does not carry a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Names = Callable[[str], bool]
_HALF, _FLOAT = int(TensorProto.FLOAT16), int(TensorProto.FLOAT)
_SUFFIX = {_HALF: "float16", _FLOAT: "float32"}  # as the writers of the graphs call their Casts

_ATTENTION = r"image/block\d+/attention/(logits|softmax|mix)"
_STREAM = r"image/(positions|ln_pre|ln_post|pooled|block\d+/(ln_1|ln_2|first/residual|attention/residual|mlp/residual))"
_BLOCKS = r"image/block\d+/.*"


def _any_of(*patterns: str) -> Names:
    pattern = re.compile("|".join(patterns))
    return lambda name: pattern.fullmatch(name) is not None


# The image tower's nodes by what is tried first; each rung includes those before it. attention: its two products and
# the softmax. norms: LayerNorm and the residual stream, which grows from block to block. blocks: all that is in one.
RUNGS: Mapping[str, Names] = {
    "attention": _any_of(_ATTENTION),
    "norms": _any_of(_ATTENTION, _STREAM),
    "blocks": _any_of(_ATTENTION, _STREAM, _BLOCKS),
}


def held_in_fp32(graph: onnx.ModelProto, names: Names) -> onnx.ModelProto:
    """A copy in which the nodes that `names` is true of compute in float32, and all others as they did.

    graph: typed, without subgraphs, as export/clip.py and export/darknet.py write it. What the held nodes take as
    float16 is cast up, a weight stored as float32 (its digits stay float16's); what they make is cast down where others
    want float16, and goes as it is from one held node to the next. Names of nodes and the graph's inputs and outputs
    stay. Casts are no nodes of their own here: they come and go with what they stand between.

    Raises onnx's own errors for a graph that is not valid: no user's mistake leads here.
    """
    types = _types(graph)
    held = _Held(graph, types, names)
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for field in ("node", "initializer", "value_info"):
        copy.graph.ClearField(field)
    copy.graph.node.extend(held.nodes())
    copy.graph.initializer.extend(held.initializers(copy.graph))
    onnx.checker.check_model(copy, full_check=True)
    return copy


def float32_nodes(typed: onnx.ModelProto) -> frozenset[str]:
    """The names of the nodes whose first output is float32: what a builder that chooses types itself must be told."""
    types = _types(typed)
    return frozenset(node.name for node in typed.graph.node if types[node.output[0]] == _FLOAT)


class _Held:
    """The nodes of one graph, written anew in their order, each Cast before the first that needs it."""

    def __init__(self, graph: onnx.ModelProto, types: Mapping[str, int], names: Names) -> None:
        self._graph, self._types = graph.graph, types
        version = next(entry.version for entry in graph.opset_import if entry.domain == "")
        self._weights = {tensor.name: tensor for tensor in graph.graph.initializer}
        self._casts = {node.output[0]: node for node in graph.graph.node if self._is_glue(node)}
        self._held = {node.name for node in graph.graph.node if not self._is_glue(node) and names(node.name)}
        self._maker = {output: node.name for node in graph.graph.node for output in node.output}
        self._follows = {
            node.name: _follows(node, types, version) for node in graph.graph.node if node.name in self._held
        }
        self._widened = {  # what was float16 and is float32 now
            output
            for node in graph.graph.node
            if node.name in self._held
            for output, follows in zip(node.output, self._follows[node.name][1], strict=True)
            if follows
        }
        self._ends = {output.name for output in graph.graph.output}
        self._copies: dict[str, onnx.TensorProto] = {}  # weights in float32, by their new name
        self._written: set[str] = set()  # Casts

    def nodes(self) -> Iterator[onnx.NodeProto]:
        for old in self._graph.node:
            if old.output[0] in self._casts:
                if (
                    old.output[0] in self._ends and old.output[0] not in self._written
                ):  # an output keeps its name: a Cast too
                    root = self._root(old.input[0])
                    source = self._wide(root) if root in self._widened else old.input[0]
                    yield from self._chain(source)
                    self._written.add(old.output[0])
                    yield _cast(source, old.output[0], _kind(old))
                continue
            node = onnx.NodeProto()
            node.CopyFrom(old)
            takes = self._follows[old.name][0] if old.name in self._held else [False] * len(old.input)
            for slot, (value, follows) in enumerate(zip(old.input, takes, strict=True)):
                node.input[slot], needed = self._fed(old.name, value, follows)
                yield from needed
            made = list(old.output)
            node.output[:] = [self._wide(output) if output in self._widened else output for output in made]
            yield node
            for now, output in zip(node.output, made, strict=True):
                if now != output:
                    yield helper.make_node("Cast", [now], [output], name=f"{output}/{_SUFFIX[_HALF]}", to=_HALF)

    def _wide(self, value: str) -> str:
        """What a widened value is called: its own name goes to its float16 where the graph gives it out."""
        return f"{value}/held" if value in self._ends else value

    def initializers(self, graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        """Those that the written nodes use."""
        used = {value for node in graph.node for value in node.input}
        used |= {output.name for output in graph.output}
        for tensor in (*self._graph.initializer, *self._copies.values()):
            if tensor.name in used:
                yield tensor

    def _fed(self, consumer: str, value: str, follows: bool) -> tuple[str, list[onnx.NodeProto]]:
        """What stands in this slot now, and the Casts that have to be written for it."""
        root = self._root(value)
        ours = consumer in self._held or self._maker.get(root) in self._held
        if not ours or self._types.get(value) not in _SUFFIX:
            return value, list(self._chain(value))
        wanted = _FLOAT if follows else self._types[value]
        now = _FLOAT if root in self._widened else self._types[root]
        if root in self._widened and (wanted == _FLOAT or root in self._ends):
            return self._wide(root) if wanted == _FLOAT else root, []
        if wanted == now:
            return root, []
        if root in self._weights:
            return self._weight(root), []
        name = next((new for new, cast in self._casts.items() if cast.input[0] == root and _kind(cast) == wanted), None)
        name = name or f"{root}/{_SUFFIX[wanted]}"
        if name in self._written:
            return name, []
        self._written.add(name)
        return name, [_cast(root, name, wanted)]

    def _weight(self, name: str) -> str:
        new = f"{name}/{_SUFFIX[_FLOAT]}"
        if new not in self._copies:
            array = numpy_helper.to_array(self._weights[name])
            self._copies[new] = numpy_helper.from_array(array.astype(np.float32), new)
        return new

    def _chain(self, value: str) -> Iterator[onnx.NodeProto]:
        """The Casts up to `value` as they were, those that are not written yet."""
        if value in self._casts and value not in self._written:
            yield from self._chain(self._casts[value].input[0])
            self._written.add(value)
            yield self._casts[value]

    def _root(self, value: str) -> str:
        while value in self._casts:
            value = self._casts[value].input[0]
        return value

    def _is_glue(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Cast" and _kind(node) in _SUFFIX and self._types[node.input[0]] in _SUFFIX


def _follows(node: onnx.NodeProto, types: Mapping[str, int], version: int) -> tuple[list[bool], list[bool]]:
    """Which inputs and outputs are float16 now and float32 when the node is held, by the operator's schema.

    A Reshape's shape and a Resize's scales have types of their own, which stay.
    """
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    free = {one.type_param_str for one in schema.type_constraints if "tensor(float)" in one.allowed_type_strs}
    takes = [_formal(schema.inputs, slot) for slot in range(len(node.input))]
    gives = [_formal(schema.outputs, slot) for slot in range(len(node.output))]
    raised = {kind for kind, value in zip(takes, node.input, strict=True) if types.get(value) == _HALF and kind in free}
    return (
        [kind in raised and types.get(value) == _HALF for kind, value in zip(takes, node.input, strict=True)],
        [kind in raised and types.get(value) == _HALF for kind, value in zip(gives, node.output, strict=True)],
    )


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], slot: int) -> str:
    return str(parameters[min(slot, len(parameters) - 1)].type_str)  # the last one may be variadic


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value, weights among them."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return known | {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}


def _kind(cast: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")


def _cast(source: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [name], name=name, to=to)
