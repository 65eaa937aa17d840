"""Errors and R² against scikit-learn; unknown labels do not count; end to end on a small network."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.tasks.regression import Regression
from tests.tasks.splitting import SPLITS, evaluated


@pytest.mark.parametrize("sizes", SPLITS)
def test_figures_are_those_of_scikit_learn_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(12, 2), torch.randn(12, 2) + 100
    means = evaluated(Regression(), outputs, Batch((outputs,), {}, labels), sizes).means()
    y, x = labels.double().numpy(), outputs.double().numpy()
    assert means["mse"] == pytest.approx(mean_squared_error(y, x), rel=1e-6)
    assert means["loss"] == pytest.approx(means["mse"] / 2, rel=1e-12)
    assert means["rmse"] == pytest.approx(mean_squared_error(y, x) ** 0.5, rel=1e-6)
    assert means["mae"] == pytest.approx(mean_absolute_error(y, x), rel=1e-6)
    assert means["r2"] == pytest.approx(r2_score(y, x), rel=1e-6)


@pytest.mark.parametrize("sizes", SPLITS)
def test_an_unknown_label_counts_nowhere(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(12, 2), torch.randn(12, 2)
    labels[3:10, 1] = math.nan
    means = evaluated(Regression(), outputs, Batch((outputs,), {}, labels), sizes).means()
    known = ~labels.isnan()
    assert means["mse"] == pytest.approx(float((outputs - labels)[known].square().mean()), rel=1e-6)
    columns = [r2_score(labels[known[:, i], i], outputs[known[:, i], i]) for i in range(2)]
    assert means["r2"] == pytest.approx(sum(columns) / 2, rel=1e-5)
    loss = Regression().likelihood(outputs.requires_grad_(), Batch((outputs,), {}, labels), torch.Generator())
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    assert torch.equal(gradient != 0, known)


def test_r2_of_a_column_that_never_varies_is_not_defined() -> None:
    outputs = torch.randn(12)
    assert math.isnan(evaluated(Regression(), outputs, Batch((outputs,), {}, torch.ones(12))).means()["r2"])


def test_shapes_that_do_not_fit_and_infinite_labels_are_refused() -> None:
    task, outputs = Regression(), torch.randn(3, 2)
    with pytest.raises(DataError, match=r"\(3, 2\) and \(3,\)"):
        task.losses(outputs, Batch((outputs,), {}, torch.randn(3)), None)
    with pytest.raises(DataError, match="needs labels"):
        task.losses(outputs, Batch((outputs,)), None)
    with pytest.raises(DataError, match=r"LW-D33 .*row 1"):
        task.check(Batch((outputs,), {}, torch.tensor([[0.0, 1], [torch.inf, 1], [0, 0]])), outputs)


def test_a_regression_is_analyzed_by_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(24, 4)
    data = Data.of([(x[:16], x[:16].sum(1)), (x[16:], x[16:].sum(1))])
    model = layerwise.load(network, task="regression")
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    errors = (network(x)[:, 0] - x.sum(1)).detach()
    assert report.task == "regression"
    assert report.metrics["rmse"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-5)
    skipped = model.layers[1]
    with torch.no_grad(), model.skipping([skipped.name]):
        worse = (network(x)[:, 0] - x.sum(1)).square().mean() / 2 - errors.square().mean() / 2
    assert report.scores["layer_ablation"][skipped.name] == pytest.approx(float(worse), rel=1e-4)
