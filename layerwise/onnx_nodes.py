"""A plan's bits per layer as a list of ONNX nodes, to quantize or to leave, for any tool that quantizes ONNX files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError, missing_dependency
from layerwise.plan import CompressionPlan, Step

ROOT = "model"  # the attribute under which the exporter wraps the module
CONVOLUTIONS, PRODUCTS = ("Conv", "ConvTranspose"), ("Gemm", "MatMul")
EIGHT = 8
IMPLIED = {"int8_dynamic": EIGHT, "int8_static": EIGHT, "smooth_quant": EIGHT}  # methods whose settings do not say how many bits


@dataclass(frozen=True)
class NodeList:
    """`quantize` and `exclude` are names of nodes that hold weights; `bits` of each quantized one, as the plan has it.

    `keep` is the same as a regular expression of dotted paths, as ``lw.export(..., quantize="auto", keep=...)`` takes it.
    """

    quantize: tuple[str, ...]
    exclude: tuple[str, ...]
    bits: Mapping[str, int]
    keep: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_bits(plan: CompressionPlan) -> dict[str, int]:
    """Dotted path → bits of its weights after all steps of `plan`; layers that no step stores in fewer bits are not named."""
    return {path: bits for step in plan.steps for path, bits in _bits_of(step).items()}


def _bits_of(step: Step) -> dict[str, int]:
    chosen = step.settings.get("chosen")
    if isinstance(chosen, Mapping):  # weight → bits, where a step mixes them
        return {name.removesuffix(".weight"): int(bits) for name, bits in chosen.items() if isinstance(bits, int)}
    bits = step.settings.get("bits", IMPLIED.get(step.method))
    return dict.fromkeys(step.layers, int(bits)) if bits is not None else {}


def onnx_nodes(plan: CompressionPlan | Mapping[str, int], path: str | Path, *, most: int = EIGHT) -> NodeList:
    """Of the file at `path` (exported by layerwise, in float32) the nodes in the layers with at most `most` bits, and the others.

    `plan` may be a mapping from dotted paths to bits as well. Raises `UsageError` for a file without names of modules, and for a
    layer that no node belongs to.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise missing_dependency("onnx_ir", "onnx", "the list of nodes") from error
    wanted = layer_bits(plan) if isinstance(plan, CompressionPlan) else dict(plan)
    nodes = list(weighted(ir.load(path).graph))
    if not any(owner(name) for name in nodes):
        what = "The nodes of this file are not named after modules."
        raise UsageError(what, place=str(path), remedy="Export the model with layerwise first.")
    bits = {name: found for name in nodes if (found := _nearest(owner(name), wanted)) is not None and found <= most}
    unmet = [layer for layer in wanted if not any(_inside(owner(name), layer) for name in nodes)]
    if unmet:
        there = ", ".join(list(dict.fromkeys(map(owner, nodes)))[:6])
        raise UsageError(f"No node of this file belongs to {unmet[0]}.", place=str(path), remedy=f"There are {there}, …")
    exclude = tuple(name for name in nodes if name not in bits)
    keep = "|".join(f"^{re.escape(path)}$" for path in dict.fromkeys(map(owner, exclude)))
    return NodeList(tuple(bits), exclude, bits, keep)


def _nearest(path: str, wanted: Mapping[str, int]) -> int | None:
    """The bits of the innermost named module around `path`; None where none is named."""
    around = [layer for layer in wanted if _inside(path, layer)]
    return wanted[max(around, key=len)] if around else None


def _inside(path: str, layer: str) -> bool:
    layer = layer.removeprefix(f"{ROOT}.")
    return path == layer or path.startswith(f"{layer}.")


def owner(node: str) -> str:
    """The dotted path of the module that a node named by our exporter belongs to."""
    return node.rpartition("/")[0]


def weighted(graph: Any) -> dict[str, Any]:
    """Node name → node, of the convolutions and matrix products with a float32 weight that stands in the file."""
    import onnx_ir as ir

    return {
        node.name: node
        for node in graph
        if node.op_type in CONVOLUTIONS + PRODUCTS
        and node.inputs[1].is_initializer()
        and node.inputs[1].dtype == ir.DataType.FLOAT
    }
