"""One solver that turns any ranking of layers into bits per layer at the same budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.stats import rankdata

from layerwise.benchmark.protocol import BITS, MEAN_BITS


def weights_of(scores: Mapping[str, float], layers: Sequence[str]) -> list[float]:
    """The rank of each layer, 1 for the least important, ties shared; layers without a score get the mean rank."""
    known = [name for name in layers if name in scores and math.isfinite(scores[name])]
    ranks = dict(zip(known, rankdata([scores[name] for name in known]), strict=True))
    mean = (len(known) + 1) / 2
    return [float(ranks.get(name, mean)) for name in layers]


def allocate(importance: Sequence[float], sizes: Sequence[int], bits: Sequence[int] = BITS, mean: float = MEAN_BITS) -> list[int]:
    """The bits that minimize Σ importance · 4^(−bits) with Σ size · bits ≤ mean · Σ size; exact.

    Walks the layers and keeps the Pareto front of (bits spent, objective) over partial choices, so equal sizes stay cheap.
    """
    budget = mean * sum(sizes)
    least = [min(bits) * sum(sizes[i + 1 :]) for i in range(len(sizes))]
    front: list[tuple[float, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for weight, size, rest in zip(importance, sizes, least, strict=True):
        grown = [(spent + size * b, cost + weight * 4.0**-b, (*chosen, b)) for spent, cost, chosen in front for b in bits]
        front = _pareto([entry for entry in grown if entry[0] + rest <= budget])
    return list(min(front, key=lambda entry: (entry[1], entry[0], entry[2]))[2])


def _pareto(entries: list[tuple[float, float, tuple[int, ...]]]) -> list[tuple[float, float, tuple[int, ...]]]:
    """The entries that no other one matches in both figures."""
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for entry in sorted(entries):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept
