"""`NormalCompensator`: what a token has off the vein, answered by a small correction that is itself normal to the vein."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.native.projector import VeinProjector, vein_of

LOWEST, HIGHEST, STEP = 0.05, 0.35, 0.05  # of the policy that adapts τ to a load


class NormalCompensator(nn.Module):
    """Δ = g·(I − P)·Σ_j α_j u_j (v_jᵀn), n = (I − P)h, α = 0.5·σ(Linear(LN h)), g = σ((ε − τ)/T), of h (B, T, d).

    `s` directions u (zero at first) and v; with s = 0 nothing is added. τ = `threshold` is learned, or calibrated. While training
    the gate is soft; in eval mode it is hard (ε > τ), and only the tokens it lets through are gathered and computed. `fraction`:
    of those at most this share of each sequence, the farthest off; it looks at the whole sequence, so not in causal models.
    P is the orthogonal projector on span(U), see `VeinProjector.normal`. The affine part of LN is in the Linear.
    """

    def __init__(
        self,
        d_model: int = 768,
        s: int = 1,
        *,
        threshold: float = 0.18,
        temperature: float = 0.02,
        fraction: float | None = None,
        projector: VeinProjector | None = None,
    ) -> None:
        super().__init__()
        if s < 0 or temperature <= 0 or not (fraction is None or 0 < fraction <= 1):
            what = f"s = {s}, temperature = {temperature} and fraction = {fraction} must be ≥ 0, > 0 and in (0, 1]."
            raise UsageError(what, code="LW-C09")
        self.s, self.temperature, self.fraction, self.projector = s, temperature, fraction, projector
        self.tau = nn.Parameter(torch.tensor(float(threshold)))
        if s:
            self.amount = nn.Linear(d_model, s)
            self.u = nn.Parameter(torch.zeros(s, d_model))
            self.v = nn.Parameter(torch.randn(s, d_model) * d_model**-0.5)

    def forward(
        self,
        h: Tensor,
        *,
        rate: Tensor | None = None,
        projector: VeinProjector | None = None,
        key_padding: Tensor | None = None,
        is_causal: bool = False,
        directions: Tensor | None = None,
    ) -> Tensor:
        """`rate` is ε of h, (B, T), and `directions` what `directions` gives, where the caller has them already.

        `key_padding` (B, T) is used by `fraction` only.
        """
        vein = vein_of(projector, self.projector)
        if not self.s:
            return torch.zeros_like(h)
        rate = vein.off_plane(h)[0] if rate is None else rate
        chosen = self.chosen(rate, key_padding, is_causal)
        directions = self.directions(vein) if directions is None else directions
        if self.training:
            gate = torch.sigmoid((rate - self.tau) / self.temperature)
            return self._correction(h, directions) * torch.where(chosen, gate, 0.0)[..., None].to(h.dtype)
        (open_,) = (chosen & (rate > self.tau)).flatten().nonzero(as_tuple=True)
        if len(open_) == rate.numel():
            return self._correction(h, directions)
        rows = h.reshape(-1, h.shape[-1])
        return torch.zeros_like(rows).index_copy(0, open_, self._correction(rows[open_], directions)).view_as(h)

    def directions(self, vein: VeinProjector) -> Tensor:
        """u and v made normal to the vein, (2s, d): they change with the weights only.

        I − P is symmetric, ⟨v, (I − P)h⟩ = ⟨(I − P)v, h⟩, so that these few are projected and not the many tokens.
        """
        return vein.normal(torch.cat((self.u, self.v)))

    def chosen(self, rate: Tensor, key_padding: Tensor | None, is_causal: bool) -> Tensor:
        """Which tokens may be corrected at all, (B, T): everyone, or the `fraction` of each sequence with the largest ε."""
        if self.fraction is None:
            return torch.ones_like(rate, dtype=torch.bool)
        if is_causal:
            what = "A share of the sequence's tokens is chosen by looking at all of them, and a causal model must not."
            raise UsageError(what, remedy="Leave fraction out; the threshold looks at one token at a time.")
        ranked = rate if key_padding is None else rate.masked_fill(~key_padding[:, -rate.shape[1] :].bool(), -1.0)
        most = max(1, round(self.fraction * rate.shape[1]))
        return ranked >= ranked.topk(most, -1).values[..., -1:]

    def _correction(self, h: Tensor, directions: Tensor) -> Tensor:
        u, v = directions.chunk(2)
        alpha = 0.5 * torch.sigmoid(self.amount(F.layer_norm(h, h.shape[-1:])))
        return (alpha * F.linear(h, v)) @ u

    @torch.no_grad()
    def calibrate_(self, rate: Tensor, quantile: float = 0.9) -> None:
        """Sets τ to this quantile of the off-plane rates ε (any shape) that were seen on data."""
        self.tau.copy_(torch.quantile(rate.float().flatten(), quantile))

    def extra_repr(self) -> str:
        return f"s={self.s}, temperature={self.temperature}, fraction={self.fraction}"


@torch.no_grad()
def adapt_threshold_(compensator: NormalCompensator, load: float) -> None:
    """A training loop's policy, outside forward: τ ← clamp(τ(1 − 0.05(load − 1)), 0.05, 0.35). Nothing changes in eval mode."""
    if compensator.training:
        compensator.tau.mul_(1 - STEP * (load - 1)).clamp_(LOWEST, HIGHEST)


__all__ = ["NormalCompensator", "adapt_threshold_"]
