"""Feature distillation: layers of the student give what layers of the teacher give (FitNets, Romero et al. 2015).

Where we differ: the error is relative to the teacher's features, so that a layer of large features does not drown the others and
the number means something: 0 is equal, 1 is as far away as giving nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Seen, paired, wide
from layerwise.distillation.term import TERMS, Term
from layerwise.errors import UsageError
from layerwise.task import Task, token_mask


def feature_loss(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Σ (student − teacher)² / Σ teacher², over all positions that `keep` (samples, positions) counts; shapes are equal."""
    other = wide(teacher.detach())
    apart, energy = (wide(student) - other).square(), other.square()
    if keep is not None:
        weight = keep.to(apart.dtype)[(...,) + (None,) * (apart.dim() - keep.dim())]
        apart, energy = apart * weight, energy * weight
    return apart.sum() / energy.sum().clamp_min(1e-12)


def differing_dimension(student: Tensor, teacher: Tensor) -> int | None:
    """The one dimension (not the first) in which the shapes differ, 0 for none; None where they cannot be compared."""
    if student.dim() != teacher.dim() or student.dim() < 2 or len(student) != len(teacher):
        return None
    other = [d for d in range(1, student.dim()) if student.shape[d] != teacher.shape[d]]
    return None if len(other) > 1 else other[0] if other else 0


class Projection(nn.Module):
    """A linear map of one dimension from the student's width to the teacher's, as a 1×1 convolution does of channels."""

    def __init__(self, dim: int, wide: int, to: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(wide, to)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.movedim(self.dim, -1).float()).movedim(-1, self.dim)


@TERMS.register("feature")
@dataclass(frozen=True)
class Feature(Term):
    """The mean over the paired layers of `feature_loss`; padding does not count. Where widths differ, a `Projection` is trained
    along; `project` asks for one in every pair.
    """

    project: bool = False
    name: ClassVar[str] = "feature"
    reads: ClassVar[frozenset[str]] = frozenset({"features"})

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        for name, mine, other in paired(student.features, teacher.features):
            if differing_dimension(mine, other) is None:
                raise UsageError(
                    f"The features of {name} are {tuple(mine.shape)} and those of its teacher {tuple(other.shape)}: more than "
                    "the width differs, and a linear projection cannot mend that.",
                    remedy="Pair layers of equal length or resolution.",
                )

    def companion(self, student: Seen, teacher: Seen) -> nn.Module | None:
        made: dict[str, nn.Module] = {}
        for name, mine, other in paired(student.features, teacher.features):
            dim = differing_dimension(mine, other) or (mine.dim() - 1 if self.project else 0)
            if dim:
                made[key_of(name)] = Projection(dim, mine.shape[dim], other.shape[dim]).to(mine.device)
        return nn.ModuleDict(made) if made else None

    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        found = []
        for name, mine, other in paired(student.features, teacher.features):
            if isinstance(companion, nn.ModuleDict) and key_of(name) in companion:
                mine = companion[key_of(name)](mine)
            keep = token_mask(batch, mine[..., 0]) if mine.dim() == 3 and len(mine) == batch.size else None
            found.append(feature_loss(mine, other, keep))
        return torch.stack(found).mean()


def key_of(layer: str) -> str:
    """A layer's name as the name of a submodule."""
    return layer.replace(".", "/")
