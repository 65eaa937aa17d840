"""Σ x xᵀ of what the matrices of one layer read, for one layer at a time, so that memory holds the squares of one layer only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.errors import LayerwiseError
from layerwise.matrices import Matrix
from layerwise.model import UniversalModel
from layerwise.tasks._contract import token_mask
from layerwise.trace import evaluating, run, unfused


class _LayerRan(LayerwiseError):
    """What follows the layer need not run."""


def hessians(model: UniversalModel, layer: str, chosen: Mapping[str, Matrix], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Name → Σ x xᵀ, (inputs × kernel)² in float64 on the CPU, over everything that the matrix reads; padding does not count.

    Those that do not run as modules (a fused attention's) or whose outputs read different inputs (grouped convolutions) are
    not in it.
    """
    sums = _Sums(chosen)
    block = model.layer(layer)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model.module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        for name, m in chosen.items():
            if reads_alike(m.owner):
                stack.callback(m.owner.register_forward_pre_hook(sums.hook(name, m.owner)).remove)
        stack.callback(block.module.register_forward_hook(sums.ended(block.calls)).remove)
        for batch in batches:
            sums.batch, sums.ends = batch.to(model.device), 0
            try:
                run(model.module, sums.batch)
            except _LayerRan:
                continue
    return sums.found


class _Sums:
    def __init__(self, chosen: Mapping[str, Matrix]) -> None:
        self.found: dict[str, Tensor] = {}
        self.batch = Batch()
        self.ends = 0

    def hook(self, name: str, owner: nn.Module) -> Callable[..., None]:
        def add(module: nn.Module, args: Any) -> None:
            rows = rows_read(owner, args[0].detach(), self.batch)
            square = (rows.T @ rows).double().cpu()
            self.found[name] = self.found[name] + square if name in self.found else square

        return add

    def ended(self, calls: int) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.ends += 1
            if self.ends == calls:
                raise _LayerRan("the layer ran")

        return end


def reads_alike(owner: nn.Module) -> bool:
    """Whether every output of `owner` reads the same inputs, in a way that `rows_read` knows."""
    if isinstance(owner, nn.Conv2d):
        return owner.groups == 1 and owner.padding_mode == "zeros" and not isinstance(owner.padding, str)
    return isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"


def rows_read(owner: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    """(positions, inputs × kernel) float32 of the input `x`, without padded positions."""
    if isinstance(owner, nn.Conv2d):
        patches = F.unfold(x.float(), owner.kernel_size, owner.dilation, owner.padding, owner.stride)  # type: ignore[arg-type]  # pairs
        return patches.transpose(1, 2).flatten(0, 1)
    if x.dim() == 3:
        x = x[token_mask(batch, x[..., 0])]
    return x.reshape(-1, x.shape[-1]).float()
