"""Rank statistics over layers: partial correlation, permutation, reliability, and how correlations of several models combine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from layerwise.benchmark.protocol import CLIP, PARTIAL_FREEDOM
from layerwise.importance import spearman, spearman_rows


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b; NaN where one side is constant."""
    return float(stats.kendalltau(x, y).statistic)


def partial_spearman(x: np.ndarray, y: np.ndarray, covariates: Sequence[np.ndarray]) -> float:
    """The correlation of the ranks of `x` and `y` after least squares on the ranks of the covariates that vary.

    NaN where fewer than `PARTIAL_FREEDOM` degrees of freedom are left, or where the covariates explain one side entirely.
    """
    varying = [stats.rankdata(c) for c in covariates if np.ptp(c) > 0]
    design = np.stack([np.ones(len(x)), *varying], axis=1)
    if len(x) - 1 - design.shape[1] < PARTIAL_FREEDOM:
        return math.nan
    left, right = (_residual(stats.rankdata(v), design) for v in (x, y))
    scale = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / scale if scale else math.nan


def _residual(values: np.ndarray, design: np.ndarray) -> np.ndarray:
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return rest if rest @ rest > 1e-9 * len(values) else np.zeros_like(rest)  # what is left of rounding is nothing


def permutation_p(x: np.ndarray, y: np.ndarray, draws: int, generator: np.random.Generator) -> float:
    """One-sided p of Spearman's rho: the share of orders of `y` that agree with `x` at least as well, the given one included."""
    observed = spearman(x, y)
    if math.isnan(observed):
        return 1.0
    shuffled = generator.permuted(np.broadcast_to(y, (draws, len(y))), axis=1)
    found = spearman_rows(np.broadcast_to(x, shuffled.shape), shuffled)
    return float((1 + (found >= observed - 1e-12).sum()) / (1 + draws))


def resampled(values: np.ndarray, weights: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Damages (draws, layers) on bootstrap samples of `values` (layers, samples) with `weights` (samples,)."""
    n = values.shape[1]
    counts = generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    return np.asarray((counts @ values.T) / (counts @ weights)[:, None])


def reliability(values: np.ndarray, weights: np.ndarray, splits: int, generator: np.random.Generator) -> float:
    """Mean Spearman correlation between the damages on two random halves of the samples, stepped up by Spearman–Brown."""
    n, found = values.shape[1], []
    for _ in range(splits):
        order = generator.permutation(n)
        first, second = (values[:, part].sum(1) / weights[part].sum() for part in (order[: n // 2], order[n // 2 :]))
        found.append(spearman(first, second))
    mean = float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
    return spearman_brown(mean)


def spearman_brown(half: float) -> float:
    """The reliability of the whole from that of one half, at least −1."""
    return max(2 * half / (1 + half), -1.0) if half > -1 else -1.0


def fisher_z(rho: float) -> float:
    """atanh of `rho` clipped to ±`CLIP`."""
    return math.atanh(max(-CLIP, min(CLIP, rho)))


def combined(zs: Sequence[float], layers: Sequence[int]) -> tuple[float, float, float, float]:
    """(rho, low, high, p) over models: the mean of `zs` weighted by layers − 3, with the models' own spread.

    The interval is the two-sided 95 % one of Student's t with (models − 1) degrees of freedom, `p` one-sided for rho > 0.
    """
    z, w = np.asarray(zs, float), np.maximum(np.asarray(layers, float) - 3, 0)
    if not w.sum():
        return (math.nan,) * 4
    w = w / w.sum()
    mean = float(w @ z)
    if len(z) < 2:
        return math.tanh(mean), math.nan, math.nan, math.nan
    variance = float((w * w) @ (z - mean) ** 2) * len(z) / (len(z) - 1)
    error, freedom = math.sqrt(variance), len(z) - 1
    if not error:
        return math.tanh(mean), math.tanh(mean), math.tanh(mean), float(mean <= 0)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return math.tanh(mean), math.tanh(mean - reach), math.tanh(mean + reach), float(stats.t.sf(mean / error, freedom))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN and is not counted."""
    order = sorted((i for i, v in enumerate(p) if not math.isnan(v)), key=lambda i: p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for position, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - position) * p[i]))
        adjusted[i] = highest
    return adjusted
