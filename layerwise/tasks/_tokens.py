"""What every task has whose answer is a sequence of tokens: the loss over the next token."""

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
from layerwise.tasks._contract import Figures, Task, token_ids, token_mask


@dataclass(frozen=True)
class TokenTask(Task):
    """Abstract: logits (samples, tokens, vocabulary), judged by the token that comes next."""

    quality: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        """``loss`` (nats) and ``token_accuracy``, per token that counts."""
        targets, keep = _targets(output, batch)
        nll = _nll(output, targets)
        hits = (output[:, :-1].argmax(-1) == targets).double()
        weights = keep.sum(-1).double()
        return {"loss": ((nll.double() * keep).sum(-1), weights), "token_accuracy": ((hits * keep).sum(-1), weights)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        targets, keep = _targets(output, batch)
        return (_nll(output, targets) * keep).sum(-1)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """``perplexity``: exp of the mean loss per token."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}


def _nll(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].float().transpose(1, 2), targets.clamp_min(0), reduction="none")


def _targets(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The next tokens (samples, tokens − 1), and which count: neither padding nor labelled −100."""
    ids = batch.labels if batch.labels is not None else token_ids(batch)
    if not isinstance(ids, Tensor) or output.dim() != 3 or ids.shape != output.shape[:2]:
        raise DataError(
            f"Language modelling needs token ids (samples, tokens) and logits (samples, tokens, vocabulary); "
            f"the output is {tuple(output.shape)}."
        )
    mask = token_mask(batch, ids)
    return ids[:, 1:], mask[:, 1:] & (ids[:, 1:] >= 0)
