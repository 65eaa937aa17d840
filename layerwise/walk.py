"""`Walk`: one batch for a statistic that runs the model itself, on inputs that the data does not hold.

Path integrals, corruptions and Jacobian products cannot share the sweep's pass. They get the batch, a seed and the counter to
which every forward and backward they make is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.model import UniversalModel


@dataclass(frozen=True)
class Walk:
    """The `batch` is on the model's device; `seed` is this batch's own; `ids` number its samples in the data set."""

    model: UniversalModel
    batch: Batch
    seed: int
    ids: Tensor
    counts: Counts

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, the same at every call."""
        return torch.Generator().manual_seed(self.seed)
