"""`VeinProjector`: the subspace (the *vein*) that a block computes in, and how far a token lies off it.

Decision: U starts as Vᵀ with orthonormal columns, so that VU = I and P = UV is an orthogonal projector. Two independent draws
would give neither. Training may part the two; `tied` and `orthogonal` forbid it, `penalty` discourages it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import UsageError

TINY = 1e-6  # added to ‖h‖: a token of zeros lies on every subspace


class VeinProjector(nn.Module):
    """``z = Vh`` (…, r) of h (…, d), and ``Uz`` back; V is (r, d), U is (d, r), no biases.

    `tied`: U is Vᵀ, not a parameter of its own. `orthogonal`: the rows that are used are those of the parameter made orthonormal
    (by its Cholesky factor, which leaves an orthonormal one as it is); it implies `tied`. Raises `UsageError` unless 1 ≤ r ≤ d.
    """

    U: nn.Parameter | None

    def __init__(self, d_model: int = 768, rank: int = 64, *, tied: bool = False, orthogonal: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= d_model:
            raise UsageError(f"The rank {rank} is not one of 1 … {d_model}, the width.", code="LW-C09")
        self.d_model, self.rank, self.orthogonal, self.tied = d_model, rank, orthogonal, tied or orthogonal
        self.V = nn.Parameter(torch.empty(rank, d_model))
        self.register_parameter("U", None if self.tied else nn.Parameter(torch.empty(d_model, rank)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws an orthonormal V, and sets U to Vᵀ."""
        nn.init.orthogonal_(self.V)
        self._match_()

    def _match_(self) -> None:
        if self.U is not None:
            self.U.copy_(self.V.T)

    def rows(self) -> Tensor:
        """V as it is used, (r, d)."""
        return orthonormal_rows(self.V) if self.orthogonal else self.V

    def columns(self) -> Tensor:
        """U as it is used, (d, r)."""
        return self.rows().T if self.U is None else self.U

    def forward(self, h: Tensor) -> Tensor:
        """z = Vh, (…, r)."""
        return F.linear(h, self.rows())

    def reconstruct(self, z: Tensor) -> Tensor:
        """Uz, (…, d)."""
        return F.linear(z, self.columns())

    def normal(self, h: Tensor) -> Tensor:
        """The part of h orthogonal to span(U), (…, d): (I − P)h as long as U = Vᵀ is orthonormal, and orthogonal also later.

        P is U(UᵀU)⁻¹Uᵀ, since UV is no orthogonal projector once training has parted U from Vᵀ.
        """
        U = self.columns()
        if self.orthogonal:
            return h - F.linear(F.linear(h, U.T), U)
        exact = U if U.dtype == torch.float64 else U.float()
        along = exact.T @ h.to(exact.dtype).reshape(-1, self.d_model).T
        inside = exact @ torch.cholesky_solve(along, _factor(exact.T @ exact))
        return (h.to(exact.dtype) - inside.T.reshape(h.shape)).to(h.dtype)

    def off_plane(self, h: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The off-plane rate ε = ‖h − U(Vh)‖ / (‖h‖ + 1e-6) of each token, (…,), float32 or better, and ‖h − U(Vh)‖ itself.

        ε is in [0, 1] while P is an orthogonal projector, above 1 only where U and V have parted. On h of unit variance the
        absolute value is about √(d − r). `z` is Vh where the caller has it already.
        """
        precise = torch.promote_types(h.dtype, torch.float32)
        rest = (h - self.reconstruct(self(h) if z is None else z)).to(precise)
        absolute = torch.linalg.vector_norm(rest, dim=-1)
        return absolute / (torch.linalg.vector_norm(h.to(precise), dim=-1) + TINY), absolute

    def penalty(self, weight: float = 1.0) -> Tensor:
        """λ‖VU − I‖²_F, a scalar to add to the loss; near 0 for orthogonal projectors."""
        product = self.rows() @ self.columns()
        return weight * (product - torch.eye(self.rank, dtype=product.dtype, device=product.device)).square().sum()

    @torch.no_grad()
    def fit(self, X: Tensor) -> VeinProjector:
        """Sets V to the r leading principal directions of activations X (…, d), and U to Vᵀ. In place; gives itself.

        X is not centred: the projection has no bias, and this is what minimizes ‖X − UVX‖. Directions that X does not reach
        are completed orthonormally.
        """
        flat = X.detach().reshape(-1, self.d_model).double()
        _, vectors = torch.linalg.eigh(flat.T @ flat)
        self.V.copy_(vectors.flip(1)[:, : self.rank].T)
        self._match_()
        return self

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.rank}, tied={self.tied}, orthogonal={self.orthogonal}"


def vein_of(given: VeinProjector | None, own: VeinProjector | None) -> VeinProjector:
    """The projector of the call, or the part's own. Raises `UsageError` where there is neither."""
    found = own if given is None else given
    if found is None:
        raise UsageError("This part shares the projector of its block and was given none.", remedy="Call it with projector=.")
    return found


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """The rows of (r, d) made orthonormal without leaving their span: L⁻¹W with LLᵀ = WWᵀ, differentiable."""
    exact = matrix if matrix.dtype == torch.float64 else matrix.float()
    return torch.linalg.solve_triangular(_factor(exact @ exact.T), exact, upper=False).to(matrix.dtype)


def _factor(gram: Tensor) -> Tensor:
    """The Cholesky factor of a Gram matrix, lifted by as little as its rounding: a pruned row must not end the run."""
    limits = torch.finfo(gram.dtype)
    lift = gram.diagonal().mean() * limits.eps + limits.tiny
    return torch.linalg.cholesky(gram + lift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


__all__ = ["VeinProjector", "orthonormal_rows", "vein_of"]
