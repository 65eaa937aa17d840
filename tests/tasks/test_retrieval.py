"""Recall and reciprocal ranks over the whole gallery, by a slow replica; ties; what flows into the gradient; end to end."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.tasks.retrieval import Retrieval
from tests.tasks.splitting import SPLITS, evaluated


def slow_ranks(queries: Tensor, documents: Tensor, right: Tensor, sought: Tensor) -> list[int]:
    ranks = []
    for query, own, among in zip(F.normalize(queries.double(), dim=-1), right, sought, strict=True):
        order = sorted(
            (j for j in range(len(documents)) if among[j]),
            key=lambda j: float(-query @ F.normalize(documents[j].double(), dim=0)),
        )
        places = [place for place, j in enumerate(order, start=1) if own[j]]
        ranks += places[:1]
    return ranks


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("form", ["pairs", "groups"])
def test_ranks_are_those_of_the_whole_gallery_however_the_data_are_split(sizes: tuple[int, ...], form: str) -> None:
    torch.manual_seed(0)
    if form == "pairs":
        output, labels = torch.randn(12, 2, 4), None
        output[:, 1] += output[:, 0]
        ranks = slow_ranks(output[:, 0], output[:, 1], torch.eye(12).bool(), torch.ones(12, 12).bool())
    else:
        output, labels = torch.randn(12, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 2, 9])  # 9 is alone
        others = ~torch.eye(12).bool()
        ranks = slow_ranks(output, output, (labels[:, None] == labels) & others, others)
        assert len(ranks) == 11
    means = evaluated(Retrieval(), output, Batch((output,), {}, labels), sizes).means()
    assert means["mrr"] == pytest.approx(sum(1 / r for r in ranks) / len(ranks), abs=1e-12)
    for k in (1, 5, 10):
        assert means[f"recall_at_{k}"] == pytest.approx(sum(r <= k for r in ranks) / len(ranks), abs=1e-12)


def test_one_point_for_everything_is_the_worst_and_not_the_best() -> None:
    output = torch.ones(12, 2, 4)
    assert evaluated(Retrieval(), output, Batch((output,))).means()["mrr"] == pytest.approx(1 / 12)


def test_the_loss_is_the_contrast_in_the_batch_and_each_gradient_a_samples_own() -> None:
    torch.manual_seed(0)
    output = torch.randn(4, 2, 3, requires_grad=True)
    losses = Retrieval(temperature=0.5).likelihood(output, Batch((output,)), torch.Generator())
    q, d = F.normalize(output[:, 0], dim=-1), F.normalize(output[:, 1], dim=-1)
    torch.testing.assert_close(losses, F.cross_entropy(q @ d.T / 0.5, torch.arange(4), reduction="none"))
    (gradient,) = torch.autograd.grad(losses[2], output)
    assert gradient.abs().flatten(1).sum(1).nonzero().flatten().tolist() == [2]


def test_a_sample_without_a_partner_in_its_batch_has_no_loss_and_no_gradient() -> None:
    output = torch.randn(1, 3, requires_grad=True)
    batch = Batch((output,), {}, torch.tensor([4]))
    values, weights = Retrieval().losses(output, batch, None)
    (gradient,) = torch.autograd.grad(Retrieval().likelihood(output, batch, torch.Generator()).sum(), output)
    assert float(values) == float(weights) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


class DualEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))

    def forward(self, query: Tensor, document: Tensor) -> dict[str, Tensor]:
        both = self.body(torch.stack([query, document], 1))
        return {"query": both[:, 0], "document": both[:, 1]}


def test_a_dual_encoder_is_analyzed_by_name() -> None:
    torch.manual_seed(0)
    network, x = DualEncoder(), torch.randn(12, 6)
    data = Data.of([{"query": x[i], "document": x[i] + 0.1 * torch.randn_like(x[i])} for i in (slice(8), slice(8, 12))])
    model = layerwise.load(network, task="retrieval", example=data[0])
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    assert report.metrics["mrr"] > 0.8
    assert all(math.isfinite(v) and v > 0 for v in report.scores["gradient_based"].usable().values())


def test_tokens_that_are_not_pooled_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(4, 7, 3\)"):
        Retrieval().losses(torch.randn(4, 7, 3), Batch((torch.zeros(4),)), None)
    with pytest.raises(DataError, match="what belongs together"):
        Retrieval().losses(torch.randn(4, 3), Batch((torch.zeros(4),)), None)
