"""The baseline that knows only how large a layer's weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore
from layerwise.structure import Layer


@dataclass(frozen=True)
@ANALYZERS.register("weight_norm")
class WeightNormAnalyzer(ImportanceAnalyzer):
    """‖θ‖₂ of all the layer's parameters; with `per_parameter`, their root mean square."""

    method: ClassVar[str] = "weight_norm"
    unit: ClassVar[str] = "norm of θ"
    baseline: ClassVar[bool] = True

    per_parameter: bool = False

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        return {layer.name: LayerScore.measured(self._norm(layer)) for layer in model.layers}

    def _norm(self, layer: Layer) -> float:
        squares = sum(float(p.detach().double().square().sum()) for _, p in layer.tensors())
        return math.sqrt(squares / max(layer.parameters, 1) if self.per_parameter else squares)
