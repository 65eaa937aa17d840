"""Prune a little at a time while training: the cubic schedule of Zhu & Gupta (2017), which ends at exactly the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.sparsity import lowest, quantized, weights_of, zero_, zeros_off
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.training import recipe_of, train_, untrainable

SCOPES = ("local", "global")


@METHODS.register("progressive_pruning")
@dataclass(frozen=True)
class ProgressivePruning(CompressionMethod):
    """Trains, and over the first share `ramp` of the steps raises the share of zeros to `amount` in `updates` prunings.

    After the fraction t of the ramp it is ``amount · (1 − (1 − t)³)`` of all weights, not of those that are left, so that nothing
    compounds. Smallest |w| go first, of each tensor or of all (`scope`); what is zero stays zero. The last weights are kept:
    those of an earlier epoch may not be sparse enough. The rest is the recipe, see `TrainingSettings`.
    """

    amount: float = 0.5
    scope: str = "global"
    ramp: float = 0.6
    updates: int = 20
    epochs: int = 3
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warm_up: float = 0.1
    clip: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "progressive_pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for setting in ("amount", "ramp"):
            if not 0 <= getattr(self, setting) <= 1:
                raise UsageError(f"progressive_pruning: {setting} is {getattr(self, setting)!r}, and must lie in 0 … 1.")
        if self.updates < 1:
            raise UsageError(f"progressive_pruning: updates is {self.updates!r}, and must be at least 1.")
        if self.scope not in SCOPES:
            raise UsageError(f"progressive_pruning: unknown scope {self.scope!r}.", remedy=f"Known: {', '.join(SCOPES)}.")
        recipe_of(self, keep_best=False)

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        matrices = any(p.dim() > 1 for p in layer.module.parameters())
        return quantized(layer) or untrainable(layer.module) or ("" if matrices else "has no weight matrix")

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        ramp = Ramp(self, tuple(weights_of(model.module, layers)))
        train_(model, supplies, settings=recipe_of(self, keep_best=False), before_step=ramp.before, after_step=ramp.after)
        ramp.prune_(model.module, self.amount)

    def share(self, done: float) -> float:
        """The share of zeros after the fraction `done` of the ramp."""
        return self.amount * (1 - (1 - min(done, 1.0)) ** 3)

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        return [list(names)] if self.scope == "global" else [[name] for name in names]

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """As many zeros as asked for, no more; values are learned."""
        return zeros_off(before, after, self.groups(list(weights_of(after.module, layers))), self.amount)


@dataclass
class Ramp:
    """At work during one training: prunes before the steps at which the schedule rises, and keeps zeros after each."""

    method: ProgressivePruning
    names: tuple[str, ...]
    masks: dict[str, Tensor] = field(default_factory=dict)

    def before(self, module: nn.Module, step: int, steps: int) -> None:
        rising = max(round(self.method.ramp * steps), 1)
        marks = [round(i * rising / self.method.updates) for i in range(1, self.method.updates + 1)]
        if step in marks:
            self.prune_(module, self.method.share(sum(mark <= step for mark in marks) / self.method.updates))
        elif not self.masks:  # the beginning, or a run that goes on
            self.masks = {name: module.get_parameter(name).detach() == 0 for name in self.names}

    def after(self, module: nn.Module) -> None:
        zero_((module.get_parameter(name) for name in self.masks), self.masks.values())

    @torch.no_grad()
    def prune_(self, module: nn.Module, share: float) -> None:
        for group in self.method.groups(self.names):
            weights = [module.get_parameter(name).detach() for name in group]
            count = round(share * sum(w.numel() for w in weights))
            count = max(count, sum(int((w == 0).sum()) for w in weights))
            masks = lowest(weights, count, torch.abs)
            zero_(weights, masks)
            self.masks |= dict(zip(group, masks, strict=True))
