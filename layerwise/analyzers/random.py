"""The baseline that knows nothing: a method that does not beat it shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore


@dataclass(frozen=True)
@ANALYZERS.register("random")
class RandomAnalyzer(ImportanceAnalyzer):
    """Uniform numbers in 0 … 1 from `seed`. No unit."""

    method: ClassVar[str] = "random"
    unit: ClassVar[str] = "none"
    baseline: ClassVar[bool] = True

    seed: int = 0

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        drawn = torch.rand(len(model.layers), generator=torch.Generator().manual_seed(self.seed))
        return {layer.name: LayerScore(float(drawn[layer.index])) for layer in model.layers}
