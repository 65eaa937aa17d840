"""Copies of an 8-bit graph that compute in floats: with no rounding at all, or with every rounding but no integer product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from layerwise.export._grids import removed_nodes
from layerwise.export._quantize import constant
from layerwise.export._rounding import Graphs, quantized_inputs


def without_rounding(graphs: Graphs, out: Path) -> None:
    """Writes the 8-bit graph with all roundings taken out and the float weights of the same nodes put back."""
    import onnx_ir as ir

    constants = graphs.made.graph.initializers
    for node, made in list(graphs.pairs()):
        for slot in quantized_inputs(made):
            original = node.inputs[slot]
            name = f"{original.name}.restored"  # its own name may be that of the value read back from integers
            if name not in constants:
                constants[name] = constant(name, original.const_value.numpy())
            if made.op_type.endswith("Integer"):
                _as_float(graphs.made.graph, made, made.inputs[0].producer().inputs[0], constants[name])
            else:
                made.replace_input_with(slot, constants[name])
    gone = removed_nodes(graphs)
    cut = dict[Any, Any]()  # value → the same behind the Relu or Clip that was left out
    for node in [n for n in graphs.made.graph if n.op_type == "DequantizeLinear" and n.inputs[0].producer() is not None]:
        value = node.inputs[0].producer().inputs[0]
        if value not in cut:
            cut[value] = _cut(graphs.made.graph, node, value, gone[value.name]) if value.name in gone else value
        ir.convenience.replace_all_uses_with(node.outputs[0], cut[value], replace_graph_outputs=True)
    ir.save(graphs.made, out)


def _cut(graph: Any, place: Any, value: Any, again: Any) -> Any:
    """What `again`, a Relu or Clip of the float graph, makes of `value`, in front of the node `place`, under its own name."""
    import onnx_ir as ir

    node = ir.node(again.op_type, [value, *(graph.initializers[v.name] for v in again.inputs[1:] if v is not None)])
    name, value.name = value.name, f"{value.name}.uncut"
    node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    graph.insert_before(place, node)
    return node.outputs[0]


def with_float_products(graphs: Graphs, out: Path) -> None:
    """Writes the 8-bit graph with each integer product computed in floats on the same integers: what the numbers stand for."""
    import onnx_ir as ir

    graph = graphs.made.graph
    for node in [n for n in graph if n.op_type == "MatMulInteger"]:
        weight = quantized_inputs(node)[1]
        rounded = node.inputs[0].producer()
        left = ir.node("DequantizeLinear", list(rounded.outputs))
        values = weight.values()
        name = f"{node.name}.weight"
        graph.initializers[name] = constant(name, values.astype(np.float32))
        graph.insert_before(node, left)
        left.outputs[0].name = f"{node.name}.left"
        _as_float(graph, node, left.outputs[0], graph.initializers[name])
    ir.save(graphs.made, out)


def _as_float(graph: Any, node: Any, left: Any, weight: Any) -> None:
    """Puts the product of `left` and `weight` in the place of the integer product `node` and its widening."""
    import onnx_ir as ir

    (cast,) = node.outputs[0].consumers()
    (widened,) = cast.outputs[0].consumers()
    product = ir.node("MatMul", [left, weight])
    product.outputs[0].name, product.outputs[0].dtype = f"{node.name}.product", ir.DataType.FLOAT
    graph.insert_before(node, product)
    y = widened.outputs[0]
    ir.convenience.replace_all_uses_with(y, product.outputs[0], replace_graph_outputs=True)
    name, y.name = y.name, f"{y.name}.rounded"
    product.outputs[0].name = name
