"""GPTQ against the definition of optimal brain quantization: every step inverts the Hessian of the columns that are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.lowbit.correction import Correction, corrected, row_errors
from layerwise.lowbit.grid import Grid, Levels


def slow(rows: Tensor, hessian: Tensor, grid: Grid, levels: Levels, how: Correction) -> Tensor:
    """OBQ with a fixed order: round one column, then move all others to the optimum that is left, by a fresh inverse."""
    w, h = rows.double().clone(), hessian.double().clone()
    h += how.damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    size = grid.size(w.shape[1])
    order = sorted(range(w.shape[1]), key=lambda j: -float(hessian[j, j])) if how.order else list(range(w.shape[1]))
    codes = torch.zeros(rows.shape, dtype=torch.uint8)
    for step, j in enumerate(order):
        scale, zero = levels.scale[:, j // size].double(), levels.zero[:, j // size].double()
        code = (w[:, j] / scale).round().add(zero).clamp(0, 2**grid.bits - 1)
        codes[:, j] = code.byte()
        rest = order[step:]
        inverse = h[rest][:, rest].inverse()
        error = (w[:, j] - (code - zero) * scale) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0]
    return codes


def problem(columns: int, samples: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(samples, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return torch.randn(4, columns, generator=g), (x.T @ x).double()


@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(4, 0), Grid(2, 40, symmetric=True)])
@pytest.mark.parametrize("order", [True, False])
def test_codes_are_those_of_the_slow_replica(grid: Grid, order: bool) -> None:
    rows, hessian = problem(140)  # more than a block of columns
    levels, how = grid.levels(rows), Correction(order, 0.01)
    assert torch.equal(corrected(rows, hessian, grid, levels, how), slow(rows, hessian, grid, levels, how))


def test_the_error_falls_far_below_rounding_to_nearest() -> None:
    """With inputs that depend on one another; of independent ones nothing could be made up for."""
    rows, hessian = problem(64, 40)
    grid = Grid(3, 32)
    levels = grid.levels(rows)
    plain = row_errors(rows, grid.values(grid.codes(rows, levels), levels), hessian).sum()
    ours = row_errors(rows, grid.values(corrected(rows, hessian, grid, levels, Correction()), levels), hessian).sum()
    assert ours < 0.3 * plain


def test_independent_inputs_give_nearest_levels_and_unseen_ones_do_no_harm() -> None:
    rows, _ = problem(32)
    grid, nothing = Grid(4), torch.zeros(32, 32).double()
    levels = grid.levels(rows)
    seen = torch.eye(32).double()
    seen[5, 5] = 0
    for hessian in (nothing, seen):
        assert torch.equal(corrected(rows, hessian, grid, levels, Correction()), grid.codes(rows, levels))
