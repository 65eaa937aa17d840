"""`TrainingSettings`: the recipe, as plain data.

Methods that train repeat the fields that they offer: a method's settings are flat, so that a plan and the command line name them
as they are, and a class that is used is not a base of others. `recipe_of` reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from layerwise.errors import UsageError, nearest

SHAPES: dict[str, Callable[[float], float]] = {  # share of the steps after the warm-up → share of the learning rate
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    `weight_decay` is applied to matrices and kernels, not to biases and norms. `warm_up` is the share of all steps in which the
    learning rate rises from 0; `clip` bounds the norm of all gradients together, 0 leaves them. The order of the batches is drawn
    anew in each epoch from `seed`; which samples share a batch is the data's choice.

    With validation data the model is judged before the first epoch and after each by `monitor`: the ``quality`` of its task, its
    ``loss``, or another of its metrics. `keep_best` puts the best weights back at the end (those before training among them), and
    `patience` epochs in a row without a better one end the training, 0 never.
    """

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

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", tuple(SHAPES))):
            if getattr(self, name) not in known:
                raise UsageError(f"Unknown {name} {getattr(self, name)!r}.", remedy=nearest(getattr(self, name), known))
        for name, low, high in RANGES:
            if not low <= getattr(self, name) <= high:  # NaN as well
                raise UsageError(f"{name} is {getattr(self, name)!r}, and must lie in {low:g} … {high:g}.")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step number `step`, counted from 0, of `steps`."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * SHAPES[self.schedule]((step - rising) / max(steps - rising, 1))

    def order(self, epoch: int, batches: int) -> list[int]:
        """The numbers of the batches in the order of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(batches, generator=generator).tolist()

    def step_seed(self, step: int) -> int:
        """Where the random numbers of this step (dropout) begin."""
        return self.seed * 1_000_003 + 7_919 * (step + 1)

    def optimizer_for(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer; its learning rate is set before each step."""
        found = list(parameters)
        groups = [
            {"params": [p for p in found if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in found if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.learning_rate)


def recipe_of(method: Any, **fixed: Any) -> TrainingSettings:
    """The recipe in the settings of `method`, a dataclass; `fixed` are those that it does not leave to its user.

    Raises `UsageError` for a setting that is out of range.
    """
    own = {f.name for f in fields(method)}
    chosen = {f.name: getattr(method, f.name) for f in fields(TrainingSettings) if f.name in own}
    return TrainingSettings(**chosen | fixed)


RANGES = (
    ("epochs", 0, 1e6), ("learning_rate", 0, 1e3), ("momentum", 0, 1), ("weight_decay", 0, 1e3), ("warm_up", 0, 1),
    ("clip", 0, 1e9), ("patience", 0, 1e6), ("seed", 0, 2**40),
)  # fmt: skip
