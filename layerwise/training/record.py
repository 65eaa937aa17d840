"""`Trained`: what a training did, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.counts import Counts


@dataclass(frozen=True)
class Epoch:
    """`number` 0 is the model before training. `loss`: the objective's mean over the epoch's steps, None before training.

    `metrics` are the task's on the validation data, `figures` what the objective says of itself.
    """

    number: int
    loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """`best`: the epoch whose weights the model has now, where validation chose it. `stopped`: why it ended early, or ''."""

    epochs: tuple[Epoch, ...]
    steps: int
    best: int | None
    stopped: str
    counts: Counts
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
