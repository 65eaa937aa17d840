"""Closed forms, the loop, batch-size invariance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.analyzers.fisher_information import FisherInformationAnalyzer
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.task import Classification, Fidelity, Task
from tests.models import CASES
from tests.replicas import sample_gradients


def logistic(samples: int) -> tuple[UniversalModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(samples, 5, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(5, 2, bias=False)).double()
    return UniversalModel(net, task=Fidelity(), example=Batch((x[:2],))), x


def test_logistic_regression_has_the_closed_form() -> None:
    """F = Σ_n p(1−p) x xᵀ for the difference of two logits; the softmax over both has trace 2 p(1−p)‖x‖²."""
    model, x = logistic(20_000)
    score = FisherInformationAnalyzer().analyze(model, Data.of([Batch((part,)) for part in x.split(5_000)]))
    p = model.module(x).softmax(-1)[:, 0].detach()
    expected = float((2 * p * (1 - p) * x.square().sum(1)).mean())
    entry = score.entries["0"]
    assert entry.value == pytest.approx(expected, abs=4 * entry.stderr)
    assert entry.stderr < 0.02 * expected


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "t5", "convnext", "encoder"])
def test_equals_the_loop_over_samples(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(5)
    model.see(batch)
    scores = FisherInformationAnalyzer().analyze(model, Data.of([batch]), seed=0)
    rows = sample_gradients(model, batch, seed=0)
    for layer in model.layers:
        expected = sum(float(g.double().square().sum()) for row in rows for g in row[layer.index]) / len(rows)
        assert scores[layer.name] == pytest.approx(expected, rel=1e-5)


def test_does_not_depend_on_the_batch_size() -> None:
    case = CASES["vit"]
    model, batch = case.model(Classification()), case.batch(12)
    found = [
        FisherInformationAnalyzer().analyze(model, Data.of([batch.narrow(i, min(i + size, 12)) for i in range(0, 12, size)]))
        for size in (1, 4, 5, 12)
    ]
    for scores in found[1:]:
        for name in scores:
            assert scores[name] == pytest.approx(found[0][name], rel=1e-5)


def test_per_parameter_divides_by_the_size() -> None:
    case = CASES["sequential"]
    whole = FisherInformationAnalyzer().analyze(case.model(), case.data())
    share = FisherInformationAnalyzer(per_parameter=True).analyze(case.model(), case.data())
    sizes = {x.name: x.parameters for x in case.model().layers}
    for name in whole:
        assert share[name] == pytest.approx(whole[name] / sizes[name], rel=1e-6)


def labelled_logistic(samples: int) -> tuple[UniversalModel, Batch, torch.Tensor, torch.Tensor]:
    model, x = logistic(samples)
    model.task = Classification()
    p = model.module(x).softmax(-1)[:, 1].detach()
    labels = (torch.rand(samples, generator=torch.Generator().manual_seed(1)) < 0.9).long()  # nothing like the model's
    return model, Batch((x,), {}, labels), x, p


def test_with_labels_the_true_fisher_has_its_closed_form_and_the_empirical_its_own() -> None:
    model, batch, x, p = labelled_logistic(20_000)
    data = Data.of([batch.narrow(i, i + 5_000) for i in range(0, 20_000, 5_000)])
    true = FisherInformationAnalyzer(kind="true").analyze(model, data).entries["0"]
    assert true.value == pytest.approx(float((2 * p * (1 - p) * x.square().sum(1)).mean()), abs=4 * true.stderr)
    assert true.stderr < 0.02 * true.value
    empirical = FisherInformationAnalyzer(kind="empirical").analyze(model, data)["0"]
    expected = float((2 * (p - batch.labels).square() * x.square().sum(1)).mean())
    assert empirical == pytest.approx(expected, rel=1e-6)
    assert abs(empirical - true.value) > 20 * true.stderr
    assert FisherInformationAnalyzer().analyze(model, data)["0"] == empirical


class Gaussian(Task):
    """y ~ N(output, 1): −log p = ½‖y − output‖², y drawn from the model."""

    name = "gaussian"
    quality = "loss"
    higher_is_better = False

    def figures(self, output: torch.Tensor, batch: Batch, reference: torch.Tensor | None) -> dict:
        return {"loss": (output.sum(-1), torch.ones(len(output)))}

    def likelihood(self, output: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        drawn = output.detach() + torch.randn(output.shape, generator=generator, dtype=output.dtype)
        return 0.5 * (drawn - output).square().sum(-1)


def test_linear_regression_with_unit_noise_has_the_trace_of_the_inputs_second_moment() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 5, dtype=torch.float64)
    model = UniversalModel(nn.Sequential(nn.Linear(5, 3, bias=False)).double(), task=Gaussian(), example=Batch((x[:2],)))
    entry = FisherInformationAnalyzer().analyze(model, Data.of([Batch((x,))])).entries["0"]
    assert entry.value == pytest.approx(3 * float(x.square().sum(1).mean()), abs=4 * entry.stderr)
    assert entry.stderr < 0.02 * entry.value


def test_the_true_fisher_of_a_model_without_labels_is_that_of_the_shared_sweep() -> None:
    model, x = logistic(50)
    data = Data.of([Batch((x,))])
    assert dict(FisherInformationAnalyzer(kind="true").analyze(model, data)) == dict(
        FisherInformationAnalyzer().analyze(model, data)
    )
    with pytest.raises(UsageError, match="needs labels"):
        FisherInformationAnalyzer(kind="empirical").analyze(model, data)


def test_answers_drawn_despite_labels_cost_a_sweep_of_their_own() -> None:
    case = CASES["vit"]
    model = case.model(Classification())
    statistic = FisherInformationAnalyzer(kind="true").statistic(model)
    seen = observe(model, case.data(4, 4), {"fisher_information": statistic})
    assert (seen.counts.forwards, seen.counts.backwards) == (2, 4)  # a backward more per batch: whose gradient is whose


@pytest.mark.parametrize("weighting", ["quantization", "direction"])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_weighted_by_a_rounding_it_equals_the_loop(name: str, weighting: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(4)
    model.see(batch)
    scores = FisherInformationAnalyzer(weighting=weighting, bits=3).analyze(model, Data.of([batch]))
    rows = sample_gradients(model, batch, seed=0)
    for layer in model.layers:
        weights = list(layer.module.parameters())
        total = 0.0
        for row in rows:
            pairs = [(g.double(), rounded(w, 3).double() - w.double()) for g, w in zip(row[layer.index], weights, strict=True)]
            if weighting == "quantization":
                total += sum(float(g.square().sum() * d.square().mean()) for g, d in pairs)
            else:
                total += sum(float((g * d).sum()) for g, d in pairs) ** 2
        assert scores[layer.name] == pytest.approx(total / len(rows), rel=1e-4, abs=1e-9)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Row by row to multiples of max|w| / (2^(bits − 1) − 1); vectors stay."""
    if weight.dim() < 2:
        return weight.detach()
    result = weight.detach().clone()
    for row in result:
        step = row.abs().max() / (2 ** (bits - 1) - 1)
        row.copy_((row / step).round() * step)
    return result


def test_along_the_rounding_it_is_twice_the_divergence_that_rounding_causes() -> None:
    model, x = logistic(20_000)
    data = Data.of([Batch((x,))])
    entry = FisherInformationAnalyzer(weighting="direction", bits=5).analyze(model, data).entries["0"]
    before = model.predict(x).log_softmax(-1)
    after = (x @ rounded(model.module[0].weight, 5).T).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert entry.value == pytest.approx(2 * divergence, rel=0.05, abs=4 * entry.stderr)
    assert entry.stderr < 0.1 * entry.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ture"}, "Did you mean 'true'"),
        ({"weighting": "quantisation"}, "Did you mean 'quantization'"),
        ({"bits": 1}, "2 to 16"),
        ({"per_parameter": True, "weighting": "direction"}, "plain trace"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FisherInformationAnalyzer(**settings)
