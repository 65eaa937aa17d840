"""Areas under the ROC curve against scikit-learn, with unknown labels and ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.tasks.multi_label import MultiLabel
from tests.tasks.splitting import SPLITS, evaluated


def outputs_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=generator).mul(2).round()  # ties
    labels = torch.randint(0, 2, (12, 3), generator=generator).float()
    labels[torch.rand(12, 3, generator=generator) < 0.25] = math.nan
    return logits, labels


@pytest.mark.parametrize("sizes", SPLITS)
def test_figures_are_those_of_the_known_labels_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    logits, labels = outputs_and_labels()
    means = evaluated(MultiLabel(), logits, Batch((logits,), {}, labels), sizes).means()
    known = ~labels.isnan()
    columns = [roc_auc_score(labels[known[:, i], i], logits[known[:, i], i]) for i in range(3)]
    assert means["auc"] == pytest.approx(sum(columns) / 3, abs=1e-12)
    assert means["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits[known], labels[known])), rel=1e-6)
    assert means["accuracy"] == pytest.approx(float(((logits > 0).float() == labels)[known].float().mean()), rel=1e-6)


def test_a_question_with_one_kind_of_answer_has_no_area_and_does_not_count() -> None:
    logits, labels = outputs_and_labels()
    known = ~labels[:, 0].isnan()
    labels[:, 1], labels[:, 2] = 1.0, math.nan
    means = evaluated(MultiLabel(), logits, Batch((logits,), {}, labels)).means()
    assert means["auc"] == pytest.approx(roc_auc_score(labels[known, 0], logits[known, 0]), abs=1e-12)
    assert math.isnan(evaluated(MultiLabel(), logits, Batch((logits,), {}, torch.ones(12, 3))).means()["auc"])


def test_a_label_that_is_no_answer_names_its_row() -> None:
    with pytest.raises(DataError, match=r"LW-D34 .*row 1"):
        MultiLabel().check(Batch((), {}, torch.tensor([[0.0, 1], [2, 1]])), torch.randn(2, 2))


def test_several_questions_are_analyzed_by_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    _, labels = outputs_and_labels()
    inputs = torch.randn(12, 4)
    report = layerwise.analyze(
        layerwise.load(network, task="multi_label"), Data.of([(inputs, labels)]), ["gradient_based", "layer_ablation"]
    )
    known = ~labels.isnan()
    expected = F.binary_cross_entropy_with_logits(network(inputs).detach()[known], labels[known])
    assert report.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert all(math.isfinite(v) for v in report.scores["gradient_based"].usable().values())
