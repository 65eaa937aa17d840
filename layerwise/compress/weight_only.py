"""Weights in a few bits, activations as they were: each weight is rounded to the nearest level of its group's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerwise.lowbit.grid import Grid
from layerwise.lowbit.rounding import check_rounded, chosen, round_
from layerwise.matrices import left, refusal, worth
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies


@METHODS.register("weight_only")
@dataclass(frozen=True)
class WeightOnly(CompressionMethod):
    """Every weight of linear layers, convolutions, GPT-2's Conv1D and `nn.MultiheadAttention` in `bits` (2 … 8) per weight.

    One scale per `group` inputs of an output (0: all of them), `symmetric` about zero or from the smallest to the largest weight.
    Packed, in memory as in the file: ``bits + (16 + bits) / group`` bits per weight (``bits + 16 / group`` if symmetric).
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    name: ClassVar[str] = "weight_only"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  # it refuses settings that make no grid

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(bits) for bits in (4, 8, 3, 6, 5))

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.symmetric)

    def treats(self, layer: Layer) -> str:
        return refusal(layer.module, self.grid)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        names = ", ".join(left(layer.module, worth(layer.module, self.grid)))
        return (f"weight_only leaves {names} in {layer.name} as they are",) if names else ()

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        round_(model, chosen(model, layers, self.grid))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        round_(model, chosen(model, layers, self.grid))

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return check_rounded(before, after, chosen(before, layers, self.grid))
