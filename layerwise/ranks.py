"""Ranks and rank correlations: what methods in different units are compared and combined by."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata


def shares(values: np.ndarray) -> np.ndarray:
    """The share of the other values that lie below each (ties count half), 0 … 1; 1 for a single value, NaN where it is NaN."""
    found = np.full(len(values), math.nan)
    known = np.isfinite(values)
    count = int(known.sum())
    found[known] = (rankdata(values[known]) - 1.0) / (count - 1) if count > 1 else 1.0
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN where one side is constant or there are < 2 values."""
    return float(spearman_rows(x[None], y[None])[0]) if len(x) > 1 else math.nan


def spearman_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`spearman` of each row of `x` with the same row of `y`, both (rows, values), all rows at once."""
    rx, ry = (rankdata(a, axis=1) for a in (x, y))
    rx, ry = (a - a.mean(1, keepdims=True) for a in (rx, ry))
    scale = np.sqrt((rx * rx).sum(1) * (ry * ry).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (rx * ry).sum(1) / scale, np.nan)
