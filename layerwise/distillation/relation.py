"""Relation distillation: samples that are alike to the teacher are alike to the student (Tung & Mori 2019; Park et al. 2019).

Gram matrices have the size of the batch whatever the widths, so nothing is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Seen, paired, wide
from layerwise.distillation.term import TERMS, Term
from layerwise.errors import UsageError
from layerwise.task import Task, token_mask


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the cosines between samples; features (samples, width), widths may differ.

    Pairs of two different samples only; 0 for a single sample.
    """
    mine, other = gram(student), gram(teacher.detach())
    apart = (mine - other).square()
    pairs = max(len(mine) * (len(mine) - 1), 1)
    return (apart.sum() - apart.diagonal().sum()) / pairs


def gram(features: Tensor) -> Tensor:
    """(samples, samples): cosines."""
    unit = F.normalize(wide(features), dim=-1)
    return unit @ unit.T


def pooled(features: Tensor, keep: Tensor | None = None) -> Tensor:
    """(samples, width): of (samples, positions, width) the mean over the positions that count, of images over the pixels."""
    if features.dim() == 4:
        return features.flatten(2).mean(-1)
    if features.dim() != 3:
        return features.flatten(1)
    if keep is None:
        return features.mean(1)
    weight = keep.to(features.dtype)[..., None]
    return (features * weight).sum(1) / weight.sum(1).clamp_min(1)


@TERMS.register("relation")
@dataclass(frozen=True)
class Relation(Term):
    """The mean over the paired layers of `relation_loss` between their `pooled` features."""

    name: ClassVar[str] = "relation"
    reads: ClassVar[frozenset[str]] = frozenset({"features"})

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        for name, mine, other in paired(student.features, teacher.features):
            if len(mine) != len(other):
                raise UsageError(
                    f"The features of {name} have {len(mine)} rows and its teacher's {len(other)}: no common samples."
                )

    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        pairs = paired(student.features, teacher.features)
        return torch.stack([relation_loss(_pooled(a, batch), _pooled(b, batch)) for _, a, b in pairs]).mean()


def _pooled(features: Tensor, batch: Batch) -> Tensor:
    by_token = features.dim() == 3 and len(features) == batch.size
    return pooled(features, token_mask(batch, features[..., 0]) if by_token else None)
