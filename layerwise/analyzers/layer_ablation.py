"""Ablation: the measured damage of leaving a layer out. The yardstick that cheaper methods are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise import trees
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic, unskippable
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.patching import Replacement, skip
from layerwise.replay import Replay
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer


def zero(layer: Layer) -> Replacement:
    """The layer's main output becomes 0. In a residual net this kills the stream, not only the layer's share of it."""
    stream = layer.stream
    assert stream is not None, layer.name

    def silenced(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        return trees.replaced(output, stream.leaves, torch.zeros_like(trees.get(output, stream.leaves)))

    return silenced


OPERATIONS: dict[str, Callable[[Layer], Replacement]] = {"skip": skip, "zero": zero}


class AblationDamage(MomentsStatistic):
    """Per sample: the loss with the layer changed minus the loss without, on the same samples (paired)."""

    intervenes: ClassVar[bool] = True

    def __init__(self, model: UniversalModel, operation: str) -> None:
        super().__init__(Moments(len(model.layers)))
        self.operation = OPERATIONS[operation]
        self.layers = [x for x in model.layers if x.stream is not None and (operation != "skip" or x.skippable)]

    def probe(self, replay: Replay) -> None:
        before, weights = self._losses(replay, replay.output)
        for layer in self.layers:
            after, _ = self._losses(replay, replay.replacing({layer.index: self.operation(layer)}))
            self.moments.add_(layer.index, after - before, weights)

    @staticmethod
    def _losses(replay: Replay, output: Tensor) -> tuple[Tensor, Tensor]:
        assert replay.model.task is not None  # settled before the first batch
        values, weights = replay.model.task.losses(output, replay.batch, replay.output)
        return values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1)


@dataclass(frozen=True)
@ANALYZERS.register("layer_ablation")
class LayerAblationAnalyzer(ImportanceAnalyzer):
    """Mean loss with the layer left out minus mean loss of the whole model, in nats; the standard error is that of the pairs.

    Costs L + L(L−1)/2 block calls per batch for L layers that can be skipped. A layer that changes the stream's shape cannot be
    skipped and has no score: no substitute is made up for it.

    Parameters
    ----------
    operation
        ``skip``: the layer passes its input on (default); ``zero``: its output becomes 0.

    References
    ----------
    Kim et al. (2024), "Shortened LLaMA"; Song et al. (2024), "SLEB" (there greedy and repeated, here one layer at a time).
    """

    method: ClassVar[str] = "layer_ablation"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    operation: Literal["skip", "zero"] = "skip"

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise UsageError(
                f"Unknown operation {self.operation!r} of layer_ablation.", remedy=nearest(self.operation, OPERATIONS)
            )

    def statistic(self, model: UniversalModel) -> Statistic:
        return AblationDamage(model, self.operation)

    def score(self, model: UniversalModel, statistic: AblationDamage) -> Mapping[str, LayerScore]:
        missing = {layer.name: unskippable(layer) for layer in model.layers} if self.operation == "skip" else {}
        return statistic.scores(model.layers, missing=missing)
