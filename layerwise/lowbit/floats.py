"""Floats in the place of weights that are stored in fewer bits, for whoever has no use for these."""

from __future__ import annotations

from torch import nn

from layerwise.lowbit.halves import HalfWeight
from layerwise.lowbit.packed import PackedWeight, place_

STORED = (PackedWeight, HalfWeight)


def floats_(root: nn.Module) -> int:
    """Puts the values of every packed weight in its place; how many there were."""
    packed = {id(p): p for p in root.parameters() if isinstance(p, STORED)}
    for weight in packed.values():
        place_(root, weight, weight.dequantize())
    return len(packed)
