"""Packed weights behave as the floats they stand for, and are nothing else in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwise.errors import UsageError
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight, place_
from layerwise.tensors import byte_size, dense, flattened


def packed_linear(grid: Grid) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(70, 8, bias=False)
    place_(linear, linear.weight, PackedWeight.rounded(linear.weight, grid))
    return linear


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_bytes_are_the_packed_ones(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, 32, symmetric)
    linear = packed_linear(grid)
    parts = flattened("weight", linear.weight)
    assert byte_size(linear) == sum(t.nbytes for t in parts.values()) == grid.stored_bytes(8, 70)
    assert parts["weight.codes"].nbytes == 8 * (35 if bits == 4 else 18 + 9)
    assert ("weight.zeros" in parts) is not symmetric


def test_it_is_copied_moved_and_cast_as_a_parameter() -> None:
    linear = packed_linear(Grid(3))
    again = copy.deepcopy(linear)
    assert isinstance(again.weight, nn.Parameter)
    assert isinstance(again.weight, PackedWeight)
    assert again.weight.codes.data_ptr() != linear.weight.codes.data_ptr()
    assert torch.equal(dense(again.weight), dense(linear.weight))
    again.double()
    assert again.weight.dtype == again(torch.randn(2, 70).double()).dtype == torch.float64


def test_gradients_reach_the_input() -> None:
    linear = packed_linear(Grid())
    x = torch.randn(3, 70, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], dense(linear.weight).sum(0))


def test_a_turned_weight_has_its_groups_along_the_inputs() -> None:
    w = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    turned, straight = PackedWeight.rounded(w, Grid(), turned=True), PackedWeight.rounded(w.T.contiguous(), Grid())
    assert torch.equal(dense(turned), dense(straight).T)
    assert torch.equal(turned.codes, straight.codes)


def test_tied_weights_stay_tied() -> None:
    module = nn.ModuleDict({"table": nn.Embedding(9, 32), "head": nn.Linear(32, 9, bias=False)})
    module["head"].weight = module["table"].weight
    place_(module, module["table"].weight, PackedWeight.rounded(module["table"].weight, Grid()))
    assert module["head"].weight is module["table"].weight
    assert torch.equal(module["table"](torch.tensor([3])), dense(module["head"].weight)[3:4])


def test_nobody_writes_into_it() -> None:
    with pytest.raises(UsageError, match="packed weight"):
        packed_linear(Grid()).weight.mul_(2)
