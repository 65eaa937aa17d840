"""`Term`: one way to compare a student with its teacher on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Seen
from layerwise.registry import Registry
from layerwise.task import Task


class Term(ABC):
    """A frozen dataclass of settings. `reads`: what of the paired layers it needs, ``features`` or ``attention``."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        """Raises `UsageError` in words where the two cannot be compared."""

    def companion(self, student: Seen, teacher: Seen) -> nn.Module | None:
        """What is trained along and thrown away afterwards (projections); None where nothing is."""
        return None

    @abstractmethod
    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        """A scalar, a mean over samples and positions that count; layers go by the student's names in both."""


TERMS: Registry[Term] = Registry("distillation objective", "layerwise.distillation")
