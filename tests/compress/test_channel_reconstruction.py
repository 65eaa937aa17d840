"""The refit against numpy's least squares, the order against trying everything, the budget against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layerwise.channel_budget import knapsack
from layerwise.compress.channel_pruning import ChannelPruning
from layerwise.compress.channel_reconstruction import ChannelReconstruction
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.least_squares import damped, elimination, refitted
from layerwise.measure import costs
from layerwise.method import apply_plan, step_of
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged
from layerwise.supplies import Supplies
from tests.compress.test_channel_pruning import Block, batch, net

DATA = Data.of([batch(16), batch(12)])
SUPPLIES = Supplies(calibration=DATA, progress=lambda done, of: None)


def problem(block: int = 2, blocks: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(block * blocks, block * blocks, generator=g, dtype=torch.float64)
    x = torch.randn(200, block * blocks, generator=g, dtype=torch.float64) @ mixing
    return torch.randn(3, block * blocks, generator=g, dtype=torch.float64), x, x.T @ x


def test_the_refit_is_least_squares() -> None:
    weight, x, gram = problem()
    kept = [0, 1, 4, 5, 8, 9]
    found = refitted(weight, gram, kept)
    wanted = np.linalg.lstsq(x[:, kept].numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found[:, kept].numpy(), wanted, rtol=1e-6)
    assert not found[:, [2, 3, 6, 7]].any()


def test_each_elimination_is_the_cheapest_after_a_refit() -> None:
    weight, x, gram = problem()
    order, gone = elimination(weight, gram, 2), list[int]()
    for chosen in order[:-1]:
        errors = {}
        for candidate in set(range(5)) - set(gone):
            kept = [i for i in range(10) if i // 2 not in {*gone, candidate}]
            errors[candidate] = float(((x @ (weight - refitted(weight, gram, kept)).T) ** 2).sum())
        assert chosen == min(errors, key=errors.__getitem__)
        gone.append(chosen)


def test_the_budget_is_spent_as_well_as_it_can_be() -> None:
    g = np.random.default_rng(0)
    options = [
        [(float(s), float(d)) for s, d in zip(g.uniform(0, 9, 4), g.uniform(0, 1, 4), strict=True)] + [(0.0, 0.0)]
        for _ in range(4)
    ]
    for wanted in (1.0, 9.0, 17.0, 1000.0):
        found = knapsack(options, wanted)
        sums = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*options)]
        feasible = [damage for saving, damage in sums if saving >= wanted]
        assert (found is None) == (not feasible)
        if found is not None:
            saving, damage = map(sum, zip(*(o[i] for o, i in zip(options, found, strict=True)), strict=True))
            assert saving >= wanted
            assert damage <= min(feasible) + 0.02  # savings are rounded down to a 2000th


def test_it_meets_the_budget_and_what_follows_cuts_without_changing_an_output() -> None:
    model = net()
    names = ["blocks.0", "blocks.1", "blocks.2"]
    plan = CompressionPlan((step_of(ChannelReconstruction(0.6), names), step_of(ChannelPruning(by="zeros"), names)))
    proofs = []
    result = apply_plan(model, plan, SUPPLIES, watch=lambda a, b, s: proofs.append(judged(a, b, s, [batch(5)], SUPPLIES)))
    assert [p.passed for p in proofs] == [True, True], proofs
    share = costs(result.model)["macs"] / costs(model)["macs"]
    assert share <= 0.6
    other = apply_plan(model, CompressionPlan((step_of(ChannelPruning(0.6, by="random"), names),))).model
    x = batch(16)
    apart = [F.mse_loss(m.predict(x), model.predict(x)) for m in (result.model, other)]
    assert apart[0] < apart[1]


def test_other_weights_on_the_way_are_found() -> None:
    model = net(Block(8, 8, 12), Block(8, 8, 12))
    applied = apply_plan(model, CompressionPlan((step_of(ChannelReconstruction(0.8), ["blocks.0"]),)), SUPPLIES)
    step, weight = applied.plan.steps[0], applied.model.module.blocks[0].conv2.weight
    gone = step.settings["channels"]["blocks.0.conv2"]
    kept = next(i for i in range(12) if i not in gone)
    for place, value in ((gone[0], 0.5), (kept, 2.0)):  # a channel that is read again, and one that is refitted wrongly
        before = weight.detach().clone()
        with torch.no_grad():
            weight[:, place] += value
        proof = judged(model, applied.model, step, [batch(5)], SUPPLIES)
        assert proof.passed is False
        assert proof.layer == "blocks.0.conv2.weight"
        with torch.no_grad():
            weight.copy_(before)
    assert judged(model, applied.model, step, [batch(5)], SUPPLIES).passed


def test_what_cannot_be_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"cannot leave 0\.01 .*allows 0\.\d+"):
        apply_plan(net(), CompressionPlan((step_of(ChannelReconstruction(0.01), ["blocks.0"]),)), SUPPLIES)
    with pytest.raises(UsageError, match="calibration"):
        apply_plan(net(), CompressionPlan((step_of(ChannelReconstruction(), ["blocks.0"]),)))
    with pytest.raises(UsageError, match="0 excluded"):
        ChannelReconstruction(0)


def test_the_damped_gram_is_solvable_where_inputs_are_alike() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    assert float(torch.linalg.det(damped(x.T @ x, 1e-4))) > 0
