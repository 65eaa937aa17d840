"""How much a layer changes its stream: block influence, angular distance, or 1 − CKA of what enters and what leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic, streamless, unskippable
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer
from layerwise.sweep import Seen
from layerwise.task import cosine_distance, token_mask

MEASURES = ("block_influence", "angular", "cka")
TOKENS = ("all", "last")


def angle(distance: Tensor) -> Tensor:
    """The angle whose 1 − cos is `distance`, over π; by the half angle, since arccos near 1 loses half of the digits."""
    return torch.asin((distance / 2).clamp_max(1.0).sqrt()) * (2 / math.pi)


OF_DISTANCE: dict[str, Callable[[Tensor], Tensor]] = {"block_influence": lambda distance: distance, "angular": angle}


def last_only(keep: Tensor) -> Tensor:
    """Of a mask (samples, positions) each row's last kept position."""
    return keep & (keep.flip(1).cumsum(1).flip(1) == 1)


class BlockInfluence(MomentsStatistic):
    """Per sample: Σ over positions of 1 − cos(entering, leaving), or of their angle, weighted by the number of positions."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})

    def __init__(self, layers: int, measure: str = "block_influence", tokens: str = "all") -> None:
        super().__init__(Moments(layers))
        self.value = OF_DISTANCE[measure]
        self.tokens = tokens

    def observe(self, seen: Seen) -> None:
        for layer in seen.layers:
            entering, leaving = seen.entering[layer.index], seen.leaving[layer.index]
            if entering is None or leaving is None or not layer.skippable or leaving.shape[0] != seen.batch.size:
                continue
            x, y = positions(entering), positions(leaving)
            distance = cosine_distance(x, y)
            mask = token_mask(seen.batch, distance)
            keep = (mask if self.tokens == "all" else last_only(mask)).double()
            self.moments.add_(layer.index, (self.value(distance) * keep).sum(1), keep.sum(1))


def positions(stream: Tensor) -> Tensor:
    """(samples, positions, features) in float64: tokens of a sequence; any other shape is one position per sample."""
    x = stream.double()
    return x if x.dim() == 3 else x.flatten(1).unsqueeze(1)


class MinibatchCKA(Statistic):
    """Sums over batches of the unbiased HSIC of (entering, leaving), (entering, entering), (leaving, leaving), and squares."""

    aligned: ClassVar[bool] = True
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS})

    def __init__(self, layers: int) -> None:
        self.sums = torch.zeros(layers, 9, dtype=torch.float64)  # xy xx yy, their squares, xy·xx xy·yy xx·yy
        self.batches = torch.zeros(layers, dtype=torch.float64)
        self.seen = torch.zeros(1, dtype=torch.float64)

    def observe(self, seen: Seen) -> None:
        self.seen += seen.batch.size
        if seen.batch.size < 4:  # the unbiased estimator divides by n − 3
            return
        for layer in seen.layers:
            entering, leaving = seen.entering[layer.index], seen.leaving[layer.index]
            if entering is None or leaving is None or leaving.shape[0] != seen.batch.size:
                continue
            k, g = gram(entering), gram(leaving)
            xy, xx, yy = unbiased_hsic(k, g), unbiased_hsic(k, k), unbiased_hsic(g, g)
            row = torch.stack([xy, xx, yy, xy * xy, xx * xx, yy * yy, xy * xx, xy * yy, xx * yy])
            self.sums = self.sums.to(row.device)  # once: from then on no batch waits for the host
            self.sums[layer.index] += row
            self.batches[layer.index] += 1

    def merge_(self, other: MinibatchCKA) -> None:
        self.sums = self.sums + other.sums.to(self.sums.device)
        self.batches = self.batches + other.batches
        self.seen = self.seen + other.seen

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "batches": self.batches, "seen": self.seen}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.sums, self.batches, self.seen = state["sums"], state["batches"], state["seen"]

    @property
    def samples(self) -> int:
        return int(self.seen)

    def distance(self, layer: int) -> LayerScore:
        """1 − Σ HSIC(x, y) / √(Σ HSIC(x, x) Σ HSIC(y, y)), with the delta method's standard error over batches."""
        n = float(self.batches[layer])
        if not n:
            return LayerScore.missing(Status.NOT_APPLICABLE, "needs batches of at least 4 samples")
        xy, xx, yy, *squares = (float(v) / n for v in self.sums[layer].cpu())
        if xx <= 0 or yy <= 0:
            return LayerScore.missing(Status.FAILED, "the stream does not vary over samples")
        cka = xy / math.sqrt(xx * yy)
        if n < 2:
            return LayerScore.measured(1.0 - cka)
        gradient = torch.tensor([cka / xy if xy else 0.0, -cka / (2 * xx), -cka / (2 * yy)], dtype=torch.float64)
        means = torch.tensor([xy, xx, yy], dtype=torch.float64)
        a, b, c, ab, ac, bc = squares
        second = torch.tensor([[a, ab, ac], [ab, b, bc], [ac, bc, c]], dtype=torch.float64)
        variance = float(gradient @ (second - torch.outer(means, means)) @ gradient) / (n - 1)
        return LayerScore.measured(1.0 - cka, math.sqrt(max(variance, 0.0)))


def gram(stream: Tensor) -> Tensor:
    """The linear-kernel Gram matrix of the flattened samples, (samples, samples), float64."""
    x = stream.flatten(1).double()
    return x @ x.T


def unbiased_hsic(k: Tensor, g: Tensor) -> Tensor:
    """The unbiased estimator HSIC₁ of two Gram matrices (Song et al. 2012), for n ≥ 4 samples."""
    n = k.shape[0]
    off = 1.0 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, g = k * off, g * off
    trace = (k * g.T).sum()
    middle = k.sum() * g.sum() / ((n - 1) * (n - 2))
    last = 2.0 * (k.sum(0) * g.sum(0)).sum() / (n - 2)
    return (trace + middle - last) / (n * (n - 3))


@dataclass(frozen=True)
@ANALYZERS.register("layer_correlation")
class LayerCorrelationAnalyzer(ImportanceAnalyzer):
    """How far what leaves a layer is from what entered: 0 for a layer that does nothing. No unit.

    It says how much a layer changes its stream, not how much that change matters.

    Parameters
    ----------
    measure
        ``block_influence``: mean over tokens of 1 − cos (default; for layers that keep the shape); ``angular``: mean of
        arccos(cos) / π, which grows with small turns and not with their square; ``cka``: 1 − linear CKA from unbiased minibatch
        HSIC, defined for any shapes, dependent on the batch size only through its variance.
    tokens
        ``all`` (default), or ``last``: only the last token of each sample that is no padding. For the first two measures.

    References
    ----------
    Men et al. (2024), "ShortGPT"; Gromov et al. (2024), "The unreasonable ineffectiveness of the deeper layers" (angular distance
    of the last token; there over spans of layers, here over one layer); Kornblith et al. (2019), "Similarity of neural network
    representations revisited"; Nguyen, Raghu, Kornblith (2021), "Do wide and deep networks learn the same things?" (minibatch
    CKA).
    """

    method: ClassVar[str] = "layer_correlation"
    unit: ClassVar[str] = "1 − similarity"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    measure: Literal["block_influence", "angular", "cka"] = "block_influence"
    tokens: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"Unknown measure {self.measure!r} of layer_correlation.", remedy=nearest(self.measure, MEASURES))
        if self.tokens not in TOKENS:
            raise UsageError(f"Unknown tokens {self.tokens!r} of layer_correlation.", remedy=nearest(self.tokens, TOKENS))
        if self.tokens == "last" and self.measure == "cka":
            raise UsageError("cka compares whole samples.", remedy="Use tokens='all', or measure='angular'.")

    def measured_in(self) -> str:
        return "angle / π" if self.measure == "angular" else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        layers = len(model.layers)
        return MinibatchCKA(layers) if self.measure == "cka" else BlockInfluence(layers, self.measure, self.tokens)

    def score(self, model: UniversalModel, statistic: BlockInfluence | MinibatchCKA) -> Mapping[str, LayerScore]:
        if isinstance(statistic, MinibatchCKA):
            return {layer.name: self._cka(statistic, layer) for layer in model.layers}
        missing = {layer.name: streamless(layer) for layer in model.layers}
        for layer in model.layers:
            if not missing[layer.name] and (reason := unskippable(layer)):
                missing[layer.name] = f"{reason} (cka has a value)"
        return statistic.scores(model.layers, missing=missing)

    def _cka(self, statistic: MinibatchCKA, layer: Layer) -> LayerScore:
        reason = streamless(layer)
        return LayerScore.missing(Status.NOT_APPLICABLE, reason) if reason else statistic.distance(layer.index)
