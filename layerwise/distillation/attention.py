"""Attention distillation: the student looks where the teacher looks (TinyBERT, Jiao et al. 2020; MiniLM, Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Maps, Seen, wide
from layerwise.distillation.term import TERMS, Term
from layerwise.errors import UsageError
from layerwise.task import Task

TYPES = ("self", "cross", "both")
SMALLEST = 1e-12


def attention_loss(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) in nats per query, the mean over heads and the queries that `keep` (rows, queries) counts.

    Maps are (rows, heads, queries, keys); where the numbers of heads differ, both are averaged over their heads first.
    """
    mine, other = wide(student), wide(teacher.detach())
    if mine.shape[1] != other.shape[1]:
        mine, other = mine.mean(1, keepdim=True), other.mean(1, keepdim=True)
    terms = torch.where(other > 0, other * (other.clamp_min(SMALLEST).log() - mine.clamp_min(SMALLEST).log()), 0.0)
    rows = terms.sum(-1).mean(1)
    if keep is None:
        return rows.mean()
    weight = keep.to(rows.dtype)
    return (rows * weight).sum() / weight.sum().clamp_min(1e-12)


@TERMS.register("attention")
@dataclass(frozen=True)
class Attention(Term):
    """The mean of `attention_loss` over the calls of the paired layers. `attention_type`: ``self``, ``cross`` or ``both``; the
    first call of a layer is attention of the sequence to itself, later ones are cross attention.
    """

    attention_type: str = "both"
    name: ClassVar[str] = "attention"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        if self.attention_type not in TYPES:
            raise UsageError(f"Unknown attention_type {self.attention_type!r}.", remedy=f"Known: {', '.join(TYPES)}.")

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        found = self._pairs(student, teacher)
        if not found:
            kind = "" if self.attention_type == "both" else f"{self.attention_type} "
            raise UsageError(f"No {kind}attention was seen in the paired layers.", remedy="Use response or feature distillation.")
        for name, mine, other in found:
            if mine.weights.shape[2:] != other.weights.shape[2:] or len(mine.weights) != len(other.weights):
                raise UsageError(
                    f"The attention maps of {name} are {tuple(mine.weights.shape)} and its teacher's "
                    f"{tuple(other.weights.shape)}: they look at different sequences."
                )

    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        pairs = self._pairs(student, teacher)
        return torch.stack([attention_loss(a.weights, b.weights, b.keep) for _, a, b in pairs]).mean()

    def _pairs(self, student: Seen, teacher: Seen) -> list[tuple[str, Maps, Maps]]:
        pairs = []
        for name, calls in student.attention.items():
            mine, other = self._chosen(calls), self._chosen(teacher.attention.get(name, ()))
            pairs += [(name, a, b) for a, b in zip(mine, other, strict=False)]
        return pairs

    def _chosen(self, calls: Sequence[Maps]) -> list[Maps]:
        return [c for c in calls if self.attention_type == "both" or c.cross == (self.attention_type == "cross")]
