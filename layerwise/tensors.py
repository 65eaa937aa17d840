"""Tensors as plain data: quantized ones are made of inner tensors, tied ones share memory; both must be counted right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def flattened(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Key → plain tensor: a plain tensor under its own `name`, a wrapper's inner tensors under ``name.inner``."""
    if not wraps(tensor):
        return {name: tensor.data if isinstance(tensor, nn.Parameter) else tensor}
    inner_names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # what makes it a wrapper
    parts: dict[str, Tensor] = {}
    for inner in inner_names:
        parts |= flattened(f"{name}.{inner}", getattr(tensor, inner))
    return parts


def wraps(tensor: Tensor) -> bool:
    """Whether `tensor` is a subclass that holds others inside, such as torchao's quantized weights."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def dense(tensor: Tensor) -> Tensor:
    """The values that `tensor` stands for, as a plain tensor."""
    plain = tensor.dequantize() if wraps(tensor) else tensor
    return plain.detach()


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every persistent tensor by its dotted name, live; tied ones under each of their names."""
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def distinct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, whatever the number of names it goes by."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def parameter_count(module: nn.Module) -> int:
    """How many numbers the parameters stand for; a quantized weight counts as many as before."""
    return sum(p.numel() for p in module.parameters())


def nonzero_count(module: nn.Module) -> int:
    """How many parameters are not 0."""
    counts = [dense(p).count_nonzero() for p in module.parameters()]
    return int(torch.stack(counts).sum()) if counts else 0


def byte_size(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each memory once, quantized weights by what they hold inside."""
    sizes: dict[Any, int] = {}
    for name, tensor in distinct(module):
        for plain in flattened(name, tensor).values():
            key = (plain.device, plain.data_ptr()) if plain.numel() and plain.device.type != "meta" else name
            sizes[key] = max(sizes.get(key, 0), plain.nbytes)
    return sum(sizes.values())


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements differ; all of them where shape or type do, and for quantized tensors those of the inner ones."""
    if a.shape != b.shape or a.dtype != b.dtype or wraps(a) != wraps(b):
        return max(a.numel(), 1)
    parts = zip(flattened("", a).values(), flattened("", b).values(), strict=True)
    return sum(int((x != y).sum()) for x, y in parts if x.numel())


def unbounded_alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with 0 where both are the same infinity, as masked scores are: there they do not differ, and ∞ − ∞ is no number."""
    same = (a == b) & a.isinf()
    return (a.masked_fill(same, 0), b.masked_fill(same, 0)) if bool(same.any()) else (a, b)
