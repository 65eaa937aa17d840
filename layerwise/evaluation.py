"""A task's metrics over many batches: exact weighted means with standard errors, without keeping an output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from layerwise.data import Batch
from layerwise.moments import Moments
from layerwise.task import Task


@dataclass
class Evaluation:
    """Sums per metric; `means` and `stderr` can be read at any time."""

    task: Task
    sums: dict[str, Moments] = field(default_factory=dict)

    def add(self, output: Tensor, batch: Batch, reference: Tensor | None) -> None:
        """One batch's outputs; `reference` is the uncompressed model's output on it."""
        for metric, (values, weights) in self.task.figures(output, batch, reference).items():
            moments = self.sums.setdefault(metric, Moments(1))
            moments.add_(0, values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1))

    @property
    def samples(self) -> int:
        return max((m.samples() for m in self.sums.values()), default=0)

    def means(self) -> dict[str, float]:
        """Metric → mean over everything added, the derived metrics (perplexity) included."""
        means = {metric: m.score(0).value for metric, m in self.sums.items()}
        return means | self.task.derived(means)

    def stderr(self) -> dict[str, float]:
        """Metric → standard error; of a derived metric by the change that one standard error of the loss makes."""
        errors = {metric: m.score(0).stderr for metric, m in self.sums.items()}
        means = {metric: m.score(0).value for metric, m in self.sums.items()}
        if math.isfinite(errors.get("loss", math.nan)):
            moved = self.task.derived(means | {"loss": means["loss"] + errors["loss"]})
            errors |= {metric: abs(moved[metric] - value) for metric, value in self.task.derived(means).items()}
        return errors
