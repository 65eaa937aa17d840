"""`HalfWeight`: a weight stored in 16 bits and computed with in the type that it had, so that a single layer can have one.

Decision: the cast of a whole model (`half_precision`) rounds what flows between layers as well and needs the same type
everywhere. Here only stored numbers are rounded, to float16's 11 digits: of all that halves a layer, what spoils least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.errors import UsageError, nearest
from layerwise.lowbit.packed import COPIES, place_
from layerwise.method import Check, exactly
from layerwise.model import UniversalModel
from layerwise.tensors import state, wraps

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

aten = torch.ops.aten


class HalfWeight(Tensor):
    """`stored`, the numbers in 16 bits, in the place of a weight of type `dtype`; any operator gets them in that type."""

    stored: Tensor

    @staticmethod
    def __new__(cls, half: Tensor, dtype: torch.dtype) -> HalfWeight:
        made = Tensor._make_wrapper_subclass(cls, half.shape, dtype=dtype, device=half.device, requires_grad=False)
        made.stored = half
        return made

    def dequantize(self) -> Tensor:
        return self.stored.to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["stored"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], about: Any, size: Any, stride: Any) -> HalfWeight:
        return HalfWeight(parts["stored"], about)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes the contents to print
        return f"HalfWeight({tuple(self.shape)}, {self.stored.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to switch it off

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # as documented
        kwargs = dict(kwargs or {})
        if func in COPIES:
            dtype = kwargs.pop("dtype", None) or args[0].dtype
            return HalfWeight(func(args[0].stored, *args[1:], **kwargs), dtype)
        if func._schema.is_mutable and isinstance(args[0], HalfWeight):
            raise UsageError(
                f"{func._schema.name} would write into a weight of 16 bits.", remedy="Change the model before it is stored so."
            )
        if func is aten.embedding.default and isinstance(args[0], HalfWeight):
            rows = func(args[0].stored, *args[1:], **kwargs)  # a table is large, and few of its rows are looked up
            return rows.to(args[0].dtype)
        args, kwargs = tree_map(lambda x: x.dequantize() if isinstance(x, HalfWeight) else x, (args, kwargs))
        return func(*args, **kwargs)


def dtype_named(name: str, method: str) -> torch.dtype:
    """Raises `UsageError` with the nearest name."""
    if name not in DTYPES:
        raise UsageError(f"{method}: unknown dtype {name!r}.", remedy=nearest(name, DTYPES))
    return DTYPES[name]


def taken(weight: Tensor) -> bool:
    """Whether `weight` is floats of more than 16 bits. Its values do not count, so that a plan can be replayed without them."""
    return not wraps(weight) and weight.is_floating_point() and weight.element_size() > 2


def overflows(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether some number lies beyond the range of `dtype`."""
    return bool(weight.numel()) and bool(weight.detach().abs().max() > torch.finfo(dtype).max)


def halve_(model: UniversalModel, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Stores the `weights` (name → parameter) in `dtype`, in place; what is tied stays tied."""
    for weight in {id(w): w for w in weights.values()}.values():
        place_(model.module, weight, HalfWeight(weight.detach().to(dtype), weight.dtype))


def check_halved(before: UniversalModel, after: UniversalModel, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Check:
    """Whether the chosen `weights` of `before` are stored rounded to `dtype`, and all other tensors are the same."""
    chosen = {id(w) for w in weights.values()}
    expected = {n: HalfWeight(t.detach().to(dtype), t.dtype) if id(t) in chosen else t for n, t in state(before.module).items()}
    return exactly(expected, state(after.module), f"the original, rounded to {str(dtype).removeprefix('torch.')} where chosen")
