"""Translation: a text in other words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layerwise.data import Data
from layerwise.tasks._contract import TASKS, Acted
from layerwise.tasks._tokens import TokenTask

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@TASKS.register("translation")
@dataclass(frozen=True)
class Translation(TokenTask):
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

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        from layerwise.tasks._decoding import Decoding, written_metrics  # it runs models, which know tasks

        return written_metrics(model, data, ("bleu", "chrf", "ter"), Decoding(self.samples, self.tokens, self.tokenize))
