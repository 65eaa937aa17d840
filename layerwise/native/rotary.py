"""Rotary positions: pairs of features turn by an angle that grows with the position (Su et al. 2021, "RoFormer").

The pairs are (i, i + n/2), as in Llama. Of ⟨R_i q, R_j k⟩ only j − i remains, which holds for vectors that are rotated in the
space in which they are compared: so it is done after a projection, never before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import UsageError


def rates(features: int, base: float = 10_000.0) -> Tensor:
    """(features / 2,) radians per position. Raises `UsageError` for an odd number of features, which has no pairs."""
    if features % 2:
        raise UsageError(f"Rotary positions turn pairs of features, and {features} is odd.", remedy="Use an even rank.")
    return base ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)


def rotated(x: Tensor, positions: Tensor, per_position: Tensor) -> Tensor:
    """x (B, H, T, n) turned; `positions` (T,) or (B, T), `per_position` (n/2,) as of `rates`, or each head's own (H, n/2)."""
    angles = positions.to(per_position.dtype)[..., None, :, None] * per_position.reshape(-1, 1, per_position.shape[-1])
    return turned(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (…, n) with its pairs turned by angles whose cosine and sine are given, (…, n/2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


__all__ = ["rates", "rotated", "turned"]
