"""Extractive question answering: the span of the context that answers the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Figures, Task, token_ids, token_mask
from layerwise.tasks._texts import as_text, exact_match, f1

PACKED = ("start_logits", "end_logits")


@TASKS.register("question_answering")
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The forward gives ``start_logits`` and ``end_logits`` ``(samples, tokens)``; they are packed into ``(samples, 2, tokens)``.

    Labels: the first and the last token of the answer, ``(samples, 2)``; or a dict with them as ``span`` and the texts as code
    points (`layerwise.tasks._texts.as_codes`): ``context`` ``(samples, characters)``, ``offsets`` ``(samples, tokens, 2)`` of
    each token in it, and ``answers`` ``(samples, references, characters)``. Loss: mean cross entropy of both ends, nats.

    Metrics: ``exact_match`` and ``f1_score`` of the most likely span of at most `longest` tokens, inside the second segment where
    ``token_type_ids`` tell it. With texts they are SQuAD's, over normalised words, best of the references; else they are over
    token positions.
    """

    longest: int = 30
    name: ClassVar[str] = "question_answering"
    quality: ClassVar[str] = "f1_score"
    higher_is_better: ClassVar[bool] = True

    def reads(self, raw: Any) -> Tensor | None:
        if isinstance(raw, Mapping) and all(isinstance(raw.get(name), Tensor) for name in PACKED):
            return torch.stack([raw[name] for name in PACKED], 1)
        if isinstance(raw, tuple) and len(raw) == 2 and all(isinstance(x, Tensor) and x.dim() == 2 for x in raw):
            return torch.stack(list(raw), 1)
        return None

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        losses = self._losses(output, batch).double()
        ones = torch.ones_like(losses)
        matches, overlaps = self._answers(output, batch)
        return {"loss": (losses, 2 * ones), "exact_match": (matches, ones), "f1_score": (overlaps, ones)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._losses(output, batch)

    def losses(self, output: Tensor, batch: Batch, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        losses = self._losses(output, batch).double()
        return losses, torch.full_like(losses, 2.0)

    def check(self, batch: Batch, output: Tensor) -> None:
        spans = batch.labels.get("span") if isinstance(batch.labels, Mapping) else batch.labels
        if not isinstance(spans, Tensor) or spans.device.type != "cpu" or output.dim() != 3 or spans.dim() != 2:
            return
        wrong = (spans < 0) | (spans >= output.shape[-1])
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            what = f"The answer in row {row} of the batch is at {spans[row].tolist()}, outside the {output.shape[-1]} tokens."
            raise DataError(what, remedy="Leave out rows whose answer was cut off.", code="LW-D34")

    @staticmethod
    def _spans(output: Tensor, batch: Batch) -> Tensor:
        spans = batch.labels.get("span") if isinstance(batch.labels, Mapping) else batch.labels
        if not isinstance(spans, Tensor) or output.dim() != 3 or output.shape[1] != 2 or spans.shape != output.shape[:2]:
            raise DataError(
                f"Question answering needs start and end logits, packed (samples, 2, tokens), and labels (samples, 2); "
                f"the output is {tuple(output.shape)}."
            )
        return spans.to(output.device).long()

    def _losses(self, output: Tensor, batch: Batch) -> Tensor:
        """(samples,): the negative log-likelihood of both ends."""
        spans = self._spans(output, batch)
        return F.cross_entropy(output.float().flatten(0, 1), spans.flatten(), reduction="none").reshape(-1, 2).sum(1)

    def _answers(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Exact match and F1, (samples,) each."""
        spans, found = self._spans(output, batch), best_spans(output, _allowed(output, batch), self.longest)
        if isinstance(batch.labels, Mapping) and "answers" in batch.labels:
            return _by_words(found, batch.labels, output.device)
        both = (torch.minimum(spans[:, 1], found[:, 1]) - torch.maximum(spans[:, 0], found[:, 0]) + 1).clamp_min(0).double()
        lengths = (spans[:, 1] - spans[:, 0] + found[:, 1] - found[:, 0] + 2).double()
        return (spans == found).all(1).double(), 2 * both / lengths


def best_spans(output: Tensor, allowed: Tensor, longest: int) -> Tensor:
    """(samples, 2): start ≤ end with the greatest sum of logits, at most `longest` tokens, both `allowed` (samples, tokens)."""
    starts, ends = output.double().masked_fill(~allowed[:, None], -torch.inf).unbind(1)
    tokens = starts.shape[1]
    distance = torch.arange(tokens, device=output.device)[None] - torch.arange(tokens, device=output.device)[:, None]
    scores = (starts[:, :, None] + ends[:, None]).masked_fill((distance < 0) | (distance >= longest), -torch.inf)
    best = scores.flatten(1).argmax(1)
    return torch.stack([best // tokens, best % tokens], 1)


def _allowed(output: Tensor, batch: Batch) -> Tensor:
    """(samples, tokens): not padding, and of the context where segments tell it; the first token means: no answer."""
    segments, ids = batch.kwargs.get("token_type_ids"), token_ids(batch)
    like = output[:, 0]
    allowed = token_mask(batch, like) if ids is not None and ids.shape == like.shape else torch.ones_like(like, dtype=torch.bool)
    if isinstance(segments, Tensor) and segments.shape == like.shape and bool(segments.any()):
        allowed = allowed & (segments == 1)
        allowed[:, 0] = True
    return allowed


def _by_words(found: Tensor, labels: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    matches, overlaps = [], []
    for span, context, offsets, answers in zip(
        found.cpu(), *(labels[n].cpu() for n in ("context", "offsets", "answers")), strict=True
    ):
        answer = as_text(context)[int(offsets[span[0], 0]) : int(offsets[span[1], 1])]
        truths = [as_text(row) for row in answers if bool((row >= 0).any())] or [""]
        matches.append(exact_match(answer, truths))
        overlaps.append(f1(answer, truths))
    return tuple(torch.tensor(x, dtype=torch.float64, device=device) for x in (matches, overlaps))  # type: ignore[return-value]  # two of them
