"""What a block alone costs: bytes, parameters, multiply-accumulates, and its time, in pairs with the block it would replace."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.tensors import byte_size, nonzero_count, parameter_count
from layerwise.trace import evaluating, traced

Arguments = tuple[Any, Any]  # (args, kwargs)
REPEATS = 7


def block_costs(layer: Layer, block: nn.Module, arguments: Arguments | None) -> dict[str, float]:
    """``size``, ``params``, ``macs`` (per sample) and ``nonzero`` of `block` in the place of `layer`.

    MACs are the layer's own where no `arguments` to run both with are given.
    """
    costs = {"size": byte_size(block), "params": parameter_count(block), "macs": layer.macs, "nonzero": nonzero_count(block)}
    if not costs["params"]:
        costs["macs"] = 0
    elif arguments is not None and layer.macs:
        batch = Batch(tuple(arguments[0]), dict(arguments[1]))
        before = traced(layer.module, _copied(batch)).macs
        costs["macs"] = round(layer.macs * traced(block, _copied(batch)).macs / max(before, 1))
    return {metric: float(value) for metric, value in costs.items()}


def arguments_of(model: UniversalModel, batch: Batch) -> dict[str, Arguments]:
    """Layer → what it is called with on `batch`, first call."""
    seen: dict[str, Arguments] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in seen:
                seen[name] = copy.deepcopy((args, dict(kwargs)))  # with what holds keys and values, which the block adds to

        return record

    handles = [x.module.register_forward_pre_hook(recorder(x.name), with_kwargs=True) for x in model.layers]
    try:
        model.predict(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def time_blocks(before: nn.Module, after: nn.Module, arguments: Arguments, repeats: int = REPEATS) -> tuple[float, float]:
    """Median milliseconds of both blocks on the same arguments, in turns; equal where they differ by less than their spreads."""
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(before), evaluating(after), torch.no_grad():
        for round_ in range(repeats + 1):
            for block, taken in zip((before, after), times, strict=True):
                elapsed = _milliseconds(block, arguments)
                if round_:  # the first call allocates and chooses kernels
                    taken.append(elapsed)
    (low, old, high), (least, new, most) = (np.percentile(t, [25, 50, 75]) for t in times)
    return (float(old), float(old)) if abs(new - old) <= (high - low + most - least) / 2 else (float(old), float(new))


def _milliseconds(block: nn.Module, arguments: Arguments) -> float:
    args, kwargs = copy.deepcopy(arguments)  # a block may write into its input
    cuda = any(p.is_cuda for p in block.parameters())
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    block(*args, **kwargs)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def _copied(batch: Batch) -> Batch:
    return copy.deepcopy(batch)


def rest_of(model: UniversalModel, whole: Mapping[str, float]) -> dict[str, float]:
    """What the whole model costs besides its layers."""
    own: dict[str, Callable[[Layer], float]] = {
        "size": lambda x: byte_size(x.module),
        "params": lambda x: parameter_count(x.module),
        "macs": lambda x: x.macs,
        "nonzero": lambda x: nonzero_count(x.module),
    }
    whole = {"nonzero": nonzero_count(model.module), **whole}
    rest = {metric: whole[metric] - sum(map(cost, model.layers)) for metric, cost in own.items()}
    return rest | {"latency": whole.get("latency", 0.0)}


__all__ = ["Arguments", "arguments_of", "block_costs", "rest_of", "time_blocks"]
