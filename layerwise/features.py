"""A layer's stream as numbers per unit: its observations, or one vector per sample, with padding left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.landmarks import hashed
from layerwise.structure import Layer
from layerwise.task import token_mask


def observations(batch: Batch, layer: Layer, stream: Tensor) -> tuple[Tensor, Tensor]:
    """`stream` as (samples, positions, units) float64 and what each position weighs, (samples, positions): 0 for padding.

    Three dimensions are samples × tokens × features. With four or more, channels are the units and the rest positions: channels
    come second in layers that convolve, last in others (Swin keeps height × width × channels). A vector is one position.
    """
    x = stream.detach().double()
    if x.dim() < 3:
        x = x.reshape(len(x), 1, -1)
    elif x.dim() > 3:
        x = x.movedim(1, -1).flatten(1, -2) if layer.kind == "convolution" else x.flatten(1, -2)
    elif stream.dim() == 3:
        return x, token_mask(batch, x[..., 0]).double().to(x.device)
    return x, torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)


def pooled(batch: Batch, layer: Layer, stream: Tensor) -> Tensor:
    """The mean over the positions that count, (samples, units), float64."""
    x, weights = observations(batch, layer, stream)
    return torch.einsum("npd,np->nd", x, weights) / weights.sum(1, keepdim=True).clamp_min(1)


def by_group(ids: Tensor, groups: int, seed: int) -> list[Tensor]:
    """Positions of the samples in each of `groups` parts of the data, on the CPU; the seeded hash of its number says which."""
    part = hashed(ids, seed).remainder(groups).numpy()
    return [torch.from_numpy(np.flatnonzero(part == g)) for g in range(groups)]


__all__ = ["by_group", "observations", "pooled"]
