"""The damages: a layer's weights rounded, pruned by size, or pruned by size times input, swapped in for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.model import UniversalModel
from layerwise.sparsity import lowest, zero_
from layerwise.structure import Layer
from layerwise.swapping import Values

Norms = Mapping[int, Tensor]  # id of a weight → ‖x‖ of each input feature or channel


def matrices(layer: Layer) -> list[nn.Parameter]:
    """The layer's weight matrices and kernels."""
    return [p for p in layer.module.parameters() if p.dim() > 1]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` rounded to nearest, symmetric, with 2^(bits−1) − 1 steps on either side and one scale per output channel."""
    steps = 2 ** (bits - 1) - 1
    rows = weight.detach().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / steps
    return ((rows / scale).round().clamp(-steps, steps) * scale).view_as(weight)


def halved(weight: Tensor) -> Tensor:
    """`weight` with the half that is smallest by |w| set to 0."""
    pruned = weight.detach().clone()
    zero_([pruned], lowest([pruned], round(pruned.numel() / 2), torch.abs))
    return pruned


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """`weight` with the half of each output channel that is smallest by |w|·‖x‖ set to 0; `norms` (inputs,)."""
    spread = norms.to(weight.dtype).view(1, -1, *[1] * (weight.dim() - 2))
    rows = (weight.detach().abs() * spread).flatten(1)
    smallest = rows.argsort(dim=1, stable=True)[:, : round(rows.shape[1] / 2)]
    return weight.detach().flatten(1).scatter(1, smallest, 0.0).view_as(weight)


def hurt(layer: Layer, damage: str, norms: Norms) -> Values:
    """The layer's weights and what the `damage` makes of them."""
    return [(p, WEIGHT_DAMAGES[damage](p, norms)) for p in matrices(layer)]


WEIGHT_DAMAGES: dict[str, Callable[[Tensor, Norms], Tensor]] = {
    "w4": lambda w, norms: rounded(w, 4),
    "w3": lambda w, norms: rounded(w, 3),
    "w2": lambda w, norms: rounded(w, 2),
    "prune50": lambda w, norms: halved(w),
    "wanda50": lambda w, norms: wanda(w, norms[id(w)]),
}


def input_norms(model: UniversalModel, data: Data) -> dict[int, Tensor]:
    """‖x‖ over all samples and positions for the inputs of every linear map and convolution in the layers."""
    squares: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in model.layers:
            for module in layer.module.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    stack.callback(module.register_forward_pre_hook(_summing(module, squares)).remove)
        for batch in data:
            model.predict(batch)
    return {key: total.sqrt() for key, total in squares.items()}


def _summing(module: nn.Linear | nn.Conv2d, squares: dict[int, Tensor]) -> Callable[[nn.Module, Any], None]:
    key, channels = id(module.weight), -1 if isinstance(module, nn.Linear) else 1

    def add(_: nn.Module, args: Any) -> None:
        x = args[0].detach().double().movedim(channels, -1).flatten(0, -2)
        total = x.square().sum(0)
        squares[key] = squares[key] + total if key in squares else total

    return add
