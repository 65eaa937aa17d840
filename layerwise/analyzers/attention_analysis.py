"""What a layer's attention does: how much the loss hangs on its weights, how focused, how far, how unlike its heads are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.attention_maps import AttentionCall
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore
from layerwise.statistics import UNREACHED, MomentsStatistic
from layerwise.structure import Layer
from layerwise.sweep import Seen

WITH_THE_BLOCK = "attention maps are measured of whole blocks or attention modules, not of this part"
NO_ATTENTION = "no attention runs in this layer"
NOT_SEEN = "no attention of samples to keys was seen in this layer, or nothing that this measure is defined for"

Sums = tuple[Tensor, Tensor]  # per row of the call: Σ value and Σ weight


def focus(call: AttentionCall) -> Sums:
    """1 − entropy / log(number of visible keys), over heads and queries."""

    def values(weights: Tensor, visible: Tensor, rows: slice) -> Tensor:
        return 1 - torch.special.entr(weights).sum(-1) / visible.sum(-1).clamp_min(2).double().log()

    return _over_queries(call, values)


def distance(call: AttentionCall) -> Sums | None:
    """Σ_j A_ij |i − j|, over heads and queries; between two sequences there is no distance."""
    if not call.first or call.shape[2] != call.shape[3]:
        return None
    keys = torch.arange(call.shape[3], device=call.keep.device, dtype=torch.float64)

    def values(weights: Tensor, visible: Tensor, rows: slice) -> Tensor:
        return (weights * (keys[rows, None] - keys).abs()).sum(-1)

    return _over_queries(call, values)


def disagreement(call: AttentionCall) -> Sums | None:
    """The Jensen–Shannon divergence of the heads' rows over log(heads), over queries; one head has nobody to agree with."""
    heads = call.shape[1]
    if heads < 2:
        return None

    def values(weights: Tensor, visible: Tensor, rows: slice) -> Tensor:
        entropy = torch.special.entr(weights).sum(-1).mean(1, keepdim=True)
        return (torch.special.entr(weights.mean(1, keepdim=True)).sum(-1) - entropy) / math.log(heads)

    return _over_queries(call, values)


def _over_queries(call: AttentionCall, values: Callable[[Tensor, Tensor, slice], Tensor]) -> Sums:
    """Sums over queries that see at least two keys and are no padding: with one key there is nothing to choose."""
    total = weight = torch.zeros(call.shape[0], dtype=torch.float64, device=call.keep.device)
    for rows in call.blocks():
        weights, visible = call.weights(rows)
        found = values(weights, visible, rows)
        counted = (visible.sum(-1) > 1) & call.keep[:, None, rows]
        counted = (counted if found.shape[1] == call.shape[1] else counted.all(1, keepdim=True)).expand_as(found)
        total = total + found.masked_fill(~counted, 0.0).sum((1, 2))
        weight = weight + counted.double().sum((1, 2))
    return total, weight


def gradient_weighted(call: AttentionCall) -> Tensor:
    """Σ |A · dF/dA| over heads, queries and keys: (samples,)."""
    return call.by_sample(sum((_products(call, rows).abs().sum((1, 2, 3)) for rows in call.blocks()), start=_zero(call)))


def head_weighted(call: AttentionCall) -> Tensor:
    """Σ over heads of |⟨dF/d(head's output), head's output⟩| = |Σ A · dF/dA|: (samples,)."""
    heads = call.by_sample(sum((_products(call, rows).sum((2, 3)) for rows in call.blocks()), start=_zero(call)))
    return heads.abs().sum(1)


def _products(call: AttentionCall, rows: slice) -> Tensor:
    weights, visible = call.weights(rows)
    counted = visible & call.keep[:, None, rows, None]
    return (weights * call.slope(rows)).masked_fill(~counted, 0.0)  # filled, since a row without keys may hold NaN


def _zero(call: AttentionCall) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=call.keep.device)


MAPS: dict[str, Callable[[AttentionCall], Sums | None]] = {
    "entropy": focus,
    "distance": distance,
    "redundancy": disagreement,
}
SLOPES: dict[str, Callable[[AttentionCall], Tensor]] = {"gradient": gradient_weighted, "head_importance": head_weighted}
UNITS = {
    "gradient": "nats",
    "head_importance": "nats",
    "entropy": "1 − share of the largest entropy",
    "distance": "positions",
    "redundancy": "share of the largest divergence",
    "rollout": "total variation",
}


class BatchSums:
    """What a batch's calls gave so far: layer → (values, weights), each (samples,). A layer may attend several times."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def add_(self, layer: int, values: Tensor, weights: Tensor) -> None:
        before = self.found.get(layer)
        self.found[layer] = (values, weights) if before is None else (before[0] + values, before[1] + weights)

    def flush_(self, moments: Moments, *, weighted: bool) -> None:
        """Adds the batch to `moments` and forgets it; without `weighted` each sample counts 1."""
        for layer, (values, weights) in self.found.items():
            moments.add_(layer, values, weights if weighted else None)
        self.found.clear()


class MapStatistic(MomentsStatistic):
    """Per sample: a sum over its queries, weighted by their number."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ATTENTION})

    def __init__(self, layers: int, measure: str) -> None:
        super().__init__(Moments(layers))
        self.measure = MAPS[measure]
        self._batch = BatchSums()

    def attention(self, layer: int, call: AttentionCall) -> None:
        sums = self.measure(call)
        if sums is not None:
            self._batch.add_(layer, call.by_sample(sums[0]), call.by_sample(sums[1]))

    def observe(self, seen: Seen) -> None:
        self._batch.flush_(self.moments, weighted=True)

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self._batch = BatchSums()  # of a batch that failed half-way


class SlopeStatistic(MomentsStatistic):
    """Per sample: a sum over all weights of the layer's maps and their gradients."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ATTENTION, Signal.GRADIENTS})

    def __init__(self, layers: int, measure: str) -> None:
        super().__init__(Moments(layers))
        self.measure = SLOPES[measure]
        self._batch = BatchSums()

    def attention(self, layer: int, call: AttentionCall) -> None:
        values = self.measure(call)
        self._batch.add_(layer, values, torch.ones_like(values))

    def observe(self, seen: Seen) -> None:
        self._batch.flush_(self.moments, weighted=False)

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self._batch = BatchSums()


class RolloutStatistic(MomentsStatistic):
    """Per sample: Σ over queries of the total variation between a chain's rollout after and before the layer."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ATTENTION})

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__(Moments(len(layers)))
        self.chains = [layer.group for layer in layers]
        self._batch = BatchSums()
        self._flow: dict[str, Tensor] = {}  # chain → (samples, positions, positions): where each position's content came from

    def attention(self, layer: int, call: AttentionCall) -> None:
        n, _, queries, keys = call.shape
        if queries != keys or n != call.samples or not call.first:
            return
        mean = torch.cat([call.weights(rows)[0].mean(1) for rows in call.blocks()], 1)
        before = self._flow.get(self.chains[layer])
        if before is None or before.shape != mean.shape:  # the chain begins, or begins anew on shorter sequences
            before = torch.eye(queries, dtype=mean.dtype, device=mean.device).expand_as(mean)
        after = (mean @ before + before) / 2
        self._flow[self.chains[layer]] = after
        self._batch.add_(layer, ((after - before).abs().sum(-1) / 2 * call.keep).sum(1), call.keep.double().sum(1))

    def observe(self, seen: Seen) -> None:
        self._batch.flush_(self.moments, weighted=True)
        self._flow.clear()

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self._batch = BatchSums()
        self._flow.clear()


@dataclass(frozen=True)
@ANALYZERS.register("attention_analysis")
class AttentionAnalyzer(ImportanceAnalyzer):
    """What each layer's attention does, from its maps, recomputed beside the model's own (fused) attention.

    Layers without attention are not applicable. Padding is left out; queries that see a single key count for `gradient`,
    `head_importance` and `rollout` only. The standard error is that of samples (ratio estimator). Costs one forward, for the
    first two measures one backward of the activations as well, and one more QKᵀ per call, in blocks of queries: a map is never
    formed whole, but for `rollout`, which holds the mean over heads.

    Parameters
    ----------
    measure
        ``gradient`` (default): E Σ |A · dF/dA| over heads, queries and keys, F the negative log-likelihood, in nats: the loss's
        change, to first order, with each weight taken away by itself. ``head_importance``: E Σ_heads |⟨g, o⟩|, o the head's
        output and g the gradient by it, in nats: to first order, each head taken away. ``entropy``: 1 − entropy / log(number of
        visible keys), 0 for uniform attention and 1 for one key. ``distance``: mean |i − j| in positions. ``redundancy``: the
        heads' Jensen–Shannon divergence over log(heads), 0 for heads that all say the same. ``rollout``: total variation between
        the rollout after the layer and before it, 0 for a layer that attends to itself only.

    References
    ----------
    Chefer, Gur, Wolf (2021), "Generic attention-model explainability for interpreting bi-modal and encoder-decoder transformers"
    (gradient times attention; there the positive part, averaged over heads, as a picture); Michel, Levy, Neubig (2019), "Are
    sixteen heads really better than one?" (there normalised per layer, which would make layers incomparable); Abnar, Zuidema
    (2020), "Quantifying attention flow in transformers" (that a layer counts by how much it changes the rollout is our reading).
    """

    method: ClassVar[str] = "attention_analysis"
    unit: ClassVar[str] = UNITS["gradient"]
    asks: ClassVar[frozenset[str]] = frozenset({"attention"})
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    measure: Literal["gradient", "head_importance", "entropy", "distance", "redundancy", "rollout"] = "gradient"

    def __post_init__(self) -> None:
        if self.measure not in UNITS:
            raise UsageError(f"Unknown measure {self.measure!r} of attention_analysis.", remedy=nearest(self.measure, UNITS))

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def statistic(self, model: UniversalModel) -> Statistic:
        if self.measure == "rollout":
            return RolloutStatistic(list(model.layers))
        layers = len(model.layers)
        return SlopeStatistic(layers, self.measure) if self.measure in SLOPES else MapStatistic(layers, self.measure)

    def score(self, model: UniversalModel, statistic: MomentsStatistic) -> Mapping[str, LayerScore]:
        # counts first: a layer whose queries all see one key has samples, and no weight
        without = [i for i, weight in enumerate(statistic.moments.sums[1].tolist()) if not weight]
        missing = {model.layers[i].name: self._why(model.layers[i]) for i in without}
        return statistic.scores(model.layers, missing=missing)

    def _why(self, layer: Layer) -> str:
        if layer.kind != "attention":
            return NO_ATTENTION
        if layer.site is not None:
            return WITH_THE_BLOCK
        return UNREACHED if self.measure in SLOPES else NOT_SEEN
