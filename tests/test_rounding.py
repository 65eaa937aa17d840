"""The check of packed weights finds each kind of wrong packing, which a check by the same arithmetic would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from layerwise.compress.weight_only import WeightOnly
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight, place_
from layerwise.matrices import Matrix
from layerwise.method import apply_plan, step_of
from layerwise.plan import CompressionPlan
from layerwise.tensors import dense
from tests.models import CASES

GRID = Grid(4, 8)
METHOD = WeightOnly(bits=4, group=8)


def swapped_scales(m: Matrix, good: PackedWeight) -> PackedWeight:
    bad = good.clone()
    bad.scale[[0, 1]] = good.scale[[1, 0]]
    return bad


def zero_off_by_one(m: Matrix, good: PackedWeight) -> PackedWeight:
    bad = good.clone()
    assert bad.zeros is not None
    bad.zeros[0, 0] ^= 1
    return bad


def group_one_late(m: Matrix, good: PackedWeight) -> PackedWeight:
    """Scales and zeros of groups that begin one input late, the values rounded rightly to these."""
    late = GRID.levels(m.rows.roll(-1, 1))
    return PackedWeight.of(GRID.codes(m.rows, late), late, GRID, m.parameter)


def wrong_order(m: Matrix, good: PackedWeight) -> PackedWeight:
    """Codes found in a permuted order and not put back."""
    return PackedWeight.of(good.unpacked().flip(1), good.levels(), GRID, m.parameter)


def other_grid(m: Matrix, good: PackedWeight) -> PackedWeight:
    return PackedWeight.rounded(m.parameter, Grid(8, 8))


@pytest.mark.parametrize("fault", [swapped_scales, zero_off_by_one, group_one_late, wrong_order, other_grid])
def test_a_wrong_packing_is_found(fault: Callable[[Matrix, PackedWeight], PackedWeight]) -> None:
    model = CASES["residual"].model()
    after = apply_plan(model, CompressionPlan((step_of(METHOD, ["blocks.0", "blocks.2"]),))).model
    assert METHOD.check(model, after, ["blocks.0", "blocks.2"]).passed
    packed = after.module.blocks[2].down.weight  # type: ignore[index, union-attr]
    original = model.module.blocks[2].down.weight  # type: ignore[index, union-attr]
    place_(after.module, packed, fault(Matrix("", model.module, original), packed))
    check = METHOD.check(model, after, ["blocks.0", "blocks.2"])
    assert not check.passed
    assert check.place == "blocks.2.down.weight"


def test_half_precision_before_it_is_no_fault() -> None:
    """The packed weight keeps the type of the original, whose own rounding is not held against it."""
    model = CASES["residual"].model()
    _ = model.layers
    model.module.half()
    for bits in (4, 8):
        method, after = WeightOnly(bits), model.clone()
        method.apply_(after, ["blocks.1"])
        assert method.check(model, after, ["blocks.1"]).passed
        assert dense(after.module.blocks[1].up.weight).dtype == torch.float16  # type: ignore[index, union-attr]
