"""Closed form on a residual linear net, exact zero for an identity block, the naive loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.layer_ablation import LayerAblationAnalyzer
from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification, Task
from tests.models import CASES
from tests.replicas import naive_skip


class Squared(Task):
    """½‖output − label‖², in float64."""

    name = "squared"
    quality = "loss"
    higher_is_better = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> dict:
        return {"loss": (0.5 * (output - batch.labels).square().sum(-1), torch.ones(len(output), dtype=torch.float64))}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.figures(output, batch, None)["loss"][0]


class LinearResidual(nn.Module):
    """x ← x + B A x, several times."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        pairs = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)) for _ in range(depth)]
        self.blocks = nn.ModuleList(_Add(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Add(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)

    def matrix(self) -> Tensor:
        a, b = (m.weight for m in self.inner)
        return torch.eye(4, dtype=torch.float64) + b @ a


def test_a_residual_linear_net_has_the_closed_form() -> None:
    torch.manual_seed(0)
    net = LinearResidual(3).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    model = UniversalModel(net, task=Squared(), example=Batch((x,), {}, y))
    scores = LayerAblationAnalyzer().analyze(model, Data.of([(x, y)]))
    matrices = [b.matrix() for b in net.blocks]
    whole = 0.5 * (x @ (matrices[2] @ matrices[1] @ matrices[0]).T - y).square().sum(-1)
    for skipped in range(3):
        product = torch.eye(4, dtype=torch.float64)
        for i, m in enumerate(matrices):
            product = product if i == skipped else m @ product
        change = 0.5 * (x @ product.T - y).square().sum(-1) - whole
        entry = scores.entries[f"blocks.{skipped}"]
        assert entry.value == pytest.approx(float(change.mean()), rel=1e-10)
        assert entry.stderr == pytest.approx(float(change.std() / 7**0.5), rel=1e-6)


def test_an_identity_block_costs_exactly_nothing() -> None:
    torch.manual_seed(0)
    net = LinearResidual(4)
    net.blocks[1].inner[1].weight.data.zero_()
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    model = UniversalModel(net, task=Squared(), example=Batch((x,), {}, y))
    assert LayerAblationAnalyzer().analyze(model, Data.of([(x, y)]))["blocks.1"] == 0.0


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "t5"])
def test_equals_the_naive_loop(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data(4, 3)
    model.see(data[0])
    scores = LayerAblationAnalyzer().analyze(model, data)
    assert model.task is not None
    for layer in model.layers:
        if not layer.skippable:
            assert scores.entries[layer.name].status is Status.NOT_APPLICABLE
            assert layer.reason in scores.entries[layer.name].reason
            continue
        total = weight = 0.0
        for batch in data:
            output = model.predict(batch)
            before, w = model.task.losses(output, batch, output)
            after, _ = model.task.losses(naive_skip(model, batch, [layer]), batch, output)
            total += float((after - before).sum())
            weight += float(w.sum())
        assert scores[layer.name] == pytest.approx(total / weight, rel=1e-9, abs=1e-12)


def test_block_calls_per_batch_are_L_plus_half_of_L_times_L_minus_1() -> None:  # noqa: N802  L is the number of layers
    case = CASES["vit"]
    model = case.model(Classification())
    statistic = LayerAblationAnalyzer().statistic(model)
    seen = observe(model, case.data(4, 4, 4), {"layer_ablation": statistic})
    assert seen.counts.block_calls == 3 * (4 + 4 * 3 // 2)


def test_zero_silences_the_output_even_where_skipping_is_undefined() -> None:
    case = CASES["resnet"]
    scores = LayerAblationAnalyzer(operation="zero").analyze(case.model(Classification()), case.data())
    assert len(scores.usable()) == 8
