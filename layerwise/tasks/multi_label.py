"""Multi-label classification: several yes/no questions per sample, some of them unanswered in the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task
from layerwise.tasks._ranking import roc_auc
from layerwise.tasks.regression import check_finite_or_unknown, mean_of_known, targets_of


@TASKS.register("multi_label")
@dataclass(frozen=True)
class MultiLabel(Task):
    """Outputs are logits ``(samples, questions)``, labels 0 or 1 of the same shape; a label NaN is unknown and does not count.

    Loss: binary cross entropy, nats per known label. Metrics: ``accuracy``, the share of known labels that a probability of ½
    tells rightly; ``auc``, the area under the ROC curve of each question, as a mean over the questions whose known labels are
    not all the same (as Tox21 is judged).
    """

    name: ClassVar[str] = "multi_label"
    quality: ClassVar[str] = "auc"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        logits, labels = targets_of(output, batch, "Multi-label classification")
        known = ~labels.isnan()
        weights = known.sum(-1).double()
        hits = ((logits > 0) == (labels > 0.5)) & known
        return {"loss": (_entropies(logits, labels).double().sum(-1), weights), "accuracy": (hits.sum(-1).double(), weights)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return _entropies(*targets_of(output, batch, "Multi-label classification")).sum(-1)

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        return dict(zip(("output", "label"), targets_of(output, batch, "Multi-label classification"), strict=True))

    def overall(self, evidence: Evidence) -> dict[str, float]:
        scores, labels = (evidence[name].double().cpu() for name in ("output", "label"))
        return {"auc": mean_of_known([_auc(scores[:, i], labels[:, i]) for i in range(labels.shape[1])])}

    def check(self, batch: Batch, output: Tensor) -> None:
        check_finite_or_unknown(batch)
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.device.type != "cpu":
            return
        wrong = ((labels != 0) & (labels != 1) & ~labels.isnan()).reshape(len(labels), -1)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            what = f"A label in row {row} of the batch is neither 0, 1 nor NaN (unknown)."
            raise DataError(what, remedy="Give one column of 0 and 1 per question.", code="LW-D34")


def _entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(samples, questions), 0 where the label is unknown."""
    values = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    return torch.where(labels.isnan(), 0.0, values)


def _auc(scores: Tensor, labels: Tensor) -> float:
    known = ~labels.isnan()
    return roc_auc(scores[known].numpy(), labels[known].numpy() > 0.5)
