"""How several objectives are weighed: as given, or so that none drowns the others.

What a weighting learns or keeps is a module, so that it is trained, saved and resumed with the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

EVERY = 16  # steps between measurements of the gradients' norms
LIMITS = (1e-3, 1e3)  # of a weight
FLOOR = 1e-3  # a loss below it is weighed as if it were this large


class Weighting(ABC, nn.Module):
    """Gives the weighted sum of the losses, in the order of their names."""

    name: ClassVar[str]

    def begin(self, losses: Sequence[float]) -> None:
        """The losses on the first batch, before training."""

    @abstractmethod
    def total(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        """A scalar with its graph."""

    @abstractmethod
    def weights(self) -> list[float]:
        """What each loss is multiplied with now."""


class Fixed(Weighting):
    """As given."""

    name: ClassVar[str] = "fixed"

    def __init__(self, given: Sequence[float]) -> None:
        super().__init__()
        self.given = list(given)

    def total(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.stack([w * loss for w, loss in zip(self.given, losses, strict=True)]).sum()

    def weights(self) -> list[float]:
        return self.given


class GradientNorm(Weighting):
    """Every loss moves the student's weights equally: w = given · (mean norm of all gradients) / (norm of its own gradient),
    measured every `EVERY` steps (in the spirit of GradNorm, Chen et al. 2018, without its training of the weights).
    """

    name: ClassVar[str] = "gradient_norm"

    def __init__(self, given: Sequence[float]) -> None:
        super().__init__()
        self.given = list(given)
        self.register_buffer("factors", torch.ones(len(given), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.factors: Tensor
        self.steps: Tensor

    def total(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        if torch.is_grad_enabled():
            if int(self.steps) % EVERY == 0:
                self.factors.copy_(balanced([gradient_norm(loss, parameters) for loss in losses]))
            self.steps += 1
        return torch.stack([w * loss for w, loss in zip(self.weights(), losses, strict=True)]).sum()

    def weights(self) -> list[float]:
        return [w * f for w, f in zip(self.given, self.factors.tolist(), strict=True)]


class Uncertainty(Weighting):
    """Each loss has a variance that is learned along: Σ ½ (given · e^−s · loss + s), with s = log σ² (Kendall et al. 2018).

    Each s begins where it is best for the first batch, at the logarithm of the loss: from 0 a student's small learning rate would
    not bring it there in a whole training.
    """

    name: ClassVar[str] = "uncertainty"

    def __init__(self, given: Sequence[float]) -> None:
        super().__init__()
        self.given = list(given)
        self.log_variances = nn.Parameter(torch.zeros(len(given)))

    def begin(self, losses: Sequence[float]) -> None:
        with torch.no_grad():
            found = [max(w * loss, FLOOR) for w, loss in zip(self.given, losses, strict=True)]
            self.log_variances.copy_(torch.tensor(found).log())

    def total(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        parts = [w * loss * (-s).exp() + s for w, loss, s in zip(self.given, losses, self.log_variances, strict=True)]
        return torch.stack(parts).sum() / 2

    def weights(self) -> list[float]:
        return [w / 2 * float((-s).exp()) for w, s in zip(self.given, self.log_variances.detach(), strict=True)]


def gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """The norm of the gradient over all `parameters` together; the graph is kept."""
    if not loss.requires_grad:
        return 0.0
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [g.double().square().sum() for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def balanced(norms: Sequence[float]) -> Tensor:
    """Factors that make all `norms` their mean, within `LIMITS`; 1 for a norm of 0, which nothing can make equal."""
    mean = sum(norms) / len(norms)
    factors = [mean / norm if norm else 1.0 for norm in norms]
    return torch.tensor(factors, dtype=torch.float64).clamp(*LIMITS)


WEIGHTINGS: Mapping[str, type[Weighting]] = {w.name: w for w in (Fixed, GradientNorm, Uncertainty)}
