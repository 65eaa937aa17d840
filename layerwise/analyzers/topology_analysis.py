"""The shape of each layer's activations: clusters and loops of a sample of points, and how much the layer changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from layerwise import persistence
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic, streamless
from layerwise.data import Batch
from layerwise.errors import UsageError, nearest
from layerwise.landmarks import Landmarks
from layerwise.model import UniversalModel
from layerwise.persistence import Array
from layerwise.scores import LayerScore, Status
from layerwise.statistics import UNREACHED
from layerwise.sweep import Seen
from layerwise.task import token_mask

FEWEST, MOST = 4, 500  # landmarks
GROUPS = 10  # of the jackknife
ENTERING, LEAVING = 0, 1


class StreamLandmarks(Statistic):
    """For each layer the same few samples of what enters and of what leaves, pooled to one vector per sample."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})

    def __init__(self, layers: int, capacity: int, seed: int) -> None:
        self.kept = [[Landmarks(capacity, seed) for _ in (ENTERING, LEAVING)] for _ in range(layers)]
        self.seen = torch.zeros(1, dtype=torch.float64)

    def observe(self, seen: Seen) -> None:
        self.seen = self.seen + seen.batch.size
        for layer in seen.layers:
            if layer.site is not None or not seen.complete(layer):
                continue
            for side, streams in zip(self.kept[layer.index], (seen.entering, seen.leaving), strict=True):
                stream = streams[layer.index]
                assert stream is not None  # the layer was seen completely
                side.add_(seen.ids, pooled(stream, seen.batch))

    def merge_(self, other: StreamLandmarks) -> None:
        self.seen = self.seen + other.seen
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            for side, addition in zip(mine, theirs, strict=True):
                side.merge_(addition)

    def state(self) -> dict[str, Tensor]:
        found = {"seen": self.seen}
        for layer, sides in enumerate(self.kept):
            for side, marks in enumerate(sides):
                found |= {f"{layer}.{side}.{key}": value for key, value in marks.state().items()}
        return found

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]
        for layer, sides in enumerate(self.kept):
            for side, marks in enumerate(sides):
                marks.load_({key: state[f"{layer}.{side}.{key}"] for key in marks.state()})

    @property
    def samples(self) -> int:
        return int(self.seen)

    def points(self, layer: int) -> tuple[Array, Array]:
        """What enters and what leaves, each (landmarks, features)."""
        entering, leaving = (marks.rows().cpu().double().numpy() for marks in self.kept[layer])
        return entering, leaving


def pooled(stream: Tensor, batch: Batch) -> Tensor:
    """(samples, features): the mean over tokens that are no padding, or over the places of an image; else flattened."""
    x = stream.double()
    if x.dim() == 3:
        keep = token_mask(batch, x[..., 0]).double()[..., None]
        return (x * keep).sum(1) / keep.sum(1).clamp_min(1)
    if x.dim() == 4:  # places are the two dimensions of one size; channels come first where that does not tell
        last = x.shape[1] == x.shape[2] != x.shape[3]
        return x.mean((1, 2) if last else (2, 3))
    return x.flatten(1)


def change(entering: Array, leaving: Array) -> float:
    """How far the H0 bars of what leaves are from those of what enters."""
    return persistence.bar_distance(persistence.components(entering), persistence.components(leaving))


def spread(entering: Array, leaving: Array) -> float:
    """The mean length of the H0 bars of what leaves: total persistence per bar."""
    return float(persistence.components(leaving).mean())


def roundness(entering: Array, leaving: Array) -> float:
    """The total length of the H1 bars of what leaves."""
    return float(persistence.loops(leaving).sum())


def unevenness(entering: Array, leaving: Array) -> float:
    """1 − the normalised persistent entropy of the H0 bars of what leaves."""
    return persistence.focus(persistence.components(leaving))


# of distances in units of their median
MEASURES: dict[str, Callable[[Array, Array], float]] = {
    "change": change,
    "total_persistence": spread,
    "loops": roundness,
    "persistent_entropy": unevenness,
}
UNITS = {
    "change": "median distances",
    "total_persistence": "median distances",
    "loops": "median distances",
    "persistent_entropy": "1 − share of the largest entropy",
}


def measured(measure: Callable[[Array, Array], float], entering: Array, leaving: Array) -> LayerScore:
    """The measure of two clouds of the same samples, with its standard error by the jackknife over groups of them."""
    distances = [persistence.distances(points) for points in (entering, leaving)]
    value = _value(measure, distances)
    if value is None:
        return LayerScore.missing(Status.FAILED, "more than half of the samples are one point of the stream")
    n = len(entering)
    groups = min(GROUPS, n)
    without = []
    for group in range(groups):
        rest = np.flatnonzero(np.arange(n) % groups != group)
        found = _value(measure, [d[np.ix_(rest, rest)] for d in distances]) if len(rest) >= FEWEST - 1 else None
        if found is None:
            return LayerScore.measured(value)
        without.append(found)
    return LayerScore.measured(value, math.sqrt((groups - 1) * float(np.var(without))))


def _value(measure: Callable[[Array, Array], float], distances: list[Array]) -> float | None:
    units = [persistence.scaled(d) for d in distances]
    return None if units[0] is None or units[1] is None else measure(units[0], units[1])


@dataclass(frozen=True)
@ANALYZERS.register("topology_analysis")
class TopologyAnalyzer(ImportanceAnalyzer):
    """How much a layer changes the clustering of its stream: the distance between the bars of H0 before and after it.

    A seeded sample of the data, the same for every layer and whatever the sharding, is pooled to one vector per sample (mean over
    tokens or places); distances are in units of their median, so a scale or a rotation changes nothing. The standard error is the
    jackknife's over ten groups of landmarks (NaN where fewer than three are left), which errs on the large side: on synthetic
    clouds it was 1.2 to 1.9 times the deviation of repeated draws. Costs one forward, and n² distances per layer at the end.

    Parameters
    ----------
    measure
        ``change`` (default): mean |difference| of the H0 bars that enter and leave, in the order of their lengths.
        ``total_persistence``: the mean H0 bar of what leaves; long where no samples lie together. ``loops``: the total length of
        the H1 bars of what leaves, by ripser (extra ``topology``). ``persistent_entropy``: 1 − entropy of the H0 bars over its
        largest value; high where few bars outweigh the rest, as between clusters.
    landmarks
        How many samples are kept, 4 … 500.
    seed
        Which.

    References
    ----------
    Edelsbrunner, Harer (2010), "Computational topology" (persistence, Wasserstein distance); Tralie, Saul, Bar-On (2018),
    "Ripser.py"; Chintakunta et al. (2015), "An entropy-based persistence barcode". That a layer counts by how much it changes the
    bars is our reading.
    """

    method: ClassVar[str] = "topology_analysis"
    unit: ClassVar[str] = UNITS["change"]
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    measure: Literal["change", "total_persistence", "loops", "persistent_entropy"] = "change"
    landmarks: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"Unknown measure {self.measure!r} of topology_analysis.", remedy=nearest(self.measure, MEASURES))
        if not FEWEST <= self.landmarks <= MOST:
            raise UsageError(f"topology_analysis takes {FEWEST} to {MOST} landmarks, not {self.landmarks}.")

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def statistic(self, model: UniversalModel) -> Statistic:
        if self.measure == "loops":
            persistence.ripser()  # now, and not after the pass
        return StreamLandmarks(len(model.layers), self.landmarks, self.seed)

    def score(self, model: UniversalModel, statistic: StreamLandmarks) -> Mapping[str, LayerScore]:
        inside = {x.name: LayerScore.missing(Status.NOT_APPLICABLE, streamless(x)) for x in model.layers if x.site is not None}
        return {x.name: inside.get(x.name) or self._score(*statistic.points(x.index)) for x in model.layers}

    def _score(self, entering: Array, leaving: Array) -> LayerScore:
        if not len(leaving):
            return LayerScore.missing(Status.NOT_APPLICABLE, UNREACHED)
        if len(leaving) < FEWEST:
            return LayerScore.missing(Status.NOT_APPLICABLE, f"needs at least {FEWEST} samples")
        if not (np.isfinite(entering).all() and np.isfinite(leaving).all()):
            return LayerScore.missing(Status.FAILED, "the stream holds NaN or infinity")
        return measured(MEASURES[self.measure], entering, leaving)
