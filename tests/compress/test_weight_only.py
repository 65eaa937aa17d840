"""Packed weights in whole models: what shrinks to how many bytes on disk, what is left and said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Batch
from layerwise.lowbit.packed import PackedWeight
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.saved import save_model
from tests.models import CASES


@pytest.mark.parametrize(("bits", "per_weight"), [(3, 3 + 19 / 32), (4, 4 + 20 / 32), (8, 8 + 24 / 32)])
def test_the_file_shrinks_by_the_bits_that_are_promised(bits: int, per_weight: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UniversalModel(nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))), example=Batch((torch.randn(2, 256),)))
    result = apply_plan(model, CompressionPlan((step_of(WeightOnly(bits), ["0", "1", "2"]),)))
    save_model(result.model, tmp_path / "model")
    size = (tmp_path / "model" / "weights.safetensors").stat().st_size
    packed = 3 * 256 * 256 * per_weight / 8 + 3 * 256 * 4
    assert packed <= size <= packed + 2048  # the header


def test_different_bits_in_single_blocks() -> None:
    """What a planner does: one step per number of bits."""
    model = CASES["gpt2"].model()
    steps = tuple(step_of(WeightOnly(bits), [f"transformer.h.{i}"]) for i, bits in enumerate((8, 4, 3)))
    result = apply_plan(model, CompressionPlan(steps)).model
    for i, bits in enumerate((8, 4, 3)):
        weight = result.module.transformer.h[i].attn.c_attn.weight  # type: ignore[index, union-attr]
        assert isinstance(weight, PackedWeight)
        assert (weight.grid.bits, weight.turned) == (bits, True)


def test_what_is_left_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.out, self.turn = (
                nn.Parameter(torch.randn(8, 8)),
                nn.Linear(8, 8),
                nn.ConvTranspose1d(1, 1, 3, padding=1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.turn(self.out(x @ self.own)[:, None])[:, 0]

    model = UniversalModel(nn.Sequential(Odd(), Odd(), Odd()), example=Batch((torch.randn(2, 8),)))
    applied = apply_plan(model, CompressionPlan((step_of(WeightOnly(), ["0"]),)))
    assert applied.remarks == ("weight_only leaves own (Odd), turn.weight (ConvTranspose1d) in 0 as they are",)


def test_a_fused_attention_takes_packed_weights() -> None:
    """`nn.TransformerEncoderLayer` hands its weights to one kernel, which must see floats."""
    model, batch = CASES["encoder"].model(), CASES["encoder"].batch(3)
    names = [x.name for x in model.layers if not WeightOnly(8).treats(x)]
    after = apply_plan(model, CompressionPlan((step_of(WeightOnly(8), names),)))
    assert not any("in_proj" in remark for remark in after.remarks)
    torch.testing.assert_close(after.model.predict(batch), model.predict(batch), rtol=0.05, atol=0.05)
