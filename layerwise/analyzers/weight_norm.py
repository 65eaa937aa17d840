"""The baseline that knows only how large a layer's weights are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.scores import LayerScore
from layerwise.zeroshot import WeightAnalyzer, chunks


@dataclass(frozen=True)
@ANALYZERS.register("weight_norm")
class WeightNormAnalyzer(WeightAnalyzer):
    """‖θ‖₂ of all the layer's parameters; with `per_parameter`, their root mean square. No standard error: no samples."""

    method: ClassVar[str] = "weight_norm"
    unit: ClassVar[str] = "norm of θ"
    baseline: ClassVar[bool] = True

    per_parameter: bool = False

    def summarize(self, tensor: Tensor, whole: bool = True) -> tuple[int, float]:
        """How many values, and the sum of their squares."""
        return tensor.numel(), math.fsum(float(values.square().sum()) for values in chunks(tensor))

    def combine(self, summaries: Sequence[tuple[int, float]]) -> LayerScore:
        count = sum(n for n, _ in summaries) if self.per_parameter else 1
        return LayerScore.measured(math.sqrt(math.fsum(squares for _, squares in summaries) / max(count, 1)))
