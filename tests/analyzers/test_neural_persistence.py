"""Spanning trees that can be drawn by hand, and those of a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.analyzers.neural_persistence import NeuralPersistenceAnalyzer, persistence, spanning_tree
from layerwise.errors import UsageError


def kruskal(matrix: Tensor) -> list[float]:
    """Edges from the strongest to the weakest, each that joins two components kept."""
    rows, columns = matrix.shape
    edges = sorted(((float(matrix[i, j].abs()), i, rows + j) for i in range(rows) for j in range(columns)), reverse=True)
    group = list(range(rows + columns))
    kept = []
    for strength, a, b in edges:
        if group[a] != group[b]:
            kept.append(strength)
            old = group[a]
            group = [group[b] if g == old else g for g in group]
    return kept


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [4, 1 << 21])
def test_the_tree_is_that_of_the_slow_twin_ties_included(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.analyzers.neural_persistence.BLOCK", block)
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(2 + seed % 7, 2 + seed % 5, generator=g)
    for matrix in (w, w.mul(2).round(), w.bfloat16(), w.T):
        assert np.allclose(np.sort(spanning_tree(matrix))[::-1], kruskal(matrix))


def test_a_hand_drawn_tree() -> None:
    w = torch.tensor([[1.0, -0.5], [0.1, 0.25]])  # joins at 1, 0.5, 0.25; the edge of 0.1 closes a ring
    assert persistence(w, 2) == pytest.approx(((0.5**2 + 0.75**2) / 3) ** 0.5)
    assert persistence(w, 1) == pytest.approx((0.5 + 0.75) / 3)


def test_equal_weights_and_zeros_have_no_persistence_and_one_strong_connection_almost_all() -> None:
    assert persistence(torch.full((4, 6), -3.0), 2) == 0.0
    assert persistence(torch.zeros(4, 6), 2) == 0.0
    one = torch.zeros(20, 30)
    one[3, 4] = 5.0
    assert persistence(one, 2) == pytest.approx((48 / 49) ** 0.5)


def test_neither_scale_nor_the_order_of_neurons_matters() -> None:
    w = torch.randn(9, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shuffled = w[torch.randperm(9)][:, torch.randperm(14)]
    for other in (7 * w, -w, w.T, shuffled):
        assert persistence(other, 2) == pytest.approx(persistence(w, 2), rel=1e-12)


def test_a_weight_that_is_not_finite_ends_in_no_score_and_no_endless_loop() -> None:
    assert np.isnan(persistence(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), 2))


def test_the_exponent_is_checked() -> None:
    for p in (0.5, float("inf"), float("nan"), "2"):
        with pytest.raises(UsageError, match="at least 1"):
            NeuralPersistenceAnalyzer(p=p)  # type: ignore[arg-type]
