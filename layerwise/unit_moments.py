"""Sums per unit that merge exactly: weight, mean, centred second, third, fourth moment, |a|, how often it is small, the peak."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = ("weight", "mean", "second", "third", "fourth", "absolute", "small", "peak")  # the moments are sums of centred powers


def unit_moments(rows: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """(8, units) of `rows` (observations, units) float64 whose `weights` are 0 or 1."""
    w = weights[:, None]
    count = w.sum().expand(rows.shape[1])
    mean = (w * rows).sum(0) / count.clamp_min(1)
    centred, size = (rows - mean) * w, rows.abs() * w
    powers = [centred.square().sum(0), centred.pow(3).sum(0), centred.square().square().sum(0)]
    small = ((rows.abs() < epsilon) * w).sum(0)
    return torch.stack([count, mean, *powers, size.sum(0), small, size.amax(0)])


def joined_units(a: Tensor, b: Tensor) -> Tensor:
    """The moments of the union, (…, 8, units): Chan's formula, to fourth order by Pébay (2008)."""
    na, ma, a2, a3, a4, aa, sa, pa = a.unbind(-2)
    nb, mb, b2, b3, b4, ab, sb, pb = b.unbind(-2)
    n = na + nb
    m = n.clamp_min(1)
    d = mb - ma
    second = a2 + b2 + d**2 * na * nb / m
    third = a3 + b3 + d**3 * na * nb * (na - nb) / m**2 + 3 * d * (na * b2 - nb * a2) / m
    fourth = (
        a4 + b4 + d**4 * na * nb * (na**2 - na * nb + nb**2) / m**3
        + 6 * d**2 * (na**2 * b2 + nb**2 * a2) / m**2 + 4 * d * (na * b3 - nb * a3) / m
    )  # fmt: skip
    return torch.stack([n, ma + d * nb / m, second, third, fourth, aa + ab, sa + sb, torch.maximum(pa, pb)], dim=-2)


__all__ = ["ROWS", "joined_units", "unit_moments"]
