"""timm: the smallest model of every model file, with random weights and images no larger than the model needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from layerwise.benchmark.architectures.made import Group, Made, first_that_runs, noise
from layerwise.data import Batch

SIDES = (64, 96, 128, 160, 192, 224, 256)


def families() -> dict[str, list[str]]:
    """Model file → its models."""
    import timm
    from timm.models import _registry

    return {family: timm.list_models(module=family) for family in sorted(_registry._module_to_models)}


def smallest(names: list[str]) -> str:
    """The one with the fewest parameters; built without memory where the model allows it."""
    sizes = {name: parameters(name) for name in names}
    return min(sizes, key=lambda name: (sizes[name], name))


def parameters(name: str) -> int:
    import timm

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # some compute with tensors while they are built
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())


@cache
def names() -> list[str]:
    """The smallest of each file that has models; takes minutes, since every model's size must be known."""
    return [smallest(models) for models in families().values() if models]


def make(name: str) -> Made:
    return first_that_runs(_attempts(name))


def _attempts(name: str) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Batch]]]]:
    """The smallest side first; told to the constructor where that takes it, else only fed."""
    import timm

    channels, *_, side = timm.models.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    for size in sorted({s for s in (*SIDES, side) if s <= side}):
        for settings in ({"img_size": size}, {}) if size != side else ({},):
            yield f"{name} at {size} pixels", partial(_built, name, channels, size, settings)


def _built(name: str, channels: int, side: int, settings: Mapping[str, Any]) -> tuple[nn.Module, Batch]:
    import timm

    return timm.create_model(name, pretrained=False, **settings), Batch((noise(2, channels, side, side),))


GROUP = Group("timm", names, make, lambda name: ("image classification",))
