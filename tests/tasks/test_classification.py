"""Precision, recall and F1 of the whole data set, against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from layerwise.data import Batch
from layerwise.jackknife import GROUPS
from layerwise.task import Classification
from tests.tasks.splitting import SPLITS, evaluated


@pytest.mark.parametrize("sizes", SPLITS)
def test_macro_averages_are_those_of_scikit_learn_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(12, 5), torch.tensor([0, 1, 2, 2, 0, 1, 1, 0, 2, 2, 1, 0])  # 3 is answered only, 4 neither
    logits[:, 4] = -9
    predicted = logits.argmax(-1)
    means = evaluated(Classification(), logits, Batch((logits,), {}, labels), sizes).means()
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1_score", f1_score)):
        assert means[name] == pytest.approx(function(labels, predicted, average="macro", zero_division=0), abs=1e-12)
    assert 3 in predicted


def test_a_mean_over_batches_would_be_another_f1() -> None:
    logits, labels = torch.eye(2)[torch.tensor([0] * 6 + [1, 0, 0, 1, 1, 1])], torch.tensor([0] * 6 + [1] * 6)
    parts = [(logits[i], labels[i]) for i in (slice(6), slice(6, 12))]
    means = [evaluated(Classification(), x, Batch((x,), {}, y), (6,)).means()["f1_score"] for x, y in parts]
    assert means == pytest.approx([1.0, 0.4])  # one class right everywhere; then 4 of 6, and a class without a label
    whole = evaluated(Classification(), logits, Batch((logits,), {}, labels)).means()["f1_score"]
    assert whole == pytest.approx((12 / 14 + 8 / 10) / 2)


def test_the_standard_error_of_f1_is_about_its_spread_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    found, said = [], []
    for _ in range(60):
        labels = torch.randint(0, 3, (200,), generator=generator)
        logits = torch.randn(200, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3)
        evaluation = evaluated(Classification(), logits, Batch((logits,), {}, labels), (200,))
        found.append(evaluation.means()["f1_score"])
        said.append(evaluation.stderr()["f1_score"])
    assert len(said) > GROUPS
    assert float(torch.tensor(said).mean()) == pytest.approx(float(torch.tensor(found).std()), rel=0.25)
