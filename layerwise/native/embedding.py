"""From token numbers, images and audio frames to one sequence of tokens (B, T, d)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import UserModelError
from layerwise.native.settings import VFTSettings


class VFTEmbedding(nn.Module):
    """Patches stand first, then frames, then text; where there are several kinds, each has a vector that says which it is."""

    def __init__(self, settings: VFTSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.tokens = nn.Embedding(s.vocab_size, s.d_model) if s.vocab_size else None
        self.patches = nn.Linear(s.image[0] * s.image[3] ** 2, s.d_model) if s.image else None
        self.frames = nn.Linear(s.frame, s.d_model) if s.frame else None
        several = len(s.modalities) > 1
        self.kinds = nn.Parameter(torch.randn(len(s.modalities), s.d_model) * 0.02) if several else None
        learned = s.positions == "learned"
        self.places = nn.Embedding(s.max_positions, s.d_model) if learned else None
        for table in (self.tokens, self.places):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor | None, images: Tensor | None, frames: Tensor | None) -> Tensor:
        """(B, T, d) without positions. Raises `UserModelError` for an input that the model does not read, and for none."""
        parts = []
        for i, name in enumerate(self.settings.modalities):
            part = self._part(name, {"vision": images, "audio": frames, "text": input_ids}[name])
            if part is not None:
                parts.append(part if self.kinds is None else part + self.kinds[i])
        given = sum(x is not None for x in (input_ids, images, frames))
        if not parts or given > len(parts):
            reads = ", ".join(self.settings.modalities)
            raise UserModelError(
                f"The model reads {reads}, and was given {given} inputs.", remedy="See VFTSettings.", code="LW-U78"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _part(self, name: str, given: Tensor | None) -> Tensor | None:
        if given is None:
            return None
        if name == "vision":
            return self.patches(patched(given, self.settings.image[3]))  # type: ignore[misc]  # there where the modality is
        return self.frames(given) if name == "audio" else self.tokens(given)  # type: ignore[misc]

    def placed(self, x: Tensor, positions: Tensor, total: int) -> Tensor:
        """x with the vectors of its positions ((T,) or (B, T)). Raises `UserModelError` LW-D40 for too many tokens."""
        if self.places is None:
            return x
        if total > self.places.num_embeddings:
            what = f"{total} tokens are more than the model's {self.places.num_embeddings} positions."
            raise UserModelError(what, remedy="Shorten the input, or build the model with more max_positions.", code="LW-D40")
        return x + self.places(positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, vocabulary) through the transposed embedding."""
        assert self.tokens is not None  # settings: a language model has a vocabulary
        return F.linear(hidden, self.tokens.weight)


def patched(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) → (B, patches row by row, C·side²)."""
    B, C, H, W = images.shape
    cut = images.reshape(B, C, H // side, side, W // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * side * side)


__all__ = ["VFTEmbedding", "patched"]
