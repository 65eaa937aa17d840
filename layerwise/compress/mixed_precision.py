"""Each weight in as many bits as it needs: where rounding hurts more, elsewhere fewer, in the bytes of a uniform choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from layerwise.data import Data
from layerwise.errors import UsageError, nearest
from layerwise.lowbit.candidates import HOW, place_corrected_
from layerwise.lowbit.correction import check_corrected, check_levels
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.mixing import best_bits, scored_damages, stored
from layerwise.lowbit.rounding import Chosen, check_rounded, chosen, round_
from layerwise.lowbit.weighing import Around, weighed_bits
from layerwise.matrices import left, refusal, worth
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies


@METHODS.register("mixed_precision")
@dataclass(frozen=True)
class MixedPrecision(CompressionMethod):
    """`menu` are the bits to choose from, per weight; together they take no more bytes than `bits` (it may be 3.5) everywhere.

    What roundings do to the outputs, alone and together, is seen on the first `weighed` calibration samples, around the model
    with the most bits everywhere that fit, each weight one step of the menu down or up. `fitted` sets `chosen` (weight → bits),
    and `measured`: the divergence there with these bits and with uniform ones, which are kept unless others measure better. With
    `scores` (layer → importance) nothing is measured. `corrected`: rounded as by `gptq` on the first `samples`, else to nearest.
    It promises no shrinkage by itself: the planner mixes bits on its own, and must not find this on its menu.
    """

    bits: float = 4
    menu: Sequence[int] = (2, 3, 4, 5, 6, 8)
    group: int = 32
    corrected: bool = True
    samples: int = 128
    weighed: int = 256
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    chosen: Mapping[str, int] = field(default_factory=dict, hash=False)
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)
    name: ClassVar[str] = "mixed_precision"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "menu", tuple(self.menu))  # a list, when it comes from a file
        if not self.menu or min(self.samples, self.weighed) < 1 or not min(self.menu) <= self.bits <= max(self.menu):
            raise UsageError("mixed_precision: bits must lie within the menu, and samples be at least 1.")
        for bits in {*self.menu, *self.chosen.values()}:
            Grid(bits, self.group)

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(bits) for bits in (4, 3))

    @property
    def whole(self) -> bool:
        """What one weight saves another may spend."""
        return True

    @property
    def coarsest(self) -> Grid:
        """That of the most bits; a weight that it does not make smaller is left."""
        return Grid(max(self.menu), self.group)

    def treats(self, layer: Layer) -> str:
        return refusal(layer.module, self.coarsest)

    @property
    def uniform(self) -> int:
        """The most bits of the menu that fit everywhere."""
        return max(bits for bits in self.menu if bits <= self.bits)

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        names = ", ".join(left(layer.module, worth(layer.module, self.coarsest)))
        kept = self.measured and {*self.chosen.values()} == {self.uniform}
        why = "no other choice in these bytes was better on the calibration data"
        return (
            *((f"mixed_precision leaves {names} in {layer.name} as they are",) if names else ()),
            *((f"mixed_precision keeps {self.uniform} bits in {layer.name}: {why}",) if kept else ()),
        )

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> MixedPrecision:
        found = {name: m for name, (m, _) in chosen(model, layers, self.coarsest).items()}
        if unknown := self.chosen.keys() - found.keys():
            raise UsageError(f"mixed_precision: there is no weight {min(unknown)!r}.", remedy=nearest(min(unknown), found))
        if self.chosen.keys() == found.keys():
            return self
        if self.scores:
            damages = scored_damages(found, self.coarsest, self.scores)
            return replace(self, chosen=best_bits(found, damages, self.menu, self.coarsest, self._limit(model, layers)))
        bits, measured = weighed_bits(model, layers, self._around(model, layers), self._data(supplies, self.weighed))
        return replace(self, chosen=bits, measured=measured)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        method = self.fitted(model, layers, supplies)
        if self.corrected:
            data = self._data(supplies, self.samples)
            place_corrected_(model, layers, lambda m: self._uniform(m, layers), method.chosen, data)
        else:
            round_(model, method._found(model, layers))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        round_(model, self._found(model, layers))

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """All as for uniform bits, and the bytes are kept."""
        found = self._found(before, layers)
        spent, limit = sum(stored(m, grid.bits, grid) for m, grid in found.values()), self._limit(before, layers)
        if spent > limit * (1 + 1e-9):
            return Check(spent, limit, f"bytes of codes, scales and zeros; {self.bits} bits everywhere take {limit:,.0f}")
        return (check_levels if self.corrected else check_rounded)(before, after, found)

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        values = self.check(before, after, layers)
        if not values.passed or supplies.calibration is None or not self.corrected:
            return values
        data = self._data(supplies, self.samples)
        return check_corrected(before, after, layers, lambda m: self._uniform(m, layers), data, HOW)

    def _data(self, supplies: Supplies, samples: int) -> Data:
        supplies.check(self.name, self.needs)
        assert supplies.calibration is not None  # just checked
        return supplies.calibration.head(samples)

    def _around(self, model: UniversalModel, layers: Sequence[str]) -> Around:
        menu = sorted(self.menu)
        at = menu.index(self.uniform)
        near = tuple(menu[max(at - 1, 0) : at + 2])
        corrected_on = self.samples if self.corrected else 0
        return Around(near, self._limit(model, layers), lambda m: self._uniform(m, layers), corrected_on)

    def _uniform(self, model: UniversalModel, layers: Sequence[str]) -> Chosen:
        """Each weight with the grid of the bits that all would have."""
        found = chosen(model, layers, self.coarsest)
        return {name: (m, Grid(self.uniform, self.group)) for name, (m, _) in found.items()}

    def _limit(self, model: UniversalModel, layers: Sequence[str]) -> float:
        return sum(stored(m, self.bits, grid) for m, grid in chosen(model, layers, self.coarsest).values())

    def _found(self, model: UniversalModel, layers: Sequence[str]) -> Chosen:
        """Each weight with the grid of the bits that it got."""
        found = chosen(model, layers, self.coarsest)
        return {name: (m, Grid(self.chosen[name], self.group)) for name, (m, _) in found.items()}
