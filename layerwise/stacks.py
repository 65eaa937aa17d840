"""Which layers stand in one stack: the dotted path up to the first number, which says nothing about what the names mean."""

from __future__ import annotations

import itertools

from layerwise.structure import Layer


def stack_of(layer: Layer) -> str:
    """``encoder.layers`` of ``encoder.layers.3.attention``; '' where the path begins with a number."""
    parts = (layer.parent or layer.name).split(".")
    path = list(itertools.takewhile(lambda part: not part.isdigit(), parts))
    return ".".join(path) if len(path) < len(parts) else layer.group
