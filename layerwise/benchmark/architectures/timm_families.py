"""timm: a small model of every model file, with random weights and images no larger than the model needs.

Which one is in ``timm_small.json``: the one with the fewest parameters among those whose name says that they are small. Asking
every model for its size takes longer than judging them all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.benchmark.architectures.enlivened import enliven_
from layerwise.benchmark.architectures.made import Group, Made, first_that_runs, noise
from layerwise.data import Batch

TABLE = Path(__file__).with_name("timm_small.json")
LARGE, DEPTH = 100_000_000, 6  # parameters from which on only so many blocks are asked for, where the model lets one ask
SEEN = 8  # images that the batch normalizations take their statistics from
SIDES = (64, 96, 112, 128, 160, 192, 224, 256)


@cache
def table() -> dict[str, str]:
    """Model file → the model of it that is judged."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def families() -> list[str]:
    """timm's model files that hold models, by timm's own list."""
    import timm
    from timm.models import _registry

    return sorted(family for family in _registry._module_to_models if timm.list_models(module=family))


def make(name: str) -> Made:
    return first_that_runs(_attempts(name))


def _attempts(name: str) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Batch]]]]:
    """The smallest side first; told to the constructor where that takes it, else only fed."""
    import timm

    fewer: list[dict[str, Any]] = [{"depth": DEPTH}, {}] if _parameters(name) > LARGE else [{}]
    channels, *_, side = timm.models.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    sizes = sorted({s for s in (*SIDES, side) if s <= side})
    for less, size in itertools.product(fewer, sizes):
        for own in ({"img_size": size}, {}) if size != side else ({},):
            yield f"{name} at {size} pixels", partial(_built, name, channels, size, {**own, **less})


def _parameters(name: str) -> int:
    """Counted without memory; 0 where that does not work."""
    import timm

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    except Exception:  # some compute with tensors while they are built
        return 0


def _built(name: str, channels: int, side: int, settings: Mapping[str, Any]) -> tuple[nn.Module, Batch]:
    import timm

    module = timm.create_model(name, pretrained=False, **settings)
    enliven_(module, Batch((noise(SEEN, channels, side, side, seed=1),)))
    return module, Batch((noise(2, channels, side, side),))


GROUP = Group("timm", lambda: list(table().values()), make, lambda name: ("image classification",))
