"""`PackedWeight`: a weight as codes of a few bits with its scales and zeros; floats come into being where it is used.

Decision: a tensor of our own rather than torchao's `IntxUnpackedToInt8Tensor`, which spends a byte on each code of 2 … 7 bits,
takes `nn.Linear` only and groups that divide its inputs. Any operator gets the floats, so a convolution, GPT-2's Conv1D, a fused
attention kernel and an embedding that is also the head can all have such a weight. No kernel computes with the codes: it is
smaller, not faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwise.errors import UsageError
from layerwise.lowbit.grid import Grid, Levels, pack, unpack

aten = torch.ops.aten
COPIES = {aten.detach.default, aten.clone.default, aten.alias.default, aten._to_copy.default}  # what gives a packed weight again


class PackedWeight(Tensor):
    """`codes` (rows, bytes), `scale` (rows, groups) and, unless the grid is symmetric, packed `zeros` of the matrix that a weight
    is: its first dimension against the others, or `turned`, its last against the first (GPT-2's Conv1D stores inputs first).
    """

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    grid: Grid
    turned: bool

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], grid: Grid, turned: bool, shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
        codes = parts["codes"]
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device, requires_grad=False)
        made.codes, made.scale, made.zeros = codes, parts["scale"], parts.get("zeros")
        made.grid, made.turned = grid, turned
        return made

    @classmethod
    def rounded(cls, weight: Tensor, grid: Grid, *, turned: bool = False) -> PackedWeight:
        """`weight` rounded to the nearest levels of `grid`."""
        matrix = as_matrix(weight, turned)
        levels = grid.levels(matrix)
        return cls.of(grid.codes(matrix, levels), levels, grid, weight, turned=turned)

    @classmethod
    def of(cls, codes: Tensor, levels: Levels, grid: Grid, weight: Tensor, *, turned: bool = False) -> PackedWeight:
        """The given codes (rows, columns) and levels in the place of `weight`, whose shape and type it keeps."""
        made = {"codes": pack(codes, grid.bits), "scale": levels.scale}
        if not grid.symmetric:
            made["zeros"] = pack(levels.zero, grid.bits)
        return cls(made, grid, turned, weight.shape, weight.dtype)

    @property
    def columns(self) -> int:
        return self.numel() // len(self.codes) if len(self.codes) else 0

    def unpacked(self) -> Tensor:
        """The codes (rows, columns), uint8."""
        return unpack(self.codes, self.grid.bits, self.columns)

    def levels(self) -> Levels:
        if self.zeros is None:
            return Levels(self.scale, torch.full(self.scale.shape, 2 ** (self.grid.bits - 1), device=self.device).byte())
        return Levels(self.scale, unpack(self.zeros, self.grid.bits, self.scale.shape[1]))

    def dequantize(self) -> Tensor:
        """The values, in the type that the weight had."""
        matrix = self.grid.values(self.unpacked(), self.levels())
        weight = matrix.T if self.turned else matrix
        return weight.reshape(self.shape).to(self.dtype, memory_format=torch.contiguous_format)

    def rows(self, index: Tensor) -> Tensor:
        """The values of these rows of a matrix that is not turned, (rows, columns)."""
        levels = self.levels()
        codes = unpack(self.codes[index], self.grid.bits, self.columns)
        return self.grid.values(codes, Levels(levels.scale[index], levels.zero[index])).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["codes", "scale"] if self.zeros is None else ["codes", "scale", "zeros"]
        return names, (self.grid, self.turned, self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], about: Any, size: Any, stride: Any) -> PackedWeight:
        return PackedWeight(parts, *about)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes the contents to print
        return f"PackedWeight({tuple(self.shape)}, {self.grid}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to switch it off

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # as documented
        kwargs = kwargs or {}
        if func in COPIES:
            return args[0]._mapped(lambda part: func(part, *args[1:], **_without_dtype(kwargs)), kwargs.get("dtype"))
        if func._schema.is_mutable and isinstance(args[0], PackedWeight):
            raise UsageError(
                f"{func._schema.name} would write into a packed weight.", remedy="Change the model before it is packed."
            )
        if func is aten.embedding.default and isinstance(args[0], PackedWeight) and not args[0].turned:
            used, places = args[1].unique(return_inverse=True)  # a table is large, and few of its rows are looked up
            return args[0].rows(used)[places]
        args, kwargs = tree_map(lambda x: x.dequantize() if isinstance(x, PackedWeight) else x, (args, kwargs))
        return func(*args, **kwargs)

    def _mapped(self, change: Any, dtype: torch.dtype | None) -> PackedWeight:
        names, (grid, turned, shape, old) = self.__tensor_flatten__()
        return PackedWeight({name: change(getattr(self, name)) for name in names}, grid, turned, shape, dtype or old)


def as_matrix(weight: Tensor, turned: bool) -> Tensor:
    """(outputs, inputs × kernel) of a weight that stores outputs first, or of one that is `turned`."""
    return weight.T if turned else weight.flatten(1)


def place_(root: nn.Module, old: Tensor, new: Tensor) -> None:
    """Puts `new` in the place of the parameter `old` under each of its names, so that what was tied stays tied."""
    parameter = nn.Parameter(new, requires_grad=False)
    for module in root.modules():
        for name in [n for n, p in module._parameters.items() if p is old]:
            setattr(module, name, parameter)


def _without_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format")}
