"""Lookup tables in 16 bits: what `half_weights` is for layers, for what lies in none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from layerwise.lowbit.halves import check_halved, dtype_named, halve_, taken
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies


@METHODS.register("half_embeddings")
@dataclass(frozen=True)
class HalfEmbeddings(CompressionMethod):
    """Every `nn.Embedding` of the model stored in `dtype` and looked up as before; one that is also the head stays one."""

    dtype: str = "float16"
    name: ClassVar[str] = "half_embeddings"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    def __post_init__(self) -> None:
        dtype_named(self.dtype, self.name)

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        """Any layer; the layers of the step are a matter of record, as tables stand beside them."""
        return ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        halve_(model, _tables(model.module), dtype_named(self.dtype, self.name))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        self.apply_(model, layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return check_halved(before, after, _tables(before.module), dtype_named(self.dtype, self.name))


def _tables(module: nn.Module) -> dict[str, Tensor]:
    found = {f"{name}.weight": m.weight for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    return {name: weight for name, weight in found.items() if taken(weight)}
