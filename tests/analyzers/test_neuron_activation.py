"""Activation statistics against closed forms, a slow twin, and what cancellation would destroy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kurtosis
from torch import Tensor, nn

from layerwise.analyzer import ANALYZERS
from layerwise.analyzers.neuron_activation import UNITS, NeuronActivationAnalyzer, effective_rank, eigenvalues
from layerwise.analyzers.neuron_activation import participation_ratio as ratio
from layerwise.covariance import Covariance, moments_of
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Scores, Status
from layerwise.task import Classification
from layerwise.unit_moments import joined_units, unit_moments
from tests.models import CASES


class Emits(nn.Module):
    """A layer that owns two matrices and gives relu(x) or x: its branch is known in closed form."""

    def __init__(self, function: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = (nn.Parameter(torch.eye(width, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(x @ self.a @ self.b)


def scored(function: nn.Module, x: Tensor, **settings: object) -> Scores:
    net = nn.Sequential(Emits(function, x.shape[-1]), Emits(nn.Identity(), x.shape[-1]))
    model = UniversalModel(net, task=Classification(), example=Batch((x[:2],)))
    return NeuronActivationAnalyzer(**settings).analyze(model, Data.of([x[:30], x[30:]]))


@pytest.mark.parametrize(
    ("measure", "expected"), [("activity", 0.5), ("magnitude", 1 / math.sqrt(2 * math.pi)), ("variance", 0.5 - 0.5 / math.pi)]
)
def test_a_rectified_gaussian_has_its_closed_form_within_the_error(measure: str, expected: float) -> None:
    torch.manual_seed(0)
    entry = scored(nn.ReLU(), torch.randn(4000, 8, dtype=torch.float64), measure=measure).entries["0"]
    assert 0.001 < entry.stderr < 0.01  # √(1/4 / 32,000) is 0.0028
    assert abs(entry.value - expected) < 4 * entry.stderr


def test_white_features_use_every_dimension_and_a_copied_one_adds_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 8, dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0))[0]
    values = eigenvalues(moments_of(white))
    assert ratio(values) == pytest.approx(8, rel=1e-9)
    assert effective_rank(values) == pytest.approx(8, rel=1e-9)
    twice = eigenvalues(moments_of(torch.cat([white, white], 1)))
    assert ratio(twice) == pytest.approx(8, rel=1e-9)
    assert effective_rank(eigenvalues(moments_of(torch.ones(9, 3)))) == 0.0 == ratio(torch.zeros(3, dtype=torch.float64))


def test_the_ranks_of_a_layer_are_those_of_its_branch() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64) * torch.arange(1, 9)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    found = scored(nn.Identity(), x, measure="participation_ratio")
    assert found["0"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-9)
    share = values / values.sum()
    assert scored(nn.Identity(), x, measure="effective_rank")["0"] == pytest.approx(
        float((-(share * share.log()).sum()).exp()), rel=1e-9
    )
    assert found.entries["0"].stderr > 0


def test_moments_merge_like_one_pass_and_a_large_mean_costs_no_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64).exp() + 1e8
    w = (torch.rand(300) > 0.3).double()
    parts = [unit_moments(x[i : i + 77], w[i : i + 77], 1e-6) for i in range(0, 300, 77)]
    total = torch.zeros(8, 4, dtype=torch.float64)
    for part in parts:
        total = joined_units(total, part)
    kept = x[w.bool()]
    assert torch.allclose(total[2] / total[0], kept.var(0, unbiased=False), rtol=1e-6)
    excess = total[0] * total[4] / total[2] ** 2 - 3
    assert torch.allclose(excess, torch.from_numpy(kurtosis((kept - 1e8).numpy())), rtol=1e-6)
    skew = total[3] / total[0] / (total[2] / total[0]) ** 1.5
    centred = kept - kept.mean(0)
    assert torch.allclose(skew, centred.pow(3).mean(0) / centred.square().mean(0) ** 1.5, rtol=1e-6)
    assert torch.equal(total[7], kept.amax(0))


def test_covariances_merge_like_one_pass_and_blank_ones_are_neutral() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 5, dtype=torch.float64) + 1e7
    parts, blank = Covariance(2), Covariance(2)
    parts.merge_(blank)
    assert not parts.mean.numel()
    parts.add_(0, x[:20])
    parts.add_(1, x[20:])
    before = parts.scatter.clone()
    parts.merge_(blank)
    assert torch.equal(parts.scatter, before)
    count, mean, scatter = parts.total()
    assert float(count) == 50
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(scatter / 49, torch.cov(x.T), rtol=1e-7, atol=1e-9)
    assert torch.allclose(parts.total(without=0)[2] / 29, torch.cov(x[20:].T), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("measure", sorted(UNITS))
def test_a_slow_twin_agrees_with_padding_left_out(measure: str) -> None:
    case = CASES["bert"]
    model, batch = case.model(Classification()), case.batch(6)
    keep = batch.kwargs["attention_mask"].bool()
    scores = NeuronActivationAnalyzer(measure=measure, epsilon=0.02, outlier=1.5).analyze(model, Data.of([batch]))
    with model.capture([x.name for x in model.layers]) as seen:
        model.predict(batch)
    for name, (entering, leaving) in seen.items():
        a, stream = (leaving - entering)[keep].double(), entering[keep].double()
        assert scores[name] == pytest.approx(twin(measure, a, stream), rel=1e-5), name


def twin(measure: str, a: Tensor, stream: Tensor) -> float:
    rms = a.square().mean(0).sqrt()
    values = torch.linalg.eigvalsh(torch.cov(a.T)).clamp_min(0)
    share = values / values.sum()
    found = {
        "contribution": lambda: a.square().mean().sqrt() / stream.square().mean().sqrt(),
        "magnitude": lambda: a.abs().mean(),
        "variance": lambda: a.var(0, unbiased=False).mean(),
        "activity": lambda: (a.abs() >= 0.02).double().mean(),
        "alive": lambda: (a.abs() >= 0.02).any(0).double().mean(),
        "kurtosis": lambda: kurtosis(a.numpy()).mean(),
        "peak": lambda: a.abs().max(),
        "outliers": lambda: (rms > 1.5 * rms.mean()).double().mean(),
        "effective_rank": lambda: torch.special.entr(share).sum().exp(),
        "participation_ratio": lambda: values.sum() ** 2 / values.square().sum(),
    }[measure]()
    return float(found)


@pytest.mark.parametrize("measure", sorted(set(UNITS) - {"contribution"}))
def test_states_merge_and_come_back(measure: str) -> None:
    case, analyzer = CASES["vit"], NeuronActivationAnalyzer(measure=measure)
    model = case.model(Classification())
    whole, left, right, loaded = (analyzer.statistic(model) for _ in range(4))
    batches = [case.batch(3), case.batch(4)]
    for statistic, part in ((whole, batches), (left, batches[:1]), (right, batches[1:])):
        observe(model, Data.of(part), {"x": statistic})
    left.merge_(right)
    loaded.load_(left.state())
    found, expected = (analyzer.finish(model, s, 0) for s in (loaded, whole))
    assert len(expected.usable()) == 4
    assert dict(found) == pytest.approx(dict(expected), rel=1e-9)
    assert found.samples == 7


def test_channels_are_the_units_of_a_map() -> None:
    case = CASES["resnet"]
    model = case.model(Classification())
    statistic = NeuronActivationAnalyzer(measure="magnitude").statistic(model)
    observe(model, case.data(3), {"x": statistic})
    assert statistic.sums[0].shape[-1] == 64
    assert float(statistic.total(0)[0, 0]) == 3 * 8 * 8


def test_one_forward_and_no_backward() -> None:
    case = CASES["vit"]
    model = case.model()
    seen = observe(model, case.data(4, 4), {"x": NeuronActivationAnalyzer().statistic(model)})
    assert (seen.counts.forwards, seen.counts.backwards) == (2, 0)


def test_too_many_units_for_a_scatter_matrix_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.analyzers.neuron_activation.WIDEST", 6)
    entry = scored(nn.ReLU(), torch.randn(40, 8, dtype=torch.float64), measure="effective_rank").entries["0"]
    assert entry.status is Status.NOT_APPLICABLE
    assert "8 units" in entry.reason


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="magnitude"):
        ANALYZERS["neuron_activation"](measure="magnitud")
    with pytest.raises(UsageError, match="epsilon"):
        NeuronActivationAnalyzer(epsilon=0.0)
