"""A task turns outputs into a loss, metrics and a likelihood to differentiate. All losses are in nats, one value per sample.

Decision: every task gives *sums with weights* per sample (`values`, `weights`), so that means over any split of the data are
exact: a language model's sentence weighs as many tokens as it predicts. Without labels the task is `fidelity`, the divergence
from the uncompressed model's own outputs; its gradient is zero there, so what is differentiated is the loss of an answer drawn
from the model itself (which makes the squared gradient the true Fisher information).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError, UsageError, nearest

Figures = dict[str, tuple[Tensor, Tensor]]  # metric → (values, weights), each of shape (samples,)


class Task(ABC):
    """What the model is asked to do, and how well it does it."""

    name: ClassVar[str]
    quality: ClassVar[str]  # the metric that the report's verdict speaks of
    higher_is_better: ClassVar[bool]

    @abstractmethod
    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        """Each metric's sums and weights per sample; ``loss`` (nats) is always there.

        `reference` is the uncompressed model's output on the same batch.
        """

    @abstractmethod
    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """The negative log-likelihood to differentiate, (samples,), in nats, summed over a sample's tokens."""

    def losses(self, output: Tensor, batch: Batch, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss per sample: values and weights, each (samples,)."""
        return self.figures(output, batch, reference)["loss"]

    def check(self, batch: Batch, output: Tensor) -> None:
        """Raises `DataError` where the labels of `batch`, still on the host, cannot belong to `output`."""

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of means, such as the perplexity."""
        return {}


@dataclass(frozen=True)
class Classification(Task):
    """One of C classes per sample; outputs are logits ``(samples, C)``, labels ``(samples,)`` integers."""

    name: ClassVar[str] = "classification"
    quality: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        labels = self._labels(output, batch)
        ones = torch.ones(len(labels), dtype=torch.float64, device=output.device)
        loss = F.cross_entropy(output.float(), labels, reduction="none").double()
        hits = (output.argmax(-1) == labels).double()
        return {"loss": (loss, ones), "accuracy": (hits, ones)}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(output.float(), self._labels(output, batch), reduction="none")

    def check(self, batch: Batch, output: Tensor) -> None:
        if isinstance(batch.labels, Tensor) and batch.labels.device.type == "cpu" and output.dim() == 2:
            check_classes(batch.labels, output.shape[1])

    @staticmethod
    def _labels(output: Tensor, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise DataError("Classification needs labels.", remedy="Give (inputs, labels), or use task='fidelity'.")
        labels = torch.as_tensor(batch.labels, device=output.device).long()
        if output.dim() != 2 or labels.shape != output.shape[:1]:
            raise DataError(
                f"Classification needs outputs (samples, classes) and labels (samples,), got {tuple(output.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if labels.device.type == "cpu":  # on a GPU asking would make every batch wait: there the engine asks before the copy
            check_classes(labels, output.shape[1])
        return labels


def check_classes(labels: Tensor, classes: int) -> None:
    """Raises `DataError` (LW-D34) with the row of the first label that is not one of 0 … classes − 1."""
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"Label {int(labels[row])} in row {row} of the batch lies outside the model's {classes} classes.",
            remedy="Check the label column, or the number of classes the model was built with.",
            code="LW-D34",
        )


@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token; outputs are logits ``(samples, tokens, vocabulary)``; padding is left out of every mean."""

    name: ClassVar[str] = "language_modelling"
    quality: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        targets, keep = self._targets(output, batch)
        nll = self._nll(output, targets)
        hits = (output[:, :-1].argmax(-1) == targets).double()
        weights = keep.sum(-1).double()
        return {
            "loss": ((nll.double() * keep).sum(-1), weights),
            "token_accuracy": ((hits * keep).sum(-1), weights),
        }

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        targets, keep = self._targets(output, batch)
        return (self._nll(output, targets) * keep).sum(-1)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["loss"], 700.0))}

    @staticmethod
    def _nll(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :-1].float().transpose(1, 2), targets.clamp_min(0), reduction="none")

    @staticmethod
    def _targets(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch.labels if batch.labels is not None else token_ids(batch)
        if ids is None or output.dim() != 3 or ids.shape != output.shape[:2]:
            raise DataError(
                f"Language modelling needs token ids (samples, tokens) and logits (samples, tokens, vocabulary); "
                f"the output is {tuple(output.shape)}."
            )
        mask = token_mask(batch, ids)
        return ids[:, 1:], mask[:, 1:] & (ids[:, 1:] >= 0)


@dataclass(frozen=True)
class Fidelity(Task):
    """How far from the uncompressed model: KL(reference ‖ output) of logits, or 1 − cosine of embeddings (`kind`)."""

    kind: str = "kl"
    name: ClassVar[str] = "fidelity"
    quality: ClassVar[str] = "divergence"
    higher_is_better: ClassVar[bool] = False

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        if reference is None:
            raise UsageError("Fidelity compares with the uncompressed model's outputs, and none were given.")
        keep = output_mask(batch, output)
        loss, same = self._distance(output, reference.to(output.device))
        figures = {"loss": ((loss * keep).sum(-1), keep.sum(-1))}
        figures["divergence"] = figures["loss"]
        if same is not None:
            figures["agreement"] = ((same * keep).sum(-1), keep.sum(-1))
        return figures

    def _distance(self, output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor | None]:
        """(samples, positions) divergences and, for logits, whether both prefer the same class."""
        if self.kind == "cosine":
            return _rows(cosine_distance(output, reference)), None
        p, q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
        # log q may be -inf where a model forbids a class outright; there p is 0 too, and 0·inf would be NaN
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
        return _rows(terms.sum(-1).clamp_min(0)), _rows((output.argmax(-1) == reference.argmax(-1)).double())

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        keep = output_mask(batch, output)
        if self.kind == "cosine":  # a unit-variance Gaussian around the output: the gradient is the drawn noise
            unit = F.normalize(output.float(), dim=-1)
            noise = torch.randn(unit.shape, generator=generator).to(output.device)
            return (_rows((unit * noise).sum(-1)) * keep).sum(-1)
        logits = output.float()
        nll = -logits.log_softmax(-1).gather(-1, drawn_classes(logits.detach(), generator)[..., None])[..., 0]
        return (_rows(nll) * keep).sum(-1)


def drawn_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class per row of logits (…, C), drawn by inverting the distribution function: only the uniform numbers are copied."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.rand((*logits.shape[:-1], 1), generator=generator, dtype=torch.float64).to(logits.device, non_blocking=True)
    found = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    return found.squeeze(-1).clamp_max(logits.shape[-1] - 1)


TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (Classification, LanguageModelling, Fidelity)}


def task_named(name: str) -> Task:
    """The task called `name`, with its defaults. Raises `UsageError` with the nearest name."""
    if name not in TASKS:
        raise UsageError(f"Unknown task {name!r}.", remedy=nearest(name, TASKS))
    return TASKS[name]()


def token_ids(batch: Batch) -> Tensor | None:
    """The integer input of shape (samples, tokens) that the outputs belong to, where there is one: a decoder's if it has one."""
    candidates = [batch.kwargs.get("decoder_input_ids"), batch.kwargs.get("input_ids"), *batch.args[:1]]
    return next((c for c in candidates if isinstance(c, Tensor) and c.dim() == 2 and not c.is_floating_point()), None)


def token_mask(batch: Batch, like: Tensor) -> Tensor:
    """True for the tokens that count, of the shape of `like` (samples, tokens); all where there is no mask."""
    decoder = "decoder_" if "decoder_input_ids" in batch.kwargs else ""  # outputs are then the decoder's, not the encoder's
    mask = batch.kwargs.get(f"{decoder}attention_mask")
    if isinstance(mask, Tensor) and mask.shape == like.shape:
        return mask.bool()
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)


def output_mask(batch: Batch, output: Tensor) -> Tensor:
    """(samples, positions) float64 weights of an output's rows; positions is 1 for outputs of shape (samples, C)."""
    if output.dim() == 3:
        return token_mask(batch, output[..., 0]).double()
    return torch.ones(_rows(output[..., 0]).shape, dtype=torch.float64, device=output.device)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos over the last dimension, float64: exactly 0 for equal vectors and never negative, whatever the rounding."""
    return (F.normalize(x.double(), dim=-1) - F.normalize(y.double(), dim=-1)).square().sum(-1) / 2


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
