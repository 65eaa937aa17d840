"""The dense twin: a `VFTModel` whose blocks are plain pre-norm transformer blocks, fed, cached and trained in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.native import VFTModel, VFTSettings
from layerwise.native.attention import attend, joined, split
from layerwise.native.masks import visible


class DenseBlock(nn.Module):
    """Attention with q, k, v and out, a feed-forward of 4d, biases throughout; its cache holds keys and values, 2d numbers."""

    def __init__(self, d_model: int, n_heads: int, act: str = "silu") -> None:
        super().__init__()
        self.heads, self.act = n_heads, act
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor, *, cache: Any = None, key_padding: Any = None, is_causal: bool = False, **_: Any) -> Tensor:
        q, stored = self.qkv(self.norm1(x)).split((x.shape[-1], 2 * x.shape[-1]), -1)
        stored = split(stored, 2 * self.heads)
        k, v = (stored if cache is None else cache.append(stored)).chunk(2, 1)
        seen = visible(q.shape[1], k.shape[2], causal=is_causal, key_padding=key_padding)
        size = x.shape[-1] // self.heads
        x = x + self.out(joined(seen.cleared(attend(split(q, self.heads), k, v, seen, size**-0.5))))
        return x + self.down(F.silu(self.up(self.norm2(x))))

    def new_cache(self) -> DenseCache:
        return DenseCache()


class DenseCache:
    """Keys and values (B, 2·heads, tokens, d/heads), each head's tokens side by side: the layout that attention reads fastest."""

    def __init__(self) -> None:
        self.capacity = self.length = 0
        self.buffer: Tensor | None = None

    @property
    def floats(self) -> int:
        return 0 if self.buffer is None else self.buffer[:, :, : self.length].numel()

    def append(self, new: Tensor) -> Tensor:
        stop = self.length + new.shape[2]
        if self.buffer is None or stop > self.buffer.shape[2]:
            old = self.buffer
            self.buffer = new.new_empty(*new.shape[:2], max(stop + stop // 4, self.capacity), new.shape[3])
            if old is not None:
                self.buffer[:, :, : self.length] = old[:, :, : self.length]
        self.buffer[:, :, self.length : stop] = new
        self.length = stop
        return self.buffer[:, :, :stop]


def dense(settings: VFTSettings, width: int = 0) -> VFTModel:
    """The twin of the same depth, width and heads, or of another `width`."""
    s = replace(settings, d_model=width or settings.d_model, rank=1, normals=0)
    model = VFTModel(s)
    model.blocks = nn.ModuleList(DenseBlock(s.d_model, s.n_heads) for _ in range(s.n_layers))
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matched(settings: VFTSettings) -> VFTModel:
    """The dense net of the VFT's depth and heads whose parameter count is nearest to the VFT's: narrower."""
    goal = parameters(VFTModel(settings))
    widths = range(settings.n_heads, settings.d_model + 1, settings.n_heads)
    best = min(widths, key=lambda w: abs(parameters(dense(settings, w)) - goal))
    return dense(settings, best)
