"""Rounding that lets the weights not yet rounded make up for those that are (GPTQ, Frantar 2022; OBQ's order of columns).

For ‖(W − Ŵ)X‖² with H = XXᵀ: column after column is rounded, and its error, by the inverse of H, taken off the columns that
are left. Where we differ from the paper: the levels of a group are those of the original weights, fixed beforehand, with or
without reordering; and a row whose error on the calibration data did not get smaller keeps its nearest levels. So the error is
never above that of rounding to nearest, and the check can ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data import Data
from layerwise.hessians import hessians, reads_alike
from layerwise.lowbit.grid import Grid, Levels
from layerwise.lowbit.packed import PackedWeight, as_matrix, place_
from layerwise.lowbit.rounding import Chosen, compared, group_steps, steps_off
from layerwise.matrices import Matrix
from layerwise.method import Check
from layerwise.model import UniversalModel
from layerwise.tensors import dense, state

Visit = tuple[str, Matrix, Grid, Tensor | None]
BLOCK = 128  # columns whose errors are spread among themselves before the rest hears of them


@dataclass(frozen=True)
class Correction:
    """`order`: the columns with the largest inputs first. `damping`: share of H's mean diagonal added to it."""

    order: bool = True
    damping: float = 0.01


def correct_(
    model: UniversalModel,
    layers: Sequence[str],
    choose: Callable[[UniversalModel], Chosen],
    batches: Data,
    how: Correction,
) -> None:
    """Packs the chosen weights, layer by layer in the order in which they run, each seeing what the ones before give by then."""
    for _, m, grid, hessian in walk(model, layers, choose(model), batches):
        place_(model.module, m.parameter, packed(m, grid, hessian, how))


def walk(model: UniversalModel, layers: Sequence[str], found: Chosen, batches: Data | None) -> Iterator[Visit]:
    """The chosen weights in the order in which their layers run, each with its name, grid and Hessian on what the layers before
    give by then; None where it has none, and for all without `batches`. Who walks puts the roundings in place on the way.
    """
    for layer, own in by_layer(model, layers, found):
        squares = hessians(model, layer, {name: m for name, (m, _) in own.items()}, batches) if batches is not None else {}
        for name, (m, grid) in own.items():
            yield name, m, grid, squares.get(name)


def by_layer(model: UniversalModel, layers: Sequence[str], chosen: Chosen) -> list[tuple[str, Chosen]]:
    """The layers in the order in which they run, each with those of the chosen weights that lie in it."""
    names = [layer.name for layer in model.layers if layer.name in layers]
    return [(layer, {n: found for n, found in chosen.items() if n.startswith(f"{layer}.")}) for layer in names]


def packed(m: Matrix, grid: Grid, hessian: Tensor | None, how: Correction) -> PackedWeight:
    """The weight with its rounding corrected by `hessian`; row by row that or the nearest levels, whichever errs less."""
    nearest = PackedWeight.rounded(m.parameter, grid, turned=m.turned)
    if hessian is None:
        return nearest
    rows, levels = m.rows, nearest.levels()
    plain = nearest.unpacked()
    codes = corrected(rows, hessian.to(rows.device), grid, levels, how)
    better = row_errors(rows, grid.values(codes, levels), hessian) < row_errors(rows, grid.values(plain, levels), hessian)
    return PackedWeight.of(torch.where(better[:, None], codes, plain), levels, grid, m.parameter, turned=m.turned)


def row_errors(rows: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(outputs,): the squared error of each output on the data that `hessian` sums."""
    off = rounded.double() - rows.double()
    return ((off @ hessian.to(off.device)) * off).sum(1)


def corrected(rows: Tensor, hessian: Tensor, grid: Grid, levels: Levels, how: Correction) -> Tensor:
    """The codes (outputs, inputs) of `rows`, column after column."""
    columns = rows.shape[1]
    scale, zero = (x.double() for x in levels.columns(grid.size(columns), columns))
    order = hessian.diagonal().argsort(descending=True, stable=True) if how.order else torch.arange(columns, device=rows.device)
    spread = inverse_factor(hessian[order][:, order], how.damping)
    left, scale, zero = rows.double()[:, order], scale[:, order], zero[:, order]
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros_like(left[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = (left[:, i] / scale[:, i]).round().add(zero[:, i]).clamp(0, grid.top)
            errors[:, i - start] = (left[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / spread[i, i]
            left[:, i:stop] -= errors[:, i - start, None] * spread[i, i:stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes[:, order.argsort()].byte()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse; inputs that were always zero get no say."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def check_levels(before: UniversalModel, after: UniversalModel, chosen: Chosen) -> Check:
    """The levels of each group just cover the original weights; where nothing is corrected, a weight has its nearest level; and
    all other tensors are the same. 1 is the most that is allowed.
    """
    off = compared(
        before, after, chosen, lambda m, new: levels_off(m, new) if reads_alike(m.owner) else steps_off(m, new) / 0.502
    )
    worst = max(off, key=lambda name: off[name])
    return Check(off[worst], 1, f"levels of {len(chosen)} weights off their groups' ranges, in shares of what is allowed", worst)


def levels_off(m: Matrix, made: PackedWeight) -> float:
    """How far scales and zeros are from the range of their group in the original, in shares of what rounding allows."""
    levels, worst = made.levels(), 0.0
    old = m.rows.double()
    for i, (start, steps) in enumerate(group_steps(old, made.grid)):
        low = old[:, start : start + made.grid.size(old.shape[1])].amin(1).clamp_max(0)
        scale, zero = levels.scale[:, i].double(), levels.zero[:, i].double()
        empty = steps < torch.finfo(torch.float32).tiny  # a group of zeros has the scale 1
        wide = torch.where(empty, (scale - 1).abs(), (scale / steps - 1).abs()) / 2.0**-9
        middle = torch.full_like(zero, 2 ** (made.grid.bits - 1))
        shift = (zero - (middle if made.grid.symmetric else -low / scale)).abs() / 0.51
        worst = max(worst, float(wide.max()), float(shift.max()))
    return worst


def check_corrected(
    before: UniversalModel,
    after: UniversalModel,
    layers: Sequence[str],
    choose: Callable[[UniversalModel], Chosen],
    batches: Data,
    along: Correction | None = None,
) -> Check:
    """On the calibration data, no weight errs more than if it were rounded to nearest: the largest ratio of squared errors.

    The layers before a weight give what they give in `after`; or with `along` what they give once the chosen weights have been
    corrected in that way, whatever bits they have in `after`.
    """
    stage, found = before.clone(), state(after.module)
    ratios = dict[str, float]()
    for name, m, grid, hessian in walk(stage, layers, choose(stage), batches):
        made = found[name]
        assert isinstance(made, PackedWeight)  # check_levels has seen to it
        ratios[name] = error_ratio(m, made.grid, made, hessian)
        kept = made.clone() if along is None or made.grid == grid else packed(m, grid, hessian, along)
        place_(stage.module, m.parameter, kept)
    worst = max(ratios, key=lambda name: ratios[name])
    middle = sorted(ratios.values())[len(ratios) // 2]
    samples = sum(b.size for b in batches)
    what = "largest squared error of a weight's outputs relative to rounding to nearest"
    detail = f"{what}, on {samples} samples; half are below {middle:.2g}"
    return Check(ratios[worst], 1 + 1e-6, detail, worst)


def error_ratio(m: Matrix, grid: Grid, made: PackedWeight, hessian: Tensor | None) -> float:
    """Squared error on the data relative to that of rounding to nearest; what read nothing must have its nearest levels."""
    if hessian is None:
        return steps_off(m, made) / 0.502
    nearest = as_matrix(PackedWeight.rounded(m.parameter, grid, turned=m.turned).dequantize(), m.turned)
    found, plain = (float(row_errors(m.rows, x, hessian).sum()) for x in (as_matrix(dense(made), m.turned), nearest))
    return found / plain if plain else float(found > 0)
