"""Parameters and multiply-accumulates by formula. The tests count both on the modules, where they must be equal.

The T² term costs 2·H·T²·r, in a dense layer 2·H·T²·d_h: it shrinks only where r < d_h. The saving otherwise is that of the
projections and of the cache.
"""

from __future__ import annotations

from layerwise.native.settings import VFTSettings


def attention_parameters(d: int, heads: int, rank: int) -> int:
    """2dr + 4Hr² of the latent scope with its own projector, as many key-value heads as queries."""
    return 2 * d * rank + 4 * heads * rank**2


def block_parameters(s: VFTSettings) -> int:
    """Of one block with ``scope="latent"`` and no stabilizer: projector, attention, feed-forward, two norms, compensator."""
    hidden, kv = s.hidden or 2 * s.rank, s.kv_heads or s.n_heads
    projector = s.d_model * s.rank * (1 if s.tied or s.orthogonal else 2)
    attention = (2 * s.n_heads + 2 * kv) * s.rank**2
    feed_forward = 2 * s.rank * hidden + hidden + s.rank
    normals = 1 + (3 * s.normals * s.d_model + s.normals if s.normals else 0)
    return projector + attention + feed_forward + 4 * s.d_model + normals


def block_macs(s: VFTSettings, tokens: int, corrected: int = 0) -> int:
    """Of one block on one sequence, without causality's half; `corrected`: how many tokens pass the compensator's gate.

    The compensator's directions are made normal to the vein once per call, whatever the number of tokens.
    """
    hidden, kv = s.hidden or 2 * s.rank, s.kv_heads or s.n_heads
    projections = 5 * s.d_model * s.rank  # V twice, U twice, and once more for what is off the plane
    attention = (2 * s.n_heads + 2 * kv) * s.rank**2
    normals = (s.d_model * s.rank**2 + 4 * s.normals * s.d_model * s.rank) if s.normals else 0
    per_token = projections + attention + 2 * s.rank * hidden
    return tokens * per_token + 2 * s.n_heads * tokens**2 * s.rank + normals + 3 * corrected * s.normals * s.d_model


def dense_block_parameters(d: int, hidden: int = 0) -> int:
    """Of a dense pre-norm block: q, k, v, out and the feed-forward with biases, two norms; `hidden` is 4d where it is 0."""
    hidden = hidden or 4 * d
    return 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d


def dense_block_macs(d: int, tokens: int, hidden: int = 0) -> int:
    """Of the same on one sequence, without causality's half."""
    return tokens * (4 * d * d + 2 * d * (hidden or 4 * d)) + 2 * tokens**2 * d


def cache_floats(s: VFTSettings, tokens: int) -> int:
    """Numbers that the cache of a ``scope="latent"`` model holds: r per token and layer."""
    return s.n_layers * tokens * s.rank


__all__ = [
    "attention_parameters",
    "block_macs",
    "block_parameters",
    "cache_floats",
    "dense_block_macs",
    "dense_block_parameters",
]
