"""The fixed grids of activations in an 8-bit graph, against what the extremes on the calibration data say they must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerwise.export._rounding import HALF, REMOVED, Graphs, array_of, mismatch, padded

MOVERS = {  # give no value that they were not given, or means of such
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Resize", "Gather", "Pad", "MaxPool",
    "AveragePool",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What a QuantizeLinear does to a tensor of the float graph."""

    node: str  # that gives the tensor, or reads it where it is the model's input
    tensor: str
    scale: float
    zero: float
    lower: int
    upper: int

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value that it can say."""
        return (self.lower - self.zero) * self.scale, (self.upper - self.zero) * self.scale


def grids(graphs: Graphs) -> list[Grid]:
    """Every fixed grid of an activation. Raises `ExportMismatch` where it is read back on another one than it is written on."""
    found = []
    for node in graphs.made.graph:
        if node.op_type != "QuantizeLinear" or node.inputs[0].is_initializer():
            continue
        scale, zero = (array_of(v) for v in node.inputs[1:3])
        tensor = node.inputs[0].name.removesuffix("_QuantizeLinear_Input")
        giver = node.inputs[0].producer()
        readers = [r for c in node.outputs[0].consumers() for r in c.outputs[0].consumers()]
        name = giver.name if giver is not None else next((r.name for r in readers), tensor)
        if scale is None or zero is None or scale.size != 1:
            raise mismatch(name, f"the grid of {tensor} is not one fixed scale and zero point")
        for back in node.outputs[0].consumers():
            if back.op_type != "DequantizeLinear" or any(
                not np.array_equal(a, b)
                for a, b in ((scale, array_of(back.inputs[1])), (zero, array_of(back.inputs[2])))
                if b is not None
            ):
                raise mismatch(name, f"{tensor} is read back on another grid than it was written on")
        limits = np.iinfo(zero.dtype)
        found.append(Grid(name, tensor, float(scale.reshape(())), float(zero.reshape(())), limits.min, limits.max))
    return found


def check_grids(graphs: Graphs, extremes: Mapping[str, tuple[float, float]]) -> int:
    """Check (3) against `extremes` (tensor → smallest and largest value on the calibration data); how many grids there are."""
    values = {v.name: v for n in graphs.reference.graph for v in n.outputs} | {v.name: v for v in graphs.reference.graph.inputs}
    found = grids(graphs)
    for grid in found:
        if grid.tensor not in values:
            raise mismatch(grid.node, f"the float graph has no tensor {grid.tensor}")
        allowed = [_expected(extremes[v.name], grid) for v in related(values[grid.tensor]) if v.name in extremes]
        if any(v.producer() is not None and v.producer().op_type == "Softmax" for v in related(values[grid.tensor])):
            allowed.append(_expected((0.0, 1.0), grid))
        if not any(abs(grid.scale - s) <= 1e-5 * s and abs(grid.zero - z) <= HALF for s, z in allowed):
            scale, zero = allowed[0] if allowed else (float("nan"), float("nan"))
            what = f"the grid of {grid.tensor} has scale {grid.scale:.6g} and zero point {grid.zero:g}"
            raise mismatch(grid.node, f"{what}, and the calibration data gives {scale:.6g} and {zero:.0f}")
    return len(found)


def related(value: Any) -> list[Any]:
    """The tensors whose grid `value` may have: its own; those it only moves; and what is left behind a Relu or Clip."""
    chain = [value]
    while (giver := chain[-1].producer()) is not None and giver.op_type in MOVERS:
        chain.append(giver.inputs[0])
    behind = [c.outputs[0] for v in chain for c in v.consumers() if c.op_type in REMOVED]
    return chain + behind


def _expected(extremes: tuple[float, float], grid: Grid) -> tuple[float, float]:
    """Scale and zero point (not yet rounded) of the grid from the smaller to the larger extreme that holds 0."""
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)
    scale = (high - low) / (grid.upper - grid.lower)
    return (scale, grid.lower - low / scale) if scale > np.finfo(np.float32).tiny else (1.0, 0.0)


def with_extremes(path: Path, out: Path, tensors: list[str]) -> None:
    """Writes a copy of the graph that gives the smallest and the largest value of each of `tensors`, after its own outputs."""
    import onnx_ir as ir

    model = ir.load(path)
    values = {v.name: v for n in model.graph for v in n.outputs} | {v.name: v for v in model.graph.inputs}
    for name in tensors:
        for kind in ("ReduceMin", "ReduceMax"):
            node = ir.node(kind, [values[name]], attributes={"keepdims": 0})
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"{name}.{kind}", ir.DataType.FLOAT, ir.Shape([])
            model.graph.append(node)
            model.graph.outputs.append(node.outputs[0])
    ir.save(model, out)


def removed_nodes(graphs: Graphs) -> dict[str, Any]:
    """Tensor → the Relu or Clip of the float graph that gives it and stands no longer in the other; its grid must cut the same.

    Raises `ExportMismatch` where it does not.
    """
    there = {n.name for n in graphs.made.graph}
    gone = {n.outputs[0].name: n for n in graphs.reference.graph if n.op_type in REMOVED and n.name not in there}
    cut = {g.tensor: g for g in grids(graphs)}
    for tensor, node in gone.items():
        grid = cut.get(tensor)
        low, high = _limits(node)
        if (
            grid is None
            or (grid.lower - grid.zero) * grid.scale < low - HALF * grid.scale
            or (grid.upper - grid.zero) * grid.scale > high + HALF * grid.scale
        ):
            raise mismatch(node.name, f"the {node.op_type} was taken out, and nothing behind it cuts off the same")
    return gone


def _limits(node: Any) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    low, high = (array_of(v) for v in padded(node.inputs, 3)[1:])
    return (-np.inf if low is None else float(low), np.inf if high is None else float(high))
