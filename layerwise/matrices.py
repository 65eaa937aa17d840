"""`Matrix`: a weight in a layer that can be rounded row by row, because it is known which of its dimensions are the outputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import as_matrix
from layerwise.tensors import wraps

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention's own
OWNERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Conv1d: ("weight",),
    nn.Conv2d: ("weight",),
    nn.Conv3d: ("weight",),
    nn.MultiheadAttention: ATTENTION,
}


@dataclass(frozen=True, eq=False)
class Matrix:
    """The parameter `name` (dotted path from where the search began) of `owner`; `turned`: it stores inputs first."""

    name: str
    owner: nn.Module
    parameter: Tensor
    turned: bool = False

    @property
    def rows(self) -> Tensor:
        """(outputs, inputs × kernel), a view."""
        return as_matrix(self.parameter.detach(), self.turned)


def matrices(module: nn.Module) -> list[Matrix]:
    """Every floating weight inside `module` that can be rounded, shared ones once."""
    found: dict[int, Matrix] = {}
    for path, owner in module.named_modules():
        for key in _keys(owner):
            parameter = owner._parameters.get(key)
            if parameter is not None and parameter.is_floating_point() and not wraps(parameter):
                name = f"{path}.{key}" if path else key
                found.setdefault(id(parameter), Matrix(name, owner, parameter, _turned(owner)))
    return list(found.values())


def worth(module: nn.Module, grid: Grid) -> list[Matrix]:
    """The `matrices` of `module` that are smaller on `grid`; a kernel of one weight per output is not."""
    return [m for m in matrices(module) if grid.stored_bytes(*m.rows.shape) < m.parameter.nbytes]


def left(module: nn.Module, taken: list[Matrix]) -> Iterator[str]:
    """In words, the weights of more than one dimension inside `module` that are not among those `taken`."""
    known = {id(m.parameter) for m in taken}
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in known:
                known.add(id(parameter))
                yield f"{path}.{key} ({type(owner).__name__})" if path else f"{key} ({type(owner).__name__})"


def refusal(module: nn.Module, grid: Grid) -> str:
    """'' or why nothing inside `module` can be rounded to `grid`."""
    if any(wraps(p) for p in module.parameters()):
        return "its weights are quantized already"
    if worth(module, grid):
        return ""
    others = sorted({type(m).__name__ for m in module.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))})
    return f"holds no linear layer or convolution that would shrink; its weights are in {', '.join(others) or 'vectors'}"


def _keys(owner: nn.Module) -> tuple[str, ...]:
    if _turned(owner):
        return ("weight",)
    return next((keys for known, keys in OWNERS.items() if isinstance(owner, known)), ())


def _turned(owner: nn.Module) -> bool:
    """GPT-2's Conv1D; whoever has one has imported it."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(owner, library.Conv1D)
