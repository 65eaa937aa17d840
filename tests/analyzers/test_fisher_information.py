"""Closed forms, the loop, batch-size invariance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.analyzers.fisher_information import FisherInformationAnalyzer
from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.task import Classification, Fidelity
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
