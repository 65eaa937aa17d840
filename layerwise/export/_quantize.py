"""Which nodes of a float ONNX graph become 8-bit, and onnxruntime's own quantizer set to work on them.

Decision: measured on a CPU with 8-bit dot products, convolutions gain with scales fixed beforehand (static, unsigned activations,
signed weights, per channel), and lose when scales are computed while they run; matrix products of transformers gain with scales
computed while they run (dynamic), and lose quality when these are fixed. So a graph is treated by what holds most of its weights.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.data import Data
from layerwise.errors import UsageError, UserModelError, nearest
from layerwise.export._inputs import Inputs
from layerwise.onnx_nodes import CONVOLUTIONS, PRODUCTS, owner, weighted

MODES = ("auto", "static", "dynamic")


@dataclass(frozen=True)
class Choice:
    """`nodes` become 8-bit in the way `mode` says; those in `kept` hold weights and stay float, each with the reason."""

    mode: str
    nodes: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    convolutional: bool = False


def check(mode: str, keep: str) -> None:
    """Raises `UsageError` for a mode or a regular expression that no graph could be treated by."""
    if mode and mode not in MODES:
        raise UsageError(f"There is no way to quantize called {mode!r}.", place="quantize", remedy=nearest(mode, MODES))
    if keep and not mode:
        raise UsageError("Which layers stay float matters only with quantize.", place="keep", remedy="Add quantize=auto.")
    try:
        re.compile(keep)
    except re.error as error:
        what = f"{keep!r} is no regular expression: {error}."
        raise UsageError(what, place="keep", remedy="Escape points and brackets.", code="LW-C12") from error


def choose(graph: Any, mode: str, keep: str) -> Choice:
    """The nodes for `mode` (``auto`` decides between static and dynamic); `keep`: a regular expression found in their names.

    Raises `UsageError` for a pattern that matches nothing, `UserModelError` where no node is left.
    """
    nodes = weighted(graph)
    sizes = {name: math.prod(node.inputs[1].shape.numpy()) for name, node in nodes.items()}
    convolutional = sum(sizes[n] for n, x in nodes.items() if x.op_type in CONVOLUTIONS) * 2 >= sum(sizes.values())
    mode = ("static" if convolutional else "dynamic") if mode == "auto" else mode
    kept = dict.fromkeys(_matching(keep, nodes), "named to stay float")
    for name, node in nodes.items():
        if mode == "dynamic" and node.op_type in CONVOLUTIONS:
            kept.setdefault(name, "a convolution whose scales are computed while it runs is slower than in float")
    chosen = tuple(name for name in nodes if name not in kept)
    if not chosen:
        what = (
            "No node is left to quantize: " + ("; ".join(sorted(set(kept.values()))) or "the graph holds no float32 weight") + "."
        )
        raise UserModelError(what, remedy="Leave out quantize, or keep fewer layers in float.", code="LW-U79")
    return Choice(mode, chosen, kept, convolutional)


def _matching(keep: str, nodes: Mapping[str, Any]) -> list[str]:
    if not keep:
        return []
    found = [name for name in nodes if re.search(keep, owner(name))]
    if not found:
        modules = list(dict.fromkeys(map(owner, nodes)))
        some = ", ".join(modules[:6]) + (f", … ({len(modules)} in all)" if len(modules) > 6 else "")
        raise UsageError(f"{keep!r} is found in no layer with weights.", place="keep", remedy=f"There are {some}.", code="LW-C12")
    return found


def split_gemm(path: Path, out: Path) -> None:
    """Copies the graph with every ``Gemm`` of a weight as MatMul and Add, which is what can be quantized while it runs."""
    import onnx_ir as ir

    model: Any = ir.load(path)
    for node in [n for n in model.graph if n.op_type == "Gemm" and _plain(n)]:
        weight, (y,) = node.inputs[1], node.outputs
        array = weight.const_value.numpy()
        flipped = array.T.copy() if node.attributes.get_int("transB", 0) else array
        name = f"{weight.name}.columns"
        if name not in model.graph.initializers:
            model.graph.initializers[name] = constant(name, flipped)
        product = ir.node("MatMul", [node.inputs[0], model.graph.initializers[name]], name=node.name.replace("Gemm", "MatMul"))
        made = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=node.name.replace("Gemm", "Add_of_Gemm")))
        for new in made:
            new.outputs[0].dtype, new.outputs[0].shape = y.dtype, y.shape
            model.graph.insert_before(node, new)
        product.outputs[0].name = f"{y.name}.product"
        ir.convenience.replace_all_uses_with(y, made[-1].outputs[0], replace_graph_outputs=True)
        model.graph.remove(node)
        made[-1].outputs[0].name = y.name
        if not weight.uses():
            del model.graph.initializers[weight.name]
    ir.save(model, out)


def constant(name: str, array: Any) -> Any:
    """`array` as a tensor that stands in the file."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))


def _plain(node: Any) -> bool:
    """alpha = beta = 1, the left side as it is, and a weight that stands in the file."""
    get = node.attributes
    ones = get.get_float("alpha", 1.0) == get.get_float("beta", 1.0) == 1.0
    return ones and not get.get_int("transA", 0) and node.inputs[1].is_initializer()


def quantized(path: Path, out: Path, choice: Choice, inputs: Inputs, calibration: Data) -> None:
    """Writes the graph at `path` with `choice` carried out to `out`, by onnxruntime's quantizer."""
    from onnxruntime import quantization as ort

    common = {
        "per_channel": True,
        "nodes_to_exclude": [*choice.kept, *([] if choice.convolutional else weightless(path))],
        "extra_options": {"MatMulConstBOnly": True},
    }
    with _quiet():
        if choice.mode == "dynamic":
            ort.quantize_dynamic(path, out, op_types_to_quantize=["MatMul"], weight_type=ort.QuantType.QInt8, **common)
            return
        # between convolutions all stays 8-bit; between matrix products the normalizations need floats anyway
        kinds = None if choice.convolutional else [*CONVOLUTIONS, *PRODUCTS]
        ort.quantize_static(
            path, out, _Reader(path, inputs, calibration), op_types_to_quantize=kinds, activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8, **common,
        )  # fmt: skip


def weightless(path: Path) -> list[str]:
    """The matrix products of two activations, in attention: they stay float between matrix products.

    `MatMulConstBOnly` keeps them out of dynamic graphs only. Quantized, the softmax between them becomes QLinearSoftmax, and that
    kernel is wrong where no weight of attention is large (onnxruntime 1.31): its 32-bit products overflow on a fine grid, and
    of the 197 tokens of a ViT a third got the weight 0.
    """
    import onnx_ir as ir

    graph = ir.load(path).graph
    weights = weighted(graph)
    return [name for node in graph if node.op_type in PRODUCTS and (name := node.name) and name not in weights]


class _Reader:
    """What onnxruntime's calibration reads: one batch's arrays at a time, None at the end."""

    def __init__(self, path: Path, inputs: Inputs, data: Data) -> None:
        import onnx

        taken = {i.name for i in onnx.load(path, load_external_data=False).graph.input}
        self._batches: Iterator[dict[str, Any]] = (
            {name: value.cpu().numpy() for name, value in inputs.values(batch).items() if name in taken} for batch in data
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime recommends its pre-processing, which the exporter has done: types and shapes stand in the graph."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
