"""Closed form on a residual linear net, exact zero for an identity block, the naive loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.analyzers.layer_ablation import LayerAblationAnalyzer, another_sample, mean_of_batch
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.observe import observe
from layerwise.scores import Status
from layerwise.task import Classification, Fidelity, Task
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


@pytest.mark.parametrize("operation", ["mean", "resample"])
def test_exchanged_branches_have_the_closed_form_on_a_residual_linear_net(operation: str) -> None:
    torch.manual_seed(0)
    net = LinearResidual(3).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    model = UniversalModel(net, task=Squared(), example=Batch((x,), {}, y))
    scores = LayerAblationAnalyzer(operation=operation, seed=3).analyze(model, Data.of([(x, y)]))
    matrices = [b.matrix() for b in net.blocks]
    others = another_sample(Batch((x,)), 3)(torch.arange(7))
    whole = 0.5 * (x @ (matrices[2] @ matrices[1] @ matrices[0]).T - y).square().sum(-1)
    for changed in range(3):
        stream = x
        for i, m in enumerate(matrices):
            branch = stream @ m.T - stream
            if i == changed:
                branch = branch.mean(0).expand_as(branch) if operation == "mean" else branch[others]
            stream = stream + branch
        change = 0.5 * (stream - y).square().sum(-1) - whole
        entry = scores.entries[f"blocks.{changed}"]
        assert entry.value == pytest.approx(float(change.mean()), rel=1e-10)
        assert entry.stderr == pytest.approx(float(change.std() / 7**0.5), rel=1e-6)


def test_nobody_gets_their_own_branch_and_the_seed_says_whose() -> None:
    rows = torch.arange(9)
    batch = Batch((rows,))
    draws = [another_sample(batch, seed)(rows) for seed in range(20)]
    assert all(sorted(d.tolist()) == rows.tolist() and (d != rows).all() for d in draws)
    assert len({tuple(d.tolist()) for d in draws}) > 10
    assert torch.equal(draws[4], another_sample(batch, 4)(rows))


def test_padding_has_no_part_in_the_mean() -> None:
    batch = CASES["bert"].batch(3)  # the first sample's last two tokens are padding
    branch = torch.zeros(3, 9, 2)
    branch[0] = 100.0
    mean = mean_of_batch(batch, 0)(branch)
    assert mean[1, 7:].abs().max() == 0
    assert mean[1, :7].min() == pytest.approx(100 / 3)


@pytest.mark.parametrize("operation", ["mean", "resample"])
def test_a_layer_that_adds_the_same_to_all_loses_nothing(operation: str) -> None:
    torch.manual_seed(0)
    model = CASES["residual"].model(Classification())
    model.module.blocks[1].down.weight.data.zero_()
    scores = LayerAblationAnalyzer(operation=operation).analyze(model, CASES["residual"].data())
    assert scores["blocks.1"] == pytest.approx(0.0, abs=1e-7)
    assert abs(scores["blocks.2"]) > 1e-3
    assert LayerAblationAnalyzer().analyze(model, CASES["residual"].data())["blocks.1"] != 0  # its bias is left out


@pytest.mark.parametrize("operation", ["mean", "resample"])
def test_exchanges_need_somebody_to_exchange_with(operation: str) -> None:
    scores = LayerAblationAnalyzer(operation=operation).analyze(
        CASES["residual"].model(Classification()), CASES["residual"].data(1)
    )
    assert {e.status for e in scores.entries.values()} == {Status.NOT_APPLICABLE}
    assert "at least 2 samples" in scores.entries["blocks.0"].reason


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "t5", "albert"])
@pytest.mark.parametrize("operation", ["mean", "resample"])
def test_exchanges_reach_every_layer_of_every_family(name: str, operation: str) -> None:
    case = CASES[name]
    scores = LayerAblationAnalyzer(operation=operation).analyze(case.model(), case.data())
    assert len(scores.usable()) == case.layers


def test_the_divergence_and_the_accuracy_are_those_of_the_naive_loop() -> None:
    case = CASES["vit"]
    model, batch = case.model(Classification()), case.batch(16)
    model.see(batch)
    kl = LayerAblationAnalyzer(metric="kl").analyze(model, Data.of([batch]))
    lost = LayerAblationAnalyzer(metric="accuracy").analyze(model, Data.of([batch]))
    assert (kl.unit, lost.unit) == ("nats", "share of answers")
    before = model.predict(batch)
    for layer in model.layers:
        after = naive_skip(model, batch, [layer])
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        assert kl[layer.name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
        rights = [float((o.argmax(-1) == batch.labels).double().mean()) for o in (before, after)]
        assert lost[layer.name] == pytest.approx(rights[0] - rights[1], abs=1e-12)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resample'"):
        LayerAblationAnalyzer(operation="resampel")
    with pytest.raises(UsageError, match="Unknown metric 'acuracy'"):
        LayerAblationAnalyzer(metric="acuracy")
    case = CASES["residual"]
    with pytest.raises(UsageError, match="no right answers"):
        LayerAblationAnalyzer(metric="accuracy").analyze(case.model(Fidelity("cosine")), case.data())
