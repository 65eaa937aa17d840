"""The baseline that knows only how large a layer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.scores import LayerScore
from layerwise.zeroshot import WeightAnalyzer


@dataclass(frozen=True)
@ANALYZERS.register("parameter_count")
class ParameterCountAnalyzer(WeightAnalyzer):
    """The number of the layer's parameters, each shared one counted once. No standard error: it is exact."""

    method: ClassVar[str] = "parameter_count"
    unit: ClassVar[str] = "parameters"
    baseline: ClassVar[bool] = True

    def summarize(self, tensor: Tensor, whole: bool = True) -> int:
        return tensor.numel()

    def combine(self, summaries: Sequence[int]) -> LayerScore:
        return LayerScore(float(sum(summaries)))
