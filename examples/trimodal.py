"""A small fusion transformer that reads a digit as an image, as speech and as a word: any of the three may be missing.

Open it with ``examples/trimodal.py:fusion`` for one transformer over the tokens of all modalities, or ``:late`` for a network per
modality whose answers are added. Neither has weights of its own to download: both are trained in seconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# read by layerwise: how rows with image, audio and text become the arguments of the forward
MULTIMODAL_CFG = {
    "image": {"input_size": (1, 28, 28), "mean": (0.13,), "std": (0.31,), "crop_pct": 1.0},
    "audio": {"rate": 8000, "kind": "log_mel", "scaled": True, "mels": 40, "window": 256, "hop": 128, "frames": 48},
    "text": {"words": WORDS, "length": 4},
}
PATCH, FRAMES = 7, 4  # pixels per side, frames per token


class Block(nn.Module):
    """Attention over the tokens that are there, and a feed-forward, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None, :])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Fusion(nn.Module):
    """One class token, 16 image patches, 12 pieces of the spectrogram and the word, all in one sequence."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.multimodal_cfg = MULTIMODAL_CFG
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.frames = nn.Linear(40 * FRAMES, width)
        self.words = nn.Embedding(len(WORDS) + 2, width)
        self.places = nn.Parameter(torch.randn(1, 1 + 16 + 12, width) / 4)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor, audio: Tensor, input_ids: Tensor, attention_mask: Tensor, present: Tensor) -> Tensor:
        patches = self.patches(F.unfold(image, PATCH, stride=PATCH).mT)
        frames = self.frames(audio.unflatten(-1, (-1, FRAMES)).permute(0, 2, 1, 3).flatten(2))
        words = self.words(input_ids)
        tokens = torch.cat([torch.zeros_like(patches[:, :1]), patches, frames], 1) + self.places
        x = torch.cat([tokens, words], 1)
        counts = (1, patches.shape[1], frames.shape[1])
        ones = torch.ones_like(present[:, :1])
        there = torch.cat([ones, present[:, :1], present[:, 1:2]], 1).repeat_interleave(torch.tensor(counts, device=x.device), 1)
        there = torch.cat([there, attention_mask.bool() & present[:, 2:]], 1)
        for block in self.blocks:
            x = block(x, there)
        return self.head(self.norm(x[:, 0]))


class Late(nn.Module):
    """A network per modality; the logits of those that are there are added."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.multimodal_cfg = MULTIMODAL_CFG

        def network(size: int) -> nn.Module:
            return nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

        self.image, self.audio = network(28 * 28), network(40 * 48)
        self.words, self.text = nn.Embedding(len(WORDS) + 2, width), network(width)

    def forward(self, image: Tensor, audio: Tensor, input_ids: Tensor, attention_mask: Tensor, present: Tensor) -> Tensor:
        mask = attention_mask[..., None].to(image.dtype)
        words = (self.words(input_ids) * mask).sum(1) / mask.sum(1).clamp_min(1)
        answers = torch.stack([self.image(image.flatten(1)), self.audio(audio.flatten(1)), self.text(words)], 1)
        return (answers * present[..., None].to(image.dtype)).sum(1)


def fusion(depth: int = 3) -> nn.Module:
    """The fusion transformer with fresh weights."""
    return Fusion(depth=depth)


def late() -> nn.Module:
    """Late fusion with fresh weights."""
    return Late()
