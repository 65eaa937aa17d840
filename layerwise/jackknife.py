"""The jackknife: how much a figure that is no mean depends on who was drawn, from leaving out groups in turn.

Groups are every G-th unit, G = 20 or the number of units; the standard error is √((G−1)/G · Σ (θ_g − mean)²).

References
----------
Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

GROUPS = 20  # each costs the figures of nearly all rows once


def jackknifed(units: Tensor, figures: Callable[[Tensor], Mapping[str, float]]) -> dict[str, float]:
    """Name → standard error of what `figures` gives for the rows that are kept, (rows,) bool; NaN for a single unit.

    `units` (rows,) numbers what was drawn: rows of one unit go together. NaN also where a figure is not defined without a group.
    """
    _, number = torch.unique(units.cpu(), return_inverse=True)
    groups = min(GROUPS, int(number.max()) + 1)
    if groups < 2:
        return dict.fromkeys(figures(number >= 0), math.nan)
    found = [figures(number % groups != g) for g in range(groups)]
    return {name: _spread([f[name] for f in found]) for name in found[0]}


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((v - mean) ** 2 for v in values))
