"""Exactly as many as asked for, the right ones, whatever the type, the ties and the size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from layerwise import sparsity
from layerwise.model import UniversalModel
from layerwise.sparsity import ZERO, called_matrices, lowest, lowest_in_rows, only_zeroed, remaining, scored
from tests.models import CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_the_lowest_are_those_of_a_sort(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 9, generator=g).mul(4).round().div(4).to(dtype), torch.randn(40, generator=g).to(dtype) * 1e-6]
    flat = torch.cat([p.reshape(-1) for p in parts]).float().abs().double().numpy()
    order = np.argsort(flat, kind="stable")  # ties in the order of the elements
    for count in range(len(flat) + 1):
        found = torch.cat([m.reshape(-1) for m in lowest(parts, count, torch.abs)])
        assert set(found.nonzero()[:, 0].tolist()) == set(order[:count].tolist()), count


def test_more_than_16_million_elements_in_bounded_memory() -> None:
    weight = torch.arange(1, 17_000_001, dtype=torch.float32).neg_()
    calls: list[int] = []

    def score(part: torch.Tensor) -> torch.Tensor:
        calls.append(part.numel())
        return part.abs()

    (mask,) = lowest([weight], 8_500_000, score)
    assert int(mask.sum()) == 8_500_000
    assert bool(mask[8_499_999])
    assert not bool(mask[8_500_000])
    assert max(calls) <= sparsity.CHUNK  # nothing but the mask is as large as the tensor


def test_what_is_zero_already_goes_first() -> None:
    weight = torch.tensor([3.0, 0.0, 1.0, 0.0])
    scores = scored(weight, torch.zeros(4))  # no weight matters
    assert scores.tolist() == [0, ZERO, 0, ZERO]
    assert lowest([scores], 2)[0].tolist() == [False, True, False, True]
    assert lowest([scores], 3)[0].tolist() == [True, True, False, True]


def test_rows_each_lose_as_many() -> None:
    scores = torch.tensor([[1.0, 1, 1, 0], [4, 3, 2, 1]])
    assert lowest_in_rows(scores, 2).tolist() == [[True, False, False, True], [False, False, True, True]]


def test_the_projection_that_torch_attention_reads_itself_is_not_called() -> None:
    model = CASES["encoder"].model().clone()  # of a copy, whose layers must know their own silent modules
    layer = model.layers[0]
    found = called_matrices(layer)
    assert [m.name.split(".", 3)[-1] for m in found] == ["linear1.weight", "linear2.weight"]
    assert {n.split(".", 3)[-1] for n in remaining(layer, found)} == {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


def test_faults_are_found_and_tied_names_are_one() -> None:
    before = UniversalModel(Tied())
    right = before.clone()
    with torch.no_grad():
        right.module.one.weight[0] = 0
    assert only_zeroed(before, right, {"one.weight": lambda zeros: int(zeros.sum()) == 4}).passed
    assert not only_zeroed(before, right, {"one.weight": lambda zeros: int(zeros.sum()) == 5}).passed
    assert only_zeroed(before, right, {}).place == "one.weight"  # nothing was to be zeroed
    with torch.no_grad():
        right.module.one.weight[1, 1] += 1
    assert only_zeroed(before, right, {"one.weight": None}).measured >= 1
