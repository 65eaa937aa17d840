"""N:M sparsity: in each group of M neighbouring inputs of an output at most N weights stay (Mishra et al. 2021; 2:4, 4:8).

Some GPUs run 2:4 faster by kernels of their own (`torch.sparse.to_sparse_semi_structured`); as it is stored here, nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.activations import input_norms
from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.sparsity import (
    Matrix,
    called_matrices,
    lowest_in_rows,
    matrices_of,
    only_zeroed,
    quantized,
    remaining,
    scored,
    zero_,
)
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies

SCORES = ("magnitude", "wanda")


@METHODS.register("nm_pruning")
@dataclass(frozen=True)
class NMPruning(CompressionMethod):
    """Zeroes the `m` − `n` lowest weights of every `m` along the inputs of linear layers and the input channels of convolutions.

    `scores`: |w| (``magnitude``), or |w| · ‖x‖₂ on calibration data (``wanda``, layers in order as there). Weights whose inputs
    are not a multiple of `m` stay and are named in the remarks.
    """

    n: int = 2
    m: int = 4
    scores: str = "magnitude"
    name: ClassVar[str] = "nm_pruning"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UsageError(
                f"nm_pruning: {self.n!r} of {self.m!r} weights cannot stay.", remedy="Use 0 < n < m, such as 2 and 4."
            )
        if self.scores not in SCORES:
            raise UsageError(f"nm_pruning: unknown scores {self.scores!r}.", remedy=f"Known: {', '.join(SCORES)}.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return (cls(2, 4), cls(2, 4, "wanda"), cls(4, 8))

    @property
    def whole(self) -> bool:
        return self.scores == "wanda"  # what a later layer loses hangs on the earlier ones

    def treats(self, layer: Layer) -> str:
        if reason := quantized(layer):
            return reason
        return "" if self._matrices(layer) else f"no linear or convolution layer has a multiple of {self.m} inputs"

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        left = remaining(layer, self._matrices(layer))
        return tuple(f"{name} stays: its inputs are not a multiple of {self.m}, or it is no such layer's" for name in left)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        if self.scores == "wanda":
            supplies.check(self.name, frozenset({"calibration"}))
        for done, layer in enumerate([layer for layer in model.layers if layer.name in layers], start=1):
            matrices = self._matrices(layer)
            norms: dict[str, Tensor] = {}
            if self.scores == "wanda" and supplies.calibration is not None:
                norms = input_norms(model, matrices, supplies.calibration)
            for matrix in matrices:
                sizes = matrix.weight.detach().abs().float() * norms.get(matrix.name, 1)
                zero_([matrix.weight], [self._mask(matrix, scored(matrix.weight, sizes))])
            if supplies.progress:
                supplies.progress(done, len(layers))

    def _matrices(self, layer: Layer) -> list[Matrix]:
        found = called_matrices(layer) if self.scores == "wanda" else matrices_of(layer)
        return [m for m in found if m.rows(m.weight).shape[1] % self.m == 0]

    def _groups(self, matrix: Matrix, tensor: Tensor) -> Tensor:
        """(groups, m): the input dimension last, so that a kernel's groups run over channels and not over pixels."""
        return matrix.rows(tensor).movedim(1, -1).reshape(-1, self.m)

    def _mask(self, matrix: Matrix, scores: Tensor) -> Tensor:
        shape = matrix.rows(scores).movedim(1, -1).shape
        mask = lowest_in_rows(self._groups(matrix, scores), self.m - self.n)
        return mask.view(shape).movedim(-1, 1).movedim(0, matrix.outputs)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every tensor is the one before, but for the zeros that each group must have."""
        matrices = [m for name in layers for m in self._matrices(before.layer(name))]
        return only_zeroed(before, after, {m.name: partial(self._rightly, m) for m in matrices})

    def _rightly(self, matrix: Matrix, zeros: Tensor) -> bool:
        had = self._groups(matrix, matrix.weight.detach() == 0).sum(1)
        return torch.equal(self._groups(matrix, zeros).sum(1), had.clamp_min(self.m - self.n))
