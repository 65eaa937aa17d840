"""Shares of what lies below, and Spearman against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from layerwise.ranks import shares, spearman


def test_shares_run_from_0_to_1_and_ties_count_half() -> None:
    assert shares(np.array([5.0, 1.0, 3.0])).tolist() == [1.0, 0.0, 0.5]
    assert shares(np.array([2.0, 2.0, 1.0])).tolist() == [0.75, 0.75, 0.0]
    assert shares(np.array([7.0])).tolist() == [1.0]


def test_a_missing_value_has_no_share_and_takes_no_place() -> None:
    found = shares(np.array([5.0, math.nan, 3.0]))
    assert found[[0, 2]].tolist() == [1.0, 0.0]
    assert math.isnan(found[1])


def test_spearman_equals_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, 12).astype(float), rng.normal(size=12)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))
