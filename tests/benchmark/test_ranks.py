"""The statistics against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from layerwise.benchmark import ranks


def test_partial_correlation_of_one_covariate_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 12))
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert ranks.partial_spearman(x, y, [z]) == pytest.approx(expected, abs=1e-12)


def test_partial_correlation_of_two_covariates_comes_from_the_inverse_correlation_matrix() -> None:
    table = np.random.default_rng(1).normal(size=(4, 15))
    inverse = np.linalg.inv(stats.spearmanr(table, axis=1).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert ranks.partial_spearman(table[0], table[1], list(table[2:])) == pytest.approx(expected, abs=1e-12)


def test_a_covariate_that_does_not_vary_costs_no_degree_of_freedom() -> None:
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(size=(3, 5))
    assert math.isfinite(ranks.partial_spearman(x, y, [z, np.ones(5)]))
    assert math.isnan(ranks.partial_spearman(x, y, [z, rng.normal(size=5)]))


def test_nothing_is_left_of_depth_given_depth() -> None:
    depth = np.arange(8.0)
    assert math.isnan(ranks.partial_spearman(-depth, np.random.default_rng(0).normal(size=8), [depth]))


def test_kendall_is_that_of_scipy_with_ties() -> None:
    x, y = np.array([1, 1, 2, 3, 4.0]), np.array([2, 1, 1, 4, 3.0])
    assert ranks.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_permutation_p_of_a_perfect_order_is_one_in_n_factorial() -> None:
    x = np.arange(5.0)
    p = ranks.permutation_p(x, x, 20_000, np.random.default_rng(0))
    assert p == pytest.approx(1 / 120, abs=0.003)
    assert ranks.permutation_p(x, -x, 100, np.random.default_rng(0)) == 1.0
    assert ranks.permutation_p(np.ones(5), x, 100, np.random.default_rng(0)) == 1.0


def test_bootstrap_damages_scatter_by_the_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=(2, 400))
    draws = ranks.resampled(values, np.ones(400), 4_000, np.random.default_rng(0))
    assert draws.mean(0) == pytest.approx(values.mean(1), abs=0.005)
    assert draws.std(0) == pytest.approx(values.std(1) / 20, rel=0.05)


def test_reliability_is_high_for_clear_differences_and_low_for_noise() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(8, 200))
    clear = noise + np.arange(8)[:, None]
    assert ranks.reliability(clear, np.ones(200), 20, rng) > 0.99
    assert ranks.reliability(noise, np.ones(200), 20, rng) < 0.7
    assert ranks.spearman_brown(0.5) == pytest.approx(2 / 3)


def test_combining_models_weighs_them_by_their_layers() -> None:
    rho, low, high, p = ranks.combined([ranks.fisher_z(0.9), ranks.fisher_z(0.1)], [13, 4])
    assert rho == pytest.approx(math.tanh((10 * math.atanh(0.9) + math.atanh(0.1)) / 11))
    assert low < rho < high
    assert 0 < p < 0.5
    zs = [0.3, 0.5, 0.8, 0.2]
    assert ranks.combined(zs, [9] * 4)[3] == pytest.approx(stats.ttest_1samp(zs, 0, alternative="greater").pvalue)


def test_holm_by_hand() -> None:
    assert ranks.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
