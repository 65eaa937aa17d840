"""Mutual information from nearest neighbours, one value per sample whose mean is the estimate, in nats.

For at most a few hundred points in a few dimensions: time and memory are quadratic in the points, and in many dimensions all
neighbours are far. The distance is the maximum norm, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ksg(x: Tensor, y: Tensor, neighbours: int) -> Tensor:
    """Kraskov, Stögbauer, Grassberger (2004), first estimator, of `x` (n, d) and `y` (n, q), float64; (n,)."""
    dx, dy = _distances(x), _distances(y)
    n, k = len(x), min(neighbours, len(x) - 1)
    radius = _below(torch.maximum(dx, dy).kthvalue(k, dim=1).values)
    psi = torch.special.digamma
    near_x, near_y = ((d <= radius[:, None]).sum(1).double() for d in (dx, dy))
    return psi(_number(n)) + psi(_number(k)) - psi(near_x + 1) - psi(near_y + 1)


def ksg_classes(x: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """Ross (2014), for `labels` (n,) of classes. A class of one sample has no neighbours; its sample is left out (NaN)."""
    values = torch.full((len(x),), torch.nan, dtype=torch.float64)
    same = labels[:, None] == labels[None]
    kept = same.sum(1) > 1
    distances, same = _distances(x)[kept][:, kept], same[kept][:, kept]
    n, psi = len(distances), torch.special.digamma
    size = same.sum(1).double()
    k = (size - 1).clamp_max(neighbours)
    ordered = torch.where(same, distances, torch.inf).sort(1).values
    radius = _below(ordered.gather(1, (k.long() - 1)[:, None])[:, 0])
    near = (distances <= radius[:, None]).sum(1).double() + 1  # with the point itself
    values[kept] = psi(_number(n)) + psi(k) - psi(size) - psi(near)
    return values


def _distances(x: Tensor) -> Tensor:
    d = torch.cdist(x, x, p=torch.inf)
    return d.fill_diagonal_(torch.inf)  # no point is its own neighbour


def _below(radius: Tensor) -> Tensor:
    return torch.nextafter(radius, torch.zeros_like(radius))


def _number(n: int) -> Tensor:
    return torch.tensor(float(n), dtype=torch.float64)


__all__ = ["ksg", "ksg_classes"]
