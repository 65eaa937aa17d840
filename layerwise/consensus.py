"""What several methods say together, how much each counts, and which of them contradict each other about which layers.

Methods come in different units, so only their ranks are combined: each method gives each layer the share of its layers that it
ranks below (ties count half), and the consensus is a weighted mean of these shares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from layerwise.ranks import shares, spearman, spearman_rows
from layerwise.scores import LayerScore, Scores, Status

DISAGREE = 0.4  # rho below which two methods are said to disagree
FEWEST = 4  # layers that two methods must share before they can disagree: of three, any order is chance
CONTESTED = 3  # layers that are named for each pair
PERTURBATIONS = 400
UNIT = "share of layers ranked below"
UNVOTED = "no method scored this layer"


def reliability(scores: Scores, *, seed: int = 0) -> float:
    """Expected Spearman's rho of a method's ranks with those after Gaussian noise of its own standard errors; −1 … 1.

    1: the ranks survive the sampling error; near 0: they are that error. It says how firmly the method speaks, not whether it is
    right. NaN where fewer than three layers have a standard error.
    """
    known = [e for e in scores.entries.values() if e.status is Status.OK and math.isfinite(e.stderr)]
    if len(known) < 3:
        return math.nan
    values, errors = (np.array([getattr(e, key) for e in known]) for key in ("value", "stderr"))
    noise = np.random.default_rng(seed).standard_normal((PERTURBATIONS, len(known)))
    rho = spearman_rows(np.broadcast_to(values, noise.shape), values + noise * errors)
    return float(np.nanmean(rho)) if np.isfinite(rho).any() else math.nan


def reliability_weights(voters: Mapping[str, Scores], *, seed: int = 0) -> dict[str, float]:
    """Each method's reliability, not below 0. A method without standard errors gets the median of the known ones (1 if none is).

    The median is neutral: such a method (it reads weights only) has no sampling error, but nothing shows that it deserves more.
    """
    found = {name: reliability(scores, seed=seed) for name, scores in voters.items()}
    known = [max(value, 0.0) for value in found.values() if math.isfinite(value)]
    neutral = median(known) if known else 1.0
    weights = {name: max(value, 0.0) if math.isfinite(value) else neutral for name, value in found.items()}
    return weights if any(weights.values()) else dict.fromkeys(weights, 1.0)


def combined(layers: Sequence[str], voters: Mapping[str, Scores], weights: Mapping[str, float], how: str) -> Scores:
    """The weighted mean of the methods' shares; the standard error is that over methods (NaN for a single one)."""
    votes = {name: dict(zip(s.entries, shares(_usable(s)), strict=True)) for name, s in voters.items()}
    entries = {}
    for layer in layers:
        cast = [(votes[m].get(layer, math.nan), weights[m]) for m in voters]
        entries[layer] = _mean(
            [v for v, w in cast if math.isfinite(v) and w > 0], [w for v, w in cast if math.isfinite(v) and w > 0]
        )
    return Scores("consensus", UNIT, entries, settings={"how": how, "weights": dict(weights)})


def _usable(scores: Scores) -> np.ndarray:
    return np.array([e.value if e.status is Status.OK else math.nan for e in scores.entries.values()])


def _mean(votes: Sequence[float], weights: Sequence[float]) -> LayerScore:
    if not votes:
        return LayerScore.missing(Status.NOT_APPLICABLE, UNVOTED)
    v, w = np.array(votes), np.array(weights) / sum(weights)
    mean, together = float((w * v).sum()), float((w * w).sum())  # `together` is 1 over the effective number of methods
    if len(votes) < 2:
        return LayerScore(mean)
    spread = float((w * (v - mean) ** 2).sum()) / (1.0 - together)
    return LayerScore(mean, math.sqrt(spread * together))


@dataclass(frozen=True)
class Contested:
    """A layer and the ranks that two methods give it among the layers that both scored (1: most important)."""

    layer: str
    first: int
    second: int


@dataclass(frozen=True)
class Disagreement:
    """Two methods whose ranks of `layers` common layers correlate below `DISAGREE`, and the layers they differ most about."""

    first: str
    second: str
    rho: float
    layers: int
    contested: tuple[Contested, ...]

    def __str__(self) -> str:
        named = ", ".join(f"{c.layer} (rank {c.first} against {c.second})" for c in self.contested)
        return f"{self.first} and {self.second} disagree (ρ = {self.rho:.2f} over {self.layers} layers), most about {named}."


def disagreements(voters: Mapping[str, Scores]) -> list[Disagreement]:
    """Every pair of methods that disagrees, the worst first."""
    pairs = (_compared(a, b, voters[a].usable(), voters[b].usable()) for a, b in itertools.combinations(voters, 2))
    return sorted((p for p in pairs if p.layers >= FEWEST and p.rho < DISAGREE), key=lambda p: p.rho)


def _compared(a: str, b: str, left: Mapping[str, float], right: Mapping[str, float]) -> Disagreement:
    common = [name for name in left if name in right]
    rho = spearman(np.array([left[n] for n in common]), np.array([right[n] for n in common]))
    first, second = (_places({n: side[n] for n in common}) for side in (left, right))
    apart = sorted(common, key=lambda n: -abs(first[n] - second[n]))[:CONTESTED]
    return Disagreement(a, b, rho, len(common), tuple(Contested(n, first[n], second[n]) for n in apart))


def _places(values: Mapping[str, float]) -> dict[str, int]:
    return {name: place for place, name in enumerate(sorted(values, key=lambda n: -values[n]), start=1)}
