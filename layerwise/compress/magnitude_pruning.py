"""Set the smallest weights to zero (Han et al. 2015). Shapes, bytes and speed stay: what it gains is zeros, and it says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import UsageError, nearest
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.sparsity import lowest, matrices_of, quantized, remaining, weights_of, zero_
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state

SCOPES = ("local", "global")
GRANULARITIES = ("weight", "row")


@METHODS.register("magnitude_pruning")
@dataclass(frozen=True)
class MagnitudePruning(CompressionMethod):
    """Zeroes the share `amount` of the weights (matrices and kernels; no biases or norms) that are smallest by |w|.

    `scope`: of each tensor (``local``) or of all tensors of the layers together (``global``). Exactly ``round(amount·n)`` weights
    are zero afterwards (or more where more were before), ties cut in the order of the elements. `amounts` gives single layers
    another amount (``local`` only).

    `granularity`: single weights, or whole output rows of linear and convolution layers, of which ``round(amount·rows)`` go. A
    row is measured by its mean |w| (`norm` 1) or the root of its mean w² (`norm` 2), so that rows of any length compare. For
    single weights both norms give the same order.
    """

    amount: float = 0.5
    scope: str = "local"
    granularity: str = "weight"
    norm: int = 1
    amounts: Mapping[str, float] = field(default_factory=dict, hash=False)
    name: ClassVar[str] = "magnitude_pruning"

    def __post_init__(self) -> None:
        for amount in (self.amount, *self.amounts.values()):
            if not 0 <= amount <= 1:
                raise UsageError(f"magnitude_pruning: amount is {amount!r}, and must lie in 0 … 1.")
        for value, known in ((self.scope, SCOPES), (self.granularity, GRANULARITIES), (self.norm, (1, 2))):
            if value not in known:
                raise UsageError(f"magnitude_pruning: unknown setting {value!r}.", remedy=f"Known: {', '.join(map(str, known))}.")
        if self.amounts and self.scope == "global":
            raise UsageError("magnitude_pruning: amounts per layer contradict the scope global.", remedy="Use scope='local'.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(amount) for amount in (0.3, 0.5, 0.7))

    @property
    def whole(self) -> bool:
        return self.scope == "global"

    def treats(self, layer: Layer) -> str:
        if reason := quantized(layer):
            return reason
        if self.granularity == "row":
            return "" if matrices_of(layer) else "has no linear or convolution layer"
        return "" if any(p.dim() > 1 for p in layer.module.parameters()) else "has no weight matrix"

    def remarks(self, layer: Layer) -> tuple[str, ...]:
        others = remaining(layer, matrices_of(layer)) if self.granularity == "row" else ()
        return tuple(f"{name} stays: it is no linear or convolution layer's" for name in others)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        for name in self.amounts:
            if name not in layers:
                raise UsageError(f"magnitude_pruning: {name!r} has an amount and is not treated.", remedy=nearest(name, layers))
        parts = [tuple(layers)] if self.scope == "global" else [(name,) for name in layers]
        for part in parts:
            self._prune_(model, part, self.amounts.get(part[0], self.amount) if part else 0)

    def _prune_(self, model: UniversalModel, layers: Sequence[str], amount: float) -> None:
        if self.granularity == "row":
            self._prune_rows_(model, layers, amount)
            return
        weights = list(weights_of(model.module, layers).values())
        for group in [weights] if self.scope == "global" else [[w] for w in weights]:
            zero_(group, lowest(group, round(amount * sum(w.numel() for w in group)), torch.abs))

    def _prune_rows_(self, model: UniversalModel, layers: Sequence[str], amount: float) -> None:
        matrices = list({id(m.weight): m for name in layers for m in matrices_of(model.layer(name))}.values())
        for group in [matrices] if self.scope == "global" else [[m] for m in matrices]:
            sizes = [row_norms(m.rows(m.weight.detach()), self.norm) for m in group]
            for m, gone in zip(group, lowest(sizes, round(amount * sum(map(len, sizes)))), strict=True):
                zero_([m.rows(m.weight.detach())], [gone.view(-1, *[1] * (m.weight.dim() - 1))])

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the zeros come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every tensor equals the one before, times the mask of exactly the right size in the pruned ones."""
        stage = before.clone()
        self.apply_(stage, layers)
        pruned = weights_of(after.module, layers).values()
        zeros, total = sum(int((w == 0).sum()) for w in pruned), sum(w.numel() for w in pruned)
        what = f"the original times the mask; {zeros:,} of {total:,} weights are 0"
        return exactly(state(stage.module), state(after.module), what)


def row_norms(rows: Tensor, norm: int) -> Tensor:
    """(outputs,): the mean |w| of each row, or for `norm` 2 the root of its mean square."""
    values = rows.flatten(1).float()
    return values.abs().mean(1) if norm == 1 else values.square().mean(1).sqrt()
