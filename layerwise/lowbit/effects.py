"""What rounding each weight in each number of bits does to a model's outputs, and how these effects add up or cancel.

Decision: a small divergence is half the squared length of the change of the outputs, and that change is, to first order, the
sum of what each weight's rounding does: e = Σ e_w. So the inner products of all e_w tell the divergence of every combination. It
costs one forward, and one backward pass per probe, whatever the number of weights and bits: with the gradient g of a probe at a
module's output and its input x, a weight's effect is ⟨g, ΔW x⟩. The squared effects on the probes sum to twice the divergence:
exactly where the outputs have few classes and samples one position, else in expectation (random signs keep positions apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.lowbit.packed import PackedWeight
from layerwise.matrices import Matrix
from layerwise.model import UniversalModel
from layerwise.task import Fidelity, as_rows, classes_last, output_mask
from layerwise.trace import evaluating, run, unfused

PROBES = 4  # directions in which the outputs' change is seen, where it has more
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Key = tuple[str, int]  # a weight's name and a number of bits


@dataclass(frozen=True, eq=False)
class Choices:
    """A weight: where it stands in the model that is run (`matrix`), its values before rounding, and its rounding by bits."""

    matrix: Matrix
    original: Tensor
    packed: Mapping[int, PackedWeight]

    @property
    def followed(self) -> bool:
        """Whether its module is one whose product is known."""
        return isinstance(self.matrix.owner, (nn.Linear, *CONVOLUTIONS)) or self.matrix.turned

    def product(self, x: Tensor, change: Tensor) -> Tensor:
        """What `change` of the weight adds to the module's output."""
        owner = self.matrix.owner
        if isinstance(owner, CONVOLUTIONS):
            return owner._conv_forward(x, change, None)
        return x @ change if self.matrix.turned else F.linear(x, change)


def effect_products(
    model: UniversalModel, found: Mapping[str, Choices], data: Data, folds: int
) -> tuple[list[Key], list[np.ndarray]]:
    """The weights whose effect was seen, in each of their bits, and for each of `folds` parts of the samples the products of all
    pairs of effects: half their sum over samples and probes, so that xᵀPx is the divergence of a choice, in nats of all samples.

    `model` is ours to change: its parameters need no gradients afterwards.
    """
    model.module.requires_grad_(requires_grad=False)
    generator, at, sums, seen = torch.Generator().manual_seed(0), 0, list[np.ndarray](), set[str]()
    keys = [(name, bits) for name, choices in found.items() for bits in choices.packed]
    for batch in data:
        rows = _Effects(model, found, batch.to(model.device))
        effects = rows.seen_by(generator)  # (probes, samples, keys)
        seen |= rows.seen
        fold = (torch.arange(effects.shape[1]) + at) % folds
        at += effects.shape[1]
        parts = [effects[:, fold == k].flatten(0, 1) for k in range(folds)]
        products = [(e.T @ e).numpy() / 2 for e in parts]
        sums = [a + b for a, b in zip(sums, products, strict=True)] if sums else products
    used = [i for i, (name, _) in enumerate(keys) if name in seen]
    return [keys[i] for i in used], [total[np.ix_(used, used)] for total in sums]


class _Effects:
    """One batch: hooks that turn each backward pass into the effect of every choice on every sample."""

    def __init__(self, model: UniversalModel, found: Mapping[str, Choices], batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.found = {name: choices for name, choices in found.items() if choices.followed}
        self.places, count = dict[str, int](), 0
        for name, choices in found.items():
            self.places[name], count = count, count + len(choices.packed)
        self.now = torch.zeros(batch.size, count, dtype=torch.float64)
        self.seen = set[str]()

    def seen_by(self, generator: torch.Generator) -> Tensor:
        """(probes, samples, choices), float64 on the CPU."""
        effects = []
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model.module))
            stack.enter_context(unfused())
            stack.enter_context(torch.enable_grad())
            for name, choices in self.found.items():
                stack.callback(choices.matrix.owner.register_forward_hook(self._hook(name)).remove)
            output = self.batch.by_sample(self.model.read(run(self.model.module, self.batch)))
            seen = list(probes(output, self.batch, self._kind(), generator)) if output.requires_grad else []
            for i, probe in enumerate(seen):
                self.now = torch.zeros_like(self.now)
                probe.backward(retain_graph=i < len(seen) - 1)
                effects.append(self.now)
        return torch.stack(effects or [self.now])

    def _kind(self) -> str:
        return self.model.task.kind if isinstance(self.model.task, Fidelity) else Fidelity.kind

    def _hook(self, name: str) -> Callable[..., Tensor]:
        choices, first = self.found[name], self.places[name]

        def ran(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # no parameter needs a gradient: here is where it begins
                output = output.detach().requires_grad_().clone()
            x = args[0].detach().clone()  # what follows may write into it
            output.register_hook(lambda gradient: add(x, gradient))
            self.seen.add(name)
            return output

        def add(x: Tensor, gradient: Tensor) -> None:
            with torch.no_grad():
                for i, rounding in enumerate(choices.packed.values()):
                    change = rounding.dequantize() - choices.original
                    effect = self._by_sample(gradient.detach() * choices.product(x, change))
                    self.now[: len(effect), first + i] += effect.double().cpu()

        return ran

    def _by_sample(self, values: Tensor) -> Tensor:
        """Sums over each sample; over all where rows are not of samples, which the probes' signs allow."""
        size = self.batch.size
        return values.reshape(size, -1).sum(1) if len(values) % size == 0 else values.sum().reshape(1)


def probes(output: Tensor, batch: Batch, kind: str, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers whose squared changes sum to twice the change's divergence."""
    output = output[:, None] if output.dim() == 1 else output
    keep, found = output_mask(batch, output), classes_last(output)
    signs = _signs(found[..., :1].shape, generator).to(found.device)
    if kind == "cosine":
        found = F.normalize(found.double(), dim=-1)
        directions = _random(torch.ones_like(found), generator)
    elif found.shape[-1] == 1:
        directions = [torch.ones_like(found).double()]
    else:
        chances = found.detach().double().softmax(-1)
        found = torch.where(chances > 0, found.double(), 0.0)  # −inf where a model forbids a class outright
        directions = _of_classes(chances, generator)
    for direction in directions:
        yield (as_rows((signs * direction * found).sum(-1)) * keep).sum()


def _of_classes(chances: Tensor, generator: torch.Generator) -> list[Tensor]:
    """KL is half the squared length of √p · (Δz − ⟨Δz⟩), which has no part along √p: seen along all other axes, or some."""
    root, classes = chances.sqrt(), chances.shape[-1]
    if classes - 1 <= PROBES:
        unit = torch.eye(classes, dtype=root.dtype, device=root.device).expand(*root.shape, classes)
        axes = torch.linalg.qr(torch.cat([root[..., None], unit], -1)).Q
        return [axes[..., i] * root for i in range(1, classes)]
    return [axis - chances * (axis.sum(-1, keepdim=True)) for axis in _random(root, generator)]


def _random(sizes: Tensor, generator: torch.Generator) -> list[Tensor]:
    drawn = [_signs(sizes.shape, generator).to(sizes.device) for _ in range(PROBES)]
    return [sizes * signs / PROBES**0.5 for signs in drawn]


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).double() * 2 - 1


__all__ = ["PROBES", "Choices", "Key", "effect_products", "probes"]
