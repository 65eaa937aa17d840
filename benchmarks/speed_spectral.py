"""Power-law fits of all matrices of a model: CPU time against weightwatcher's, in pairs: ``python benchmarks/speed_spectral.py``.

Both get the same matrices, those of a ViT-Tiny with random weights, and must give the same α. weightwatcher does its part of
the work: singular values as it takes them by default, then its fit; its tables and other figures are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
from weightwatcher.RMT_Util import svd_vals
from weightwatcher.WW_powerlaw import WWFit

from layerwise.analyzers.spectral_analysis import MIN_EIGENVALUES, eigenvalues, power_law
from layerwise.zeroshot import matrices

PAIRS = 5


def weights(blocks: int = 3) -> list[torch.Tensor]:
    """The matrices of the first blocks, with a heavy tail put on."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    found = [m.detach() for p in model.blocks[:blocks].parameters() for m in matrices(p) if min(m.shape) >= MIN_EIGENVALUES]
    return [m * torch.rand(m.shape[1]).pow(-0.4) for m in found]


def ours(found: list[torch.Tensor]) -> list[float]:
    return [power_law(eigenvalues(m)).alpha for m in found]


def theirs(found: list[torch.Tensor]) -> list[float]:
    return [float(WWFit(np.asarray(svd_vals(m.numpy().astype(np.float64))) ** 2).alpha) for m in found]


def timed(work: Callable[[list[torch.Tensor]], list[float]], found: list[torch.Tensor]) -> tuple[float, list[float]]:
    started = time.process_time()
    result = work(found)
    return time.process_time() - started, result


def main() -> int:
    """Prints the ratios of the pairs; 0 when α agrees."""
    torch.set_num_threads(1)
    found = weights()
    ratios, difference = [], 0.0
    ours(found), theirs(found)
    for _ in range(PAIRS):
        (mine, a), (other, b) = timed(ours, found), timed(theirs, found)
        ratios.append(other / mine)
        difference = max(difference, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    print(f"{len(found)} matrices, α differs by at most {difference:.1e}")
    print(
        f"weightwatcher / layerwise in CPU time: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}"
    )
    return 0 if difference < 1e-6 else 1


if __name__ == "__main__":
    raise SystemExit(main())
