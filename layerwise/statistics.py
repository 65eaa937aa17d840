"""Statistics that are nothing but `Moments`, one row per layer: most methods' state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyzer import Statistic
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.structure import Layer

if TYPE_CHECKING:
    from layerwise.sweep import Seen

UNREACHED = "nothing was observed: no stream, or no gradient, passed through this layer"
UNSEEN_UNIT = "nothing was observed: a part inside a block has no stream of its own, or no gradient reached it"


def masked_gradients(seen: Seen) -> Iterator[tuple[Sequence[Layer], Tensor]]:
    """`Seen.mask_gradients` of the units that are slices: heads and channels."""
    return ((units, gradients) for units, gradients in seen.mask_gradients() if units[0].masked)


def squared_norms(gradient: Tensor) -> Tensor:
    """(samples, …) → ‖·‖² of each sample, float64.

    The rows of a matrix are summed in their own precision (at least float32) and the rows' norms in float64: a float64 copy of
    every gradient would cost more than the sum, and a row is short.
    """
    samples = len(gradient)
    if gradient.dim() < 3:
        return gradient.reshape(samples, -1).double().square().sum(1)
    rows = torch.linalg.vector_norm(gradient.flatten(2), dim=2, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return rows.double().square().sum(1)


class MomentsStatistic(Statistic):
    """Holds `moments`; subclasses add to it."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def merge_(self, other: MomentsStatistic) -> None:
        self.moments.merge_(other.moments)

    def state(self) -> dict[str, Tensor]:
        return {"moments": self.moments.sums}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        self.moments = Moments(self.moments.layers, state["moments"])

    @property
    def samples(self) -> int:
        return self.moments.samples()

    def scores(
        self, layers: Sequence[Layer], *, scale: Sequence[float] | None = None, missing: Mapping[str, str] | None = None
    ) -> dict[str, LayerScore]:
        """Means with standard errors, times `scale`; `missing` says for which layers there is no score, and why."""
        found = {}
        for layer in layers:
            reason = (missing or {}).get(layer.name, "")
            if reason or not float(self.moments.sums[0, layer.index]):
                found[layer.name] = LayerScore.missing(Status.NOT_APPLICABLE, reason or _unseen(layer))
                continue
            score, factor = self.moments.score(layer.index), 1.0 if scale is None else scale[layer.index]
            found[layer.name] = LayerScore(score.value * factor, score.stderr * factor, score.status, score.reason)
        return found


def _unseen(layer: Layer) -> str:
    return UNREACHED if layer.site is None else UNSEEN_UNIT
