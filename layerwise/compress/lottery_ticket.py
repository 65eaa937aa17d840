"""Lottery tickets: prune, rewind what is left to its early weights, train again (Frankle & Carbin 2019; Frankle et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.sparsity import lowest, quantized, weights_of, zero_, zeros_off
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import distinct
from layerwise.training import KeptZeros, recipe_of, train_, untrainable


@METHODS.register("lottery_ticket")
@dataclass(frozen=True)
class LotteryTicket(CompressionMethod):
    """`rounds` times: train, zero the share `rate` of the weights that are left (smallest |w| of all), rewind the others; then
    train what is left. In the end ``1 − (1 − rate)^rounds`` of the weights are zero.

    Rewound is to the weights that the model came with, or to those after `early_epochs` of training at a constant rate; the
    schedule begins anew in each round. For a trained model "early" are its trained weights: the method then finds a sparse net
    near them. The rest is the recipe of each training, see `TrainingSettings`.
    """

    rate: float = 0.2
    rounds: int = 3
    early_epochs: int = 0
    epochs: int = 3
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warm_up: float = 0.1
    clip: float = 1.0
    seed: int = 0
    name: ClassVar[str] = "lottery_ticket"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UsageError(f"lottery_ticket: rate is {self.rate!r}, and must lie in 0 … 1, 1 excluded.")
        for setting, least in (("rounds", 1), ("early_epochs", 0)):
            if getattr(self, setting) < least:
                raise UsageError(f"lottery_ticket: {setting} is {getattr(self, setting)!r}, and must be at least {least}.")
        recipe_of(self, keep_best=False)

    @property
    def amount(self) -> float:
        """The share of zeros in the end."""
        return 1 - (1 - self.rate) ** self.rounds

    @property
    def whole(self) -> bool:
        return True

    def treats(self, layer: Layer) -> str:
        matrices = any(p.dim() > 1 for p in layer.module.parameters())
        return quantized(layer) or untrainable(layer.module) or ("" if matrices else "has no weight matrix")

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        names = list(weights_of(model.module, layers))
        masks = [w == 0 for w in _live(model, names)]
        if self.early_epochs:
            settings = replace(recipe_of(self, keep_best=False), epochs=self.early_epochs, schedule="constant")
            train_(model, supplies.at("early"), settings=settings, after_step=_keeping(names, masks))
        early = {name: t.detach().clone() for name, t in distinct(model.module)}
        total, had = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
        for number in range(self.rounds):
            train_(
                model, supplies.at(f"round{number}"), settings=recipe_of(self, keep_best=False), after_step=_keeping(names, masks)
            )
            count = max(round(total * (1 - (1 - self.rate) ** (number + 1))), had)
            masks = lowest(_live(model, names), count, torch.abs)
            _rewind_(model, early)
            zero_(_live(model, names), masks)
        train_(model, supplies.at("ticket"), settings=recipe_of(self, keep_best=False), after_step=_keeping(names, masks))

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """As many zeros as the rounds add up to; values are learned."""
        return zeros_off(before, after, [list(weights_of(after.module, layers))], self.amount)


def _live(model: UniversalModel, names: Sequence[str]) -> list[Tensor]:
    return [model.module.get_parameter(name).detach() for name in names]


def _keeping(names: Sequence[str], masks: Sequence[Tensor]) -> KeptZeros:
    return KeptZeros({name: ~mask for name, mask in zip(names, masks, strict=True)})


@torch.no_grad()
def _rewind_(model: UniversalModel, early: dict[str, Tensor]) -> None:
    """Weights and buffers as they were, so that batch normalization begins where the weights do."""
    for name, tensor in distinct(model.module):
        tensor.copy_(early[name])
