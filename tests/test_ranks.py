"""Shares of what lies below, and Spearman against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from layerwise.ranks import mean_ranks, shares, spearman


def test_mean_ranks_equal_scipys_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    for shape, most in (((7,), 4), ((5, 30), 6), ((3, 40), 10_000), ((2, 1), 2), ((0,), 2), ((2, 3, 9), 5)):
        values = rng.integers(0, most, shape).astype(float)
        np.testing.assert_array_equal(mean_ranks(values), stats.rankdata(values, axis=-1))
    gap = np.array([[1.0, math.nan, 2.0], [2.0, 1.0, 2.0]])
    np.testing.assert_array_equal(mean_ranks(gap), stats.rankdata(gap, axis=-1))


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
