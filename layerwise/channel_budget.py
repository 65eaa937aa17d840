"""How many channels of each group may go for a budget of multiply-accumulates: damage measured, the best sum found exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from layerwise.channels import ChannelGroup, Removed, width
from layerwise.model import UniversalModel
from layerwise.trace import traced

BINS = 2000  # the budget is divided into so many parts, each cost rounded up
ROUNDS = 12


class Costs:
    """The multiply-accumulates of each module on the model's example, and of the whole model with channels removed."""

    def __init__(self, model: UniversalModel) -> None:
        batch = model.example
        root = traced(model.module, batch.narrow(0, 1))
        names = {m: name for name, m in model.module.named_modules()}
        self.root, self.total = model.module, float(root.macs)
        self.own: dict[str, float] = {}
        for call in root.walk():
            if not any(True for _ in call.module.children()):
                self.own[names[call.module]] = self.own.get(names[call.module], 0.0) + call.macs

    def left(self, removed: Removed) -> float:
        """Of the whole model."""
        gone = 0.0
        for name, sides in removed.items():
            share = 1.0
            for side, indices in sides.items():
                share *= 1 - len(indices) / width(self.root.get_submodule(name), side)
            gone += self.own.get(name, 0.0) * (1 - share)
        return self.total - gone


def chosen_widths(
    groups: Sequence[ChannelGroup],
    damages: Sequence[Mapping[int, float]],
    gone: Callable[[ChannelGroup, int], Removed],
    costs: Costs,
    budget: float,
) -> list[int] | None:
    """How many channels each group keeps, with the least sum of damages that leaves at most `budget`; None if nothing does.

    `damages`: kept channels → damage, linear between the widths that were measured. ``gone(group, kept)`` is what goes.
    """
    options = [widths(group.size, damage) for group, damage in zip(groups, damages, strict=True)]
    saved = [
        [costs.total - costs.left(gone(group, kept)) for kept, _ in option] for group, option in zip(groups, options, strict=True)
    ]
    wanted = costs.total - budget
    for _ in range(ROUNDS):  # two groups that share a kernel save less together than apart
        found = knapsack([[(s, d) for s, (_, d) in zip(a, b, strict=True)] for a, b in zip(saved, options, strict=True)], wanted)
        if found is None:
            return None
        kept = [option[i][0] for option, i in zip(options, found, strict=True)]
        over = costs.left(merged(gone(g, k) for g, k in zip(groups, kept, strict=True))) - budget
        if over <= 0:
            return kept
        wanted += over
    return None


def widths(size: int, damage: Mapping[int, float]) -> list[tuple[int, float]]:
    """(kept, damage) from the narrowest width that was measured to all channels, which do none."""
    points = sorted({**damage, size: 0.0}.items())
    xs, ys = zip(*points, strict=True)
    return [(kept, float(np.interp(kept, xs, ys))) for kept in range(xs[0], size + 1, max(size // 32, 1))] + (
        [] if (size - xs[0]) % max(size // 32, 1) == 0 else [(size, 0.0)]
    )


def knapsack(options: Sequence[Sequence[tuple[float, float]]], wanted: float) -> list[int] | None:
    """The index of one option (saving, damage) of each list: least damage for savings of at least `wanted`; None if none has."""
    if wanted <= 0:
        return [max(range(len(o)), key=lambda i: -o[i][1]) for o in options]
    best = np.full(BINS + 1, np.inf)
    best[0] = 0.0
    picks = list[np.ndarray]()
    for option in options:
        new, pick = np.full(BINS + 1, np.inf), np.zeros(BINS + 1, dtype=int)
        for i, (saving, damage) in enumerate(option):
            step = int(saving / wanted * BINS)  # rounded down: what is promised is kept
            reached = np.minimum(np.arange(BINS + 1) + step, BINS)
            for start in np.flatnonzero(np.isfinite(best)):
                if best[start] + damage < new[reached[start]]:
                    new[reached[start]], pick[reached[start]] = best[start] + damage, i * (BINS + 1) + start
        best, picks = new, [*picks, pick]
    if not np.isfinite(best[BINS]):
        return None
    found, place = list[int](), BINS
    for pick in reversed(picks):
        index, place = divmod(int(pick[place]), BINS + 1)
        found.append(index)
    return found[::-1]


def merged(parts: Iterable[Removed]) -> dict[str, dict[str, Sequence[int]]]:
    """Several removals as one; a convolution may read one group and make another."""
    result: dict[str, dict[str, Sequence[int]]] = {}
    for part in parts:
        for name, sides in part.items():
            result[name] = result.get(name, {}) | dict(sides)
    return result
