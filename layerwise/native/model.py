"""`VFTModel`: blocks between an embedding of text, images, audio frames or all of them, and logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.native.block import VeinStatistics, VFTBlock
from layerwise.native.cache import Caching, VFTCache
from layerwise.native.embedding import VFTEmbedding
from layerwise.native.settings import VFTSettings


class VFTModel(nn.Module):
    """``VFTModel(vocab_size=…, causal=True, …)`` or ``VFTModel(VFTSettings(…))``; `VFTSettings` says what it reads and gives."""

    def __init__(self, settings: VFTSettings | None = None, **changes: Any) -> None:
        super().__init__()
        s = self.settings = VFTSettings.of((settings.to_dict() if settings else {}) | changes)
        self.embedding = VFTEmbedding(s)
        self.blocks = nn.ModuleList(VFTBlock(s.d_model, s.n_heads, s.rank, s.block()) for _ in range(s.n_layers))
        self.norm = nn.LayerNorm(s.d_model)
        self.head = nn.Linear(s.d_model, s.classes) if s.classes else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: VFTCache | None = None,
        statistics: list[VeinStatistics] | None = None,
    ) -> Tensor:
        """Token numbers (B, T), images (B, C, H, W), frames (B, T, F) → logits (of the text) or hidden states.

        `attention_mask` (B, T) is 1 for what counts: of all tokens, or of all but the patches (an image has no padding). With a
        `cache` (`new_cache`) the inputs are those that follow what it has seen. `statistics` gets one entry per block.
        """
        x = self.embedding(input_ids, images, frames)
        hidden = self.hidden(x, self.full_mask(x, attention_mask), cache, statistics)
        if self.head is not None:
            return self.head(self._pooled(hidden, self.full_mask(x, attention_mask)))
        if input_ids is None or not (self.settings.causal and self.settings.vocab_size):
            return hidden
        return self.embedding.logits(hidden[:, -input_ids.shape[1] :])  # text stands last

    def hidden(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: VFTCache | None = None,
        statistics: list[VeinStatistics] | None = None,
    ) -> Tensor:
        """Embedded tokens (B, T, d) → (B, T, d), with positions, blocks and the last norm. `mask` (B, T): True counts."""
        T = x.shape[1]
        keep = mask if cache is None else cache.see(x, mask)
        total = T if cache is None else cache.length
        positions = torch.arange(total, device=x.device) if keep is None else (keep.long().cumsum(1) - 1).clamp_min(0)
        x = self.embedding.placed(x, positions[..., -T:], total)
        reading: dict[str, Any] = {"key_padding": keep, "is_causal": self.settings.causal, "positions": positions}
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache.layers[i], statistics=statistics, **reading)
        return self.norm(x)

    def full_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of all tokens x, (B, T) boolean, from one of all or of all but the patches."""
        if mask is None or mask.shape[1] == x.shape[1]:
            return None if mask is None else mask.bool()
        patches = torch.ones(len(mask), x.shape[1] - mask.shape[1], dtype=torch.bool, device=mask.device)
        return torch.cat((patches, mask.bool()), 1)

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over what counts; of a causal model the last token that does, which has seen all."""
        if self.settings.causal:
            if mask is None:
                return hidden[:, -1]
            last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        if mask is None:
            return hidden.mean(1)
        weights = mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)

    def new_cache(self) -> VFTCache:
        """An empty cache. Raises `UsageError` for a model that is not causal: its first tokens must see the later ones."""
        if not self.settings.causal:
            raise UsageError("Only a causal model can go on from a cache.", remedy="Build it with causal=True.")
        return VFTCache([block.new_cache() if isinstance(block, Caching) else None for block in self.blocks])

    def stack(self) -> dict[str, VFTBlock]:
        """Dotted path → block, those that were dropped left out."""
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks) if isinstance(block, VFTBlock)}

    def penalty(self, weight: float = 1e-3) -> Tensor:
        """λ Σ ‖VU − I‖²_F over the blocks, a scalar to add to the training loss."""
        return torch.stack([block.projector.penalty(weight) for block in self.stack().values()]).sum()

    @torch.no_grad()
    def statistics(self, *inputs: Any, **named: Any) -> list[VeinStatistics]:
        """ε and gate share of each block on one batch, in eval mode; nothing is kept and nothing else is changed."""
        found: list[VeinStatistics] = []
        flags = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            self(*inputs, **named, statistics=found)
        finally:
            for module, training in flags:
                module.training = training
        return found

    def generate(self, input_ids: Tensor, new_tokens: int = 32, **how: Any) -> Tensor:
        """See `layerwise.native.generation.generate`."""
        from layerwise.native.generation import generate

        return generate(self, input_ids, new_tokens, **how)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """See `layerwise.native.saving`."""
        from layerwise.native.saving import save_pretrained

        return save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> VFTModel:
        """See `layerwise.native.saving`."""
        from layerwise.native.saving import from_pretrained

        return from_pretrained(folder, weights)


__all__ = ["VFTModel"]
