"""How much a layer's weights change when they are rounded to a few bits. No data, no passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.analyzer import ANALYZERS
from layerwise.errors import UsageError
from layerwise.scores import LayerScore, Status
from layerwise.zeroshot import WeightAnalyzer, blocks


@dataclass(frozen=True)
@ANALYZERS.register("quantization_error")
class QuantizationErrorAnalyzer(WeightAnalyzer):
    """‖Q(W) − W‖_F over the layer's weight matrices, Q being round-to-nearest per channel: what plain rounding does to it.

    Each row of a weight, flattened to (outputs, inputs × kernel), has the step max|w| / (2^(bits−1) − 1), symmetric about zero.
    Higher = more error = more important to keep precise. Vectors (norms, biases) are not rounded and do not count. It says
    how much the weights change, not what the model makes of it. No standard error: weights are no sample. Cost: one reading.

    Parameters
    ----------
    bits
        The width of the integers, 2 … 16 (default 4).
    relative
        Divide by ‖W‖_F (default): a share, comparable between layers of any size; else in the unit of the weights.

    References
    ----------
    Nagel et al. (2021), "A white paper on neural network quantization". We take the plain maximum as range, without search,
    and rows as stored: a layer that stores inputs first (GPT-2's Conv1D) is rounded per input channel.
    """

    method: ClassVar[str] = "quantization_error"
    unit: ClassVar[str] = "share of the norm"

    bits: int = 4
    relative: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UsageError(f"quantization_error: bits is {self.bits!r}; it is a whole number from 2 to 16.")

    def measured_in(self) -> str:
        return self.unit if self.relative else "norm of the change of θ"

    def summarize(self, tensor: Tensor, whole: bool = True) -> tuple[float, float] | None:
        """‖Q(W) − W‖² and ‖W‖²; None for a vector."""
        if tensor.dim() < 2:
            return None
        parts = [rounding(rows, self.bits) for rows in blocks(tensor.flatten(1))]
        return math.fsum(error for error, _ in parts), math.fsum(size for _, size in parts)

    def combine(self, summaries: Sequence[tuple[float, float] | None]) -> LayerScore:
        found = [s for s in summaries if s is not None]
        if not found:
            return LayerScore.missing(Status.NOT_APPLICABLE, "has no weight matrix")
        error, size = (math.sqrt(math.fsum(values)) for values in zip(*found, strict=True))
        return LayerScore.measured((error / size if size else 0.0) if self.relative else error)


def rounding(rows: Tensor, bits: int) -> tuple[float, float]:
    """‖Q(W) − W‖² and ‖W‖² of `rows` (channels, weights)."""
    if not rows.numel():
        return 0.0, 0.0
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (rows / step.masked_fill(step == 0, 1.0)).round_().mul_(step)
    return float(rounded.sub_(rows).square_().sum()), float(rows.square().sum())
