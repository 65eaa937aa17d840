"""16 bits inside, float32 at the door."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from layerwise.compress.half_precision import HalfPrecision
from layerwise.data import Batch
from layerwise.errors import ProofFailed, UsageError
from layerwise.method import Applied, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.tensors import byte_size, state
from tests.models import CASES


def half(model: UniversalModel, dtype: str = "float16") -> UniversalModel:
    return apply_plan(model, CompressionPlan((step_of(HalfPrecision(dtype), ()),))).model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes_and_ties_stay_tied(dtype: str) -> None:
    model = CASES["gpt2"].model()
    result = half(model, dtype)
    assert byte_size(result.module) * 2 == byte_size(model.module)
    assert result.module.lm_head.weight is result.module.transformer.wte.weight
    assert {str(t.dtype) for t in state(result.module).values()} == {f"torch.{dtype}"}


class Table(nn.Module):
    """Adds positions from a table that is computed and not saved; `casts` says whether it can live beside another type."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("angles", torch.linspace(0, 1000, 8), persistent=False)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.seen = [x.dtype, ids.dtype]
        angles = self.angles.cos()
        return self.b(self.a(x) + (angles.to(x.dtype) if self.casts else angles))


@pytest.mark.parametrize("casts", [True, False])
def test_tables_stay_exact_where_the_model_allows_it(casts: bool) -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(3, 8), torch.arange(3)))
    result = half(UniversalModel(Table(casts).eval(), example=batch))
    output = result.predict(batch)
    assert result.module.angles.dtype == (torch.float32 if casts else torch.float16)
    assert result.module.seen == [torch.float16, torch.int64]
    assert output.dtype == torch.float32


def test_a_copy_keeps_its_door() -> None:
    model = CASES["residual"].model()
    result = half(model)
    again = copy.deepcopy(result.module)
    assert torch.equal(again(CASES["residual"].batch(2).args[0]), result.predict(CASES["residual"].batch(2)))


def large() -> UniversalModel:
    """Finite in float32; in float16 beyond 65,504."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        module[1].weight.mul_(1e6)
    return UniversalModel(module, example=Batch((torch.randn(2, 8),)))


def test_overflow_is_found_and_the_step_undone() -> None:
    model = large()
    with pytest.raises(ProofFailed, match="not finite") as caught:
        half(model)
    assert caught.value.code == "LW-V05"
    plan = CompressionPlan((step_of(HalfPrecision("float16"), ()), step_of(HalfPrecision("bfloat16"), ())))
    applied: Applied = apply_plan(model, plan, skip_failures=True)
    assert [s.settings["dtype"] for s in applied.plan.steps] == ["bfloat16"]
    assert "not finite" in applied.failed["the whole model"]
    assert next(iter(applied.model.module.parameters())).dtype == torch.bfloat16


def test_another_16_bit_type_on_top_is_refused() -> None:
    model = half(CASES["residual"].model())
    with pytest.raises(UsageError, match="already"):
        half(model, "bfloat16")
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        HalfPrecision("bfloat")
