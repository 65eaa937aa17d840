"""Power-law fits of all matrices of a model: CPU time against weightwatcher's, in pairs: ``python benchmarks/speed_spectral.py``.

Both get the same matrices, those of a ViT-Tiny with random weights, and must give the same α. The first pair is the bare work:
singular values as weightwatcher takes them by default, then its fit. The second is each library as a user calls it, where
weightwatcher's table holds more figures than ours.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
from timing import paired
from weightwatcher import WeightWatcher
from weightwatcher.RMT_Util import svd_vals
from weightwatcher.WW_powerlaw import WWFit

from layerwise.analyzers.spectral_analysis import MIN_EIGENVALUES, SpectralAnalyzer, eigenvalues, power_law
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.task import Fidelity
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


def whole(blocks: int = 3) -> tuple[Callable[[], object], Callable[[], object]]:
    """Both libraries as a user calls them on the blocks of a small ViT: our α of every layer; weightwatcher's whole table."""
    torch.manual_seed(0)
    trunk = timm.create_model("vit_tiny_patch16_224", depth=blocks)
    model = UniversalModel(trunk, task=Fidelity(), example=Batch((torch.randn(2, 3, 224, 224),)))
    assert len(model.layers) == blocks
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    watcher = WeightWatcher(model=trunk.blocks, log_level="ERROR")
    return lambda: SpectralAnalyzer(measure="alpha").analyze(model), lambda: watcher.analyze(
        mp_fit=False, randomize=False, plot=False
    )


def main(pairs: int = PAIRS) -> dict[str, object]:
    """Measures, prints and returns the figures. Raises `ValueError` when α differs."""
    torch.set_num_threads(1)
    found = weights()
    fits, difference = [], 0.0
    ours(found), theirs(found)
    for _ in range(pairs):
        (mine, a), (other, b) = timed(ours, found), timed(theirs, found)
        fits.append(other / mine)
        difference = max(difference, *(abs(x - y) for x, y in zip(a, b, strict=True)))
    if difference > 1e-6:
        raise ValueError(f"α differs by {difference}")
    figures: dict[str, object] = {
        "matrices": len(found),
        "largest difference of α": difference,
        "weightwatcher / ours, singular values and fit alone": statistics.median(fits),
        "the same, lowest and highest of the pairs": [round(min(fits), 2), round(max(fits), 2)],
    }
    mine_whole, other_whole = whole()
    both = paired(other_whole, mine_whole, rounds=3)
    figures["weightwatcher's analyze / our analyzer, as called by a user"] = both.ratio
    figures["the same, lowest and highest of 3 pairs"] = [round(both.low, 2), round(both.high, 2)]
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
