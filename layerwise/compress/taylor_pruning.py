"""Set to zero the weights that the loss would notice least, to first order (Molchanov et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.sparsity import lowest, only_zeroed, quantized, scored, weights_of, zero_, zeros_off
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Progress, Supplies

SCOPES = ("local", "global")


@METHODS.register("taylor_pruning")
@dataclass(frozen=True)
class TaylorPruning(CompressionMethod):
    """Zeroes the share `amount` of the weights that are smallest by |w · ∂L/∂w|, of one tensor or of all (`scope`).

    L is the task's mean loss on the calibration data. Over several batches it is the root of the mean of (w · ∂L/∂w)², as in the
    paper, since gradients of either sign would cancel. A task without labels is asked for answers drawn from the model (`seed`).
    """

    amount: float = 0.5
    scope: str = "global"
    seed: int = 0
    name: ClassVar[str] = "taylor_pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise UsageError(f"taylor_pruning: amount is {self.amount!r}, and must lie in 0 … 1.")
        if self.scope not in SCOPES:
            raise UsageError(f"taylor_pruning: unknown scope {self.scope!r}.", remedy=f"Known: {', '.join(SCOPES)}.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(amount) for amount in (0.5, 0.3, 0.7))

    @property
    def whole(self) -> bool:
        return self.scope == "global"

    def treats(self, layer: Layer) -> str:
        return quantized(layer) or ("" if any(p.dim() > 1 for p in layer.module.parameters()) else "has no weight matrix")

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        assert supplies.calibration is not None  # what it `needs`
        weights = list(weights_of(model.module, layers).values())
        scores = taylor_scores(model, weights, supplies.calibration, self.seed, supplies.progress)
        for group in self._groups(list(zip(weights, scores, strict=True))):
            count = round(self.amount * sum(w.numel() for w, _ in group))
            zero_((w for w, _ in group), lowest([score for _, score in group], count))

    def _groups(self, items: list[Any]) -> list[list[Any]]:
        return ([items] if items else []) if self.scope == "global" else [[item] for item in items]

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every tensor is the one before, but for exactly as many zeros as asked for (or those of before, if they were more)."""
        names = list(weights_of(after.module, layers))
        check = only_zeroed(before, after, dict.fromkeys(names))
        counted = zeros_off(before, after, self._groups(names), self.amount)
        return check if counted.passed else counted if check.passed else check


def taylor_scores(
    model: UniversalModel, weights: Sequence[Tensor], data: Data, seed: int = 0, progress: Progress | None = None
) -> list[Tensor]:
    """The root of the mean over batches of (w · ∂L/∂w)², per weight; `ZERO` for those that are zero already."""
    sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    flags = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        for number, batch in enumerate(data):
            gradients = torch.autograd.grad(_loss(model, batch, seed + number), weights, allow_unused=True)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                if gradient is not None:
                    total += (weight.detach() * gradient).float().square()
            if progress:
                progress(number + 1, len(data))
    finally:
        for w, flag in zip(weights, flags, strict=True):
            w.requires_grad_(flag)
    return [scored(w, (total / len(data)).sqrt()) for w, total in zip(weights, sums, strict=True)]


def _loss(model: UniversalModel, batch: Batch, seed: int) -> Tensor:
    """The mean over the samples of the negative log-likelihood, with its graph, in eval mode."""
    batch = batch.to(model.device)
    model.see(batch)
    assert model.task is not None  # settled by see
    with torch.enable_grad():
        losses = model.task.likelihood(model.output(batch), batch, torch.Generator().manual_seed(seed))
    if not losses.requires_grad:
        raise UsageError("No weight has a gradient: the outputs do not depend on them.", place=model.name)
    return losses.mean()
