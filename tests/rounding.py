"""A typed fp16 graph as a GPU computes it, for ONNX Runtime on a CPU.

ONNX Runtime's CPU kernels have no float16: from one float16 node to the next it keeps float32, without rounding and
without an end at 65504, so that there an fp16 graph shows little more than the rounding of its weights. Here the same
nodes compute in float32 and what they make is rounded to float16 by Casts of the graph, which ONNX Runtime keeps: sums
in float32, values in float16, infinity beyond 65504, as tensor cores do it and every other kernel that is not fused.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def rounded(typed: onnx.ModelProto) -> onnx.ModelProto:
    """A graph without float16 but in pairs of Casts: one after each node whose output is float16."""
    shapes = onnx.shape_inference.infer_shapes(typed, check_type=True, strict_mode=True, data_prop=True).graph
    half = {v.name for v in shapes.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    weights = [
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type == TensorProto.FLOAT16
        else tensor
        for tensor in typed.graph.initializer
    ]
    nodes: list[onnx.NodeProto] = []
    for old in typed.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(old)
        after: list[onnx.NodeProto] = []
        for slot, value in enumerate(old.output):
            if value in half:
                node.output[slot] = f"{value}/exact"
                after.append(helper.make_node("Cast", [f"{value}/exact"], [f"{value}/half"], to=TensorProto.FLOAT16))
                after.append(helper.make_node("Cast", [f"{value}/half"], [value], to=TensorProto.FLOAT))
        if node.op_type == "Cast" and old.output[0] in half:
            node.ClearField("attribute")
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        nodes += [node, *after]
    graph = helper.make_graph(nodes, typed.graph.name, typed.graph.input, typed.graph.output, weights)
    model = helper.make_model(graph, opset_imports=typed.opset_import, ir_version=typed.ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model
