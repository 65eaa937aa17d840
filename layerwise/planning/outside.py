"""What lies in no layer (lookup tables, mostly) as one more row of the planner's table, for methods that leave layers alone.

Decision: such a method is no matter of its own on top of everything else. In a small encoder the tables are half of all bytes, so
their bits are weighed against those of the layers, by the same solver and the same measured swaps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from layerwise.model import UniversalModel
from layerwise.tensors import differing, distinct

REST = "(rest)"  # the row's name; no dotted path


class Outside(nn.Module):
    """Parameters in the place of those of a model, by their dotted names; tied ones under each name."""

    def __init__(self, changed: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.places = tuple(changed)
        self.own = nn.ParameterList(changed.values())

    @contextmanager
    def instead(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` holds these parameters instead of its own."""
        held: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for place, new in zip(self.places, self.own, strict=True):
                path, _, key = place.rpartition(".")
                owner = module.get_submodule(path)
                held.append((owner, key, owner._parameters[key]))
                owner._parameters[key] = new
            yield
        finally:
            for owner, key, old in held:
                owner._parameters[key] = old


def outside(model: UniversalModel, changed: UniversalModel) -> Outside | None:
    """The parameters in which `changed` differs from `model`; None where something else differs too, or some lies in a layer."""
    old, new = (dict(m.module.named_parameters(remove_duplicate=False)) for m in (model, changed))
    others = [dict(m.module.named_buffers(remove_duplicate=False)) for m in (model, changed)]
    if old.keys() != new.keys() or others[0].keys() != others[1].keys():
        return None
    if any(differing(t, others[1][name]) for name, t in others[0].items()):
        return None
    found = {name: new[name] for name, tensor in old.items() if tensor is not new[name] and differing(tensor, new[name])}
    inside = tuple(f"{layer.name}." for layer in model.layers)
    return Outside(found) if found and not any(name.startswith(inside) for name in found) else None


def outer_shell(model: UniversalModel) -> UniversalModel:
    """A copy of `model` in which only the tensors outside of the layers are copies; those inside are the model's own."""
    inside = {id(t) for layer in model.layers for _, t in distinct(layer.module)}
    memo: dict[int, Any] = {id(t): t for _, t in distinct(model.module) if id(t) in inside}
    return model.changed(copy.deepcopy(model.module, memo), source=model.source)


def rest_bytes(model: UniversalModel) -> int:
    """What the tensors outside of the layers hold."""
    inside = {id(t) for layer in model.layers for _, t in distinct(layer.module)}
    return sum(t.nbytes for _, t in distinct(model.module) if id(t) not in inside)


__all__ = ["REST", "Outside", "outer_shell", "outside", "rest_bytes"]
