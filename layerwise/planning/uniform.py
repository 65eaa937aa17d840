"""The uniform choices: one action on every layer that it treats, with or without one outside of the layers.

They are what a planner must not do worse than, and additive damages may rank them wrongly, so they are raced: the
most promising on a part of the data, then the best of these on all of it; where the forwards pay for it, all of them on all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from layerwise.planning.actions import KEEP, Table
from layerwise.planning.outside import REST
from layerwise.planning.search import Search, State
from layerwise.planning.solve import kept
from layerwise.planning.tabulate import LEAST

RUNNERS, FINALISTS = 16, 2


def uniform_choices(table: Table, limits: Mapping[str, float]) -> list[dict[str, str]]:
    """Those within the limits that leave a parameter in some layer, the least summed damage first."""
    found = []
    for rest in table.entries.get(REST, {KEEP: None}):
        beside = {REST: rest} if REST in table.entries else {}
        for label in table.actions:
            rows = {layer: row for layer, row in table.entries.items() if layer != REST}
            chosen = {layer: label if label in row else KEEP for layer, row in rows.items()} | beside
            alive = any(table.entries[k][v].params for k, v in chosen.items())
            if alive and kept(table, chosen, limits) and math.isfinite(table.damage(chosen)) and chosen not in found:
                found.append(chosen)
    return sorted(found, key=table.damage)


def raced(search: Search, choices: Sequence[dict[str, str]], forwards: float) -> list[State]:
    """The measured states of the best of `choices`, for about `forwards`; of all of them where these pay for that."""
    entered = list(choices[:RUNNERS])
    share = min(max(forwards / max(len(entered), 1), LEAST / search.meter.samples), 1.0)
    end = search.meter.spent + forwards
    if share < 1:
        entered = _heat(search, entered, share, end)[:FINALISTS]
    states: list[State] = []
    for chosen in entered:
        state = search.state(chosen) if share < 1 or not states or search.meter.spent < end else None
        states += [state.bare()] if state is not None else []
    return states


def _heat(search: Search, choices: Sequence[dict[str, str]], share: float, end: float) -> list[dict[str, str]]:
    """The choices, best first by what they do on a part of the data. Layers that are treated alike are built once."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, chosen in enumerate(choices):
        alike.setdefault(tuple(v for k, v in chosen.items() if k != REST), []).append(number)
    found: list[tuple[float, int]] = []
    for group in alike.values():
        if found and search.meter.spent >= end:
            break
        layers = {k: v for k, v in choices[group[0]].items() if k != REST}
        damages = search.heat(layers, [choices[i].get(REST, KEEP) for i in group], share)
        found += zip(damages, group, strict=True)
    return [choices[i] for damage, i in sorted(found) if math.isfinite(damage)]


__all__ = ["raced", "uniform_choices"]
