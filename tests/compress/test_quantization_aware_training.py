"""Training under rounding: the weights learn to stand it, and nothing of it stays in the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from layerwise.compress.fine_tune import FineTune
from layerwise.compress.quantization_aware_training import QuantizationAwareTraining, rounded
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.measure import evaluate
from layerwise.method import CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies

PACKED = WeightOnly(bits=2, group=16, symmetric=True)


def learned() -> tuple[UniversalModel, Data]:
    """A net that knows a rule of 16 inputs, with its data."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    rule = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    data = Data.of([(x[i : i + 32], rule(x[i : i + 32]).argmax(1).detach()) for i in range(0, 256, 32)])
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    model = UniversalModel(net.eval())
    model.see(data[0])
    recipe = FineTune(epochs=20, learning_rate=1e-2)
    return apply_plan(model, CompressionPlan((step_of(recipe, ()),)), Supplies(training=data)).model, data


def test_it_loses_less_to_two_bits_than_the_same_training_without_rounding() -> None:
    model, data = learned()
    recipe = {"epochs": 10, "learning_rate": 3e-3}
    names = [layer.name for layer in model.layers if not PACKED.treats(layer)]

    def loss(method: CompressionMethod) -> float:
        steps = CompressionPlan((step_of(method, names), step_of(PACKED, names)))
        packed = apply_plan(model, steps, Supplies(training=data)).model
        return evaluate(packed, data, reference=model).means()["loss"]

    aware = loss(QuantizationAwareTraining(bits=2, group=16, **recipe))  # type: ignore[arg-type]  # numbers of both kinds
    plain = loss(FineTune(**recipe))  # type: ignore[arg-type]  # likewise
    assert aware < 0.8 * plain


def test_inside_weights_are_rounded_and_outside_nothing_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2)).requires_grad_(False)
    x, inner, weight = torch.randn(4, 32), net[0], net[0].weight
    exact = net[0](x)

    def interrupted() -> None:
        with rounded(net, ["0"], 4, 32):
            assert type(net[1]) is nn.Linear
            assert 1e-3 < float((net[0](x) - exact).abs().max()) < 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert net[0] is inner
    assert inner.weight is weight
    assert torch.equal(net[0](x), exact)


def test_settings_outside_are_refused() -> None:
    for settings in ({"bits": 1}, {"bits": 9}, {"group": 0}, {"epochs": -1}):
        with pytest.raises(UsageError):
            replace(QuantizationAwareTraining(), **settings)
