"""Spectra whose ranks and tails are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerwise.analyzers.spectral_analysis import SpectralAnalyzer, effective_rank, eigenvalues, heavy_tail, matrices, stable_rank
from layerwise.model import UniversalModel
from layerwise.scores import Status
from tests.models import CASES, vectors


def test_an_orthogonal_matrix_uses_its_whole_rank_and_a_rank_one_matrix_the_least() -> None:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    one = torch.outer(torch.randn(16), torch.randn(9))
    assert effective_rank(eigenvalues(q)) == pytest.approx(1.0, abs=1e-10)
    assert stable_rank(eigenvalues(q)) == pytest.approx(16.0, abs=1e-9)
    assert effective_rank(eigenvalues(one)) == pytest.approx(1 / 9, rel=1e-4)
    assert stable_rank(eigenvalues(one)) == pytest.approx(1.0, rel=1e-6)


def test_eigenvalues_are_squared_singular_values() -> None:
    torch.manual_seed(0)
    w = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(eigenvalues(w), torch.linalg.svdvals(w).square().flip(0))


def test_hill_recovers_the_exponent_of_a_pareto_tail() -> None:
    alpha = 2.5
    u = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lam = u.pow(-1 / (alpha - 1)).sort().values  # density ~ λ^−α
    assert heavy_tail(lam) == pytest.approx(-alpha, rel=0.03)


def test_scale_changes_neither_rank_nor_tail() -> None:
    lam = eigenvalues(torch.randn(60, 80, generator=torch.Generator().manual_seed(0)))
    for measure in (effective_rank, stable_rank, heavy_tail):
        assert measure(100 * lam) == pytest.approx(measure(lam), rel=1e-9)


def test_a_fused_projection_is_split_into_its_three_parts() -> None:
    layer = CASES["vit"].model().layers[0]
    shapes = sorted(tuple(m.shape) for m in matrices(layer))
    assert shapes == [(32, 32)] * 4 + [(32, 128), (128, 32)]


def test_too_few_singular_values_give_no_tail() -> None:
    case = CASES["sequential"]
    scores = SpectralAnalyzer(measure="heavy_tail").analyze(case.model())
    assert {e.status for e in scores.entries.values()} == {Status.NOT_APPLICABLE}
    assert "fewer than 50" in scores.entries["0"].reason


def test_a_layer_is_the_mean_over_its_matrices_by_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)])
    net[0][2].weight.data = torch.outer(torch.randn(8), torch.randn(16))
    model = UniversalModel(net, example=vectors()(2))
    ranks = [effective_rank(eigenvalues(net[0][i].weight)) for i in (0, 2)]
    assert SpectralAnalyzer().analyze(model)[model.layers[0].name] == pytest.approx(sum(ranks) / 2, rel=1e-9)
    assert ranks[1] == pytest.approx(1 / 8, rel=1e-3)


def test_the_unit_is_that_of_the_measure() -> None:
    model = CASES["sequential"].model()
    units = {m: SpectralAnalyzer(measure=m).analyze(model).unit for m in ("effective_rank", "stable_rank")}
    assert units == {"effective_rank": "share of full rank", "stable_rank": "rank"}


def test_zero_weights_score_zero_not_nan() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].weight.data.zero_()
    score = SpectralAnalyzer().analyze(UniversalModel(net, example=vectors()(2)))["0"]
    assert score == 0.0
    assert math.isfinite(score)
