"""Contrastive distillation: each of the student's embeddings finds its own among the teacher's (CRD, Tian et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Seen, wide
from layerwise.distillation.term import TERMS, Term
from layerwise.errors import UsageError
from layerwise.task import Task


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE in nats between embeddings (samples, width) by cosine over `temperature`, both ways.

    The negatives are the other samples of the batch.
    """
    similar = F.normalize(wide(student), dim=-1) @ F.normalize(wide(teacher.detach()), dim=-1).T / temperature
    own = torch.arange(len(similar), device=similar.device)
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


@TERMS.register("contrastive")
@dataclass(frozen=True)
class Contrastive(Term):
    """`contrastive_loss` of the outputs: of a dual tower (samples, 2, width) the mean over its towers, each against the teacher's
    same tower. Embeddings of another width are projected to the teacher's.
    """

    temperature: float = 0.07
    name: ClassVar[str] = "contrastive"

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        embeds = task.name == "retrieval" or getattr(task, "kind", "") == "cosine"
        if not embeds or student.output.dim() not in (2, 3) or student.output.shape[:-1] != teacher.output.shape[:-1]:
            raise UsageError(
                f"Contrastive distillation compares embeddings, (samples, width) or (samples, 2, width); the task {task.name} "
                f"gives {tuple(student.output.shape)}, the teacher {tuple(teacher.output.shape)}.",
                remedy="Use it for encoders and dual towers (task='retrieval'); response distillation suits classes.",
            )

    def companion(self, student: Seen, teacher: Seen) -> nn.Module | None:
        mine, other = student.output.shape[-1], teacher.output.shape[-1]
        return None if mine == other else nn.Linear(mine, other).to(student.output.device)

    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        mine = student.output if companion is None else companion(student.output.float())
        towers = [(mine, teacher.output)] if mine.dim() == 2 else list(zip(mine.unbind(1), teacher.output.unbind(1), strict=True))
        return torch.stack([contrastive_loss(a, b, self.temperature) for a, b in towers]).mean()
