"""Whether an 8-bit ONNX graph is the rounded form of a float one: node for node, number for number, wire for wire.

Decision: an 8-bit graph cannot agree with torch to 1e-4, and a loose bound on its outputs would let a wrong weight pass. So it is
taken apart. (1) The nodes that became 8-bit are those that were chosen. (2) Every 8-bit weight lies within half a step of the
float weight of the same node, and every tensor that stayed float is the same bit for bit. (3) Every fixed scale and zero point of
an activation is what the extremes seen on the calibration data give, computed afresh. (4) What is left is the wiring: with all
roundings taken out and the float weights put back the graph must compute what torch does, to the bound of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerwise.errors import ExportMismatch
from layerwise.export._quantize import Choice
from layerwise.onnx_nodes import ROOT, owner

HALF = 0.501  # of a step, and a little for the rounding of scale·integer back to a float
SUFFIX = "_quant"  # what onnxruntime adds to the name of a node that became an integer product
REMOVED = {"Relu", "Clip"}  # left out where the quantizer behind them cuts off the same


@dataclass(frozen=True)
class Weight:
    """A constant of a node as it stands in the 8-bit graph: its integers, and the step of each along `axis`."""

    slot: int  # of the node's inputs
    integers: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int

    def steps_from(self, values: np.ndarray) -> float:
        """The largest distance to the float `values` in steps; infinite for other shapes, or steps that are no number above 0."""
        scale, zero = self._along(self.scale), self._along(self.zero)
        if self.integers.shape != values.shape or not bool(np.all(np.isfinite(scale)) and np.all(scale > 0)):
            return float("inf")
        exact = values.astype(np.float64) / scale
        return float(np.abs(self.integers.astype(np.float64) - zero - exact).max(initial=0.0))

    def values(self) -> np.ndarray:
        """What the integers stand for."""
        return (self.integers.astype(np.float64) - self._along(self.zero)) * self._along(self.scale)

    def _along(self, numbers: np.ndarray) -> np.ndarray:
        numbers = numbers.astype(np.float64)
        if numbers.size == 1:
            return numbers.reshape(())
        return numbers.reshape([-1 if d == self.axis else 1 for d in range(self.integers.ndim)])


@dataclass(frozen=True)
class Graphs:
    """The float graph and the one that was made of it, by the names of their nodes."""

    reference: Any
    made: Any

    @classmethod
    def load(cls, reference: Path, made: Path) -> Graphs:
        import onnx_ir as ir

        return cls(ir.load(reference), ir.load(made))

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """(float node, the node that computes it). Raises `ExportMismatch` for one that is gone, or of another operator."""
        found = {node.name.removesuffix(SUFFIX): node for node in self.made.graph}
        for node in self.reference.graph:
            other = found.get(node.name)
            if other is None and node.op_type in REMOVED:
                continue
            kinds = {node.op_type, f"{node.op_type}Integer"}
            if other is None or other.op_type not in kinds:
                instead = "is gone" if other is None else f"became {other.op_type}"
                raise mismatch(node.name, f"the node {instead}: this is not the file that was made of this model")
            yield node, other


def mismatch(node: str, what: str) -> ExportMismatch:
    """The error for a node, with its layer as the place."""
    layer = owner(node) or node
    remedy = "Nothing was written under the final name."
    return ExportMismatch(f"The 8-bit graph is not the float one rounded: at {node}, {what}.", place=layer, remedy=remedy)


def check_weights(graphs: Graphs, choice: Choice) -> float:
    """Checks (1) and (2); the largest distance of a weight from its original, in steps."""
    worst = 0.0
    for node, made in graphs.pairs():
        constants = quantized_inputs(made)
        if (node.name in choice.nodes) != bool(1 in constants):
            state = "was chosen and is not 8-bit" if node.name in choice.nodes else "is 8-bit and was to stay float"
            if node.name in choice.nodes or node.name in choice.kept:
                raise mismatch(node.name, f"the weight {state}")
        for slot, weight in constants.items():
            original = node.inputs[slot]
            if original is None or not original.is_initializer():
                raise mismatch(node.name, "an 8-bit constant stands where the model has none")
            off = weight.steps_from(original.const_value.numpy())
            if not off <= HALF:
                name = original.name.removeprefix(f"{ROOT}.")
                raise mismatch(node.name, f"{name} is {off:.3g} steps of its 8-bit grid away from the original (bound {HALF:g})")
            worst = max(worst, off)
    _check_floats(graphs)
    return worst


def _check_floats(graphs: Graphs) -> None:
    """Tensors that keep their name are the same bit for bit."""
    left = graphs.made.graph.initializers
    for name, value in graphs.reference.graph.initializers.items():
        if name in left and not np.array_equal(value.const_value.numpy(), left[name].const_value.numpy(), equal_nan=True):
            node = next((n.name for n, _ in value.uses()), name)
            raise mismatch(node, f"{name.removeprefix(f'{ROOT}.')} is another tensor than in the float graph")


def quantized_inputs(node: Any) -> dict[int, Weight]:
    """Slot → the 8-bit (of a bias 32-bit) constant that the node reads there."""
    if node.op_type.endswith("Integer"):
        found = _integer_weight(node)
        return {} if found is None else {1: found}
    constants = {}
    for slot, value in enumerate(node.inputs):
        source = None if value is None else value.producer()
        if source is not None and source.op_type == "DequantizeLinear" and source.inputs[0].is_initializer():
            integers, scale, zero = (array_of(v) for v in padded(source.inputs, 3))
            assert integers is not None  # an initializer
            constants[slot] = _weight(slot, integers, scale, zero, source.attributes.get_int("axis", 1))
    return constants


def _integer_weight(node: Any) -> Weight | None:
    """The weight of a MatMulInteger: its scale stands in the product that widens the integers afterwards."""
    if not node.inputs[1].is_initializer():
        return None
    scales = widening(node)
    zero = array_of(padded(node.inputs, 4)[3])
    integers = array_of(node.inputs[1])
    assert integers is not None
    return _weight(1, integers, None if scales is None else array_of(scales.inputs[1]), zero, integers.ndim - 1)


def widening(node: Any) -> Any:
    """Of a MatMulInteger the node that multiplies the scale of its left side with that of its weight; None if there is none."""
    left = node.inputs[0].producer()
    casts = node.outputs[0].consumers()
    products: Any = casts[0].outputs[0].consumers() if len(casts) == 1 and casts[0].op_type == "Cast" else ()
    if left is None or left.op_type != "DynamicQuantizeLinear" or len(products) != 1 or products[0].op_type != "Mul":
        return None
    scales = products[0].inputs[1].producer()
    fits = scales is not None and scales.op_type == "Mul" and scales.inputs[0] is left.outputs[1]
    return scales if fits and node.inputs[2] is left.outputs[2] else None


def _weight(slot: int, integers: np.ndarray, scale: np.ndarray | None, zero: np.ndarray | None, axis: int) -> Weight:
    nothing = np.array(np.nan)  # no scale that could be found: infinitely far from everything
    return Weight(
        slot,
        integers,
        nothing if scale is None else scale,
        np.zeros(1) if zero is None else zero,
        axis % integers.ndim if integers.ndim else 0,
    )


def padded(values: Any, length: int) -> list[Any]:
    return [*values, *[None] * (length - len(values))]


def array_of(value: Any) -> np.ndarray | None:
    constant = None if value is None else value.const_value
    return None if constant is None else constant.numpy()
