"""The baseline that knows only where a layer stands. In many nets it is hard to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore


@dataclass(frozen=True)
@ANALYZERS.register("depth")
class DepthAnalyzer(ImportanceAnalyzer):
    """1 for the first layer down to 0 for the last (`reverse`: the other way round). No unit."""

    method: ClassVar[str] = "depth"
    unit: ClassVar[str] = "share of the depth"
    baseline: ClassVar[bool] = True

    reverse: bool = False

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        last = max(len(model.layers) - 1, 1)
        place = {layer.name: layer.index / last for layer in model.layers}
        return {name: LayerScore(p if self.reverse else 1.0 - p) for name, p in place.items()}
