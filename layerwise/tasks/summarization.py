"""Summarization: a long text in few words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layerwise.data import Data
from layerwise.tasks._contract import TASKS, Acted
from layerwise.tasks._tokens import TokenTask

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@TASKS.register("summarization")
@dataclass(frozen=True)
class Summarization(TokenTask):
    """A sequence-to-sequence model with the summary's tokens for its decoder, and as labels ``(samples, tokens)`` with −100 for
    padding.

    Loss: nats per token of the summary, the right tokens before it given. Metrics: ``perplexity``, ``token_accuracy``; and of
    the first `samples` texts, summarized greedily with at most `tokens` tokens, ``rouge_1``, ``rouge_2`` (F of words and of
    pairs) and ``rouge`` (ROUGE-L), by rouge-score. With `tokenize` ``zh`` they count characters.
    """

    samples: int = 16
    tokens: int = 64
    tokenize: str = "13a"
    name: ClassVar[str] = "summarization"

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        from layerwise.tasks._decoding import Decoding, written_metrics  # it runs models, which know tasks

        return written_metrics(model, data, ("rouge", "rouge_1", "rouge_2"), Decoding(self.samples, self.tokens, self.tokenize))
