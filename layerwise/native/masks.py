"""What each query may see, in the one form that `scaled_dot_product_attention` takes; rows that may see nothing are set apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """`mask`: boolean (True = keep) or additive, to broadcast against (B, H, queries, keys); None where all may be seen.

    `alive` is False for the queries that see no key, None where every query sees one; `causal`: the plain triangle, no mask.
    """

    mask: Tensor | None = None
    alive: Tensor | None = None
    causal: bool = False

    def cleared(self, mixed: Tensor) -> Tensor:
        """What attention gave (B, H, queries, …), with zeros for the queries that see nothing."""
        return mixed if self.alive is None else torch.where(self.alive[..., None], mixed, 0.0)


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int = 0,
    mask: Tensor | None = None,
    key_padding: Tensor | None = None,
) -> Visible:
    """The queries are the last `queries` of the positions; keys are the last `keys`.

    `window`: a query sees itself and the `window` − 1 keys before it (0: all). `mask` is boolean (True = keep) or additive,
    (queries, keys) or with leading dimensions (B, [H,]). `key_padding` (B, ≥ keys) is True (or 1) for keys that count; its last
    `keys` columns are used.
    """
    banded = 0 < window < keys
    triangle = causal and queries > 1
    if mask is None and key_padding is None and not banded and (not triangle or queries == keys):
        return Visible(causal=triangle)
    device = next(t.device for t in (mask, key_padding, torch.empty(0)) if t is not None)
    allowed = _band(queries, keys, causal, window, device)
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None, -keys:].bool()
    if mask is None:
        return Visible(allowed) if key_padding is None else _opened(allowed, None)
    shaped = mask if mask.dim() != 3 else mask[:, None]
    return _opened(allowed & shaped, None) if mask.dtype == torch.bool else _opened(allowed, shaped)


def _band(queries: int, keys: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(queries, keys) True where the query's position lets it see the key's."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        allowed &= distance >= 0
    if window:
        allowed &= (distance if causal else distance.abs()) < window
    return allowed


def _opened(allowed: Tensor, bias: Tensor | None) -> Visible:
    """Rows without a visible key are opened and marked: softmax over nothing would be NaN, in the backward pass for good."""
    if bias is not None:
        allowed = allowed & (bias > torch.finfo(bias.dtype).min / 2)
    alive = allowed.any(-1)
    opened = allowed | ~alive[..., None]
    if bias is None:
        return Visible(opened, alive)
    return Visible(torch.where(allowed, bias, float("-inf")).masked_fill(~alive[..., None], 0.0), alive)


__all__ = ["Visible", "visible"]
