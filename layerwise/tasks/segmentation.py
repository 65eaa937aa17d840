"""Semantic segmentation: one of C classes per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task

IGNORED = 255  # what PASCAL VOC, Cityscapes and ADE20K write where no class is given


@TASKS.register("segmentation")
@dataclass(frozen=True)
class Segmentation(Task):
    """Outputs are logits ``(samples, C, height, width)``, labels class numbers ``(samples, rows, columns)``.

    A label `ignored` counts nowhere. Outputs coarser than the labels are enlarged bilinearly, as SegFormer is trained. Loss:
    cross entropy, nats per pixel. Metrics: ``pixel_accuracy``; ``mean_iou`` (the Jaccard index) and ``dice``, each from the
    counts of the whole data set, as means over the classes that occur among its labels or answers.
    """

    ignored: int = IGNORED
    name: ClassVar[str] = "segmentation"
    quality: ClassVar[str] = "mean_iou"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        logits, labels = self._enlarged(output, batch)
        keep = labels != self.ignored
        hits = (logits.argmax(1) == labels) & keep
        weights = keep.flatten(1).sum(1).double()
        return {
            "loss": (self._entropies(logits, labels).double().sum(1), weights),
            "pixel_accuracy": (hits.flatten(1).sum(1).double(), weights),
        }

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._entropies(*self._enlarged(output, batch)).sum(1)

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        logits, labels = self._enlarged(output, batch)
        return {"counts": _counts(logits.argmax(1), labels, labels != self.ignored, logits.shape[1])}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        hits, answered, present = evidence["counts"].sum(0).double()
        occurs = (answered + present) > 0
        union, both = (answered + present - hits)[occurs], (answered + present)[occurs]
        return {"mean_iou": float((hits[occurs] / union).mean()), "dice": float((2 * hits[occurs] / both).mean())}

    def check(self, batch: Batch, output: Tensor) -> None:
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.device.type != "cpu" or output.dim() != 4:
            return
        wrong = ((labels < 0) | (labels >= output.shape[1])) & (labels != self.ignored)
        if bool(wrong.any()):
            row = int(wrong.flatten(1).any(1).nonzero()[0])
            found, classes = int(labels[wrong][0]), output.shape[1]
            what = f"A pixel in row {row} of the batch is labelled {found}, outside the model's {classes} classes."
            raise DataError(what, remedy=f"Check the masks; {self.ignored} means: no class.", code="LW-D34")

    def _enlarged(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels with the same height and width."""
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.dim() != 3 or output.dim() != 4 or len(labels) != len(output):
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"Segmentation needs logits (samples, classes, height, width) and labels (samples, rows, columns), "
                f"got {tuple(output.shape)} and {found}."
            )
        logits, labels = output.float(), labels.to(output.device).long()
        if logits.shape[2:] != labels.shape[1:]:
            logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        return logits, labels

    def _entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(samples, pixels), 0 at ignored ones."""
        return F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none").flatten(1)


def _counts(predicted: Tensor, labels: Tensor, keep: Tensor, classes: int) -> Tensor:
    """(samples, 3, classes): the kept pixels of each class that were answered rightly, answered at all, and labelled so."""
    rows = []
    for picked, where in ((labels, keep & (predicted == labels)), (predicted, keep), (labels, keep)):
        counted = torch.zeros(len(labels), classes, dtype=torch.int64, device=labels.device)
        rows.append(counted.scatter_add_(1, torch.where(where, picked, 0).flatten(1), where.long().flatten(1)))
    return torch.stack(rows, 1)
