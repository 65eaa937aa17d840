"""`VFTBlock`: attention, feed-forward and compensation around one projector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.native.attention import AttentionOptions, TVAAttention
from layerwise.native.cache import VeinCache
from layerwise.native.compensation import NormalCompensator
from layerwise.native.feedforward import VFTFeedForward
from layerwise.native.projector import VeinProjector


class VeinStatistics(NamedTuple):
    """Of one block and one batch, scalars that nobody has waited for: mean and largest ε, and the share of tokens with ε > τ."""

    mean: Tensor
    largest: Tensor
    share: Tensor


@dataclass(frozen=True)
class BlockOptions:
    """What a block may have otherwise than by default; see `AttentionOptions`, `VFTFeedForward`, `NormalCompensator`."""

    attention: AttentionOptions = field(default_factory=AttentionOptions)
    scope: str = "latent"
    head_rank: int = 0  # of ``scope="head"``; 0: the whole head
    hidden: int = 0
    act: str = "silu"
    stabilizer: str | None = None
    normals: int = 1
    threshold: float = 0.18
    fraction: float | None = None
    tied: bool = False
    orthogonal: bool = False
    dropout: float = 0.0


class VFTBlock(nn.Module):
    """x ← x + TVA(LN₁x); h = LN₂x; x ← x + FFN(h) + compensation(h); (B, T, d) → (B, T, d).

    All parts work in the vein of one projector, the block's own unless `projector` is given. One threshold τ per block. Nothing
    reduces over T but the statistics, which do not come back into the stream.
    """

    def __init__(
        self,
        d_model: int = 768,
        n_heads: int = 12,
        rank: int = 64,
        options: BlockOptions | None = None,
        projector: VeinProjector | None = None,
    ) -> None:
        super().__init__()
        o = options or BlockOptions()
        self.dropout = o.dropout
        self.projector = projector or VeinProjector(d_model, rank, tied=o.tied, orthogonal=o.orthogonal)
        shared = AttentionOptions(**{**vars(o.attention), "shared": True})
        width = rank if o.scope == "latent" else o.head_rank or d_model // n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = TVAAttention(d_model, n_heads, width, o.scope, shared)
        self.feed_forward = VFTFeedForward(d_model, rank, o.hidden, o.act, o.stabilizer, shared=True)
        self.compensator = NormalCompensator(d_model, o.normals, threshold=o.threshold, fraction=o.fraction)

    def forward(
        self,
        x: Tensor,
        *,
        cache: VeinCache | None = None,
        statistics: list[VeinStatistics] | None = None,
        key_padding: Tensor | None = None,
        is_causal: bool = False,
        **reading: Any,
    ) -> Tensor:
        """`reading`: mask and positions as `TVAAttention` takes them. `statistics` gets this call's appended; nothing is kept."""
        vein = self.projector
        attended = self.attention(
            self.norm1(x), cache=cache, projector=vein, key_padding=key_padding, is_causal=is_causal, **reading
        )
        x = x + F.dropout(attended, self.dropout, self.training)
        h = self.norm2(x)
        z = vein(h)
        rate = vein.off_plane(h, z)[0]
        if statistics is not None:
            statistics.append(_statistics(rate.detach(), self.compensator.tau.detach(), key_padding))
        x = x + F.dropout(self.feed_forward(h, z=z, projector=vein), self.dropout, self.training)
        if not self.compensator.s:
            return x
        ready = None if cache is None else cache.once("normals", lambda: self.compensator.directions(vein))
        near: dict[str, Any] = {"rate": rate, "projector": vein, "directions": ready}
        return x + self.compensator(h, key_padding=key_padding, is_causal=is_causal, **near)

    def new_cache(self) -> VeinCache:
        """An empty cache that fits."""
        return self.attention.new_cache()


def _statistics(rate: Tensor, tau: Tensor, key_padding: Tensor | None) -> VeinStatistics:
    if key_padding is None:
        return VeinStatistics(rate.mean(), rate.amax(), (rate > tau).to(rate.dtype).mean())
    keep = key_padding[:, -rate.shape[1] :].to(rate.dtype)
    count = keep.sum().clamp_min(1)
    return VeinStatistics((rate * keep).sum() / count, (rate * keep).amax(), ((rate > tau) * keep).sum() / count)


__all__ = ["BlockOptions", "VFTBlock", "VeinStatistics"]
