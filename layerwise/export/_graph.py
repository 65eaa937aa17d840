"""Reading and changing ONNX graphs: where layers leave, what onnxruntime cannot compute, what should not be in a file."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from layerwise.onnx_nodes import ROOT

SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules that a node comes from, outermost first


def layer_outputs(model: Any, layers: Sequence[str]) -> dict[str, str]:
    """Layer → name of the value that it gives, for the layers that the optimizer left recognizable."""
    nodes = list(model.graph)
    scopes = {node: set(ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))) for node in nodes}
    places: dict[str, str] = {}
    for layer in layers:
        inside = [node for node in nodes if f"{ROOT}.{layer}" in scopes[node]]
        leaving = [
            v for node in inside for v in node.outputs if _leaves(v, set(inside)) and v.dtype and v.dtype.is_floating_point()
        ]
        if leaving:
            places[layer] = leaving[-1].name
    return places


def _leaves(value: Any, inside: set[Any]) -> bool:
    return value.is_graph_output() or any(consumer not in inside for consumer in value.consumers())


def name_nodes(model: Any, modules: Collection[str]) -> None:
    """Calls every node after the module that it computes, ``blocks.0.attn.qkv/MatMul``, so that a list of nodes can be read and
    made from names of layers. A node with a module's own weight is that module's, also where a later one was folded into it.
    """
    taken: set[str] = set()
    for node in ir_nodes(model):
        stem = f"{_module(node, modules)}/{node.op_type}"
        name = next(n for n in chain([stem], (f"{stem}_{i}" for i in count(1))) if n not in taken)
        taken.add(name)
        node.name = name


def ir_nodes(model: Any) -> list[Any]:
    """Every node, those of subgraphs as well."""
    import onnx_ir as ir

    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def _module(node: Any, modules: Collection[str]) -> str:
    """Where it was called; its weight's module where that stands beside: a convolution takes in the normalization after it."""
    scopes = [s.removeprefix(f"{ROOT}.") for s in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))]
    called = next((s for s in reversed(scopes) if s in modules), "")
    weights = [v.name.removeprefix(f"{ROOT}.").rpartition(".")[0] for v in node.inputs if v is not None and v.is_initializer()]
    held = next((w for w in weights if w in modules), "")
    beside = held and held.rpartition(".")[0] == called.rpartition(".")[0]
    return held if beside or not called else called


def missing_data(path: Path) -> tuple[str, str] | None:
    """The first tensor of the file at `path` whose external data is not there, and the file that should hold it."""
    import onnx

    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                return tensor.name.removeprefix(f"{ROOT}."), entry.value
    return None


def without_traces(model: Any) -> list[str]:
    """Takes out the exporter's notes: they hold file names of this machine and can outweigh a small model. Nothing to note."""

    for node in ir_nodes(model):
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *_values(model)):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return []


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def widen_bfloat16(model: Any) -> list[str]:
    """Lets a bfloat16 graph compute in float32: weights stay as they are and are cast when used. Gives a note, if it changed."""
    import onnx_ir as ir

    graph, narrow, wide = model.graph, ir.DataType.BFLOAT16, ir.DataType.FLOAT
    weights = [v for v in graph.initializers.values() if v.dtype == narrow]
    casts = [n for n in ir.traversal.RecursiveGraphIterator(graph) if n.op_type == "Cast" and n.attributes["to"].value == narrow]
    if not weights and not casts:
        return []
    for node in casts:
        node.attributes["to"] = ir.AttrInt64("to", wide)
    for value in _values(model):
        if value.dtype == narrow and value not in weights:
            value.dtype = wide
    first = graph[0]
    for weight in weights:
        cast = ir.node("Cast", [weight], attributes={"to": wide})
        cast.outputs[0].name = f"{weight.name}.float32"
        cast.outputs[0].dtype, cast.outputs[0].shape = wide, weight.shape
        users = [(node, i) for node, i in weight.uses() if node is not cast]
        for node, i in users:
            node.replace_input_with(i, cast.outputs[0])
        graph.insert_before(first, cast)
    return ["onnxruntime has no bfloat16 arithmetic on CPU: the weights are bfloat16, products and sums are in float32"]


def with_outputs(path: Path, probe: Path, places: Mapping[str, str]) -> list[str]:
    """Writes a copy of the graph at `path` to `probe` that gives each layer's value as well; the layers whose value it has."""
    import onnx_ir as ir

    model = ir.load(path)
    values = {value.name: value for value in _values(model)}
    outputs = {id(v) for v in model.graph.outputs}
    names = [layer for layer, value in places.items() if value in values]
    for layer in names:
        value = values[places[layer]]
        if id(value) in outputs:  # the model's own output: a graph cannot give one value twice
            copy = ir.node("Identity", [value])
            copy.outputs[0].name, copy.outputs[0].dtype, copy.outputs[0].shape = f"{value.name}.probe", value.dtype, value.shape
            model.graph.append(copy)
            value = copy.outputs[0]
        value.dtype = value.dtype or ir.DataType.FLOAT  # a graph's output must say what it is; layers give floats
        outputs.add(id(value))
        model.graph.outputs.append(value)
    ir.save(model, probe)
    return names
