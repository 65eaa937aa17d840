"""Which weights a forward uses, and what for: seen in the operators that take them, not read from names.

Of the parameters that run, three kinds are no business of layers and count nowhere: *tables* (only looked up or added: token
and position embeddings), the *entrance* (the first weight that meets the raw input: a patch embedding, a stem's convolution)
and the *head*. A library says which part is the head (transformers: what lies outside `base_model`; timm: the part of the model
that holds `get_classifier()`); of other modules it is the last weight that runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise import trees
from layerwise.adapter import library_of
from layerwise.data import Batch
from layerwise.structure import Layer
from layerwise.trace import evaluating, run, unfused

LOOKED_UP = frozenset({"embedding", "index", "index_select", "gather", "_embedding_bag", "embedding_bag"})
MOVED = frozenset({  # what may happen to a table that is only added or joined to a stream
    "_to_copy", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "add", "add_", "alias", "cat", "clone",
    "copy_", "detach", "expand", "flatten", "mul", "narrow", "permute", "repeat", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "upsample_bicubic2d", "upsample_bilinear2d",
    "view",
})  # fmt: skip


@dataclass(frozen=True)
class Uses:
    """`counted`: the weights that layers should hold, by name. `order`: module → when its first call began."""

    counted: dict[str, Tensor]
    order: dict[nn.Module, int]

    def share(self, layers: Sequence[Layer]) -> float:
        """How much of the counted weights lies in the layers, 0 … 1 (1 where nothing counts)."""
        inside = {id(p) for layer in layers for p in layer.module.parameters()}
        total = sum(p.numel() for p in self.counted.values())
        return sum(p.numel() for p in self.counted.values() if id(p) in inside) / total if total else 1.0

    def outside(self, layers: Sequence[Layer]) -> list[str]:
        """The counted weights in no layer, the largest first."""
        inside = {id(p) for layer in layers for p in layer.module.parameters()}
        left = {name: p.numel() for name, p in self.counted.items() if id(p) not in inside}
        return sorted(left, key=lambda name: -left[name])


def uses_of(module: nn.Module, batch: Batch) -> Uses:
    """Runs the forward once on `batch`. Raises `UserModelError` (LW-U73) when it raises."""
    watch, order = _Watch(), dict[nn.Module, int]()
    with ExitStack() as stack:
        for part in module.modules():
            stack.callback(part.register_forward_pre_hook(_noting(order)).remove)
        for context in (evaluating(module), torch.no_grad(), unfused(), watch):
            stack.enter_context(context)
        run(module, batch)
    named = {name: p for name, p in module.named_parameters() if watch.seen.get(_memory(p))}
    tables = {id(p) for p in named.values() if _table(p, watch.seen[_memory(p)])}
    weights = {id(p) for p in named.values() if p.dim() > 1} - tables
    raw = any(t.is_floating_point() for _, t in trees.tensors((batch.args, dict(batch.kwargs))))  # tokens meet a table first
    entrance = _entrance(order, weights) if raw else ()
    apart = tables | {id(p) for p in (*_head(module, order, weights), *entrance)}
    return Uses({name: p for name, p in named.items() if id(p) not in apart}, order)


def _noting(order: dict[nn.Module, int]) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, args: Any) -> None:
        order.setdefault(module, len(order))

    return note


class _Watch(TorchDispatchMode):
    """Memory of every tensor that an operator took → the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[str]] = defaultdict(set)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `layerwise.trace`: otherwise the first call imports torch._dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for _, tensor in trees.tensors((args, kwargs or {})):
            self.seen[_memory(tensor)].add(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """Equal for a tensor and its views."""
    return tensor.untyped_storage().data_ptr()


def _table(parameter: Tensor, operators: set[str]) -> bool:
    """Looked up, or a matrix or more that no product ever takes."""
    return bool(operators & LOOKED_UP) or (parameter.dim() > 1 and operators <= MOVED)


def _head(module: Any, order: Iterable[nn.Module], weights: set[int]) -> Iterator[Tensor]:
    libraries = library_of(module)
    base = getattr(module, "base_model", module) if "transformers" in libraries else module
    if base is not module:
        body = {id(p) for p in base.parameters()}
        yield from (p for p in module.parameters() if id(p) not in body)
        return
    if "timm" in libraries and isinstance(module.get_classifier(), nn.Module):
        inside = set(module.get_classifier().modules())
        yield from (p for child in module.children() if inside & set(child.modules()) for p in child.parameters())
        return
    owners = [m for m in order if _owns(m, weights)]
    yield from owners[-1].parameters(recurse=False) if owners else ()


def _entrance(order: Iterable[nn.Module], weights: set[int]) -> Iterator[Tensor]:
    """The parameters of the first module that owns a weight and is no table."""
    first = next((m for m in order if _owns(m, weights)), None)
    yield from first.parameters(recurse=False) if first is not None else ()


def _owns(module: nn.Module, weights: set[int]) -> bool:
    return any(id(p) in weights for p in module.parameters(recurse=False))


__all__ = ["Uses", "uses_of"]
