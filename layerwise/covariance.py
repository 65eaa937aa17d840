"""`Covariance`: mergeable float64 mean and scatter matrix, one pair for each part (`group`) of the data.

What is summed is centred: a batch's own mean is taken off before squares are formed, and two parts are joined by Chan's formula,
so that a mean far larger than the spread costs no digits. The parts give standard errors (`jackknife`) and held-out halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # weight (), mean (d,), scatter (d, d); or with a leading dimension of groups


@dataclass
class Covariance:
    """`count` (groups,), `mean` (groups, d) and `scatter` (groups, d, d), the sum of centred outer products; blank until fed."""

    groups: int = 1
    count: Tensor = field(default_factory=lambda: torch.empty(0))
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    scatter: Tensor = field(default_factory=lambda: torch.empty(0))

    def add_(self, group: int, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds `rows` (n, d) to one part; each weighs 1, or `weights` (n,) of 0 and 1."""
        count, mean, scatter = moments_of(rows, weights)
        zeros = Covariance(
            self.groups,
            count.new_zeros(self.groups),
            mean.new_zeros(self.groups, len(mean)),
            mean.new_zeros(self.groups, len(mean), len(mean)),
        )
        zeros.count[group], zeros.mean[group], zeros.scatter[group] = count, mean, scatter
        self.merge_(zeros)

    def merge_(self, other: Covariance) -> None:
        """Adds another shard's."""
        if not other.mean.numel():
            return
        if not self.mean.numel():
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return
        device = other.mean.device
        mine = (self.count.to(device), self.mean.to(device), self.scatter.to(device))
        self.count, self.mean, self.scatter = joined(mine, (other.count, other.mean, other.scatter))

    def state(self) -> dict[str, Tensor]:
        """The sums; empty tensors before anything was seen."""
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.count, self.mean, self.scatter = state["count"], state["mean"], state["scatter"]

    def total(self, without: int = -1) -> Triple:
        """Count, mean and scatter of all parts but one, on the CPU."""
        count, mean, scatter = self.count.cpu(), self.mean.cpu(), self.scatter.cpu()
        whole: Triple = (torch.zeros_like(count[0]), torch.zeros_like(mean[0]), torch.zeros_like(scatter[0]))
        for g in range(self.groups):
            if g != without:
                whole = joined(whole, (count[g], mean[g], scatter[g]))
        return whole


def moments_of(rows: Tensor, weights: Tensor | None = None) -> Triple:
    """Count, mean and scatter of `rows` (n, d); nothing but zeros where nothing counts."""
    rows = rows.detach().double()
    w = rows.new_ones(len(rows)) if weights is None else weights.double()
    count = w.sum()
    mean = (w @ rows) / count.clamp_min(1)
    centred = (rows - mean) * w[:, None]  # the weights are 0 or 1, their own squares
    return count, mean, centred.T @ centred


def joined(a: Triple, b: Triple) -> Triple:
    """Chan, Golub, LeVeque (1983): the moments of the union."""
    count = a[0] + b[0]
    share = b[0] / count.clamp_min(1)
    delta = b[1] - a[1]
    mean = a[1] + delta * share[..., None]
    outer = delta[..., :, None] * delta[..., None, :]
    return count, mean, a[2] + b[2] + outer * (a[0] * share)[..., None, None]


def jackknife(value: Callable[[int], float], groups: list[int]) -> float:
    """The standard error of ``value(-1)`` from ``value(g)``, the same without part g; NaN for fewer than two parts."""
    if len(groups) < 2:
        return math.nan
    left = torch.tensor([value(g) for g in groups], dtype=torch.float64)
    return math.sqrt((len(groups) - 1) / len(groups) * float((left - left.mean()).square().sum()))


__all__ = ["Covariance", "Triple", "jackknife", "joined", "moments_of"]
