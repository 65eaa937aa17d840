"""Which directions of what a matrix gives carry most: the best subspace for a product of two thin matrices.

The W' of rank r with the least ‖(W − W')X‖ over calibration inputs X keeps the first r left singular vectors of WX: W' = UUᵀW.
SVD-LLM (Wang 2024) writes the same as an SVD of WL with the Cholesky factor LLᵀ = XXᵀ, and multiplies by L⁻¹ afterwards; with
the projection nothing is inverted, so that inputs of less than full rank do no harm. Without inputs it is the plain SVD of W.
A share `RIDGE` of the plain one is always in it: what the calibration inputs never used is then ordered by the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.factors import unfolded_matrix
from layerwise.model import UniversalModel
from layerwise.native.gram import gathered

RIDGE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Directions of the outputs by falling energy: `values` (n,), `vectors` (outputs, n) orthonormal; float64."""

    values: Tensor
    vectors: Tensor

    def lost(self, rank: int) -> float:
        """The least share of the energy that `rank` directions can lose (Eckart–Young)."""
        return float(self.values[rank:].sum() / self.values.sum())

    def lost_by(self, directions: Tensor) -> float:
        """The share that the orthonormal `directions` (outputs, r) lose."""
        held = (directions.to(self.vectors).T @ self.vectors).square().sum(0)
        return 1 - float((held * self.values).sum() / self.values.sum())


def spectra(model: UniversalModel, modules: Mapping[str, nn.Module], data: Data | None) -> dict[str, Spectrum]:
    """Name → the spectrum of each of `modules` (dotted path → module) on `data`, or of its weights alone."""
    moments = _moments(model, modules, data) if data is not None else {}
    return {name: spectrum(unfolded_matrix(m).detach().double(), moments.get(name)) for name, m in modules.items()}


@dataclass(frozen=True)
class Moment:
    """Σ x xᵀ of what a matrix reads, or of what it gives, whichever is smaller."""

    gram: Tensor
    reading: bool


def _moments(model: UniversalModel, modules: Mapping[str, nn.Module], data: Data) -> dict[str, Moment]:
    reads = {n: m for n, m in modules.items() if not isinstance(m, nn.Conv2d) and _reads_less(m)}
    gives = {n: m for n, m in modules.items() if n not in reads}
    grams = gathered(model, data, outputs=gives, inputs=reads)
    return {n: Moment(g[0], n in reads) for n, g in grams.items()}


def _reads_less(module: nn.Module) -> bool:
    outputs, inputs = unfolded_matrix(module).shape
    return inputs < outputs


def spectrum(W: Tensor, moment: Moment | None) -> Spectrum:
    """Of `W` (outputs, inputs) on inputs with this moment; of W alone without, and where all that was seen is zero."""
    if moment is not None and not moment.reading and float(moment.gram.trace()):
        values, vectors = torch.linalg.eigh(moment.gram / moment.gram.trace() + RIDGE * (W @ W.T) / W.square().sum())
        return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))
    root = W
    if moment is not None and moment.reading and float(energy := ((W @ moment.gram) * W).sum()):
        ridge = RIDGE * torch.eye(len(moment.gram), dtype=W.dtype, device=W.device) / W.square().sum()
        root = W @ torch.linalg.cholesky(moment.gram / energy + ridge)
    U, S, _ = torch.linalg.svd(root, full_matrices=False)
    return Spectrum(S.square(), U)


__all__ = ["RIDGE", "Moment", "Spectrum", "spectra", "spectrum"]
