"""Language modelling: the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerwise.tasks._contract import TASKS
from layerwise.tasks._tokens import TokenTask


@TASKS.register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(TokenTask):
    """The next token; outputs are logits ``(samples, tokens, vocabulary)``; padding is left out of every mean."""

    name: ClassVar[str] = "language_modelling"
