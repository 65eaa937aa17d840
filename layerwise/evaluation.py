"""A task's metrics over many batches: exact means, metrics of the whole set from each sample's evidence, standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.jackknife import jackknifed
from layerwise.moments import Moments
from layerwise.task import Task
from layerwise.tasks._contract import Acted


@dataclass
class Evaluation:
    """Sums per metric, the evidence of every sample, and what the model did when it acted itself.

    `means` and `stderr` can be read at any time.
    """

    task: Task
    sums: dict[str, Moments] = field(default_factory=dict)
    evidence: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    acted: Acted = field(default_factory=dict)
    _known: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)  # what was computed since the last batch

    def add(self, output: Tensor, batch: Batch, reference: Tensor | None) -> None:
        """One batch's outputs; `reference` is the uncompressed model's output on it."""
        self._known.clear()
        for metric, (values, weights) in self.task.figures(output, batch, reference).items():
            moments = self.sums.setdefault(metric, Moments(1))
            moments.add_(0, values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1))
        for name, rows in self.task.evidence(output, batch).items():
            self.evidence.setdefault(name, []).append(rows.detach())

    @property
    def samples(self) -> int:
        return max((m.samples() for m in self.sums.values()), default=0)

    def means(self) -> dict[str, float]:
        """Metric → its value over everything added: means, what derives from them (perplexity), and the overall ones (F1)."""
        if "means" not in self._known:
            means = {metric: m.score(0).value for metric, m in self.sums.items()}
            overall = self.task.overall(self._gathered()) if self.evidence else {}
            self._known["means"] = means | self.task.derived(means) | overall
        return self._known["means"] | {metric: value for metric, (value, _) in self.acted.items()}

    def stderr(self) -> dict[str, float]:
        """Metric → standard error.

        Of a derived metric it is the change that one standard error of the loss makes, of an overall one the jackknife's.
        """
        if "stderr" not in self._known:
            errors = {metric: m.score(0).stderr for metric, m in self.sums.items()}
            means = {metric: m.score(0).value for metric, m in self.sums.items()}
            if math.isfinite(errors.get("loss", math.nan)):
                moved = self.task.derived(means | {"loss": means["loss"] + errors["loss"]})
                errors |= {metric: abs(moved[metric] - value) for metric, value in self.task.derived(means).items()}
            self._known["stderr"] = errors | (self._jackknifed() if self.evidence else {})
        return self._known["stderr"] | {metric: error for metric, (_, error) in self.acted.items()}

    def _gathered(self) -> dict[str, Tensor]:
        return {name: joined(parts) for name, parts in self.evidence.items()}

    def _jackknifed(self) -> dict[str, float]:
        evidence = self._gathered()
        units = evidence.get("unit", torch.arange(len(next(iter(evidence.values())))))
        return jackknifed(units, lambda kept: self.task.overall(_rows(evidence, kept)))


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts; narrower ones are padded at the end of each dimension, with NaN or, of whole numbers, −1."""
    widths = [max(p.shape[d] for p in parts) for d in range(1, parts[0].dim())]
    filler = math.nan if parts[0].is_floating_point() else -1
    return torch.cat([F.pad(p, _padding(p, widths), value=filler) for p in parts])


def _padding(part: Tensor, widths: list[int]) -> list[int]:
    """As `F.pad` wants it: from the last dimension, before and after."""
    return [n for d in range(len(widths), 0, -1) for n in (0, widths[d - 1] - part.shape[d])]


def _rows(evidence: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    return {name: rows[kept.to(rows.device)] for name, rows in evidence.items()}
