"""Two tiny subjects that need no data and no training, for runs of the whole benchmark in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.benchmark.networks import ResidualMLP
from layerwise.benchmark.subjects import Parts, Sizes, Subject, parts, tensors, wrapped
from layerwise.task import Classification

SIZES = Sizes(16, 48, 16)


def opened(seed: int) -> Parts:
    """A residual MLP of six blocks, each half as strong as the one before; the labels are its own answers."""
    torch.manual_seed(seed)
    module = ResidualMLP(8, 8, 6, classes=3).eval()
    for strength, block in enumerate(module.blocks):
        assert isinstance(block.down, nn.Linear)
        nn.init.normal_(block.down.weight, std=0.5**strength)
    inputs = torch.randn(96, 8)
    labels: Tensor = module(inputs).argmax(-1)
    pool = 2 * SIZES.calibration
    rows = tensors(inputs[:pool], labels[:pool], SIZES, "tiny")
    held_out = tensors(inputs[pool:], labels[pool:], SIZES, "tiny")(0, SIZES.evaluation)
    return parts(wrapped(module, f"tiny{seed}", inputs, Classification()), rows, SIZES, held_out)


def subjects() -> dict[str, Subject]:
    """``one`` and ``two``."""
    return {
        name: Subject(name, "other", f"tiny net {seed}", lambda seed=seed: opened(seed), shares="everything")
        for seed, name in enumerate(("one", "two"))
    }
