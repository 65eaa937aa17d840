"""Lookup tables in a few bits: in small encoders the table of tokens is half of all bytes, and lies in no layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from layerwise.lowbit.grid import Grid
from layerwise.lowbit.rounding import Chosen, check_rounded, round_
from layerwise.matrices import Matrix
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import wraps


@METHODS.register("packed_embeddings")
@dataclass(frozen=True)
class PackedEmbeddings(CompressionMethod):
    """Every `nn.Embedding` of the model in `bits` (2 … 8) per number, one scale per `group` numbers of a row (0: the whole row).

    A table that is also the head is packed as one. Only the rows that are looked up are unpacked.
    """

    bits: int = 8
    group: int = 32
    symmetric: bool = False
    name: ClassVar[str] = "packed_embeddings"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  # it refuses settings that make no grid

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(bits) for bits in (8, 4, 6, 5))

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.symmetric)

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        """Any layer; the layers of the step are a matter of record, as tables stand beside them."""
        return ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        round_(model, tables(model.module, self.grid))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        round_(model, tables(model.module, self.grid))

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return check_rounded(before, after, tables(before.module, self.grid))


def tables(module: nn.Module, grid: Grid) -> Chosen:
    """Name → every floating table of `module` that is smaller on `grid`, shared ones once."""
    found = {f"{name}.weight": m for name, m in module.named_modules() if isinstance(m, nn.Embedding) and not wraps(m.weight)}
    once = {id(m.weight): (name, m) for name, m in reversed(found.items())}
    matrices = {name: Matrix(name, m, m.weight) for name, m in once.values() if m.weight.is_floating_point()}
    return {n: (m, grid) for n, m in matrices.items() if grid.stored_bytes(*m.rows.shape) < m.parameter.nbytes}
