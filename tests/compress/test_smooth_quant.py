"""Ranges are moved exactly, by the paper's formula, where data flow allows it; a wrong move is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.smooth_quant import SmoothQuant
from layerwise.data import Data
from layerwise.lowbit.migration import EXACT, Link, apart, exponents, move_
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from tests.models import CASES

NAMES = ["0", "1", "2"]
DATA = Data.of([torch.randn(32, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2)])
SUPPLIES = Supplies(calibration=DATA)


class Gated(nn.Module):
    """x + W(up(n) · σ(gate(n))) with n = norm(x), some of whose channels are a hundred times as wide as others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[5], self.norm.bias[3] = 100.0, 0.0, 40.0
            self.gate.weight[:, 3] /= 100
            self.up.weight[:, 3] /= 100

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(self.up(n) * self.gate(n).sigmoid())


def subject() -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(nn.Sequential(Gated(), Gated(), Gated()).eval(), example=DATA[0].narrow(0, 4))


def applied(method: SmoothQuant | Int8Dynamic) -> tuple[UniversalModel, UniversalModel, SmoothQuant]:
    model = subject()
    made = apply_plan(model, CompressionPlan((step_of(method, NAMES),)), SUPPLIES)
    return model, made.model, SmoothQuant(**made.plan.steps[0].settings)


def test_links_are_norms_and_linear_layers_whose_channels_only_linear_layers_read() -> None:
    _, _, method = applied(SmoothQuant())
    assert method.links is not None
    assert sorted(method.links["0.norm"]) == ["0.gate", "0.up"]
    assert method.links["0.up"] == ["0.down"]  # not the gate: its sigmoid does not scale
    assert len(method.links) == 6
    bert = CASES["bert"].model()
    links = SmoothQuant().fitted(bert, [bert.layers[0].name], SUPPLIES).links
    assert links == {"bert.encoder.layer.0.attention.self.value": ["bert.encoder.layer.0.attention.output.dense"]}


def test_scales_are_those_of_the_paper_to_the_nearest_power_of_two() -> None:
    model = subject()
    (found,) = exponents(model, [Link("0.norm", ("0.gate", "0.up"))], 0.6, DATA)
    block = model.module[0]  # type: ignore[index]
    rows = torch.cat([block.norm(b.args[0]) for b in DATA]).detach().double()  # type: ignore[operator]
    for j in range(16):
        x = float(rows[:, j].abs().max())
        w = max(float(m.weight[:, j].detach().abs().max()) for m in (block.gate, block.up))  # type: ignore[union-attr, index]
        assert int(found[j]) == (round(math.log2(x**0.6 / w**0.4)) if x else 0)


def test_the_move_alone_changes_no_output_and_makes_rounding_better() -> None:
    model, smooth, method = applied(SmoothQuant())
    _, plain, _ = applied(SmoothQuant(links={}))
    batch = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    off = [apart(m.predict(batch), model.predict(batch)) for m in (smooth, plain)]
    assert off[0] < 0.6 * off[1]
    check = method.check_on(model, smooth, NAMES, SUPPLIES)
    assert check.passed
    moved = model.clone()
    links = [Link(giver, tuple(readers)) for giver, readers in (method.links or {}).items()]
    for link, power in zip(links, exponents(model, links, 0.5, DATA), strict=True):
        move_(moved, link, power)
    assert apart(moved.predict(batch), model.predict(batch)) <= EXACT


def one_channel_of_the_norm(module: nn.Module) -> None:
    module[1].norm.weight.data[3] *= 2  # type: ignore[index, union-attr]
    module[1].norm.bias.data[3] *= 2  # type: ignore[index, union-attr]


def the_norms_bias(module: nn.Module) -> None:
    module[1].norm.bias.data[3] *= 4  # type: ignore[index, union-attr]


def swapped_scales(module: nn.Module) -> None:
    scale = module[1].down.weight.scale  # type: ignore[index, union-attr]
    scale[[0, 1]] = scale[[1, 0]]


def a_reader_that_was_forgotten(module: nn.Module) -> None:
    """The gate as `int8_dynamic` alone would make it."""
    plain = apply_plan(subject(), CompressionPlan((step_of(Int8Dynamic(), NAMES),))).model.module
    module[1].gate.weight = plain[1].gate.weight  # type: ignore[index, union-attr]


@pytest.mark.parametrize("fault", [one_channel_of_the_norm, the_norms_bias, swapped_scales, a_reader_that_was_forgotten])
def test_a_wrong_move_is_found(fault) -> None:  # type: ignore[no-untyped-def]  # one of the four above
    model, after, method = applied(SmoothQuant())
    fault(after.module)
    check = method.check_on(model, after, NAMES, SUPPLIES)
    assert not check.passed


def test_where_nothing_can_be_moved_it_says_so() -> None:
    model = CASES["sequential"].model()
    data = CASES["sequential"].data(4)
    made = apply_plan(model, CompressionPlan((step_of(SmoothQuant(), ["0"]),)), Supplies(calibration=data))
    assert made.remarks == (
        "smooth_quant moves no range in 0, where no norm or linear layer gives to linear layers alone: it is int8_dynamic there",
    )
