"""Fidelity: how far a model is from the uncompressed one, without labels.

At the model itself the divergence is zero and so is its gradient, so what is differentiated is the loss of an answer drawn from
the model, which makes the squared gradient the true Fisher information.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.tasks._contract import TASKS, Figures, Task, as_rows, classes_last, output_mask


@TASKS.register("fidelity")
@dataclass(frozen=True)
class Fidelity(Task):
    """How far from the uncompressed model: KL(reference ‖ output) of logits, or 1 − cosine of embeddings (`kind`).

    One number per row is no distribution over classes (its softmax is always 1): it is a Gaussian's mean, of variance 1, whose
    KL is half the squared difference, in nats.
    """

    kind: str = "kl"
    name: ClassVar[str] = "fidelity"
    quality: ClassVar[str] = "divergence"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        if reference is None:
            raise UsageError("Fidelity compares with the uncompressed model's outputs, and none were given.")
        output, reference = _columns(output), _columns(reference.to(output.device))
        keep = output_mask(batch, output)
        loss, same = self._distance(classes_last(output), classes_last(reference))
        figures = {"loss": ((loss * keep).sum(-1), keep.sum(-1))}
        figures["divergence"] = figures["loss"]
        if same is not None:
            figures["agreement"] = ((same * keep).sum(-1), keep.sum(-1))
        return figures

    def _distance(self, output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor | None]:
        """(samples, positions) divergences and, for logits, whether both prefer the same class."""
        if self.kind == "cosine":
            return as_rows(cosine_distance(output, reference)), None
        if output.shape[-1] == 1:
            return as_rows((output.double() - reference.double()).square().sum(-1) / 2), None
        p, q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
        # log q may be -inf where a model forbids a class outright; there p is 0 too, and 0·inf would be NaN
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
        return as_rows(terms.sum(-1).clamp_min(0)), as_rows((output.argmax(-1) == reference.argmax(-1)).double())

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        output = _columns(output)
        keep, output = output_mask(batch, output), classes_last(output)
        if self.kind == "cosine":  # a unit-variance Gaussian around the output: the gradient is the drawn noise
            unit = F.normalize(output.float(), dim=-1)
            noise = torch.randn(unit.shape, generator=generator).to(output.device)
            return (as_rows((unit * noise).sum(-1)) * keep).sum(-1)
        if output.shape[-1] == 1:  # an answer drawn from the Gaussian: what is differentiated is half the squared error
            answer = output.detach().float() + torch.randn(output.shape, generator=generator).to(output.device)
            return (as_rows((output.float() - answer).square().sum(-1) / 2) * keep).sum(-1)
        logits = output.float()
        nll = -logits.log_softmax(-1).gather(-1, drawn_classes(logits.detach(), generator)[..., None])[..., 0]
        return (as_rows(nll) * keep).sum(-1)


def _columns(output: Tensor) -> Tensor:
    """(samples,) as (samples, 1)."""
    return output[:, None] if output.dim() == 1 else output


def drawn_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class per row of logits (…, C), drawn by inverting the distribution function: only the uniform numbers are copied."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.rand((*logits.shape[:-1], 1), generator=generator, dtype=torch.float64).to(logits.device, non_blocking=True)
    found = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    return found.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos over the last dimension, float64: exactly 0 for equal vectors and never negative, whatever the rounding."""
    return (F.normalize(x.double(), dim=-1) - F.normalize(y.double(), dim=-1)).square().sum(-1) / 2
