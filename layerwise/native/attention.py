"""`TVAAttention`, tri-vein attention: queries, keys and values live in r dimensions.

Two scopes, one class each, share masks, cache and the attention itself:

- *latent*: all heads read one projection z = Vh; per head Q̃ = zA, K̃ = zB, Ṽ = zC with r × r matrices, Ỹ = Σ_h softmax(…)ṼD and
  Y = UỸ. 2dr + 4Hr² parameters, and a cache of z only. Without rotary positions a cached step never forms the keys: B goes into
  the query and C behind the sum (⟨zA, z'B⟩ = ⟨zABᵀ, z'⟩), all heads being rows of one query against one key.
- *head*: dense W_q, W_k, W_v, W_o, and behind them a d_h → r projector per key-value head; with r = d_h it is dense attention.

The T² term costs O(B·H·T²·r) against dense O(B·H·T²·d_h): less only where r < d_h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import UsageError, nearest
from layerwise.native.cache import VeinCache
from layerwise.native.masks import Visible, visible
from layerwise.native.projector import VeinProjector, vein_of
from layerwise.native.rotary import rates, rotated


@dataclass(frozen=True)
class AttentionOptions:
    """`kv_heads`: heads of keys and values, 0 for as many as queries; `rope_base`: None for no rotary positions; `window`: how
    many keys back a query sees, itself included, 0 for all; `scale`: None for 1/√r; `bias`: of the dense projections (head).

    `shared`: the projector comes with every call and is not the attention's own (latent scope).
    """

    kv_heads: int = 0
    rope_base: float | None = None
    window: int = 0
    scale: float | None = None
    bias: bool = False
    shared: bool = False


class TVAAttention(nn.Module):
    """h (B, T, d) → (B, T, d). `rank` is that of the latent (≤ d), or with ``scope="head"`` of each head (≤ d/H).

    Raises `UsageError` for an unknown scope, a width that the heads do not divide, heads that the key-value heads do not divide,
    and an odd rank with rotary positions.
    """

    def __init__(
        self,
        d_model: int = 768,
        n_heads: int = 12,
        rank: int = 64,
        scope: str = "latent",
        options: AttentionOptions | None = None,
        projector: VeinProjector | None = None,
    ) -> None:
        super().__init__()
        options = options or AttentionOptions()
        if scope not in SCOPES:
            raise UsageError(f"Unknown scope {scope!r}.", remedy=nearest(scope, SCOPES))
        kv_heads = options.kv_heads or n_heads
        if n_heads % kv_heads or d_model % n_heads:
            what = f"{n_heads} heads with {kv_heads} for keys and values do not divide each other and the width {d_model}."
            raise UsageError(what, code="LW-C09")
        self.scope, self.options, self.rank = scope, options, rank
        own = scope == "latent" and not options.shared
        self.projector = projector or VeinProjector(d_model, rank) if own else None
        self.core: LatentScope | HeadScope = SCOPES[scope](d_model, (n_heads, kv_heads), rank, options)
        self.scale = rank**-0.5 if options.scale is None else options.scale

    def forward(
        self,
        h: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        key_padding: Tensor | None = None,
        positions: Tensor | None = None,
        cache: VeinCache | None = None,
        projector: VeinProjector | None = None,
    ) -> Tensor:
        """`mask` (queries, keys) or (B, [H,] queries, keys): boolean (True = keep) or additive. `key_padding` (B, keys).

        A query that may see nothing gives zeros. With a `cache` h holds the new tokens only, and masks and `positions` ((keys,)
        or (B, keys), by default 0, 1, …) speak of all that were seen; the new ones are added to it.
        """
        queries = h.shape[1]
        vein = projector or self.projector
        stored, q = self.core.read(h, vein)
        if cache is None:
            stored = self.core.turned(stored, positions, queries)
        else:
            stored = cache.append(self.core.turned(stored, positions, cache.length + queries))
        keys = stored.shape[1]
        total = keys if cache is None else cache.length
        q = self.core.placed(q, positions, total)
        limits: dict[str, Any] = {"causal": is_causal, "window": self.options.window, "mask": mask, "key_padding": key_padding}
        seen = visible(queries, keys, **limits)
        if isinstance(self.core, LatentScope) and self.core.absorbs and queries < keys:
            mixed = self.core.absorbed(q, stored, seen, self.scale)
        else:
            k, v = self.core.expanded(stored, positions, total)
            mixed = attend(q, k, v, seen, self.scale)
        return self.core.mixed(seen.cleared(mixed), vein)

    def new_cache(self) -> VeinCache:
        """An empty cache that fits."""
        return VeinCache(self.options.window)

    def extra_repr(self) -> str:
        return f"scope={self.scope}, rank={self.rank}"


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, scale: float) -> Tensor:
    """softmax(scale·qkᵀ + mask)v, the softmax in fp32; q (B, H, T, r), k and v (B, kv heads, keys, r)."""
    grouped = q.shape[1] != k.shape[1]
    mask = seen.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=seen.causal, scale=scale, enable_gqa=grouped)


def last(positions: Tensor | None, count: int, total: int, device: torch.device) -> Tensor:
    """The last `count` of `total` positions."""
    return torch.arange(total - count, total, device=device) if positions is None else positions[..., -count:]


class LatentScope(nn.Module):
    """All heads read z = Vh. What is stored of a token is z, (r,)."""

    rates: Tensor | None

    def __init__(self, d_model: int, heads: tuple[int, int], rank: int, options: AttentionOptions) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads
        self.rank = rank
        self.query = nn.Linear(rank, self.heads * rank, bias=False)  # A, head after head
        self.key = nn.Linear(rank, self.kv_heads * rank, bias=False)  # B
        self.value = nn.Linear(rank, self.kv_heads * rank, bias=False)  # C
        self.mix = nn.Linear(self.heads * rank, rank, bias=False)  # D
        rope = options.rope_base
        self.register_buffer("rates", None if rope is None else rates(rank, rope).float(), persistent=False)
        self.absorbs = rope is None

    def read(self, h: Tensor, projector: VeinProjector | None) -> tuple[Tensor, Tensor]:
        """What is stored of the tokens (B, T, width), and their queries (B, H, T, r), both without positions."""
        z = vein_of(projector, None)(h)
        return z, split(self.query(z), self.heads)

    def turned(self, stored: Tensor, positions: Tensor | None, total: int) -> Tensor:
        """What goes into the cache, with positions where it has them: z has none, the keys that it becomes do."""
        return stored

    def placed(self, q: Tensor, positions: Tensor | None, total: int) -> Tensor:
        """Queries or keys turned by the last of the `total` positions, where positions are rotary."""
        return q if self.rates is None else rotated(q, last(positions, q.shape[2], total, q.device), self.rates)

    def expanded(self, stored: Tensor, positions: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv heads, keys, r) of what is stored."""
        k, v = split(self.key(stored), self.kv_heads), split(self.value(stored), self.kv_heads)
        return self.placed(k, positions, total), v

    def absorbed(self, q: Tensor, stored: Tensor, seen: Visible, scale: float) -> Tensor:
        """As `attend` on `expanded`, without keys and values: all heads' queries are rows against one key."""
        B, H, T, r = q.shape
        key = self.key.weight.view(self.kv_heads, 1, r, r)
        value = self.value.weight.view(self.kv_heads, 1, r, r)
        groups = q.unflatten(1, (self.kv_heads, -1))  # (B, kv heads, heads of one, T, r)
        rows = (groups @ key).reshape(B, 1, H * T, r)
        mask = None if seen.mask is None else seen.mask.expand(B, H, T, -1).reshape(B, 1, H * T, -1)
        tokens = stored[:, None]
        mixed = attend(rows, tokens, tokens, Visible(mask), scale)
        return (mixed.reshape(B, self.kv_heads, -1, T, r) @ value.mT).reshape(B, H, T, r)

    def mixed(self, heads: Tensor, projector: VeinProjector | None) -> Tensor:
        """What the heads gave (B, H, T, r), mixed into (B, T, d)."""
        return vein_of(projector, None).reconstruct(self.mix(joined(heads)))


class HeadScope(nn.Module):
    """Dense projections, then d_h → r for each key-value head: `vein` for queries and keys, `value_vein` for values.

    What is stored of a token is its keys and values, (2·kv heads·r,). Rotary positions turn what is projected.
    """

    rates: Tensor | None

    def __init__(self, d_model: int, heads: tuple[int, int], rank: int, options: AttentionOptions) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads
        size = d_model // self.heads
        if not 1 <= rank <= size:
            raise UsageError(f"The rank {rank} is not one of 1 … {size}, the width of a head.", code="LW-C09")
        self.query = nn.Linear(d_model, self.heads * size, bias=options.bias)
        self.key = nn.Linear(d_model, self.kv_heads * size, bias=options.bias)
        self.value = nn.Linear(d_model, self.kv_heads * size, bias=options.bias)
        self.out = nn.Linear(self.heads * size, d_model, bias=options.bias)
        self.vein = nn.Parameter(torch.empty(self.kv_heads, rank, size))
        self.value_vein = nn.Parameter(torch.empty(self.kv_heads, rank, size))
        for i in range(self.kv_heads):
            nn.init.orthogonal_(self.vein.data[i])
            nn.init.orthogonal_(self.value_vein.data[i])
        rope = options.rope_base
        self.register_buffer("rates", None if rope is None else rates(rank, rope).float(), persistent=False)

    def read(self, h: Tensor, projector: VeinProjector | None) -> tuple[Tensor, Tensor]:
        """As in `LatentScope`: stored are keys and values, projected."""
        k = split(self.key(h), self.kv_heads) @ self.vein.mT
        v = split(self.value(h), self.kv_heads) @ self.value_vein.mT
        q = (split(self.query(h), self.heads).unflatten(1, (self.kv_heads, -1)) @ self.vein.mT[:, None]).flatten(1, 2)
        return joined(torch.cat((k, v), 1)), q

    def turned(self, stored: Tensor, positions: Tensor | None, total: int) -> Tensor:
        """The keys turned by their positions, before they are cached."""
        if self.rates is None:
            return stored
        k, v = split(stored, 2 * self.kv_heads).chunk(2, 1)
        return joined(torch.cat((self.placed(k, positions, total), v), 1))

    def placed(self, q: Tensor, positions: Tensor | None, total: int) -> Tensor:
        """Queries or keys turned by the last of the `total` positions, where positions are rotary."""
        return q if self.rates is None else rotated(q, last(positions, q.shape[2], total, q.device), self.rates)

    def expanded(self, stored: Tensor, positions: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv heads, keys, r) of what is stored."""
        k, v = split(stored, 2 * self.kv_heads).chunk(2, 1)
        return k, v

    def mixed(self, heads: Tensor, projector: VeinProjector | None) -> Tensor:
        """What the heads gave, back to d_h numbers each, and mixed."""
        wide = (heads.unflatten(1, (self.kv_heads, -1)) @ self.value_vein[:, None]).flatten(1, 2)
        return self.out(joined(wide))


SCOPES: dict[str, type[LatentScope] | type[HeadScope]] = {"latent": LatentScope, "head": HeadScope}


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, H·n) → (B, H, T, n)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, H, T, n) → (B, T, H·n)."""
    return x.transpose(1, 2).flatten(2)


__all__ = ["SCOPES", "AttentionOptions", "HeadScope", "LatentScope", "TVAAttention", "attend", "joined", "split"]
