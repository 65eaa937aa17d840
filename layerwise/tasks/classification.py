"""Classification: one of C classes per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """Outputs are logits ``(samples, C)``, labels ``(samples,)`` integers. Loss: cross entropy, nats.

    Metrics: ``accuracy``; ``precision``, ``recall`` and ``f1_score`` as means over the classes that occur among the labels or
    the answers, 0 where a class has no answer or no label (scikit-learn's ``average="macro"``).
    """

    name: ClassVar[str] = "classification"
    quality: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        labels = self._labels(output, batch)
        ones = torch.ones(len(labels), dtype=torch.float64, device=output.device)
        loss = F.cross_entropy(output.float(), labels, reduction="none").double()
        hits = (output.argmax(-1) == labels).double()
        return {"loss": (loss, ones), "accuracy": (hits, ones)}

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        return {"predicted": output.argmax(-1), "label": self._labels(output, batch)}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        hits, predicted, present = confusion(evidence["predicted"], evidence["label"])
        return macro_averages(hits, predicted, present)

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(output.float(), self._labels(output, batch), reduction="none")

    def check(self, batch: Batch, output: Tensor) -> None:
        if isinstance(batch.labels, Tensor) and batch.labels.device.type == "cpu" and output.dim() == 2:
            check_classes(check_whole(batch.labels), output.shape[1])

    @staticmethod
    def _labels(output: Tensor, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise DataError("Classification needs labels.", remedy="Give (inputs, labels), or use task='fidelity'.")
        given = torch.as_tensor(batch.labels, device=output.device)
        labels = (check_whole(given) if given.device.type == "cpu" else given).long()
        if output.dim() != 2 or labels.shape != output.shape[:1]:
            raise DataError(
                f"Classification needs outputs (samples, classes) and labels (samples,), got {tuple(output.shape)} and "
                f"{tuple(labels.shape)}.",
                remedy="Name the task where it is another: task='multi_label', 'regression', 'segmentation', …",
            )
        if labels.device.type == "cpu":  # on a GPU asking would make every batch wait: there the engine asks before the copy
            check_classes(labels, output.shape[1])
        return labels


def check_whole(labels: Tensor) -> Tensor:
    """`labels` themselves. Raises `DataError` (LW-D34) with the row of the first that is a real value, and so no class."""
    if not labels.is_floating_point():
        return labels
    wrong = labels != labels.round()
    if bool(wrong.any()):
        row = int(wrong.reshape(len(labels), -1).any(1).nonzero()[0])
        what = f"The label in row {row} of the batch is {labels[row].tolist()}, which is no class number."
        raise DataError(what, remedy="Use task='regression', or 'multi_label' for yes/no questions.", code="LW-D34")
    return labels


def check_classes(labels: Tensor, classes: int) -> None:
    """Raises `DataError` (LW-D34) with the row of the first label that is not one of 0 … classes − 1."""
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"Label {int(labels[row])} in row {row} of the batch lies outside the model's {classes} classes.",
            remedy="Check the label column, or the number of classes the model was built with.",
            code="LW-D34",
        )


def confusion(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each class, float64 (C,): how often it was answered rightly, answered at all, and was the label."""
    classes = int(max(predicted.max(), labels.max())) + 1
    counted = [torch.bincount(x, minlength=classes).double() for x in (labels[predicted == labels], predicted, labels)]
    return counted[0], counted[1], counted[2]


def macro_averages(hits: Tensor, answered: Tensor, present: Tensor) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1_score``, means over the classes that were answered or present (counts, each (C,))."""
    occurs = (answered + present) > 0
    shares = {"precision": hits / answered.clamp_min(1), "recall": hits / present.clamp_min(1)}
    shares["f1_score"] = 2 * hits / (answered + present).clamp_min(1)
    return {name: float(share[occurs].mean()) for name, share in shares.items()}
