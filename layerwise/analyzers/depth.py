"""The baseline that knows only where a layer stands. In many nets it is hard to beat."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore
from layerwise.structure import Layer


@dataclass(frozen=True)
@ANALYZERS.register("depth")
class DepthAnalyzer(ImportanceAnalyzer):
    """1 for the first layer down to 0 for the last of its granularity (`reverse`: the other way round). No unit."""

    method: ClassVar[str] = "depth"
    unit: ClassVar[str] = "share of the depth"
    baseline: ClassVar[bool] = True

    reverse: bool = False

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        place = {layer.name: where for group in _by_granularity(model.layers) for layer, where in _placed(group)}
        return {name: LayerScore(p if self.reverse else 1.0 - p) for name, p in place.items()}


def _by_granularity(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    return (list(group) for _, group in itertools.groupby(layers, key=lambda layer: layer.granularity))


def _placed(layers: Sequence[Layer]) -> Iterator[tuple[Layer, float]]:
    return ((layer, i / max(len(layers) - 1, 1)) for i, layer in enumerate(layers))
