"""Translation: a text in other words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.tasks._contract import TASKS, Acted, Figures, Task
from layerwise.tasks._tokens import perplexity, token_figures, token_likelihood

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@TASKS.register("translation")
@dataclass(frozen=True)
class Translation(Task):
    """A sequence-to-sequence model with the target's tokens for its decoder, and as labels ``(samples, tokens)`` with −100 for
    padding.

    Loss: nats per target token, the right tokens before it given. Metrics: ``perplexity``, ``token_accuracy``; and of the first
    `samples` texts, translated greedily with at most `tokens` tokens, ``bleu`` and ``chrf`` (0 … 100) and ``ter`` (edits per
    hundred words of the reference, lower is better), by sacrebleu. `tokenize` is sacrebleu's (``zh`` for Chinese).
    """

    samples: int = 16
    tokens: int = 64
    tokenize: str = "13a"
    name: ClassVar[str] = "translation"
    quality: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        return token_figures(output, batch)

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return token_likelihood(output, batch)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return perplexity(means)

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        from layerwise.tasks._decoding import Decoding, written_metrics  # it runs models, which know tasks

        return written_metrics(model, data, ("bleu", "chrf", "ter"), Decoding(self.samples, self.tokens, self.tokenize))
