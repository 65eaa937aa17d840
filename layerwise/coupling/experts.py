"""Whole experts as units that can be cut: what of which weights belongs to one, and the router's row for it. No model names.

Experts are weights stacked along their first dimension, or modules alike in a list, inside a block. Their router is found by
following products to a choice (`layerwise.coupling.routing`); it is the one nearest to them that tells as many apart. Whether
the model really runs without one of them, and which numbers change, is tried as for every other group (`trial`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from layerwise.coupling.groups import MODULES, Group, Place, live
from layerwise.coupling.likeness import structure
from layerwise.coupling.routing import Choice, Routing
from layerwise.data import Batch
from layerwise.trace import evaluating, run, unfused


@dataclass(frozen=True)
class Stack:
    """Experts in one place: the module `name` with weights stacked along their first dimension, or of numbered modules."""

    name: str
    units: int
    places: tuple[tuple[str, int], ...]  # names, and the dimension or `MODULES`


def mixtures(module: nn.Module, batch: Batch, blocks: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """A group for each set of experts that share a router, in the order of `blocks`; block → why others are none."""
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    stacks = {block: found for block in blocks if (found := list(_stacks(module.get_submodule(block), block)))}
    choices = list(_choices(module, batch, stacks)) if stacks else []
    for block, found in stacks.items():
        left = list(found)
        for choice in choices:
            home = _home(choice, block, left)
            own = [s for s in left if s.units == choice.experts and _within(s.name, home)] if home is not None else []
            if own:
                groups.append(_group(module, block, home or "", own, choice))
                left = [s for s in left if s not in own]
        if left:
            reasons[block] = f"{left[0].name}: no router was found that chooses between {left[0].units}"
    return groups, reasons


def _stacks(block: nn.Module, prefix: str) -> Iterator[Stack]:
    for name, part in block.named_modules():
        path = f"{prefix}.{name}".strip(".")
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and name:
            if len(part) > 1 and _alike(part._modules):
                yield Stack(path, len(part), ((path, MODULES),))
        elif not isinstance(part, nn.modules.conv._ConvNd):
            own = dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))
            for units in {p.shape[0] for p in own.values() if p.dim() > 2 and p.shape[0] > 1}:
                yield Stack(path, units, tuple((f"{path}.{n}", 0) for n, p in own.items() if p.dim() and p.shape[0] == units))


def _alike(parts: Mapping[str, nn.Module | None]) -> bool:
    """Whether they differ by number alone and have weights."""
    numbered = [key.rstrip("0123456789") + str(i) for i, key in enumerate(parts)] == list(parts)
    found = [part for part in parts.values() if part is not None]
    return numbered and len({structure(part) for part in found}) == 1 and any(True for _ in found[0].parameters())


def _choices(module: nn.Module, batch: Batch, stacks: Mapping[str, Sequence[Stack]]) -> Iterator[Choice]:
    """What the routers choose on `batch`."""
    tensors, experts = {}, {}
    for name, tensor in live(module).items():
        block = next((b for b in stacks if _within(name, b)), None)
        if block is None or not tensor.is_floating_point() or any(_within(name, s.name) for s in stacks[block]):
            continue
        sizes = {s.units for s in stacks[block]} & set(tensor.shape)
        if sizes:
            tensors[name], experts[name] = tensor, max(sizes)
    found = routed(module, [batch], tensors, experts)
    yield from sorted(found, key=lambda c: (not c.chosen, -len(c.names)))


def routed(
    module: nn.Module, batches: Iterable[Batch], tensors: Mapping[str, torch.Tensor], experts: Mapping[str, int]
) -> list[Choice]:
    """The choices that these tensors of routers make."""
    mode = Routing(tensors, experts)
    with evaluating(module), torch.no_grad(), unfused():
        for batch in batches:
            with mode:
                run(module, batch)
    return list(mode.choices.values())


def _home(choice: Choice, block: str, stacks: Sequence[Stack]) -> str | None:
    """The innermost module that holds the router and experts for it."""
    if not all(_within(name, block) for name in choice.names):
        return None
    parts = min(choice.names).split(".")[:-1]
    for end in range(len(parts), len(block.split(".")) - 1, -1):
        home = ".".join(parts[:end])
        if any(s.units == choice.experts and _within(s.name, home) for s in stacks):
            return home
    return None


def _group(module: nn.Module, block: str, home: str, stacks: Sequence[Stack], choice: Choice) -> Group:
    """The router's tensors lose a row, those along which they tell experts apart; so do vectors beside it with one for each."""
    units = np.arange(choice.experts)[:, None]
    places = [Place(name, dim, choice.experts, units) for s in stacks for name, dim in s.places]
    owners = {name.rpartition(".")[0] for name in choice.names}
    for name, tensor in live(module).items():
        beside = name.rpartition(".")[0] in owners | {home} and tuple(tensor.shape) == (choice.experts,)
        if (name in choice.names or beside) and not any(p.name == name for p in places):
            dims = [d for d, size in enumerate(tensor.shape) if size == choice.experts]
            places.append(Place(name, dims[0], choice.experts, units, gives=name in choice.names))
    order = tuple(int(i) for i in torch.argsort(choice.uses, descending=True, stable=True))
    return Group(stacks[0].name, "expert", (block,), tuple(places), order)


def _within(name: str, home: str) -> bool:
    return f"{name}.".startswith(f"{home}.") if home else True


__all__ = ["mixtures", "routed"]
