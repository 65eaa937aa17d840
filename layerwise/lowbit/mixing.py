"""How many bits each weight gets, so that all together fit into given bytes and the outputs move least.

Decision: what roundings of several weights do does not add up. In a model with two classes the products between weights are as
large as the sum of what each does alone, so that the best choice by the sum may be worse than the same bits everywhere. Therefore
the pairs are counted (`layerwise.lowbit.effects`), and since a choice that cancels on few samples need not cancel on others,
how much the pairs count, and whether anything but uniform bits is taken at all, is decided on samples left out of the choosing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerwise.errors import UsageError
from layerwise.lowbit.effects import Key
from layerwise.lowbit.grid import Grid
from layerwise.matrices import Matrix

PROBE = 3  # bits at which the share of a weight that rounding loses is taken with scores
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # how much the products between weights may count


@dataclass(frozen=True, eq=False)
class Knapsack:
    """One number of bits for each weight, in at most `limit` bytes: `keys` (weight, bits) and the bytes of each."""

    keys: Sequence[Key]
    sizes: np.ndarray
    limit: float

    @property
    def owners(self) -> np.ndarray:
        """The number of each key's weight."""
        names = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in self.keys))}
        return np.array([names[name] for name, _ in self.keys])

    def least_sum(self, damages: np.ndarray) -> np.ndarray | None:
        """The choice (one index of `keys` per weight) with the least sum, proved so by HiGHS; None where nothing fits."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that no one else should wait for

        owners = self.owners
        once = (owners[None] == np.arange(owners.max() + 1)[:, None]).astype(float)
        solved = milp(
            1e4 * damages / max(float(damages.max()), 1e-30)
            + 1e-4 * self.sizes / self.sizes.max(),  # of equal damage the smaller
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint([self.sizes / self.limit], -np.inf, 1 + 1e-9)],
            integrality=np.ones(len(self.keys)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": 30.0},
        )
        return None if solved.x is None else np.flatnonzero(solved.x > 0.5)

    def traded(self, chosen: np.ndarray, products: np.ndarray) -> np.ndarray:
        """From `chosen` on, the bits of one or two weights are changed, each time what lowers xᵀPx most, until nothing does."""
        owners, chosen = self.owners, chosen.copy()
        while True:
            others = np.setdiff1d(np.arange(len(self.keys)), chosen)
            if not len(others):
                return chosen
            own = chosen[np.argsort(owners[chosen])][owners[others]]  # what each of the others would replace
            bytes_ = self.sizes[others] - self.sizes[own]
            free = self.limit * (1 + 1e-12) - self.sizes[chosen].sum()
            towards = products[:, chosen].sum(1)
            both = products[np.ix_(others, others)] - products[np.ix_(others, own)]
            both += products[np.ix_(own, own)] - products[np.ix_(own, others)]
            single = 2 * (towards[others] - towards[own]) + both.diagonal()
            pairs = single[:, None] + single[None] + 2 * both
            pairs[(owners[others][:, None] == owners[others][None]) | (bytes_[:, None] + bytes_[None] > free)] = np.inf
            np.fill_diagonal(pairs, np.where(bytes_ <= free, single, np.inf))  # a pair with itself: it alone
            i, j = np.unravel_index(pairs.argmin(), pairs.shape)
            if not pairs[i, j] < -1e-9 * abs(towards[chosen].sum()):
                return chosen
            for new in {int(i), int(j)}:
                chosen[chosen == own[new]] = others[new]

    def best(self, uniform: np.ndarray, products: np.ndarray, weight: float) -> np.ndarray:
        """The best choice found where products between weights count `weight`, starting from `uniform` and from the least sum."""
        owners = self.owners
        shrunk = np.where(owners[:, None] == owners[None], products, weight * products)
        starts = [uniform, self.least_sum(products.diagonal().copy())]
        found = [self.traded(start, shrunk) for start in starts if start is not None]
        return min(found, key=lambda chosen: divergence(chosen, shrunk))


def divergence(chosen: np.ndarray, products: np.ndarray) -> float:
    """xᵀPx of a choice."""
    return float(products[np.ix_(chosen, chosen)].sum())


def cross_validated(knapsack: Knapsack, uniform: np.ndarray, folds: Sequence[np.ndarray]) -> list[tuple[float, np.ndarray]]:
    """The choices that are expected to do less damage than `uniform` on samples that they were not made on, with that ratio, the
    best first: one for each of the `WEIGHTS` with which this is so. `folds` are the products on each part of the samples.
    """
    whole = sum(folds[1:], start=folds[0])
    found = list[tuple[float, np.ndarray]]()
    for weight in WEIGHTS:
        held_out = sum(divergence(knapsack.best(uniform, whole - fold, weight), fold) for fold in folds)
        ratio = held_out / max(divergence(uniform, whole), 1e-300)
        if ratio < 1:
            found.append((ratio, knapsack.best(uniform, whole, weight)))
    return sorted(found, key=lambda pair: pair[0])


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
    """Name → bits with the least sum of damages in at most `limit` bytes; `damages` are those at `PROBE` bits, and others are in
    proportion to the squared rounding error. Raises `UsageError` if none fit.
    """
    keys = [(name, bits) for name in found for bits in sorted(menu)]
    lost_at = {(name, b): lost(m, Grid(b, grid.group, grid.symmetric)) for name, m in found.items() for b in {*menu, PROBE}}
    damage = np.array([damages[name] * lost_at[name, bits] / (lost_at[name, PROBE] or 1.0) for name, bits in keys])
    sizes = np.array([stored(found[name], bits, grid) for name, bits in keys])
    chosen = Knapsack(keys, sizes, limit).least_sum(damage)
    if chosen is None:
        least = sum(stored(m, min(menu), grid) for m in found.values())
        raise UsageError(f"mixed_precision: {limit:,.0f} bytes are too few: with {min(menu)} bits everywhere it is {least:,.0f}.")
    return dict(keys[i] for i in chosen)


__all__ = ["PROBE", "WEIGHTS", "Knapsack", "best_bits", "cross_validated", "divergence", "lost", "scored_damages", "stored"]
