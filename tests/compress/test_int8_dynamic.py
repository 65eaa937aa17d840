"""8-bit weights by torchao: what is quantized, what is left and said so."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from layerwise.compress.int8_dynamic import Int8Dynamic, linears
from layerwise.data import Batch
from layerwise.errors import MissingDependency
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.tensors import byte_size, dense, flattened, wraps
from tests.models import CASES


def test_rows_lie_on_their_grid() -> None:
    model = CASES["residual"].model()
    result = apply_plan(model, CompressionPlan((step_of(Int8Dynamic(), ["blocks.0"]),))).model
    old, new = model.module.blocks[0].up.weight, result.module.blocks[0].up.weight
    assert wraps(new)
    assert {k: t.dtype for k, t in flattened("w", new).items()}["w.qdata"] == torch.int8
    scale = old.detach().abs().amax(1, keepdim=True) / 127.5
    steps = (dense(new) / scale).double()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert ((steps - old.detach() / scale).abs() <= 0.501).all()
    assert not wraps(result.module.blocks[1].up.weight)
    assert byte_size(result.module) < byte_size(model.module)


def test_convolutions_are_left_and_named() -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Conv1d(4, 4, 1), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.out(self.mix(x))

    model = UniversalModel(nn.Sequential(Mixed(), Mixed(), Mixed()).eval(), example=Batch((torch.randn(2, 4, 8),)))
    applied = apply_plan(model, CompressionPlan((step_of(Int8Dynamic(), ["0", "1"]),)))
    assert applied.remarks == tuple(f"int8_dynamic leaves mix (Conv1d) in {n} as they are" for n in "01")
    resnet = CASES["resnet"].model()
    assert Int8Dynamic().treats(resnet.layers[0]) == "holds no nn.Linear; its weights are in Conv2d, which stay as they are"
    assert "Conv1D" in Int8Dynamic().treats(CASES["gpt2"].model().layers[0])


def test_a_tied_weight_is_left() -> None:
    """Its other owner would keep the floats, and nothing would be saved."""
    module = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    module["b"].weight = module["a"].weight
    assert list(linears(module)) == ["c"]


def test_without_torchao_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["residual"].model()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependency, match=r"pip install 'layerwise\[quant\]'"):
        apply_plan(model, CompressionPlan((step_of(Int8Dynamic(), ["blocks.0"]),)))
