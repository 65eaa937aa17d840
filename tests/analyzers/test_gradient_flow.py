"""Gradient norms and gains of linear nets in closed form, and slow twins for the rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.gradient_flow import UNITS, GradientFlowAnalyzer
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification
from tests.models import CASES, vectors
from tests.replicas import sample_gradients


class Turn(nn.Module):
    """x → gain · x Q, Q orthogonal."""

    def __init__(self, gain: float, width: int = 6) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
        self.a = nn.Parameter(gain * q)
        self.b = nn.Parameter(torch.eye(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b


def turns(*gains: float) -> tuple[UniversalModel, Data]:
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    labels = torch.arange(40) % 6
    model = UniversalModel(nn.Sequential(*map(Turn, gains)), task=Classification(), example=Batch((x[:2],)))
    return model, Data.of([(x[:25], labels[:25]), (x[25:], labels[25:])])


def test_orthogonal_layers_pass_the_norm_on_and_scaled_ones_scale_it() -> None:
    model, data = turns(1.0, 1.0, 1.0, 1.0)
    flat = list(GradientFlowAnalyzer().analyze(model, data).values())
    assert flat == pytest.approx([flat[0]] * 4, rel=1e-6)
    model, data = turns(0.5, 0.5, 0.5, 0.5)
    norms = list(GradientFlowAnalyzer().analyze(model, data).values())
    assert norms == pytest.approx([norms[-1] * 0.5 ** (3 - i) for i in range(4)], rel=1e-6)
    ratios = GradientFlowAnalyzer(measure="log_ratio").analyze(model, data)
    assert list(ratios.values())[1:] == pytest.approx([math.log(0.5)] * 3, rel=1e-6)
    assert ratios.entries["0"].status is Status.NOT_APPLICABLE


def test_the_jacobian_gain_of_a_linear_map_is_its_norm_within_the_error() -> None:
    model, _ = turns(1.0, 3.0)
    x = Data.of([torch.randn(2000, 6, dtype=torch.float64)])
    scores = GradientFlowAnalyzer(measure="jacobian_gain", probes=2).analyze(model, x)
    for name, exact in (("0", 1.0), ("1", 3.0)):
        assert abs(scores[name] - exact) < 4 * scores.entries[name].stderr
        assert scores.entries[name].stderr < 0.03


def test_the_jacobian_gain_of_a_block_is_that_of_its_own_jacobian() -> None:
    case = CASES["vit"]
    model, batch = case.model(), case.batch(2)
    scores = GradientFlowAnalyzer(measure="jacobian_gain", probes=150).analyze(model, Data.of([batch]))
    with model.capture([x.name for x in model.layers]) as seen:
        model.predict(batch)
    for layer in model.layers:
        entering = seen[layer.name][0][:1]
        jacobian = torch.autograd.functional.jacobian(layer.module, entering).double()
        other = torch.autograd.functional.jacobian(layer.module, seen[layer.name][0][1:]).double()
        exact = math.sqrt(float(jacobian.square().sum() + other.square().sum()) / (2 * entering.numel()))
        assert scores[layer.name] == pytest.approx(exact, rel=0.05)


def test_norms_are_taken_before_the_mean() -> None:
    case = CASES["residual"]
    model, batch = case.model(Classification()), case.batch(7)
    scores = GradientFlowAnalyzer(measure="update_ratio").analyze(model, Data.of([batch]))
    per_sample = sample_gradients(model, batch, seed=0)
    for layer in model.layers:
        norms = [math.sqrt(sum(float(g.double().square().sum()) for g in row[layer.index])) for row in per_sample]
        size = math.sqrt(sum(float(p.double().square().sum()) for p in layer.module.parameters()))
        assert scores[layer.name] == pytest.approx(sum(norms) / 7 / size, rel=1e-5)


def test_the_signal_to_noise_of_one_batch_is_that_of_all_pairs() -> None:
    case = CASES["residual"]
    model, batch = case.model(Classification()), case.batch(7)
    scores = GradientFlowAnalyzer(measure="signal_to_noise").analyze(model, Data.of([batch]))
    rows = sample_gradients(model, batch, seed=0)
    for layer in model.layers:
        g = torch.stack([torch.cat([p.flatten() for p in row[layer.index]]) for row in rows]).double()
        trace = float(g.var(0).sum())
        signal = float(g.mean(0).square().sum()) - trace / 7  # without the part that is noise
        assert scores[layer.name] == pytest.approx(signal / trace, rel=1e-4)


def test_the_signal_to_noise_error_is_that_of_repeated_draws() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = UniversalModel(net, task=Classification(), example=vectors()(2))

    def draw() -> Data:
        return Data.of([(torch.randn(8, 8), torch.randint(0, 3, (8,))) for _ in range(25)])

    found = [GradientFlowAnalyzer(measure="signal_to_noise").analyze(model, draw()).entries["0"] for _ in range(30)]
    spread = float(torch.tensor([e.value for e in found]).std())
    assert sum(e.stderr for e in found) / 30 == pytest.approx(spread, rel=0.4)


@pytest.mark.parametrize(("measure", "cost"), [("norm", (2, 2)), ("update_ratio", (2, 3)), ("jacobian_gain", (2, 6))])
def test_the_cost_in_passes(measure: str, cost: tuple[int, int]) -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    seen = observe(model, case.data(3, 3), {"x": GradientFlowAnalyzer(measure=measure, probes=3).statistic(model)})
    assert (seen.counts.forwards, seen.counts.backwards) == cost


@pytest.mark.parametrize("measure", sorted(UNITS))
def test_every_measure_merges_and_names_every_layer(measure: str) -> None:
    case, analyzer = CASES["t5"], GradientFlowAnalyzer(measure=measure)
    model = case.model()
    scores = analyzer.analyze(model, case.data(4, 3))
    assert len(scores.usable()) == (4 if measure == "log_ratio" else 6)  # the first of each stack has no forerunner
    assert all(e.stderr > 0 for e in scores.entries.values() if e.status is Status.OK)
    assert scores.unit == UNITS[measure]


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="log_ratio"):
        GradientFlowAnalyzer(measure="log_ration")
    with pytest.raises(UsageError, match="probe"):
        GradientFlowAnalyzer(probes=0)
