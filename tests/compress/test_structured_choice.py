"""Which units `structured_pruning` takes: each criterion against a slow replica in float64, and shares of all groups together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.coupling import coupled
from layerwise.coupling.choice import Floats, Limits, activations, lowest, magnitudes, taylor
from layerwise.coupling.slicing import read
from layerwise.data import Batch, Data
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from tests.models import ResidualNet, vectors

NAME = "blocks.1.up"


def net() -> UniversalModel:
    torch.manual_seed(3)  # with these weights no two criteria choose alike
    return UniversalModel(ResidualNet(depth=2, width=4).double().eval(), example=batches()[0])


def batches(*, parts: Sequence[int] = (5, 3)) -> Data:
    """Eight samples of two classes, cut as `parts` say."""
    whole = vectors(4)(8)
    x, y = whole.args[0].double(), whole.labels
    return Data.of([Batch((a,), {}, b) for a, b in zip(x.split(list(parts)), y.split(list(parts)), strict=True)])


def loss(module: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return sum(float(nn.functional.cross_entropy(module(*b.args), b.labels, reduction="sum")) for b in data)


def differences(module: nn.Module, weight: torch.Tensor, data: Data) -> torch.Tensor:
    """∂loss/∂w by central differences, weight by weight."""
    found, flat, tiny = torch.zeros_like(weight), weight.data.view(-1), 1e-6
    for i, value in enumerate(flat.tolist()):
        flat[i] = value + tiny
        above = loss(module, data)
        flat[i] = value - tiny
        found.view(-1)[i] = (above - loss(module, data)) / (2 * tiny)
        flat[i] = value
    return found


def of_each_unit(block: nn.Module, values: Sequence[torch.Tensor]) -> Floats:
    """Sums over row, bias and column of each hidden unit; `values` are those of up.weight, up.bias and down.weight."""
    rows, bias, columns = values
    return np.array([float(rows[u].sum() + bias[u] + columns[:, u].sum()) for u in range(8)])


def replica(criterion: str, model: UniversalModel, data: Data) -> Floats:
    module: Any = model.module
    block = module.blocks[1]
    weights = [block.up.weight, block.up.bias, block.down.weight]
    if criterion == "magnitude":
        return of_each_unit(block, [w.detach() ** 2 for w in weights]) ** 0.5
    if criterion == "taylor":
        return of_each_unit(block, [(w.detach() * differences(module, w, data)).abs() for w in weights])
    x = torch.cat([b.args[0] for b in data])
    with torch.no_grad():
        stream = module.blocks[0](module.stem(x))
        hidden = torch.relu(stream @ block.up.weight.T + block.up.bias)
        norms = [sum(float(h) ** 2 for h in hidden[:, u]) ** 0.5 for u in range(8)]
        return np.array([sum(abs(float(w)) for w in block.down.weight[:, u]) * norms[u] for u in range(8)])


CRITERIA = {"magnitude": lambda m, g, d: magnitudes(m, g), "taylor": taylor, "activation": activations}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_the_slow_replica(criterion: str) -> None:
    model, data = net(), batches()
    group = next(t.group for t in coupled(model).groups if t.group.name == NAME)
    wanted = replica(criterion, model, data)
    for parts in ((5, 3), (1, 7)):  # how samples are cut into batches is no matter
        found = CRITERIA[criterion](model, [group], batches(parts=parts))[NAME]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_each_criterion_takes_its_own_units() -> None:
    model, data = net(), batches()
    chosen = {}
    for criterion in CRITERIA:
        plan = CompressionPlan((step_of(StructuredPruning(0.375, criterion=criterion), ["blocks.1"]),))
        result = apply_plan(model, plan, Supplies(calibration=data)).plan.steps[0]
        chosen[criterion] = read(result.settings["groups"][NAME][1])
        assert chosen[criterion] == sorted(np.argsort(replica(criterion, model, data))[:3].tolist())
    assert len({tuple(units) for units in chosen.values()}) == 3  # one computed in another's place would show


def test_all_groups_together_lose_what_is_lowest_anywhere() -> None:
    model = net()
    module: Any = model.module
    with torch.no_grad():
        for block, sizes in zip(module.blocks, ([4, 4, 4, 3.9, 4, 4, 4, 4], [1, 2, 3, 9, 9, 9, 9, 9]), strict=True):
            block.up.bias.zero_()
            block.down.weight.zero_()
            block.up.weight.zero_()
            block.up.weight[:, 0] = torch.tensor(sizes)

    def chosen(scope: str, ratio: float) -> dict[str, list[object]]:
        plan = CompressionPlan((step_of(StructuredPruning(ratio, scope=scope), ["blocks.0", "blocks.1"]),))
        return apply_plan(model, plan).plan.steps[0].settings["groups"]

    assert chosen("local", 0.125) == {"blocks.0.up": [8, "3"], "blocks.1.up": [8, "0"]}
    # each score over the mean of its group: 3.9 / 3.99 and the like here, 1, 2, 3 of 6.4 there
    assert chosen("global", 0.125) == {"blocks.1.up": [8, "0-1"]}
    assert chosen("global", 0.25) == {"blocks.0.up": [8, "3"], "blocks.1.up": [8, "0-2"]}


def test_ties_and_groups_that_would_be_gone_leave_the_share_exact() -> None:
    scores = {"dead": np.array([0.0, 0, 0, 0]), "low": np.array([0.0, 0, 0, 40]), "high": np.array([3.0, 4, 5, 6])}
    found = lowest(scores, 0.5, dict.fromkeys(scores, Limits()), together=True)
    assert found == {"dead": [0, 1, 2], "low": [0, 1, 2], "high": []}
    found = lowest(
        scores, 0.25, {"dead": Limits(2, 2), "low": Limits(), "high": Limits()}, together=True
    )  # the first goes by twos
    assert found == {"dead": [0, 1], "low": [0], "high": []}
