"""The networks that the benchmark trains itself: a small transformer for patches, frames or characters, and two residual nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and around a shortcut; the position in depth changes nothing."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).view(samples, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(samples, tokens, width)


class SequenceClassifier(nn.Module):
    """Vectors (samples, tokens, features) through a transformer, pooled by the mean, to logits (samples, classes)."""

    def __init__(self, tokens: int, features: int, width: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 4, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class CharacterModel(nn.Module):
    """Characters (samples, tokens) through a causal transformer to logits (samples, tokens, characters)."""

    def __init__(self, characters: int, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 4, causal=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResidualMLP(nn.Module):
    """Numbers (samples, features) through `depth` blocks of norm, up, ReLU, down around a shortcut."""

    def __init__(self, features: int, width: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class SpectrogramCNN(nn.Module):
    """Spectrograms (samples, 1, mels, frames) through residual 3×3 blocks at one resolution."""

    def __init__(self, width: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, stride=(2, 4), padding=2)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        self.head = nn.Linear(width * 5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, (5, 1)).flatten(1))


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ResNet8(nn.Module):
    """The image model of MLPerf Tiny for CIFAR-10, input 0 … 255, with TensorFlow's padding and normalization constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=1e-3)
        self.stack1, self.stack2, self.stack3 = Stack(16, 16, 1), Stack(16, 32, 2), Stack(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(same(x, 3, 1))))
        return self.fc(self.stack3(self.stack2(self.stack1(x))).mean((2, 3)))


class Stack(nn.Module):
    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.conv2 = nn.Conv2d(entering, leaving, 3, stride), nn.Conv2d(leaving, leaving, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(leaving, eps=1e-3), nn.BatchNorm2d(leaving, eps=1e-3)
        if stride > 1:
            self.short = nn.Conv2d(entering, leaving, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(same(x, 3, self.stride))))
        y = self.bn2(self.conv2(same(y, 3, 1)))
        return F.relu(y + (self.short(x) if self.stride > 1 else x))


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding, which puts the odd pixel at the end."""
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    (top, left), (bottom, right) = ([t // 2 for t in total], [t - t // 2 for t in total])
    return F.pad(x, (left, right, top, bottom))
