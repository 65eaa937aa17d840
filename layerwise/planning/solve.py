"""The choice of one action per layer that spoils least within a budget: a multiple-choice knapsack, solved exactly by HiGHS.

It minimizes Σ damage subject to Σ cost ≤ limit for each cost, one action per layer, and at least one layer that keeps parameters.
The additive model is a start, not a verdict: what is chosen is measured as a whole afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from layerwise.planning.actions import Assignment, Entry, Table

Damages = Mapping[tuple[str, str], float]  # (layer, action) → nats, in the place of the table's own

SMALL = 1e-7  # of the worst damage: what a layer's whole size is worth where two choices do equal damage
LARGE = 1e5
ZOOMS = 4  # times that the pairs out of reach are taken out, so that the rest is told apart more finely


def solve(table: Table, limits: Mapping[str, float], damages: Damages | None = None) -> dict[str, str] | None:
    """The assignment with the least total damage whose costs keep `limits`; None where there is none.

    With `damages` only the layer–action pairs named there are allowed.
    """
    known = (
        damages if damages is not None else {(e.layer, e.action): e.damage for r in table.entries.values() for e in r.values()}
    )
    allowed = {
        (layer, label): known[layer, label]
        for layer, row in table.entries.items()
        for label in row
        if math.isfinite(known.get((layer, label), math.inf))
    }
    found = _solved(table, limits, allowed)
    for _ in range(ZOOMS):  # an action of 10 nats on the menu must not hide what is between 1e-8 and 1e-6
        if found is None:
            return None
        near = _within(allowed, sum(allowed[pair] for pair in found.items()))
        if len(near) == len(allowed):
            return found
        allowed = near
        found = _solved(table, limits, allowed) or found
    return found


def _within(damages: Damages, bound: float) -> dict[tuple[str, str], float]:
    """The pairs that can be part of an assignment of no more than `bound` damage."""
    least: dict[str, float] = {}
    for (layer, _), damage in damages.items():
        least[layer] = min(damage, least.get(layer, math.inf))
    total = sum(least.values())
    slack = 1e-9 * max(abs(bound), 1e-12)
    return {pair: damage for pair, damage in damages.items() if total - least[pair[0]] + damage <= bound + slack}


def _solved(table: Table, limits: Mapping[str, float], known: Damages) -> dict[str, str] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second that no one else should wait for

    pairs = list(known)
    if {layer for layer, _ in pairs} != table.entries.keys():
        return None  # a layer is left without any choice
    entries = [table.entries[layer][label] for layer, label in pairs]
    rows = [[float(layer == e.layer) for e in entries] for layer in table.entries]
    constraints = [
        LinearConstraint(np.array(rows), 1, 1),
        LinearConstraint([[float(e.params > 0) for e in entries]], 1, math.inf),
    ]
    for metric, limit in limits.items():
        scale = max(abs(limit), 1e-12)
        costs = [[e.cost(metric) / scale for e in entries]]
        constraints.append(LinearConstraint(costs, -math.inf, (limit - table.rest[metric]) / scale))
    found = milp(
        _objective(entries, [known[pair] for pair in pairs]),
        constraints=constraints,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 30.0},
    )
    if found.x is None:
        return None
    return {layer: label for (layer, label), x in zip(pairs, found.x, strict=True) if x > 0.5}


def smallest(table: Table, metric: str) -> dict[str, str]:
    """The assignment that costs least of `metric`, whatever it spoils (one layer is kept where all could go)."""
    chosen = {layer: min(row.values(), key=lambda e: (e.cost(metric), e.damage)).action for layer, row in table.entries.items()}
    if all(not table.entries[layer][label].params for layer, label in chosen.items()):
        parts = [name for name, row in table.entries.items() if any(e.params for e in row.values())]
        layer = min(parts, key=lambda name: _left(table, name, metric).cost(metric))
        chosen[layer] = _left(table, layer, metric).action
    return chosen


def kept(table: Table, chosen: Assignment, limits: Mapping[str, float]) -> bool:
    """Whether the costs that the table knows keep every limit."""
    return all(table.total(chosen, metric) <= limit * (1 + 1e-9) for metric, limit in limits.items())


def _left(table: Table, layer: str, metric: str) -> Entry:
    """The cheapest entry of a layer that leaves it parameters."""
    return min((e for e in table.entries[layer].values() if e.params), key=lambda e: (e.cost(metric), e.damage))


def _objective(entries: list[Entry], damages: list[float]) -> np.ndarray:
    """Damage and a little for bytes, so that of equal choices the smallest is taken; in large numbers, as HiGHS stops at 1e-6."""
    worst = max(*map(abs, damages), 1e-15)
    largest = max(*(abs(e.size) for e in entries), 1.0)
    return LARGE * np.array([d / worst + SMALL * e.size / largest for d, e in zip(damages, entries, strict=True)])


__all__ = ["Damages", "kept", "smallest", "solve"]
