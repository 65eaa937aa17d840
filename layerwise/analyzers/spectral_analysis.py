"""What the singular values of a layer's weight matrices say. No data, no passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore, Status
from layerwise.structure import Layer

MIN_EIGENVALUES = 50  # below, a fitted tail exponent means nothing


def eigenvalues(matrix: Tensor) -> Tensor:
    """Squared singular values, ascending, float64, from the smaller Gram matrix."""
    w = matrix.detach().double()
    return torch.linalg.eigvalsh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w).clamp_min(0)


def effective_rank(lam: Tensor) -> float:
    """exp(entropy of λ/Σλ) as a share of the largest possible rank: 1 for an orthogonal matrix, 1/d for rank one."""
    p = lam / lam.sum()
    p = p[p > 0]
    return math.exp(float(-(p * p.log()).sum())) / len(lam)


def stable_rank(lam: Tensor) -> float:
    """‖W‖²_F / σ₁²: d for an orthogonal matrix, 1 for rank one; does not depend on the scale."""
    return float(lam.sum() / lam[-1])


def log_spectral_norm(lam: Tensor) -> float:
    """log₁₀ λ_max."""
    return float(lam[-1].log10())


def heavy_tail(lam: Tensor) -> float:
    """−α of the upper half of the spectrum by Hill's estimator: heavier tails (smaller α) count as more important."""
    if len(lam) < MIN_EIGENVALUES:
        return math.nan
    k = len(lam) // 2
    threshold, tail = lam[-k - 1], lam[-k:]
    return -(1.0 + k / float((tail / threshold).log().sum())) if threshold > 0 else math.nan


MEASURES: dict[str, Callable[[Tensor], float]] = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "log_spectral_norm": log_spectral_norm,
    "heavy_tail": heavy_tail,
}


UNITS = {"effective_rank": "share of full rank", "stable_rank": "rank", "log_spectral_norm": "log₁₀ λ", "heavy_tail": "−α"}


def matrices(layer: Layer) -> list[Tensor]:
    """The layer's weights as matrices (outputs, inputs × kernel); a fused query-key-value projection as its three parts."""
    found: list[Tensor] = []
    for _, parameter in layer.tensors():
        if parameter.dim() < 2:
            continue
        w = parameter.detach().flatten(1)
        if layer.masked:  # a slice of a matrix, never a fused projection
            found.extend([w] if min(w.shape) > 1 else [])
        elif w.shape[0] == 3 * w.shape[1]:
            found.extend(w.chunk(3))
        elif w.shape[1] == 3 * w.shape[0]:  # stored inputs first
            found.extend(w.chunk(3, dim=1))
        elif min(w.shape) > 1:
            found.append(w)
    return found


@dataclass(frozen=True)
@ANALYZERS.register("spectral_analysis")
class SpectralAnalyzer(ImportanceAnalyzer):
    """Mean over the layer's weight matrices, weighted by their size, of a function of the squared singular values.

    Parameters
    ----------
    measure
        ``effective_rank``: share of the rank that is used, 0 … 1 (default); ``stable_rank``; ``log_spectral_norm``;
        ``heavy_tail``: −α of the spectrum's tail, not defined for matrices with fewer than 50 singular values.

    References
    ----------
    Roy, Vetterli (2007), "The effective rank"; Martin, Mahoney (2021), "Implicit self-regularization in deep neural networks";
    Lu et al. (2024), "AlphaPruning".
    """

    method: ClassVar[str] = "spectral_analysis"
    unit: ClassVar[str] = "share of full rank"

    measure: Literal["effective_rank", "stable_rank", "log_spectral_norm", "heavy_tail"] = "effective_rank"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"Unknown measure {self.measure!r} of spectral_analysis.", remedy=nearest(self.measure, MEASURES))

    def measured_in(self) -> str:
        return UNITS[self.measure]

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        return {layer.name: self._layer(layer) for layer in model.layers}

    def _layer(self, layer: Layer) -> LayerScore:
        found = matrices(layer)
        measured = [(w.numel(), MEASURES[self.measure](lam)) for w in found if float((lam := eigenvalues(w))[-1]) > 0]
        usable = [(n, value) for n, value in measured if math.isfinite(value)]
        if not found:
            return LayerScore.missing(Status.NOT_APPLICABLE, "has no weight matrix")
        if not measured:
            return LayerScore.measured(0.0)
        if not usable:
            return LayerScore.missing(
                Status.NOT_APPLICABLE, f"every matrix has fewer than {MIN_EIGENVALUES} singular values: too few for a tail"
            )
        return LayerScore.measured(sum(n * value for n, value in usable) / sum(n for n, _ in usable))
