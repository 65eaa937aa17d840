"""`Moments`: mergeable float64 sums of per-sample values, one row per layer, from which means and standard errors come.

A sample's `value` has a `weight` (its number of tokens, say); the mean is Σ value / Σ weight and its standard error that of the
ratio estimator. The sums live on the device, so that a batch costs no host synchronization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.scores import LayerScore

ROWS = ("count", "weight", "value", "value²", "value·weight", "weight²")


@dataclass
class Moments:
    """Sums of shape (6, layers) in the order of `ROWS`."""

    layers: int
    sums: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.sums.numel():
            self.sums = torch.zeros(len(ROWS), self.layers, dtype=torch.float64)

    def add_(self, layer: int, values: Tensor, weights: Tensor | None = None) -> None:
        """Adds samples: `values` and `weights` of shape (samples,); without weights each counts 1."""
        v = values.detach().double()
        w = torch.ones_like(v) if weights is None else weights.detach().double()
        row = torch.stack([torch.ones_like(v).sum(), w.sum(), v.sum(), (v * v).sum(), (v * w).sum(), (w * w).sum()])
        if self.sums.device != v.device:
            self.sums = self.sums.to(v.device)
        self.sums[:, layer] += row

    def add_columns_(self, layers: Sequence[int], values: Tensor) -> None:
        """Adds samples to many layers at once: `layers` are the indices of the columns of `values`, (samples, columns)."""
        v = values.detach().double()
        ones, total, squares = torch.full_like(v[0], len(v)), v.sum(0), (v * v).sum(0)
        if self.sums.device != v.device:
            self.sums = self.sums.to(v.device)
        self.sums[:, torch.tensor(layers, device=v.device)] += torch.stack([ones, ones, total, squares, total, ones])

    def merge_(self, other: Moments) -> None:
        """Adds another shard's sums."""
        self.sums = self.sums + other.sums.to(self.sums.device)

    def samples(self) -> int:
        """The largest number of samples that any layer has."""
        return int(self.sums[0].max()) if self.layers else 0

    def score(self, layer: int) -> LayerScore:
        """Mean and standard error (NaN for a single sample) of one layer."""
        n, w, v, vv, vw, ww = (float(x) for x in self.sums[:, layer].cpu())
        if not w:
            return LayerScore.measured(math.nan)
        mean = v / w
        residual = max(vv - 2 * mean * vw + mean * mean * ww, 0.0)
        return LayerScore.measured(mean, math.sqrt(residual * n / (n - 1)) / w if n > 1 else math.nan)
