"""Spectra whose ranks and tails are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerwise.analyzers.spectral_analysis import (
    MEASURES,
    SpectralAnalyzer,
    alpha,
    alpha_peak,
    effective_rank,
    eigenvalues,
    hill,
    mp_soft_rank,
    power_law,
    stable_rank,
)
from layerwise.model import UniversalModel
from layerwise.scores import Status
from layerwise.zeroshot import matrices
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
    assert hill(lam) == pytest.approx(-alpha, rel=0.03)


def test_scale_changes_neither_rank_nor_tail() -> None:
    lam = eigenvalues(torch.randn(60, 80, generator=torch.Generator().manual_seed(0)))
    for measure in (effective_rank, stable_rank, hill, alpha, alpha_peak):
        assert measure(100 * lam) == pytest.approx(measure(lam), rel=1e-9)


def test_a_fused_projection_is_split_into_its_three_parts() -> None:
    layer = CASES["vit"].model().layers[0]
    shapes = sorted(tuple(m.shape) for _, tensor in layer.tensors() for m in matrices(tensor))
    assert shapes == [(32, 32)] * 4 + [(32, 128), (128, 32)]


def test_too_few_singular_values_give_no_tail() -> None:
    case = CASES["sequential"]
    scores = SpectralAnalyzer(measure="hill").analyze(case.model())
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


def pareto(exponent: float, count: int) -> torch.Tensor:
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return u.pow(-1 / (exponent - 1)).sort().values  # density ~ λ^−exponent above 1


def test_the_fit_recovers_the_exponent_and_the_beginning_of_a_pareto_tail() -> None:
    g = torch.Generator().manual_seed(1)
    body = torch.rand(1500, dtype=torch.float64, generator=g)  # below 1 no power law
    fit = power_law(torch.cat([body, pareto(2.5, 1500)]).sort().values)
    assert fit.alpha == pytest.approx(2.5, abs=0.15)
    assert 0.8 < fit.xmin < 1.5
    assert fit.distance < 0.05


def slow_power_law(lam: torch.Tensor) -> tuple[float, float, float]:
    """Clauset's fit as it is written: one candidate after the other."""
    best = (math.inf, 0.0, 0.0)
    values = [float(x) for x in lam]
    for i, xmin in enumerate(values[:-1]):
        tail = values[i:]
        exponent = 1 + len(tail) / sum(math.log(x / xmin) for x in tail)
        distance = max(abs(1 - (x / xmin) ** (1 - exponent) - j / len(tail)) for j, x in enumerate(tail))
        best = min(best, (distance, exponent, xmin))
    return best


def test_the_fit_is_that_of_the_slow_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    lam = eigenvalues(torch.randn(70, 90, generator=torch.Generator().manual_seed(0)))
    for block in (64, 1 << 21):  # one candidate at a time, and all at once
        monkeypatch.setattr("layerwise.analyzers.spectral_analysis.BLOCK", block)
        fit = power_law(lam)
        assert (fit.distance, fit.alpha, fit.xmin) == pytest.approx(slow_power_law(lam), rel=1e-9)


def test_the_fit_is_weightwatchers() -> None:
    powerlaw = pytest.importorskip("weightwatcher.WW_powerlaw")
    for shape in ((64, 64), (100, 200), (192, 768)):
        g = torch.Generator().manual_seed(shape[0])
        lam = eigenvalues(torch.randn(*shape, generator=g) * torch.rand(shape[1], generator=g).pow(-0.5))
        theirs = powerlaw.WWFit(lam.numpy())
        assert power_law(lam)[:3] == pytest.approx((theirs.alpha, theirs.xmin, theirs.D), rel=1e-9)


def test_a_random_matrix_ends_at_the_marchenko_pastur_edge_and_a_spike_beyond_it() -> None:
    w = torch.randn(300, 900, generator=torch.Generator().manual_seed(0))
    lam = eigenvalues(w)
    assert float(lam[-1]) / 900 == pytest.approx((1 + math.sqrt(1 / 3)) ** 2, rel=0.03)
    assert mp_soft_rank(lam, 1 / 3) == pytest.approx(1.0, abs=0.03)
    assert mp_soft_rank(eigenvalues(w + 1), 1 / 3) < 0.05


def test_rounding_noise_is_no_tail() -> None:
    g = torch.Generator().manual_seed(0)
    low_rank = torch.randn(80, 20, generator=g, dtype=torch.float64) @ torch.randn(20, 90, generator=g, dtype=torch.float64)
    assert math.isnan(power_law(eigenvalues(low_rank)).alpha)


def test_the_gram_matrix_is_summed_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(40, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = eigenvalues(w)
    monkeypatch.setattr("layerwise.zeroshot.BLOCK", 40)
    torch.testing.assert_close(eigenvalues(w), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_every_measure_scores_a_layer_that_is_large_enough(measure: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(60, 80), nn.ReLU(), nn.Linear(80, 60)) for _ in range(2)])
    scores = SpectralAnalyzer(measure=measure).analyze(UniversalModel(net, example=vectors(60)(2)))  # type: ignore[arg-type]
    assert all(math.isfinite(value) for value in scores.values())
