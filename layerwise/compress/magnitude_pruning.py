"""Set the smallest weights to zero (Han et al. 2015). Shapes, bytes and speed stay: what it gains is zeros, and it says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state, wraps

SCOPES = ("local", "global")


@METHODS.register("magnitude_pruning")
@dataclass(frozen=True)
class MagnitudePruning(CompressionMethod):
    """Zeroes the share `amount` of the weights (matrices and kernels; no biases or norms) that are smallest by |w|.

    `scope`: of each tensor (``local``) or of all tensors of the layers together (``global``). Exactly ``round(amount·n)`` weights
    are zero afterwards (or more where more were before), ties cut in the order of the elements. For single weights the L1 and the
    L2 norm give the same order, so there is no setting for it.
    """

    amount: float = 0.5
    scope: str = "local"
    name: ClassVar[str] = "magnitude_pruning"

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise UsageError(f"magnitude_pruning: amount is {self.amount!r}, and must lie in 0 … 1.")
        if self.scope not in SCOPES:
            raise UsageError(f"magnitude_pruning: unknown scope {self.scope!r}.", remedy=f"Known: {', '.join(SCOPES)}.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(amount) for amount in (0.3, 0.5, 0.7))

    @property
    def whole(self) -> bool:
        return self.scope == "global"

    def treats(self, layer: Layer) -> str:
        if any(wraps(p) for p in layer.module.parameters()):
            return "its weights are quantized already"
        return "" if any(p.dim() > 1 for p in layer.module.parameters()) else "has no weight matrix"

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        weights = weights_of(model.module, layers)
        with torch.no_grad():
            for group in [[w] for w in weights.values()] if self.scope == "local" else [list(weights.values())]:
                zero_smallest_(group, round(self.amount * sum(w.numel() for w in group)))

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


def weights_of(root: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Dotted name → every parameter of more than one dimension in `layers`, shared ones once."""
    wanted = {id(p) for name in layers for p in root.get_submodule(name).parameters() if p.dim() > 1}
    return {name: p for name, p in root.named_parameters() if id(p) in wanted}


def zero_smallest_(weights: Sequence[Tensor], count: int) -> None:
    """Sets the `count` elements of `weights` with the smallest |w| to zero; of equal ones the first.

    By `torch.kthvalue`: `torch.quantile` interpolates between elements, and older versions refuse more than 16 M of them.
    """
    if not count:
        return
    sizes = torch.cat([w.detach().abs().reshape(-1).float() for w in weights])
    threshold = sizes.kthvalue(count).values
    smallest = sizes < threshold
    ties = (sizes == threshold).nonzero()[:, 0]
    smallest[ties[: count - int(smallest.sum())]] = True
    for weight, mask in zip(weights, smallest.split([w.numel() for w in weights]), strict=True):
        weight.masked_fill_(mask.view(weight.shape), 0)
