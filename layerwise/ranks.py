"""Ranks and rank correlations: what methods in different units are compared and combined by."""

from __future__ import annotations

import math

import numpy as np


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last dimension, 1 the lowest, ties sharing their mean; a row with a NaN has none (all NaN).

    As ``scipy.stats.rankdata``, which costs 66 MB and half a second to load.
    """
    order = values.argsort(-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    places = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    begins, ends = np.ones((2, *values.shape), bool)
    begins[..., 1:] = ends[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    first = np.maximum.accumulate(np.where(begins, places, 0), -1)
    last = np.minimum.accumulate(np.where(ends, places, values.shape[-1])[..., ::-1], -1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return np.where(np.isnan(values).any(-1, keepdims=True), np.nan, ranks)


def shares(values: np.ndarray) -> np.ndarray:
    """The share of the other values that lie below each (ties count half), 0 … 1; 1 for a single value, NaN where it is NaN."""
    found = np.full(len(values), math.nan)
    known = np.isfinite(values)
    count = int(known.sum())
    found[known] = (mean_ranks(values[known]) - 1.0) / (count - 1) if count > 1 else 1.0
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN where one side is constant or there are < 2 values."""
    return float(spearman_rows(x[None], y[None])[0]) if len(x) > 1 else math.nan


def spearman_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`spearman` of each row of `x` with the same row of `y`, both (rows, values), all rows at once."""
    rx, ry = (mean_ranks(a) for a in (x, y))
    rx, ry = (a - a.mean(1, keepdims=True) for a in (rx, ry))
    scale = np.sqrt((rx * rx).sum(1) * (ry * ry).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (rx * ry).sum(1) / scale, np.nan)
