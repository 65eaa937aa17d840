"""At most n of every m, counted by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from layerwise.compress.nm_pruning import NMPruning
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import NOTHING, Supplies
from tests.models import CASES


def pruned(model: UniversalModel, method: NMPruning, names: list[str], supplies: Supplies = NOTHING) -> UniversalModel:
    return apply_plan(model, CompressionPlan((step_of(method, names),)), supplies).model


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
def test_each_group_keeps_its_largest(n: int, m: int) -> None:
    model = CASES["residual"].model()
    found = pruned(model, NMPruning(n, m), ["blocks.0"]).module.blocks[0].up.weight
    weight = model.module.blocks[0].up.weight
    for row, start in itertools.product(range(len(weight)), range(0, weight.shape[1], m)):
        group = weight[row, start : start + m].tolist()
        largest = sorted(range(m), key=lambda i: -abs(group[i]))[:n]
        expected = [value if i in largest else 0.0 for i, value in enumerate(group)]
        assert found[row, start : start + m].tolist() == expected


def test_groups_of_a_kernel_run_over_channels_and_a_stem_of_three_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    model = UniversalModel(net, example=Data.of([torch.randn(2, 3, 5, 5)])[0])
    names = [layer.name for layer in model.layers if not NMPruning().treats(layer)]
    assert names == ["2", "5"]
    assert "multiple of 4" in NMPruning().treats(model.layers[0])
    weight = pruned(model, NMPruning(), names).module[2].weight
    assert ((weight.view(4, 2, 4, 9) != 0).sum(2) == 2).all()


def test_wanda_scores_read_the_inputs_and_ask_for_them() -> None:
    model = UniversalModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)))
    data = Data.of([torch.tensor([[0.0, 5.0, 0.1, 5.0]])])
    model.see(data[0])
    with torch.no_grad():
        model.module[0].weight[:] = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    assert pruned(model, NMPruning(), ["0"]).module[0].weight.tolist() == [[3.0, 0.0, 2.0, 0.0]] * 2
    found = pruned(model, NMPruning(scores="wanda"), ["0"], Supplies(calibration=data)).module[0].weight
    assert found.tolist() == [[0.0, 1.0, 0.0, 1.0]] * 2
    with pytest.raises(UsageError, match="calibration"):
        pruned(model, NMPruning(scores="wanda"), ["0"])


def test_bad_settings_are_refused() -> None:
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(UsageError, match="0 < n < m"):
            NMPruning(n, m)
    with pytest.raises(UsageError, match="magnitude, wanda"):
        NMPruning(scores="norm")
