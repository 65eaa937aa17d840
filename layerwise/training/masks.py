"""Zeros that stay zeros: weights that were pruned are put back to 0 after every step.

Which zeros were pruned is read from the weights: in a matrix or kernel of which at least `SPARSE` is exactly 0, every 0 is one.
A trained weight is hardly ever exactly 0 by itself, but some rows are (the padding row of an embedding), and a few of them must
not freeze a matrix that nobody pruned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.tensors import wraps

SPARSE = 0.01


@dataclass(frozen=True)
class KeptZeros:
    """Called after each step. `masks`: name of the parameter → True where the weight may live."""

    masks: dict[str, Tensor]

    def __call__(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight = module.get_parameter(name)
                weight.masked_fill_(~mask.to(weight.device), 0)

    def broken(self, module: nn.Module) -> dict[str, int]:
        """Parameter → how many of its pruned weights are not 0, where there are any."""
        counts = {
            n: int((module.get_parameter(n)[~m.to(module.get_parameter(n).device)] != 0).sum()) for n, m in self.masks.items()
        }
        return {name: count for name, count in counts.items() if count}


def kept_zeros(module: nn.Module, names: Iterable[str] | None = None) -> KeptZeros:
    """The zeros to keep in the parameters `names` (all if None); shared ones once."""
    wanted = None if names is None else set(names)
    masks = {
        name: weight.detach() != 0
        for name, weight in module.named_parameters()
        if (wanted is None or name in wanted) and weight.dim() > 1 and not wraps(weight) and _pruned(weight)
    }
    return KeptZeros(masks)


def _pruned(weight: Tensor) -> bool:
    return int((weight == 0).sum()) >= SPARSE * weight.numel() > 0


def zeros_kept(before: nn.Module, after: nn.Module) -> tuple[float, float, str, str]:
    """Of the weights that were pruned in `before`: how many are not 0 in `after`, the bound, both in words, and where."""
    zeros = kept_zeros(before)
    broken, kept = zeros.broken(after), sum(int((~mask).sum()) for mask in zeros.masks.values())
    what = f"modules, names and shapes are as they were, and of {kept:,} pruned weights none lives again"
    return sum(broken.values()), 0, "pruned weights that are no longer 0" if broken else what, next(iter(broken), "")
