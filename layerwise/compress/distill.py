"""Train what is left after a cut to do what the uncompressed model does (Hinton, Vinyals & Dean 2015), zeros kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from layerwise.distillation import Distillation, paired_layers
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.training import kept_zeros, recipe_of, train_, untrainable, zeros_kept


@METHODS.register("distill")
@dataclass(frozen=True)
class Distill(CompressionMethod):
    """The student is the model as it stands, the teacher the uncompressed one; the whole model is trained.

    `distill_type` names the objectives, joined by ``+``, as in ``response+feature``; they, `temperature`, `alpha`, `beta`,
    `weights`, `weighting`, `layer_map` and `cache` are those of `Distillation`. The rest is the recipe, see `TrainingSettings`.
    """

    distill_type: str = "response"
    temperature: float = 4.0
    alpha: float = 0.7
    beta: float = 0.3
    weights: Sequence[float] = field(default_factory=list)
    weighting: str = "fixed"
    layer_map: str | Mapping[str, str] = "uniform"
    cache: str = "memory"
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
    name: ClassVar[str] = "distill"
    needs: ClassVar[frozenset[str]] = frozenset({"training", "teacher"})
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.objective().chosen()
        recipe_of(self)

    def objective(self) -> Distillation:
        return Distillation(
            tuple(self.distill_type.split("+")),
            self.temperature,
            self.alpha,
            self.beta,
            tuple(self.weights),
            self.weighting,
            self.layer_map,
            self.cache,
        )

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        return untrainable(layer.module)

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> CompressionMethod:
        """With the pairs of layers that the objectives will compare."""
        assert supplies.teacher is not None
        assert supplies.training is not None
        pairs = paired_layers(self.objective(), model, supplies.teacher, supplies.training[0])
        return replace(self, layer_map=pairs) if pairs else self

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        train_(model, supplies, self.objective(), recipe_of(self), after_step=kept_zeros(model.module))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the structure stays, and what was learned comes with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        return Check(*zeros_kept(before.module, after.module))
