"""What the planner is compared with, from its own table: the best uniform choice, a random one, and dropping the last layers."""

from __future__ import annotations

import random
from collections.abc import Mapping

from layerwise.method import apply_plan
from layerwise.plan import CompressionPlan, Step
from layerwise.planner import Planner
from layerwise.planning.actions import Table
from layerwise.planning.outside import REST
from layerwise.planning.search import Search
from layerwise.planning.solve import kept, smallest
from layerwise.planning.uniform import raced, uniform_choices
from layerwise.planning.wholes import Whole

CHOICES = 12  # uniform choices that are measured on all planning samples, the least summed damage first


def uniform(planner: Planner, limit: float) -> tuple[Step, ...] | None:
    """One action on every layer that it treats, with one outside of the layers or none, alone or under a whole-model method.

    The best by what is measured on all planning samples, of the `CHOICES` that the table's sums call best.
    """
    found: list[tuple[float, int, tuple[Step, ...]]] = []
    for number, whole in enumerate(planner.wholes):
        table = whole.on(planner.table)
        search = Search(table, planner.meter, planner.supplies, seen=planner.seen)
        choices = uniform_choices(table, {"size": limit})[: 1 if whole.methods else CHOICES]
        if whole.methods:
            for chosen in choices:
                steps = planner.table.steps(planner.model, chosen, whole.methods)
                changed = apply_plan(planner.model, CompressionPlan(steps), planner.supplies).model
                found.append((planner.meter.compared(changed).damage, number, steps))
        else:
            states = [s for s in raced(search, choices, float("inf")) if kept(table, s.chosen, {"size": limit})]
            found += [(s.damage, number, planner.table.steps(planner.model, s.chosen)) for s in states]
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def at_random(planner: Planner, limit: float, seed: int) -> tuple[Step, ...] | None:
    """A random whole-model method with which the budget can be met, then random layers, tables too, to random cheaper actions."""
    draw = random.Random(1000 + seed)
    feasible = [w for w in planner.wholes if w.on(planner.table).total(smallest(w.on(planner.table), "size"), "size") <= limit]
    if not feasible:
        return None
    whole = draw.choice(feasible)
    table = whole.on(planner.table)
    chosen = table.kept()
    while table.total(chosen, "size") > limit:
        layer = draw.choice(list(chosen))
        size = table.entries[layer][chosen[layer]].size
        cheaper = [e.action for e in table.entries[layer].values() if e.size < size]
        moved = chosen | {layer: draw.choice(cheaper)} if cheaper else chosen
        chosen = moved if alive(table, moved) else chosen
    return planner.table.steps(planner.model, chosen, whole.methods)


def last_k(planner: Planner, limit: float) -> tuple[Step, ...] | None:
    """The last layers are dropped, as few as some whole-model method, or choice outside of the layers, allows."""
    label = next(label for label, action in planner.table.actions.items() if [m.name for m in action.methods] == ["drop_layers"])
    found: list[tuple[int, float, int, dict[str, str], Whole]] = []
    for whole in planner.wholes:
        table = whole.on(planner.table)
        for rest in table.entries.get(REST, {"": None}):
            chosen = table.kept() | ({REST: rest} if rest else {})
            for layer in [name for name in reversed(list(chosen)) if label in table.entries[name]]:
                if table.total(chosen, "size") <= limit:
                    break
                chosen = chosen | {layer: label}
            if table.total(chosen, "size") <= limit and alive(table, chosen):
                count = sum(v == label for v in chosen.values())
                damage = whole.effect.damage + (table.entries[REST][rest].damage if rest else 0.0)
                found.append((count, damage, len(found), chosen, whole))
    if not found:
        return None
    *_, chosen, whole = min(found, key=lambda entry: entry[:3])
    return planner.table.steps(planner.model, chosen, whole.methods)


def alive(table: Table, chosen: Mapping[str, str]) -> bool:
    return any(table.entries[k][v].params for k, v in chosen.items())
