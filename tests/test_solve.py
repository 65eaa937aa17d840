"""The solver against every assignment tried one by one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from layerwise.planning.actions import KEEP, Action, Entry, Table
from layerwise.planning.search import pareto
from layerwise.planning.solve import kept, smallest, solve


def table(seed: int, layers: int = 4, actions: int = 4) -> Table:
    """Random costs and damages; the last action of each layer drops it."""
    draw = random.Random(seed)
    labels = [KEEP, *(f"a{i}" for i in range(1, actions - 1)), "drop"]
    entries = {}
    for name in map(str, range(layers)):
        row = {KEEP: Entry(name, KEEP, size=100, params=100, macs=100)}
        for label in labels[1:]:
            size = 0.0 if label == "drop" else draw.randint(10, 90)
            row[label] = Entry(name, label, size=size, params=size, macs=draw.randint(0, 100), damage=draw.random())
        entries[name] = row
    return Table(entries, {label: Action() for label in labels}, dict.fromkeys(("size", "params", "macs", "latency"), 7.0))


def tried(found: Table, limits: dict[str, float]) -> float:
    """The least damage of any assignment within `limits` that keeps a parameter; infinite where there is none."""
    best = math.inf
    for labels in itertools.product(*(row for row in found.entries.values())):
        chosen = dict(zip(found.entries, labels, strict=True))
        alive = any(found.entries[k][v].params for k, v in chosen.items())
        if alive and all(found.total(chosen, m) <= limit for m, limit in limits.items()):
            best = min(best, found.damage(chosen))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_the_least_damage_within_every_limit(seed: int) -> None:
    found = table(seed)
    limits = {"size": 7 + 400 * (0.15 + 0.07 * seed), "macs": 7 + 400 * 0.6}
    chosen, best = solve(found, limits), tried(found, limits)
    assert (chosen is None) == math.isinf(best)
    if chosen is not None:
        assert kept(found, chosen, limits)
        assert found.damage(chosen) == pytest.approx(best, abs=1e-6)


def test_small_damages_are_told_apart_beside_large_ones_and_bytes_are_used() -> None:
    """Fails where differences of 1e-8 nats drown in an action of 10: then the smaller choice is taken, and bytes are left."""
    labels = {KEEP: (100, 0.0), "half": (50, 1e-9), "eight": (27, 3e-8), "four": (14, 1e-5), "drop": (0, 10.0)}
    entries = {n: {k: Entry(n, k, size=s, params=s, damage=d) for k, (s, d) in labels.items()} for n in ("a", "b", "c")}
    found = Table(entries, {k: Action() for k in labels}, {"size": 0.0})
    assert sorted((solve(found, {"size": 150}) or {}).values()) == ["half", "half", "half"]
    assert sorted((solve(found, {"size": 105}) or {}).values()) == ["eight", "eight", "half"]


def test_one_layer_stays() -> None:
    found = table(0)
    chosen = solve(found, {"size": 7 + 60.0})
    assert chosen is None or any(label != "drop" for label in chosen.values())
    assert any(found.entries[k][v].params for k, v in smallest(found, "size").items())


def test_with_damages_only_the_pairs_named_are_chosen() -> None:
    found = table(1)
    allowed = {(layer, KEEP): 0.0 for layer in found.entries} | {("2", "drop"): -1.0, ("3", "drop"): math.inf}
    assert solve(found, {"size": 1e9}, allowed) == {"0": KEEP, "1": KEEP, "2": "drop", "3": KEEP}
    assert solve(found, {"size": 100.0}, allowed) is None


def test_the_front_holds_what_nothing_beats() -> None:
    rows = [
        Entry("x", str(i), size=s, damage=d) for i, (s, d) in enumerate([(9, 0), (5, 2), (5, 1), (4, 1), (3, 3), (2, 3), (1, 9)])
    ]
    assert [(e.size, e.damage) for e in pareto(rows, "size")] == [(1, 9), (2, 3), (4, 1), (9, 0)]
