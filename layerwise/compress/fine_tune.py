"""Train what is left after a cut on the task's own loss, with the zeros of pruned weights kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.training import kept_zeros, only_training, recipe_of, train_, untrainable, zeros_kept

SCOPES = ("model", "layers")


@METHODS.register("fine_tune")
@dataclass(frozen=True)
class FineTune(CompressionMethod):
    """`scope`: trains the whole model, embeddings and head included, or only the step's ``layers``. The rest is the recipe, see
    `TrainingSettings`. In a matrix of which at least 1 % is exactly 0, every zero was pruned and stays 0 (`kept_zeros`).
    """

    scope: str = "model"
    epochs: int = 3
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warm_up: float = 0.1
    clip: float = 1.0
    patience: int = 0
    keep_best: bool = True
    monitor: str = "quality"
    seed: int = 0
    name: ClassVar[str] = "fine_tune"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UsageError(f"fine_tune: unknown scope {self.scope!r}.", remedy=f"Known: {', '.join(SCOPES)}.")
        recipe_of(self)

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        return untrainable(layer.module)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        chosen = [model.layer(name).module for name in layers] if self.scope == "layers" else [model.module]
        with only_training(model.module, chosen):
            train_(model, supplies, settings=recipe_of(self), after_step=kept_zeros(model.module))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the structure stays, and what was learned comes with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return Check(*zeros_kept(before.module, after.module))
