"""How many bits each weight gets, so that all together fit into given bytes and the outputs move least.

Decision: the damage of each weight alone is measured once, rounded to 3 bits, as the divergence of the model's outputs from those
of the unrounded model; for other bits it is scaled by the squared rounding errors, since a small divergence grows with the square
of the change. So it costs one run per weight. The sum over weights is then minimized exactly (a multiple-choice knapsack).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight
from layerwise.matrices import Matrix
from layerwise.model import UniversalModel
from layerwise.task import Fidelity

PROBE = 3  # bits at which the damage is measured: it stands out of float32, and the model still works


def measured_damages(model: UniversalModel, found: Mapping[str, Matrix], grid: Grid, data: Data) -> dict[str, float]:
    """Name → divergence of the outputs on `data` with that weight alone rounded to `PROBE` bits; `grid` gives the groups."""
    task = model.task if isinstance(model.task, Fidelity) else Fidelity()
    probe = Grid(PROBE, grid.group, grid.symmetric)
    batches = [batch.to(model.device) for batch in data]
    wanted = [model.predict(batch) for batch in batches]
    damages = {}
    for name, m in found.items():
        total, weight = 0.0, 0.0
        with rounded(m, probe):
            for batch, reference in zip(batches, wanted, strict=True):
                loss, count = task.losses(model.predict(batch), batch, reference)
                total, weight = total + float(loss.sum()), weight + float(count.sum())
        damages[name] = total / max(weight, 1.0)
    return damages


def scored_damages(found: Mapping[str, Matrix], grid: Grid, scores: Mapping[str, float]) -> dict[str, float]:
    """Name → score of its layer, times the share of the weight that is lost when it is rounded to `PROBE` bits.

    Raises `UsageError` when a layer has no score.
    """
    probe, damages = Grid(PROBE, grid.group, grid.symmetric), {}
    for name, m in found.items():
        layer = max((x for x in scores if name.startswith(f"{x}.")), key=len, default=None)
        if layer is None:
            raise UsageError(f"mixed_precision: no score is given for the layer of {name}.", remedy="Score every layer.")
        damages[name] = scores[layer] * lost(m, probe) / max(float(m.rows.double().square().sum()), 1e-30)
    return damages


def lost(m: Matrix, grid: Grid) -> float:
    """‖Q(W) − W‖²."""
    rows = m.rows
    levels = grid.levels(rows)
    return float((grid.values(grid.codes(rows, levels), levels) - rows.float()).double().square().sum())


def stored(m: Matrix, bits: float, grid: Grid) -> float:
    """Bytes of the weight in `bits`, between whole numbers by the share."""
    low, high = (Grid(b, grid.group, grid.symmetric).stored_bytes(*m.rows.shape) for b in (math.floor(bits), math.ceil(bits)))
    return low + (high - low) * (bits - math.floor(bits))


def best_bits(
    found: Mapping[str, Matrix], damages: Mapping[str, float], menu: Sequence[int], grid: Grid, limit: float
) -> dict[str, int]:
    """Name → bits with the least sum of damages in at most `limit` bytes, proved so by HiGHS. Raises `UsageError` if none fit."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that no one else should wait for

    grids = {bits: Grid(bits, grid.group, grid.symmetric) for bits in sorted(menu)}
    pairs = [(name, bits) for name in found for bits in grids]
    lost_by = {(name, bits): lost(m, grids[bits]) for name, m in found.items() for bits in {*grids}}
    at_probe = {name: lost(m, Grid(PROBE, grid.group, grid.symmetric)) or 1.0 for name, m in found.items()}
    damage = np.array([damages[name] * lost_by[name, bits] / at_probe[name] for name, bits in pairs])
    size = np.array([float(stored(found[name], bits, grid)) for name, bits in pairs])
    once = np.array([[float(name == n) for name, _ in pairs] for n in found])
    solved = milp(
        1e4 * damage / max(float(damage.max()), 1e-30) + 1e-4 * size / size.max(),  # of equal damage the smaller
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint([size / limit], -np.inf, 1 + 1e-12)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 30.0},
    )
    if solved.x is None:
        least = sum(stored(m, min(menu), grid) for m in found.values())
        raise UsageError(f"mixed_precision: {limit:,.0f} bytes are too few: with {min(menu)} bits everywhere it is {least:,.0f}.")
    return {name: bits for (name, bits), x in zip(pairs, solved.x, strict=True) if x > 0.5}


@contextmanager
def rounded(m: Matrix, grid: Grid) -> Iterator[None]:
    """Inside, the weight has the values of its nearest levels."""
    kept: Tensor = m.parameter.data
    m.parameter.data = PackedWeight.rounded(kept, grid, turned=m.turned).dequantize()
    try:
        yield
    finally:
        m.parameter.data = kept


__all__ = ["PROBE", "best_bits", "lost", "measured_damages", "rounded", "scored_damages", "stored"]
