"""Weights in a few bits, their rounding errors made up for by the weights that are rounded later (GPTQ, Frantar 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerwise.errors import UsageError
from layerwise.hessians import reads_alike
from layerwise.lowbit.correction import Correction, check_corrected, check_levels, correct_
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.rounding import Chosen, chosen, round_
from layerwise.matrices import left, refusal, worth
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies


@METHODS.register("gptq")
@dataclass(frozen=True)
class Gptq(CompressionMethod):
    """As `weight_only`, in the same bytes, with less error in the layers' outputs on the first `samples` calibration samples.

    Layer by layer in the order in which they run, so that each sees what the rounded ones before it give. `order`: the columns
    with the largest inputs first (act-order); `damping`: share of the mean squared input added to each.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    order: bool = True
    damping: float = 0.01
    samples: int = 256
    name: ClassVar[str] = "gptq"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  # it refuses settings that make no grid
        if not self.damping > 0 or self.samples < 1:
            raise UsageError("gptq: damping must be above 0, and samples at least 1.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(bits) for bits in (4, 3))

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.symmetric)

    @property
    def how(self) -> Correction:
        return Correction(self.order, self.damping)

    def treats(self, layer: Layer) -> str:
        return refusal(layer.module, self.grid)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        taken = worth(layer.module, self.grid)
        kept = ", ".join(left(layer.module, taken))
        plain = ", ".join(m.name for m in taken if not reads_alike(m.owner))
        return (
            *((f"gptq leaves {kept} in {layer.name} as they are",) if kept else ()),
            *((f"gptq rounds {plain} in {layer.name} to nearest: its inputs are not those of one matrix",) if plain else ()),
        )

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        supplies.check(self.name, self.needs)
        assert supplies.calibration is not None  # just checked
        correct_(model, layers, lambda m: self._chosen(m, layers), supplies.calibration.head(self.samples), self.how)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        round_(model, self._chosen(model, layers))

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return check_levels(before, after, self._chosen(before, layers))

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        levels = self.check(before, after, layers)
        if not levels.passed or supplies.calibration is None:
            return levels
        return check_corrected(before, after, layers, lambda m: self._chosen(m, layers), supplies.calibration.head(self.samples))

    def _chosen(self, model: UniversalModel, layers: Sequence[str]) -> Chosen:
        return chosen(model, layers, self.grid)
