"""Language modelling: the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Figures, Task, token_ids, token_mask


@TASKS.register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token; outputs are logits ``(samples, tokens, vocabulary)``; padding is left out of every mean."""

    name: ClassVar[str] = "language_modelling"
    quality: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        targets, keep = self._targets(output, batch)
        nll = self._nll(output, targets)
        hits = (output[:, :-1].argmax(-1) == targets).double()
        weights = keep.sum(-1).double()
        return {
            "loss": ((nll.double() * keep).sum(-1), weights),
            "token_accuracy": ((hits * keep).sum(-1), weights),
        }

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        targets, keep = self._targets(output, batch)
        return (self._nll(output, targets) * keep).sum(-1)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["loss"], 700.0))}

    @staticmethod
    def _nll(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :-1].float().transpose(1, 2), targets.clamp_min(0), reduction="none")

    @staticmethod
    def _targets(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch.labels if batch.labels is not None else token_ids(batch)
        if ids is None or output.dim() != 3 or ids.shape != output.shape[:2]:
            raise DataError(
                f"Language modelling needs token ids (samples, tokens) and logits (samples, tokens, vocabulary); "
                f"the output is {tuple(output.shape)}."
            )
        mask = token_mask(batch, ids)
        return ids[:, 1:], mask[:, 1:] & (ids[:, 1:] >= 0)
