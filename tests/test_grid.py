"""Grids against a slow replica in float64, against torchao, and bytes against their number."""

from __future__ import annotations

import warnings

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.lowbit.grid import Grid, pack, packed_width, unpack

SHAPES = [(3, 32), (4, 70), (2, 5), (1, 1)]


def slow(row: list[float], grid: Grid) -> list[float]:
    """The nearest of all levels, group by group, element by element."""
    out: list[float] = []
    size = grid.group or len(row)
    for start in range(0, len(row), size):
        group = row[start : start + size]
        low, high, top = min(0.0, *group), max(0.0, *group), 2**grid.bits - 1
        exact = 2 * max(-low, high) / top if grid.symmetric else (high - low) / top
        step = float(torch.tensor(exact * (1 + 2**-10)).half())
        zero = 2 ** (grid.bits - 1) if grid.symmetric else round(-low / step)
        levels = [(code - zero) * step for code in range(top + 1)]
        out += [min(levels, key=lambda level, w=w: abs(level - w)) for w in group]  # type: ignore[misc]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 8, 32])
def test_values_are_those_of_the_slow_replica(bits: int, symmetric: bool, group: int) -> None:
    grid = Grid(bits, group, symmetric)
    for rows, columns in SHAPES:
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
        levels = grid.levels(w)
        found = grid.values(grid.codes(w, levels), levels).double()
        expected = torch.tensor([slow(row, grid) for row in w.double().tolist()], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_symmetric_scales_are_those_of_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own on import
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8)
    w, grid = linear.weight.detach().clone(), Grid(4, 32, symmetric=True)
    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    levels = grid.levels(w)
    torch.testing.assert_close(levels.scale.float(), linear.weight.scale.float(), rtol=2e-3, atol=0)
    ours = grid.codes(w, levels).int() - 8
    assert (ours == linear.weight.qdata.int()).double().mean() > 0.95  # the others were near a tie


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_come_back_and_fill_their_bits(bits: int) -> None:
    for columns in (1, 7, 8, 64, 65):
        codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        packed = pack(codes, bits)
        assert torch.equal(unpack(packed, bits, columns), codes)
        assert packed.shape == (3, packed_width(columns, bits))
    assert packed_width(64, bits) == 64 * bits // 8


def test_zeros_tiny_and_huge_groups_stay_finite() -> None:
    for factor in (0.0, 1e-30, 1e30):
        w = torch.tensor([[1.0, -2.0, 3.0, 0.0]]) * factor
        levels = Grid(4, 2).levels(w)
        found = Grid(4, 2).values(Grid(4, 2).codes(w, levels), levels)
        torch.testing.assert_close(found, w, rtol=0.1, atol=0.1 * factor)
        assert found[0, 3] == 0


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (9, 32), (4, -1), (4.0, 32), (True, 32)])
def test_what_is_no_grid_is_refused(bits: int, group: int) -> None:
    with pytest.raises(UsageError, match=r"bits is|group is"):
        Grid(bits, group)
