"""Log-mel spectrograms of short clips, by torch alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

RATE, WINDOW, HOP, MELS, FRAMES = 8_000, 256, 128, 40, 48


def log_mel(clips: list[np.ndarray]) -> Tensor:
    """(clips, MELS, FRAMES): 0.77 s from the start, silence after the end, each clip centred and scaled."""
    length = HOP * (FRAMES - 1)
    waves = torch.zeros(len(clips), length)
    for i, clip in enumerate(clips):
        cut = torch.as_tensor(np.asarray(clip, np.float32))[:length]
        waves[i, : len(cut)] = cut
    spectrum = torch.stft(waves, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    mel = torch.log(mel_filters() @ spectrum + 1e-6)
    return (mel - mel.mean((1, 2), keepdim=True)) / mel.std((1, 2), keepdim=True)


def mel_filters() -> Tensor:
    """(MELS, WINDOW/2 + 1) triangles that overlap by half on the mel scale 2595·log10(1 + f/700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clamp_min(0)
