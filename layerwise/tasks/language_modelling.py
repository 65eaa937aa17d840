"""Language modelling: the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.tasks._contract import TASKS, Figures, Task
from layerwise.tasks._tokens import perplexity, token_figures, token_likelihood


@TASKS.register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token; outputs are logits ``(samples, tokens, vocabulary)``; padding is left out of every mean."""

    name: ClassVar[str] = "language_modelling"
    quality: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        return token_figures(output, batch)

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return token_likelihood(output, batch)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return perplexity(means)
