"""torchao's 8-bit linear layers for export: with few operators, and without rounding for a check as sharp as that of float32.

Two right implementations of 8-bit arithmetic may disagree: where an activation lies between two steps, a difference of 1e-7
before it decides which one is taken. So the graph is also compared with its roundings taken out, against the module with the
same weights and no rounding of activations; there every wrong weight, scale or wire shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.patching import Replacement, replacing
from layerwise.tensors import dense, flattened, wraps

SMALLEST = torch.finfo(torch.float32).eps  # torchao's least scale: a row of zeros must not be divided by zero


@contextmanager
def compact(module: nn.Module) -> Iterator[None]:
    """Inside, every linear layer with 8-bit weights and a scale per row computes the same with a tenth of the operators.

    The arithmetic is torchao's, the order of the steps as well; the export is compared with the module outside of this block.
    """
    with ExitStack() as stack:
        for child in _quantized(module):
            parts = flattened("weight", child.weight)
            if parts["weight.qdata"].dtype == torch.int8 and "weight.scale" in parts:
                stack.enter_context(replacing(child, _rounding(parts, child.bias)))
        yield


@contextmanager
def unrounded(module: nn.Module) -> Iterator[None]:
    """Inside, linear layers with 8-bit weights use these weights, but take their inputs as they come."""
    with ExitStack() as stack:
        for child in _quantized(module):
            stack.enter_context(replacing(child, _plain(dense(child.weight), child.bias)))
        yield


def _quantized(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear) and wraps(m.weight)]


def _rounding(parts: dict[str, Tensor], bias: Tensor | None) -> Replacement:
    columns, steps = parts["weight.qdata"].t().contiguous(), parts["weight.scale"].reshape(1, -1)
    fixed = parts.get("weight.act_quant_scale")  # else the steps are those of each row

    def forward(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (x,) = (*args, *kwargs.values())
        rows = x.reshape(-1, x.shape[-1])
        row_steps = (rows.abs().amax(-1, keepdim=True) / 127.5).clamp_min(SMALLEST) if fixed is None else fixed.reshape(1, 1)
        whole = (rows * row_steps.reciprocal()).round().clamp(-128, 127).to(torch.int8)
        product = torch._int_mm(whole, columns).to(x.dtype) * row_steps * steps.to(x.dtype)
        if bias is not None:
            product = product + bias
        return product.reshape(*x.shape[:-1], columns.shape[1])

    return forward


def _plain(weight: Tensor, bias: Tensor | None) -> Replacement:
    def forward(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return F.linear(x, weight.to(x.dtype), bias)

    return forward


def without_rounding(path: Path, unrounded_path: Path) -> bool:
    """Writes the graph at `path` with each 8-bit product as a float one of the unrounded activations; False if it finds another
    form of product than `compact` makes."""
    import onnx_ir as ir

    model = ir.load(path)
    for node in [n for n in model.graph if n.op_type == "MatMulInteger"]:
        rounded, weight = node.inputs
        chain = _producers(rounded, ("Cast", "Clip", "Round"))
        (widened,) = node.outputs[0].consumers() if len(node.outputs[0].consumers()) == 1 else (None,)
        if chain is None or widened is None or widened.op_type != "Cast":
            return False
        wide = ir.node("Cast", [weight], attributes={"to": widened.attributes["to"].value})
        product = ir.node("MatMul", [chain, wide.outputs[0]])
        for made, old in ((wide, f"{node.outputs[0].name}.weight"), (product, f"{node.outputs[0].name}.unrounded")):
            made.outputs[0].name = old
            model.graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(widened.outputs[0], product.outputs[0], replace_graph_outputs=True)
    ir.save(model, unrounded_path)
    return True


def _producers(value: Any, kinds: tuple[str, ...]) -> Any:
    """What goes into the chain of operators `kinds` (last first) that gives `value`; None where the chain is another."""
    for kind in kinds:
        node = value.producer()
        if node is None or node.op_type != kind:
            return None
        value = node.inputs[0]
    return value
