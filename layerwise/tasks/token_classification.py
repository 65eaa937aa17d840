"""Token classification: one of C classes per token (parts of speech, names)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task
from layerwise.tasks.classification import confusion, macro_averages

UNLABELLED = -100  # padding, special tokens and the later pieces of a word, as transformers writes them


@TASKS.register("token_classification")
@dataclass(frozen=True)
class TokenClassification(Task):
    """Outputs are logits ``(samples, tokens, C)``, labels ``(samples, tokens)``; a token labelled −100 counts nowhere.

    Loss: cross entropy, nats per labelled token. Metrics: ``accuracy``; ``precision``, ``recall`` and ``f1_score`` as means over
    the classes that occur, per token. The F1 of whole spans that names are judged by elsewhere is another figure.
    """

    name: ClassVar[str] = "token_classification"
    quality: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        labels = self._labels(output, batch)
        keep = labels != UNLABELLED
        weights = keep.sum(1).double()
        hits = ((output.argmax(-1) == labels) & keep).sum(1).double()
        return {"loss": (self._entropies(output, labels).double().sum(1), weights), "accuracy": (hits, weights)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._entropies(output, self._labels(output, batch)).sum(1)

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        return {"predicted": output.argmax(-1), "label": self._labels(output, batch)}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        keep = evidence["label"] >= 0  # narrower batches were padded with −1
        return macro_averages(*confusion(evidence["predicted"][keep], evidence["label"][keep]))

    def check(self, batch: Batch, output: Tensor) -> None:
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.device.type != "cpu" or output.dim() != 3:
            return
        wrong = ((labels < 0) | (labels >= output.shape[2])) & (labels != UNLABELLED)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            found, classes = int(labels[wrong][0]), output.shape[2]
            what = f"A token in row {row} of the batch is labelled {found}, outside the model's {classes} classes."
            raise DataError(what, remedy="Check the tags; −100 means: not labelled.", code="LW-D34")

    @staticmethod
    def _labels(output: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels
        if not isinstance(labels, Tensor) or output.dim() != 3 or labels.shape != output.shape[:2]:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"Token classification needs logits (samples, tokens, classes) and labels (samples, tokens), "
                f"got {tuple(output.shape)} and {found}."
            )
        return labels.to(output.device).long()

    @staticmethod
    def _entropies(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float().transpose(1, 2), labels, ignore_index=UNLABELLED, reduction="none")
