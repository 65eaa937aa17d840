"""Weights as they are drawn, made to let something through.

Some architectures start with heads or branches of zeros, and deep stacks of batch normalizations that have seen no data let their
streams grow to 10⁸: every gradient is then exactly 0, whatever the structure. Trained weights are neither.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwise.data import Batch

SPREAD = 0.02  # standard deviation of what replaces zeros


def enliven_(module: nn.Module, batch: Batch) -> None:
    """Weights that are all 0 become small noise, and batch normalizations take their statistics from `batch`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    module.eval()
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = None  # a plain mean over the calls
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            module(*batch.args, **batch.kwargs)
    module.eval()


__all__ = ["enliven_"]
