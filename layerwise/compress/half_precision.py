"""Weights and arithmetic in 16 bits: float16 (finer, up to 65,504) or bfloat16 (coarser, the range of float32)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.errors import UsageError, UserModelError, nearest
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state, wraps

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@METHODS.register("half_precision")
@dataclass(frozen=True)
class HalfPrecision(CompressionMethod):
    """The whole model in `dtype`; floating inputs are cast at the door, outputs go back to float32, integers stay.

    Tables that the class computes and does not save (rotary frequencies) stay in float32, since their rounding grows with the
    position, unless the model cannot run with them so.
    """

    dtype: str = "float16"
    name: ClassVar[str] = "half_precision"
    shrinks: ClassVar[frozenset[str]] = frozenset({"size"})

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(dtype) for dtype in DTYPES)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"half_precision: unknown dtype {self.dtype!r}.", remedy=nearest(self.dtype, DTYPES))

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        """Any layer; the layers of the step are a matter of record, as the model is cast as one."""
        return "its weights are quantized already" if any(wraps(p) for p in layer.module.parameters()) else ""

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        dtype = DTYPES[self.dtype]
        _refuse_quantized(model.module)
        if any(isinstance(h, _Door) and h.dtype != dtype for h in model.module._forward_pre_hooks.values()):
            raise UsageError("half_precision: the model is in another 16-bit type already; rounding twice is not offered.")
        saved = {id(t) for t in state(model.module).values()}
        for tensor in _floating(model.module):
            if id(tensor) in saved:
                tensor.data = tensor.data.to(dtype)
        _add_door_(model.module, dtype)
        tables = [t for t in _floating(model.module) if id(t) not in saved]
        if tables and not _runs(model):
            for table in tables:
                table.data = table.data.to(dtype)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        self.apply_(model, layers)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every saved floating tensor is the one before rounded to `dtype`, every other the same."""
        if not any(isinstance(h, _Door) for h in after.module._forward_pre_hooks.values()):
            return Check(1, 0, "the door that casts inputs is missing")
        rounded = {name: self._rounded(tensor) for name, tensor in state(before.module).items()}
        return exactly(rounded, state(after.module), f"the original rounded to {self.dtype}")

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[self.dtype]) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Door:
    """The hooks at the model's door. A class of its own, so that it is copied, recognized and never added twice."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return trees.mapped(args, self._cast), trees.mapped(dict(kwargs), self._cast)

    def out(self, module: nn.Module, args: Any, output: Any) -> Any:
        return trees.mapped(output, lambda t: t.float() if t.dtype == self.dtype else t)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _add_door_(module: nn.Module, dtype: torch.dtype) -> None:
    door = _Door(dtype)
    if door not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(door, with_kwargs=True)
        module.register_forward_hook(door.out)


def _floating(module: nn.Module) -> list[Tensor]:
    """Live parameters and buffers; tied ones once, so that they stay tied."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _refuse_quantized(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if wraps(parameter):
            raise UsageError(
                f"half_precision cannot treat {name}: it is quantized already.",
                remedy="Put half_precision before it in the plan.",
            )


def _runs(model: UniversalModel) -> bool:
    try:
        model.predict(model.example)
    except UserModelError:
        return False
    return True
