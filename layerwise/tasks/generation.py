"""Generation: a text goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layerwise.data import Data
from layerwise.tasks._contract import TASKS, Acted
from layerwise.tasks._tokens import TokenTask

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@TASKS.register("generation")
@dataclass(frozen=True)
class Generation(TokenTask):
    """Outputs, loss, ``perplexity`` and ``token_accuracy`` are those of language modelling; tokens labelled −100 are the prompt.

    Metrics of written texts: ``bleu`` (0 … 100, sacrebleu) and ``rouge`` (ROUGE-L, F of longest common subsequences). The first
    `samples` texts are continued greedily after their prompt, or else after their first half, by as many tokens as they
    themselves go on, at most `tokens`. `tokenize` is sacrebleu's (``zh`` for Chinese). Without a tokenizer the ids are compared.
    """

    samples: int = 16
    tokens: int = 32
    tokenize: str = "13a"
    name: ClassVar[str] = "generation"

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        from layerwise.tasks._decoding import Decoding, written_metrics  # it runs models, which know tasks

        return written_metrics(model, data, ("bleu", "rouge"), Decoding(self.samples, self.tokens, self.tokenize))
