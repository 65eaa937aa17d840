"""Where a model chooses between experts: routers, followed from their weights to the choice; and routing with experts left out.

A router is a matrix with a row for each expert whose product with the data reaches, through no other product, a choice along
these rows: ``topk``, ``sort``, ``argmax``, ``max``, or a softmax where all experts are used. No model is named here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise import trees

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "convolution", "_scaled_mm"})
CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "max"})
SHARES = frozenset({"_softmax", "softmax", "_safe_softmax"})
SUMS = frozenset({"add", "add_", "sub", "sub_", "addmm", "baddbmm", "linear", "addmv"})


class Followed(NamedTuple):
    """What a tensor is made of: the names of a router's tensors, and how many experts they tell apart."""

    names: frozenset[str]
    experts: int


@dataclass
class Choice:
    """What one router chose: its tensors, and of each expert how often it was chosen, or else its share of the softmax."""

    names: frozenset[str]
    experts: int
    counts: Tensor
    shares: Tensor
    chosen: bool = False

    @property
    def uses(self) -> Tensor:
        """(experts,) float64."""
        return self.counts if self.chosen else self.shares


@dataclass(eq=False)
class Routing(TorchDispatchMode):
    """Inside, products with the `tensors` (name → tensor) of routers are followed. The logits of the experts `shut` (name of a
    router's tensor → experts) are −∞, so that the choice runs over the rest.
    """

    tensors: Mapping[str, Tensor]
    experts: Mapping[str, int]
    shut: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.choices: dict[frozenset[str], Choice] = {}
        self.weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.logits: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, tensor in self.tensors.items():
            self.weights[tensor] = Followed(frozenset({name}), self.experts[name])

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see layerwise.trace: otherwise the first call imports the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for _, t in trees.tensors((args, kwargs or {}))]
        weights = [w for t in given if (w := self.weights.get(t))]
        logits = [w for t in given if (w := self.logits.get(t))]
        if weights or logits:
            self._follow(func, given, args, result, weights, logits)
        return result

    def _follow(
        self, func: Any, given: Sequence[Tensor], args: Any, result: Any, weights: list[Followed], logits: list[Followed]
    ) -> None:
        name = func._schema.name.split("::")[-1]
        results = [t for _, t in trees.tensors(result) if t.is_floating_point()]
        if not logits and all(t in self.weights for t in given):  # a view of a weight, its type, its norm
            for tensor in results:
                self.weights[tensor] = _joined(weights)
            return
        if name in PRODUCTS and not any(self._is_matrix(t) for t in given):
            return  # a product with something else: no logits any more
        if not logits and name not in PRODUCTS:
            return
        found = _joined(weights if name in PRODUCTS else [*logits, *weights])
        if logits and (name in CHOICES or name in SHARES):
            self._note(name, found, args, result)
        for tensor in results:
            if found.experts in tensor.shape:
                self.logits[tensor] = found
                if weights and name in PRODUCTS | SUMS:
                    self._shut(tensor, found)

    def _is_matrix(self, tensor: Tensor) -> bool:
        return tensor in self.weights and tensor.dim() > 1

    def _shut(self, tensor: Tensor, found: Followed) -> None:
        gone = {unit for name in found.names for unit in self.shut.get(name, ())}
        if gone:
            index = torch.tensor(sorted(gone), device=tensor.device)
            tensor.index_fill_(_dimension(tensor, found.experts), index, -math.inf)

    def _note(self, name: str, found: Followed, args: Any, result: Any) -> None:
        x = args[0]
        if found.experts not in x.shape:
            return
        dim = _dimension(x, found.experts)
        choice = self.choices.setdefault(
            found.names, Choice(found.names, found.experts, *torch.zeros(2, found.experts, dtype=torch.float64))
        )
        indices = [t for _, t in trees.tensors(result) if t.dtype == torch.int64]
        if name in SHARES:
            others = [d for d in range(x.dim()) if d != dim]
            choice.shares += result.detach().double().sum(others).cpu() if others else result.detach().double().cpu()
        elif indices and indices[0].numel() < x.numel():
            choice.counts += torch.bincount(indices[0].reshape(-1).cpu(), minlength=found.experts)[: found.experts]
            choice.chosen = True


def _dimension(tensor: Tensor, experts: int) -> int:
    """The last one of this size."""
    return max(d for d, size in enumerate(tensor.shape) if size == experts)


def _joined(found: Iterable[Followed]) -> Followed:
    found = list(found)
    return Followed(frozenset().union(*(f.names for f in found)), found[0].experts)


__all__ = ["Choice", "Routing"]
