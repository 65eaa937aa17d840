"""8-bit weights and fixed activation scales by torchao: against float64 arithmetic, and what a wrong scale looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.int8_static import Int8Static
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from layerwise.tensors import dense, wraps


class Twice(nn.Module):
    """`flat` reads (samples × positions, 16), `both` that and (samples, positions, 16), `deep` the latter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.both, self.deep = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.both(self.flat(x.flatten(0, 1))).view(x.shape)
        return x + self.deep(self.both(rows)).tanh()


def subject() -> tuple[UniversalModel, Supplies]:
    torch.manual_seed(0)
    model = UniversalModel(nn.Sequential(*[Twice() for _ in range(3)]).eval(), example=Batch((torch.randn(2, 4, 16),)))
    return model, Supplies(calibration=Data.of([torch.randn(8, 4, 16), torch.randn(8, 4, 16)]))


def applied(*layers: str) -> tuple[UniversalModel, Supplies, Applied]:
    model, supplies = subject()
    return model, supplies, apply_plan(model, CompressionPlan((step_of(Int8Static(), layers),)), supplies)


def by_hand(weight: Tensor, bias: Tensor, largest: float, x: Tensor) -> Tensor:
    """round(x / s) · s times the rounded weights in float64, s the scale of all x."""
    step = largest / 127
    return (x.double() / step).round().clamp(-128, 127) * step @ weight.double().T + bias.double()


def test_it_computes_the_products_of_rounded_numbers_and_cuts_off_what_is_larger() -> None:
    _, supplies, result = applied("0")
    assert supplies.calibration is not None
    largest = max(float(b.args[0].abs().max()) for b in supplies.calibration)
    x = torch.randn(5, 16) * 3
    assert x.abs().max() > largest  # some are beyond what was seen
    new = result.model.module.get_submodule("0.flat")
    wanted = by_hand(dense(new.get_parameter("weight")), new.get_parameter("bias").detach(), largest, x)
    torch.testing.assert_close(new(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_reads_tensors_of_two_ranks_is_left_and_named() -> None:
    _, _, result = applied("0", "1")
    assert [wraps(result.model.module.get_parameter(f"0.{n}.weight")) for n in ("flat", "both", "deep")] == [True, False, True]
    assert {path: int(reads[1]) for path, reads in result.plan.steps[0].settings["reads"].items()} == {
        "0.flat": 2, "0.deep": 3, "1.flat": 2, "1.deep": 3,
    }  # fmt: skip
    assert result.remarks[0].startswith("int8_static leaves both in 0 as they are: ")


def test_another_scale_and_other_data_are_found() -> None:
    model, supplies, result = applied("1")
    method = method_of(result.plan.steps[0])
    assert isinstance(method, Int8Static)
    assert method.reads is not None
    assert method.check_on(model, result.model, ["1"], supplies).passed
    with torch.no_grad():
        result.model.module.get_parameter("1.deep.weight").act_quant_scale.mul_(1.01)  # type: ignore[attr-defined]
    assert method.check(model, result.model, ["1"]).place == "1.deep.weight"
    narrower = replace(method, reads={path: [0.9 * x, n] for path, (x, n) in method.reads.items()})
    made = apply_plan(model, CompressionPlan((step_of(narrower, ["1"]),)), supplies).model
    assert narrower.check(model, made, ["1"]).passed
    found = narrower.check_on(model, made, ["1"], supplies)
    assert not found.passed
    assert found.measured == pytest.approx(0.1)


def test_a_linear_layer_that_does_not_exist_is_refused() -> None:
    model, supplies = subject()
    with pytest.raises(UsageError, match=r"0\.flat"):
        Int8Static(reads={"0.flatt": [1.0, 2]}).fitted(model, ["0"], supplies)
