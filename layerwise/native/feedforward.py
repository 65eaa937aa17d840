"""`VFTFeedForward`: a feed-forward whose hidden layer is as small as the vein it works in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import UsageError, nearest
from layerwise.native.projector import VeinProjector, vein_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class VFTFeedForward(nn.Module):
    """y = U(W₂·act(W₁(Vx) + b₁) + b₂), (…, d) → (…, d); W₁ is (hidden, r), W₂ (r, hidden); `hidden` is 2r where it is 0.

    `stabilizer` adds Sx, zero at first, with S diagonal ("diag", d numbers), of rank r ("lowrank", 2dr) or full ("dense", d²: it
    eats what the vein saves, so it is never there unless asked for). Without a `projector` it has its own; with ``shared`` the
    projector comes with every call. Raises `UsageError` for an unknown activation or stabilizer.
    """

    def __init__(
        self,
        d_model: int = 768,
        rank: int = 64,
        hidden: int = 0,
        act: str = "silu",
        stabilizer: str | None = None,
        *,
        projector: VeinProjector | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise UsageError(f"Unknown activation {act!r}.", remedy=nearest(act, ACTIVATIONS))
        if stabilizer is not None and stabilizer not in STABILIZERS:
            raise UsageError(f"Unknown stabilizer {stabilizer!r}.", remedy=nearest(stabilizer, STABILIZERS))
        self.act = act
        self.projector = None if shared else projector or VeinProjector(d_model, rank)
        self.up = nn.Linear(rank, hidden or 2 * rank)
        self.down = nn.Linear(hidden or 2 * rank, rank)
        self.stabilizer: nn.Module | None = STABILIZERS[stabilizer](d_model, rank) if stabilizer else None

    def forward(self, x: Tensor, *, z: Tensor | None = None, projector: VeinProjector | None = None) -> Tensor:
        """`z` is Vx where the caller has it already."""
        vein = vein_of(projector, self.projector)
        inner = self.down(ACTIVATIONS[self.act](self.up(vein(x) if z is None else z)))
        y = vein.reconstruct(inner)
        return y if self.stabilizer is None else y + self.stabilizer(x)


class Diagonal(nn.Module):
    """x times one number per feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _dense(width: int, rank: int) -> nn.Module:
    layer = nn.Linear(width, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _low_rank(width: int, rank: int) -> nn.Module:
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)


STABILIZERS: dict[str, Callable[[int, int], nn.Module]] = {
    "diag": lambda width, rank: Diagonal(width),
    "lowrank": _low_rank,
    "dense": _dense,
}

__all__ = ["ACTIVATIONS", "STABILIZERS", "Diagonal", "VFTFeedForward"]
