"""Regression: real-valued targets, any number per sample, some of them unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task


@TASKS.register("regression")
@dataclass(frozen=True)
class Regression(Task):
    """Outputs ``(samples, targets)`` or ``(samples,)``, labels of the same shape; a label NaN is unknown and does not count.

    Loss: ½ (output − label)², which is the negative log-likelihood in nats, up to a constant, of a Gaussian with variance 1.
    Metrics, per known target: ``mse`` (twice the loss), ``rmse``, ``mae``, all in the targets' own unit; ``r2``, the share of the
    variance that is explained, as a mean over target columns (scikit-learn's ``r2_score``), NaN where a column never varies.
    """

    name: ClassVar[str] = "regression"
    quality: ClassVar[str] = "rmse"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        error, known = self._errors(output, batch)
        error, weights = error.double(), known.sum(-1).double()
        squares = error.square().sum(-1)
        return {"loss": (squares / 2, weights), "mse": (squares, weights), "mae": (error.abs().sum(-1), weights)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        error, _ = self._errors(output, batch)
        return error.square().sum(-1) / 2

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"rmse": math.sqrt(2 * means["loss"])}

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        return dict(zip(("output", "label"), targets_of(output, batch, "Regression"), strict=True))

    def overall(self, evidence: Evidence) -> dict[str, float]:
        outputs, labels = (evidence[name].double().cpu() for name in ("output", "label"))
        return {"r2": mean_of_known([_explained(outputs[:, i], labels[:, i]) for i in range(labels.shape[1])])}

    def check(self, batch: Batch, output: Tensor) -> None:
        check_finite_or_unknown(batch)

    @staticmethod
    def _errors(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(samples, targets): the errors, 0 where the label is unknown, and which labels are known."""
        outputs, labels = targets_of(output, batch, "Regression")
        known = ~labels.isnan()
        return torch.where(known, outputs - labels.nan_to_num(0.0), 0.0), known


def targets_of(output: Tensor, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """Outputs and labels as float32 ``(samples, targets)``. Raises `DataError` where they do not fit."""
    if batch.labels is None:
        raise DataError(f"{task} needs labels.", remedy="Give (inputs, labels), or use task='fidelity'.")
    labels = torch.as_tensor(batch.labels, device=output.device).float()
    outputs, labels = (x[:, None] if x.dim() == 1 else x for x in (output.float(), labels))
    if outputs.dim() != 2 or labels.shape != outputs.shape:
        raise DataError(
            f"{task} needs outputs and labels of one shape (samples, targets), got {tuple(output.shape)} and "
            f"{tuple(torch.as_tensor(batch.labels).shape)}."
        )
    return outputs, labels


def check_finite_or_unknown(batch: Batch) -> None:
    """Raises `DataError` (LW-D33) with the row of an infinite label; NaN means unknown."""
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.device.type != "cpu" or not labels.is_floating_point():
        return
    if bool(labels.isinf().any()):
        row = int(labels.isinf().reshape(len(labels), -1).any(1).nonzero()[0])
        raise DataError(
            f"The label in row {row} of the batch is infinite.", remedy="Mend it, or give NaN for unknown.", code="LW-D33"
        )


def mean_of_known(values: list[float]) -> float:
    """The mean of those that are defined; NaN where none is."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _explained(outputs: Tensor, labels: Tensor) -> float:
    """R² of one target column."""
    known = ~labels.isnan()
    outputs, labels = outputs[known], labels[known]
    spread = float((labels - labels.mean()).square().sum()) if len(labels) else 0.0
    return 1 - float((outputs - labels).square().sum()) / spread if spread else math.nan
