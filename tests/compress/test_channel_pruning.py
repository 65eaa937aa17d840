"""Channels go with everything that belongs to them, what is left computes what it computed, and faults are found."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.channels import Graph, limited
from layerwise.compress.channel_pruning import ChannelPruning
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.supplies import NOTHING, Supplies


class Block(nn.Module):
    """As in ResNet-20: the shortcut pads channels of zeros, where Torch-Pruning alone breaks."""

    def __init__(self, entering: int, leaving: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entering, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, leaving, 3, padding=1), nn.BatchNorm2d(leaving)
        self.added = leaving - entering

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)))


class Mobile(nn.Module):
    """Wide, one kernel per channel, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.bn1 = nn.Conv2d(width, 3 * width, 1), nn.BatchNorm2d(3 * width)
        self.own, self.bn2 = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width), nn.BatchNorm2d(3 * width)
        self.narrow = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.bn2(self.own(F.relu(self.bn1(self.wide(x)))))))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def batch(n: int, size: int = 8) -> Batch:
    g = torch.Generator().manual_seed(n)
    return Batch((torch.randn(n, 3, size, size, generator=g),), {}, torch.randint(0, 5, (n,), generator=g))


def net(*blocks: nn.Module) -> UniversalModel:
    torch.manual_seed(0)
    module = Net(*(blocks or (Block(8, 8, 12), Block(8, 12, 6), Mobile(12)))).train()
    for _ in range(3):  # statistics that are not 0 and 1
        module(torch.randn(8, 3, 8, 8))
    model = UniversalModel(module.eval(), example=batch(2))
    model.see(batch(4))
    return model


def cut(model: UniversalModel, method: ChannelPruning, supplies: Supplies = NOTHING, names: list[str] | None = None) -> Applied:
    names = names or [layer.name for layer in model.layers if not method.treats(layer)]
    return apply_plan(model, CompressionPlan((step_of(method, names),)), supplies)


def test_every_module_of_a_group_loses_its_channels_and_says_so() -> None:
    model = net()
    result = cut(model, ChannelPruning(0.5))
    first, second, third = result.model.module.blocks
    assert (first.conv1.out_channels, first.bn1.num_features, first.conv2.in_channels) == (6, 6, 6)
    assert (second.conv1.out_channels, second.conv2.out_channels) == (3, 12)
    assert (third.wide.out_channels, third.own.groups, third.own.in_channels, third.narrow.in_channels) == (18, 18, 18, 18)
    kept = [i for i in range(12) if i not in result.plan.steps[0].settings["removed"]["blocks.0.conv1"]["out"]]
    norms = (
        model.module.blocks[0].conv1.weight.flatten(1).norm(dim=1) ** 2
        + model.module.blocks[0].conv2.weight.transpose(0, 1).flatten(1).norm(dim=1) ** 2
    )
    assert len(kept) == 6
    torch.testing.assert_close(first.bn1.running_mean, model.module.blocks[0].bn1.running_mean[kept])
    assert norms[kept].mean() > norms.mean()
    proof = judged(model, result.model, result.plan.steps[0], [batch(5)])
    assert proof.passed, proof
    assert proof.measured < 1e-6


@pytest.mark.parametrize("fault", ["wrong channels", "stale statistics", "swapped rows"])
def test_injected_faults_are_found(fault: str) -> None:
    model = net()
    result = cut(model, ChannelPruning(0.5))
    block, original = result.model.module.blocks[0], model.module.blocks[0]
    with torch.no_grad():
        if fault == "wrong channels":
            block.conv2.weight.copy_(original.conv2.weight[:, :6])
        elif fault == "stale statistics":
            block.bn1.running_var.copy_(original.bn1.running_var[:6])
        else:
            block.conv1.weight.copy_(block.conv1.weight.flip(0))
    proof = judged(model, result.model, result.plan.steps[0], [batch(5)])
    assert proof.passed is False
    assert proof.layer == "blocks.0"


@pytest.mark.parametrize("by", ["l1", "lamp", "random", "taylor", "hessian"])
def test_every_importance_gives_a_true_cut(by: str) -> None:
    model = net()
    result = cut(model, ChannelPruning(0.25, by), Supplies(calibration=Data.of([batch(4), batch(3)])))
    assert result.model.module.blocks[0].conv1.out_channels == 9
    assert judged(model, result.model, result.plan.steps[0], [batch(5)]).passed


def test_taylor_needs_data_and_takes_first_what_the_loss_does_not_notice() -> None:
    model = net(Block(8, 8, 12), Block(8, 8, 12))
    with torch.no_grad():
        model.module.blocks[0].bn1.weight[[2, 7, 9]] = 0  # these three never fire
        model.module.blocks[0].bn1.bias[[2, 7, 9]] = -1
    with pytest.raises(UsageError, match="calibration"):
        cut(model, ChannelPruning(0.25, "taylor"), names=["blocks.0"])
    result = cut(model, ChannelPruning(0.25, "taylor"), Supplies(calibration=Data.of([batch(6)])), ["blocks.0"])
    assert list(result.plan.steps[0].settings["removed"]["blocks.0.conv1"]["out"]) == [2, 7, 9]


def test_zeros_takes_what_nobody_reads_and_changes_no_output() -> None:
    model = net()
    with torch.no_grad():
        model.module.blocks[0].conv2.weight[:, [1, 4]] = 0
        model.module.blocks[2].narrow.weight[:, 5] = 0
    result = cut(model, ChannelPruning(by="zeros"))
    widths = [result.model.module.blocks[0].conv1.out_channels, result.model.module.blocks[2].own.groups]
    assert widths == [10, 35]
    torch.testing.assert_close(result.model.predict(batch(5)), model.predict(batch(5)), rtol=1e-5, atol=1e-6)


def test_the_plan_replays_without_data_or_torch_pruning_and_not_twice() -> None:
    model = net()
    result = cut(model, ChannelPruning(0.5))
    step = result.plan.steps[0]
    fresh = net()
    method_of(step).reshape_(fresh, step.layers)
    assert [p.shape for p in fresh.module.parameters()] == [p.shape for p in result.model.module.parameters()]
    with pytest.raises(UsageError, match="already"):
        apply_plan(result.model, CompressionPlan((step,)))


class Dropping(nn.Module):
    """Norms over channels and grouped kernels: taking channels out would change the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


def test_what_cannot_be_cut_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"finds no channel inside blocks\.0"):
        cut(net(Dropping(), Dropping()), ChannelPruning(), names=["blocks.0"])
    assert "no two convolutions" in ChannelPruning().treats(
        UniversalModel(nn.Linear(3, 3), example=Batch((torch.ones(1, 3),))).layers[0]
    )
    with pytest.raises(UsageError, match="Did you mean 'taylor'"):
        ChannelPruning(by="tailor")


def test_a_graph_that_takes_too_long_is_given_up() -> None:
    def forever() -> None:
        while True:
            time.sleep(0.01)

    with pytest.raises(TimeoutError):
        limited(forever, 0.1)
    with pytest.raises(UsageError, match="did not read its graph within 0 s"):
        Graph(net(), ["blocks.0"], seconds=0.0)
