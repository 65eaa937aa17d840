"""One class per token: means over labelled tokens, macro averages against scikit-learn, batches of different widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.evaluation import Evaluation
from layerwise.task import TokenClassification
from tests.tasks.splitting import SPLITS, evaluated


def tagged() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (12, 7), generator=generator)
    labels[torch.rand(12, 7, generator=generator) < 0.3] = -100
    return torch.randn(12, 7, 3, generator=generator), labels


@pytest.mark.parametrize("sizes", SPLITS)
def test_figures_are_those_of_all_labelled_tokens_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    logits, labels = tagged()
    means = evaluated(TokenClassification(), logits, Batch((logits,), {}, labels), sizes).means()
    keep = labels != -100
    assert means["f1_score"] == pytest.approx(f1_score(labels[keep], logits.argmax(-1)[keep], average="macro"), abs=1e-12)
    assert means["loss"] == pytest.approx(float(F.cross_entropy(logits.transpose(1, 2), labels)), rel=1e-6)
    assert means["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels)[keep].double().mean()), abs=1e-12)


def test_batches_may_be_padded_to_different_widths() -> None:
    logits, labels = tagged()
    labels[6:, 4:] = -100
    evaluation = Evaluation(TokenClassification())
    for rows, width in ((slice(6), 7), (slice(6, 12), 4)):
        evaluation.add(logits[rows, :width], Batch((), {}, labels[rows, :width]), None)
    whole = evaluated(TokenClassification(), logits, Batch((logits,), {}, labels)).means()
    assert evaluation.means() == pytest.approx(whole, rel=1e-12)


def test_a_tag_outside_the_classes_names_its_row() -> None:
    with pytest.raises(DataError, match=r"LW-D34 .*row 1 .*labelled 3"):
        TokenClassification().check(Batch((), {}, torch.tensor([[0, -100], [3, 1]])), torch.randn(2, 2, 3))


def test_a_tagger_is_known_by_its_labels_and_analyzed() -> None:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    module = BertForTokenClassification(config).eval()
    ids, (_, labels) = torch.randint(0, 50, (12, 7)), tagged()
    report = layerwise.analyze(
        layerwise.load(module), Data.of([{"input_ids": ids, "labels": labels}]), ["gradient_based", "layer_ablation"]
    )
    assert report.task == "token_classification"
    with torch.no_grad():
        assert report.metrics["loss"] == pytest.approx(float(module(input_ids=ids, labels=labels).loss), rel=1e-5)
