"""The weights of single layers in 16 bits, computed with as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.lowbit.halves import check_halved, dtype_named, halve_, overflows, taken
from layerwise.matrices import matrices
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import wraps


@METHODS.register("half_weights")
@dataclass(frozen=True)
class HalfWeights(CompressionMethod):
    """Every weight of linear layers, convolutions, GPT-2's Conv1D and `nn.MultiheadAttention` stored in `dtype`.

    Vectors (biases, norms) stay. `half_precision` casts the whole model and what flows through it; this casts stored numbers.
    """

    dtype: str = "float16"
    name: ClassVar[str] = "half_weights"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    def __post_init__(self) -> None:
        dtype_named(self.dtype, self.name)

    def treats(self, layer: Layer) -> str:
        found = _weights(layer)
        if not found:
            stored = any(wraps(p) or p.element_size() <= 2 for p in layer.module.parameters())
            return "its weights are in 16 bits or fewer already" if stored else "holds no linear layer or convolution"
        wide = [name for name, w in found.items() if overflows(w, dtype_named(self.dtype, self.name))]
        return f"{wide[0]} has numbers beyond the range of {self.dtype}" if wide else ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        halve_(model, self._found(model, layers), dtype_named(self.dtype, self.name))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        self.apply_(model, layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return check_halved(before, after, self._found(before, layers), dtype_named(self.dtype, self.name))

    def _found(self, model: UniversalModel, layers: Sequence[str]) -> dict[str, Tensor]:
        return {f"{name}.{key}": w for name in layers for key, w in _weights(model.layer(name)).items()}


def _weights(layer: Layer) -> dict[str, Tensor]:
    return {m.name: m.parameter for m in matrices(layer.module) if taken(m.parameter)}
