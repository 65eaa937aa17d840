"""Areas under curves of scored answers."""

from __future__ import annotations

import math

import numpy as np

from layerwise.ranks import mean_ranks


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive one has the higher score, ties counting half.

    `scores` (n,), `positive` (n,) bool. NaN where all are of one kind: there is no pair.
    """
    hits = int(positive.sum())
    others = len(positive) - hits
    if not hits or not others:
        return math.nan
    return float((mean_ranks(scores)[positive].sum() - hits * (hits + 1) / 2) / (hits * others))
