"""Gram matrices Σ x xᵀ of what modules read or give, over all tokens that count; float64 sums, no activations are kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.model import UniversalModel
from layerwise.task import token_mask


def gathered(
    model: UniversalModel,
    batches: Data,
    *,
    outputs: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Name → (groups, size, size): the features in groups of ``sizes[name]``, all in one group where it says nothing.

    Outputs in one group are taken without the module's bias, which a low-rank matrix does not have to give; those of a
    convolution are channels. What never ran has no sum.
    """
    sums: dict[str, Tensor] = {}
    images = {name for name, module in outputs.items() if isinstance(module, nn.Conv2d)}
    state: dict[str, Any] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.movedim(-3, -1) if name in images else x
        keep = token_mask(state["batch"], x[..., 0]).reshape(-1).to(x.device) if x.dim() == 3 else None
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = (rows if keep is None else rows[keep]).double()
        grouped = rows.unflatten(1, (-1, (sizes or {}).get(name, rows.shape[1])))
        sums[name] = sums.get(name, 0) + torch.einsum("ngs,ngt->gst", grouped, grouped)

    with ExitStack() as stack:
        for name, module in outputs.items():
            bias: Any = None if sizes and name in sizes else module.bias
            shaped = bias if bias is None or name not in images else bias[:, None, None]
            given = lambda m, args, out, n=name, b=shaped: add(n, out if b is None else out - b)  # noqa: E731
            stack.callback(module.register_forward_hook(given).remove)
        for name, module in (inputs or {}).items():
            stack.callback(module.register_forward_pre_hook(lambda m, args, n=name: add(n, args[0])).remove)
        for batch in batches:
            state["batch"] = batch.to(model.device)
            model.predict(batch)
    return sums


def fewest(values: Tensor, energy: float) -> int:
    """How many of the descending `values` make up the share `energy` of their sum; all of them for 1."""
    if energy >= 1:
        return len(values)
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum().clamp_min(torch.finfo(values.dtype).tiny)
    return min(len(values), int((share < energy).sum()) + 1)


__all__ = ["fewest", "gathered"]
