"""Set to zero the weights that add least to their output: |w| · ‖x‖₂ within each output row (Wanda, Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from layerwise.activations import input_norms
from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.sparsity import Matrix, called_matrices, lowest_in_rows, only_zeroed, quantized, remaining, scored, zero_
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies


@METHODS.register("wanda")
@dataclass(frozen=True)
class Wanda(CompressionMethod):
    """Zeroes in each output row of linear and convolution layers the ``round(amount·inputs)`` weights with the lowest score.

    As in the paper, layers are treated in order, each with the inputs that it gets from the pruned ones before it, and nothing is
    trained. A row of a convolution is an output channel, and x of a weight are the pixels that this weight meets.
    """

    amount: float = 0.5
    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise UsageError(f"wanda: amount is {self.amount!r}, and must lie in 0 … 1.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(amount) for amount in (0.5, 0.3, 0.7))

    @property
    def whole(self) -> bool:
        return True  # what a later layer loses hangs on the earlier ones

    def treats(self, layer: Layer) -> str:
        return quantized(layer) or ("" if called_matrices(layer) else "no linear or convolution layer is called")

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        return tuple(
            f"{name} stays: no linear or convolution layer is called with it" for name in remaining(layer, called_matrices(layer))
        )

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        assert supplies.calibration is not None  # what it `needs`
        for done, layer in enumerate([layer for layer in model.layers if layer.name in layers], start=1):
            matrices = called_matrices(layer)
            norms = input_norms(model, matrices, supplies.calibration)
            for matrix in matrices:
                scores = scored(matrix.weight, matrix.weight.detach().abs().float() * norms[matrix.name])
                zero_([matrix.weight], [self._mask(matrix, scores)])
            if supplies.progress:
                supplies.progress(done, len(layers))

    def _mask(self, matrix: Matrix, scores: Tensor) -> Tensor:
        rows = matrix.rows(scores)
        mask = lowest_in_rows(rows.flatten(1), self._count(matrix)).view(rows.shape)
        return mask.movedim(0, matrix.outputs)

    def _count(self, matrix: Matrix) -> int:
        return round(self.amount * matrix.rows(matrix.weight)[0].numel())

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every tensor is the one before, but for exactly as many zeros in each row as asked for."""
        matrices = [m for name in layers for m in called_matrices(before.layer(name))]
        return only_zeroed(before, after, {m.name: partial(self._rightly, m) for m in matrices})

    def _rightly(self, matrix: Matrix, zeros: Tensor) -> bool:
        had = matrix.rows(matrix.weight == 0).flatten(1).sum(1)
        return bool((matrix.rows(zeros).flatten(1).sum(1) == had.clamp_min(self._count(matrix))).all())
