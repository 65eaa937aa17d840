"""The baseline that knows only how large a layer is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore


@dataclass(frozen=True)
@ANALYZERS.register("parameter_count")
class ParameterCountAnalyzer(ImportanceAnalyzer):
    """The number of the layer's parameters, each shared one counted once."""

    method: ClassVar[str] = "parameter_count"
    unit: ClassVar[str] = "parameters"
    baseline: ClassVar[bool] = True

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        return {layer.name: LayerScore(float(layer.parameters)) for layer in model.layers}
