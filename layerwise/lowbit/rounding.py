"""Whether packed weights are what they should be, by other arithmetic than that which made them.

A weight rounded to the nearest level lies within half a step of the original, the step being the range of its own group; so
swapped scales, a wrong zero or a group that begins one input late are found from the values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight, place_
from layerwise.matrices import Matrix, worth
from layerwise.method import Check
from layerwise.model import UniversalModel
from layerwise.tensors import dense, differing, state

HALF_STEP = 0.5 * (1 + 2.0**-8)  # scales are rounded up to float16, and products to the weight's type
Chosen = Mapping[str, tuple[Matrix, Grid]]  # dotted name from the root → what is rounded, and to which grid
Judge = Callable[[Matrix, PackedWeight], float]


def chosen(model: UniversalModel, layers: Sequence[str], grid: Grid) -> Chosen:
    """What of `layers` is rounded to `grid`; a weight shared by two layers once."""
    found = {f"{layer}.{m.name}": m for layer in layers for m in worth(model.layer(layer).module, grid)}
    once = {id(m.parameter): name for name, m in reversed(found.items())}
    return {name: (m, grid) for name, m in found.items() if once[id(m.parameter)] == name}


def round_(model: UniversalModel, found: Chosen) -> None:
    """Rounds the chosen weights to the nearest levels of their grids, in place."""
    for m, grid in found.values():
        place_(model.module, m.parameter, PackedWeight.rounded(m.parameter, grid, turned=m.turned))


def compared(before: UniversalModel, after: UniversalModel, expected: Chosen, judge: Judge) -> dict[str, float]:
    """Tensor → how far it is off: by `judge` where it was to be packed (`expected`, by its name), else 0 or infinity."""
    old, new = state(before.module), state(after.module)
    if old.keys() != new.keys():
        return {min(old.keys() ^ new.keys()): float("inf")}
    packed = {id(m.parameter): (m, grid) for m, grid in expected.values()}
    found = {}
    for name, tensor in old.items():
        if id(tensor) not in packed:
            found[name] = float("inf") if differing(tensor, new[name]) else 0.0
            continue
        (m, grid), made = packed[id(tensor)], new[name]
        right = isinstance(made, PackedWeight) and made.grid == grid and made.shape == tensor.shape
        found[name] = judge(m, made) if right else float("inf")  # type: ignore[arg-type]  # just asked
    return found


def check_rounded(before: UniversalModel, after: UniversalModel, expected: Chosen) -> Check:
    """Every weight that was rounded lies within half a step of the original, all other tensors are the same."""
    steps = compared(before, after, expected, steps_off)
    worst = max(steps, key=lambda name: steps[name])
    detail = f"steps of its group's grid between a weight and its original, in {len(expected)} weights; the others are unchanged"
    return Check(steps[worst], HALF_STEP, detail, worst)


def steps_off(m: Matrix, packed: PackedWeight) -> float:
    """The largest distance between a weight and its original, in steps of the range of the original's group."""
    old = m.rows.double()
    new = dense(packed).double()
    new = new.T if m.turned else new.flatten(1)
    worst = 0.0
    for start, steps in group_steps(old, packed.grid):
        part = slice(start, start + packed.grid.size(old.shape[1]))
        slack = finest(m.parameter) * old[:, part].abs().amax(1)  # what the weight's own type cannot tell apart
        off = ((new[:, part] - old[:, part]).abs().amax(1) - slack) / steps
        worst = max(worst, float(off.nan_to_num(float("inf")).max()))
    return worst


def group_steps(old: Tensor, grid: Grid) -> Sequence[tuple[int, Tensor]]:
    """The first column of each group and its step in each row, from the original weights alone."""
    found = []
    for start in range(0, old.shape[1], grid.size(old.shape[1])):
        part = old[:, start : start + grid.size(old.shape[1])]
        if grid.symmetric:
            step = 2 * part.abs().amax(1) / (2**grid.bits - 1)
        else:
            step = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / (2**grid.bits - 1)
        found.append((start, step.clamp_min(torch.finfo(torch.float64).tiny)))
    return found


def finest(weight: Tensor) -> float:
    """The relative distance of neighbours in the type of `weight`."""
    return float(torch.finfo(weight.dtype).eps)
