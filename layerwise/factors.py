"""`TwoFactors`: one matrix as the product of two thin ones, in the place and under the name of the module it came from.

A matrix is what a `nn.Linear`, transformers' ``Conv1D`` or an ungrouped `nn.Conv2d` multiplies by; a kernel is read as the matrix
(outputs, inputs·height·width), so its factors are a convolution to r channels and one of 1×1 from them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.tensors import wraps

PLAIN = (bool, int, float, str, type(None))


class TwoFactors(nn.Sequential):
    """y = B(Ax) + b by two modules. It has the public settings of the module it stands for, and its ``weight`` and ``bias``:
    some models ask a matrix for its type before they use it.
    """

    def __init__(self, first: nn.Module, second: nn.Module, like: nn.Module) -> None:
        super().__init__(first, second)
        self._transposed = type(like).__name__ == "Conv1D"
        for name, value in vars(like).items():
            if not name.startswith("_") and isinstance(value, PLAIN):
                setattr(self, name, value)

    @property
    def weight(self) -> Tensor:
        """The product, in the shape that the one module had."""
        first, second = self.first.weight, self.second.weight
        if first.dim() == 4:
            return torch.einsum("or,rihw->oihw", second[:, :, 0, 0], first)
        return (second @ first).T if self._transposed else second @ first

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    @property
    def first(self) -> Any:
        """From the inputs to r numbers."""
        return self[0]

    @property
    def second(self) -> Any:
        """From r numbers to the outputs, plus the bias."""
        return self[1]

    @property
    def rank(self) -> int:
        return int(self.second.weight.shape[1])


def matrix(module: nn.Module) -> Tensor | None:
    """(outputs, inputs) of a module that multiplies by one matrix; a view. transformers' ``Conv1D`` keeps it transposed."""
    if isinstance(module, nn.Linear):
        return module.weight
    weight = getattr(module, "weight", None)
    return weight.T if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) else None


def unfolded_matrix(module: nn.Module) -> Tensor:
    """As `matrix`, and of a convolution (outputs, inputs·height·width)."""
    found = matrix(module)
    return module.weight.flatten(1) if found is None else found  # type: ignore[operator]  # asked for factorable modules


def two_factors(module: nn.Module, first: Tensor, second: Tensor) -> TwoFactors:
    """`module` as ``second @ first``: (outputs, r) times (r, inputs), its bias after both."""
    bias: Any = module.bias
    if not isinstance(module, nn.Conv2d):
        return TwoFactors(linear(first, None), linear(second, bias), module)
    kernel: dict[str, Any] = {
        key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    with torch.device("meta"):
        thin = nn.Conv2d(module.in_channels, len(first), bias=False, **kernel)
        wide = nn.Conv2d(len(first), module.out_channels, 1, bias=bias is not None)
    thin.weight = nn.Parameter(first.detach().reshape(len(first), *module.weight.shape[1:]).clone())
    wide.weight = nn.Parameter(second.detach()[:, :, None, None].clone())
    if bias is not None:
        wide.bias = nn.Parameter(bias.detach().clone())
    return TwoFactors(thin, wide, module).train(module.training)


def in_two(module: nn.Module, directions: Tensor, *, reading: bool) -> TwoFactors:
    """y = Wx + b through r orthonormal `directions` (r, width): of what it reads, (WVᵀ)Vx + b, or writes, U(UᵀW)x + b."""
    V, weight = directions.double(), unfolded_matrix(module).detach()
    first, second = (V, weight.double() @ V.T) if reading else (V @ weight.double(), V.T)
    return two_factors(module, first.to(weight), second.to(weight))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` of this matrix."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().contiguous().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def replace_(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` stands: a shared module has several dotted paths."""
    for name in [n for n, m in root.named_modules(remove_duplicate=False) if m is old]:
        root.set_submodule(name, new)


def factorable(block: nn.Module) -> dict[str, nn.Module]:
    """Path within `block` → each module that can be taken apart, those within factors left out."""
    inside = {m for f in block.modules() if isinstance(f, TwoFactors) for m in f.modules()}
    owners = Counter(id(p) for m in block.modules() for p in m.parameters(recurse=False))
    return {n: m for n, m in block.named_modules() if m not in inside and not why_whole(m) and owners[id(m.weight)] == 1}


def why_whole(module: nn.Module) -> str:
    """'' for a module that can be taken apart, or why it cannot, in words."""
    if type(module) not in (nn.Linear, nn.Conv2d) and type(module).__name__ != "Conv1D":
        return "is none of nn.Linear, nn.Conv2d, Conv1D"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"is a convolution in {module.groups} groups"
    weight: Any = module.weight
    if wraps(weight):
        return "is quantized already"
    if weight.dtype not in (torch.float32, torch.float64):
        return "has 16-bit weights: put half_precision after it"
    return "has hooks of its own" if module._forward_hooks or module._forward_pre_hooks else ""


__all__ = [
    "TwoFactors", "factorable", "in_two", "linear", "matrix", "replace_", "two_factors", "unfolded_matrix", "why_whole",
]  # fmt: skip
