"""Which parts of which weights belong together, to be cut together: heads, neurons, channels, experts. No model names.

One forward in which every tensor carries labels of the indices that it comes from (`labelling`, `rules`, `labels`) gives groups
of units (`groups`), one that follows routers to their choices gives whole experts (`experts`, `routing`); trial cuts (`trial`)
say which of them the model really runs without; `slicing` cuts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from layerwise.coupling.experts import mixtures
from layerwise.coupling.groups import Group, Place, grouped
from layerwise.coupling.labelling import labelled
from layerwise.coupling.likeness import structure
from layerwise.coupling.numbers import Number
from layerwise.coupling.trial import Tested, tested
from layerwise.model import UniversalModel

REMEMBERED = 16


@dataclass(frozen=True)
class Coupling:
    """The groups that can be cut; of the others the reason, and of each block what else in it cannot be."""

    groups: tuple[Tested, ...]
    refused: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    homes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of refused groups: their blocks


_known: OrderedDict[str, Coupling] = OrderedDict()


def coupled(model: UniversalModel) -> Coupling:
    """Costs some forwards on the model's example; models of one structure, whatever their weights, share the answer."""
    return _remembered(model, _coupled)


def coupled_experts(model: UniversalModel) -> Coupling:
    """The same of whole experts alone."""
    return _remembered(model, _experts)


def _remembered(model: UniversalModel, find: Callable[[UniversalModel], Coupling]) -> Coupling:
    key = find.__name__ + structure(model.module) + repr([(layer.name) for layer in model.blocks])
    if key not in _known:
        _known[key] = find(model)
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return _known[key]


def _coupled(model: UniversalModel) -> Coupling:
    blocks = {layer.name: layer.module for layer in model.blocks}
    labels = labelled(model.module, model.example)
    groups, reasons = grouped(model.module, labels, list(blocks))
    wanted = [g for g in groups if _inner(g)]
    found, refused = tested(model.module, model.example, wanted, blocks)
    others = {g.name: _outer(g) for g in groups if not _inner(g)}
    return Coupling(tuple(found), {**others, **refused}, reasons, {g.name: g.blocks for g in groups})


def _experts(model: UniversalModel) -> Coupling:
    blocks = {layer.name: layer.module for layer in model.blocks}
    groups, reasons = mixtures(model.module, model.example, list(blocks))
    found, refused = tested(model.module, model.example, groups, blocks)
    return Coupling(tuple(found), refused, reasons, {g.name: g.blocks for g in groups})


def _inner(group: Group) -> bool:
    """Made within one block, or heads that several blocks share a table for."""
    if "" in group.blocks:
        return group.kind in ("head", "kv_group") and len(group.blocks) > 1
    return len(group.blocks) == 1 or group.kind in ("head", "kv_group")


def _outer(group: Group) -> str:
    return "it lies outside of the blocks" if group.blocks == ("",) else "it runs through several blocks"


__all__ = ["Coupling", "Group", "Number", "Place", "Tested", "coupled", "coupled_experts"]
