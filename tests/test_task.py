"""Losses and metrics as exact weighted means; fidelity; what a task refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from layerwise.data import Batch, Data
from layerwise.errors import DataError, UsageError
from layerwise.evaluation import Evaluation
from layerwise.measure import evaluate
from layerwise.task import Classification, Fidelity, LanguageModelling, cosine_distance, suited_task, task_named
from tests.models import CASES


def test_classification_means_are_those_of_all_samples_whatever_the_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(11, 4), torch.randint(0, 4, (11,))
    evaluation = Evaluation(Classification())
    for a, b in ((0, 3), (3, 10), (10, 11)):
        evaluation.add(logits[a:b], Batch((logits[a:b],), {}, labels[a:b]), None)
    losses = F.cross_entropy(logits, labels, reduction="none")
    hits = (logits.argmax(-1) == labels).double()
    means = {name: evaluation.means()[name] for name in ("loss", "accuracy")}
    assert means == pytest.approx({"loss": float(losses.mean()), "accuracy": float(hits.mean())}, rel=1e-6)
    expected = {"loss": float(losses.double().std()) / 11**0.5, "accuracy": float(hits.std()) / 11**0.5}
    assert {name: evaluation.stderr()[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert evaluation.samples == 11


def test_perplexity_is_per_token_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 2:] = 0
    evaluation = Evaluation(LanguageModelling())
    for row in range(3):
        part = slice(row, row + 1)
        evaluation.add(logits[part], Batch((), {"input_ids": ids[part], "attention_mask": mask[part]}), None)
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")[mask[:, 1:].bool()]
    assert len(nll) == 11
    assert evaluation.means()["perplexity"] == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
    low, high = evaluation.means()["perplexity"], evaluation.stderr()["perplexity"]
    assert 0 < high < low


def test_fidelity_of_a_model_to_itself_is_exactly_nothing() -> None:
    x = torch.randn(5, 7)
    for kind in ("kl", "cosine"):
        loss, _ = Fidelity(kind).losses(x, Batch((x,)), x)
        assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_of_images_the_channels_are_compared_pixel_by_pixel(kind: str) -> None:
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    rows = [t.flatten(2).transpose(1, 2) for t in (x, y)]  # (samples, pixels, channels)
    for found, wanted in zip(
        Fidelity(kind).losses(x, Batch((x,)), y), Fidelity(kind).losses(rows[0], Batch((x,)), rows[1]), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    drawn = [Fidelity(kind).likelihood(t, Batch((x,)), torch.Generator().manual_seed(0)) for t in (x, rows[0])]
    torch.testing.assert_close(drawn[0], drawn[1])


def test_kl_is_the_divergence_from_the_reference() -> None:
    p, q = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    loss, _ = Fidelity().losses(q, Batch((q,)), p)
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 1)])
def test_one_number_per_row_is_compared_by_its_square_and_not_as_a_class(shape: tuple[int, ...]) -> None:
    """A softmax over one class is always 1: every layer of a regressor would seem safe to drop."""
    output, reference = torch.randn(shape), torch.randn(shape)
    values, weights = Fidelity().losses(output, Batch((torch.ones(3, 2),)), reference)
    assert torch.allclose(values, (output - reference).double().square().reshape(3, -1).sum(1) / 2, atol=1e-6)
    assert weights.tolist() == [output[0].numel()] * 3
    output.requires_grad_()
    likelihood = Fidelity().likelihood(output, Batch((torch.ones(3, 2),)), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(likelihood.sum(), output)
    noise = torch.randn((3, 1) if shape == (3,) else shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gradient, -noise.reshape(shape), atol=1e-5)  # a Gaussian's score


def test_a_class_that_a_model_rules_out_gives_no_nan() -> None:
    p, q = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[1.0, 1.0, -torch.inf]])
    loss, _ = Fidelity().losses(q, Batch((q,)), p)
    assert torch.isfinite(loss).all()


def test_cosine_distance_is_one_minus_the_cosine_and_never_negative() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1000, 3), torch.randn(1000, 3)
    torch.testing.assert_close(cosine_distance(x, y), 1 - F.cosine_similarity(x.double(), y.double()))
    assert float(cosine_distance(x, x * 3).min()) >= 0
    assert float(cosine_distance(x, x).max()) == 0


@pytest.mark.parametrize(("label", "row"), [(7, 2), (-1, 2)])
def test_a_label_outside_the_classes_names_its_row(label: int, row: int) -> None:
    labels = torch.tensor([0, 1, label])
    with pytest.raises(DataError, match=rf"LW-D34 .*Label {label} in row {row} .*3 classes"):
        Classification().losses(torch.randn(3, 3), Batch((), {}, labels), None)


def test_the_drawn_answer_follows_the_models_own_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(400_000, 1)
    nll = Fidelity().likelihood(logits, Batch((logits,)), torch.Generator().manual_seed(0))
    p = logits[0].softmax(-1)
    entropy = float(-(p * p.log()).sum())
    assert float(nll.mean()) == pytest.approx(entropy, rel=0.007)  # four standard errors


def test_fidelity_of_maps_compares_classes_and_not_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    flat = [x.movedim(1, -1).reshape(2, 20, 3) for x in (after, before)]
    maps = Fidelity().losses(after, Batch((after,)), before)
    rows = Fidelity().losses(flat[0], Batch((flat[0],)), flat[1])
    torch.testing.assert_close(maps[0], rows[0])
    torch.testing.assert_close(maps[1], rows[1])
    drawn = Fidelity().likelihood(after, Batch((after,)), torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, Fidelity().likelihood(flat[0], Batch((flat[0],)), torch.Generator().manual_seed(1)))


def test_the_same_seed_draws_the_same_answers() -> None:
    logits = torch.randn(9, 4)
    first, second = (Fidelity().likelihood(logits, Batch((logits,)), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("output", "labels", "name"),
    [
        ((2, 3), torch.tensor([0, 2, 1, 1]), "classification"),
        ((2, 3), [0, 2], "classification"),
        ((2, 3), torch.tensor([0.0, 2.0]), "classification"),  # class numbers from a column with gaps
        ((2, 1), torch.tensor([0.5, 2.0, 3.0]), "regression"),
        ((2, 1), torch.tensor([3, 2]), "regression"),
        ((2,), torch.tensor([0.5, torch.nan]), "regression"),
        ((2, 3), torch.rand(4, 3), "regression"),
        ((2, 3), torch.tensor([[0.0, 1, torch.nan], [1, 1, 0]]), "multi_label"),
        ((2, 9, 3), torch.zeros(4, 7, dtype=torch.long), "token_classification"),
        ((2, 3, 8, 8), torch.zeros(4, 32, 32, dtype=torch.long), "segmentation"),
    ],
)
def test_the_task_that_labels_suit(output: tuple[int, ...], labels: Any, name: str) -> None:
    task = suited_task(labels, torch.zeros(output))
    assert task is not None
    assert task.name == name


@pytest.mark.parametrize(
    ("output", "labels"), [((2, 3), None), ((2, 3), {"span": torch.zeros(2, 2)}), ((2, 9, 3), torch.rand(2, 9))]
)
def test_where_labels_leave_doubt_no_task_suits(output: tuple[int, ...], labels: Any) -> None:
    assert suited_task(labels, torch.zeros(output)) is None


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'classification'"):
        task_named("clasification")


def test_a_models_loss_is_the_mean_over_its_batch() -> None:
    case = CASES["residual"]
    model, batch = case.model(Classification()), case.batch(6)
    expected = F.cross_entropy(model.predict(batch), batch.labels)
    assert float(model.loss(batch)) == pytest.approx(float(expected), rel=1e-6)
    assert evaluate(model, Data.of([batch])).means()["loss"] == pytest.approx(float(expected), rel=1e-6)
