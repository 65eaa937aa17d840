"""The contract of a task. All losses are in nats, one value per sample.

Decision: every task gives *sums with weights* per sample (`figures`), so that means over any split of the data are exact: a
language model's sentence weighs as many tokens as it predicts. Metrics that are no means (F1, R², AUC, mIoU, mAP, recall in a
gallery) are made from *evidence*: what each sample contributes, one row per sample, kept in the order of the data and reduced
once at the end (`overall`), so that they cannot depend on the batches either, and rows can be left out for a standard error.
Metrics for which the model must act itself (decoding a text, playing an episode) are measured apart (`acted`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.registry import Registry
from layerwise.spec import built

if TYPE_CHECKING:
    from layerwise.model import UniversalModel

Figures = dict[str, tuple[Tensor, Tensor]]  # metric → (values, weights), each of shape (samples,)
Acted = Mapping[str, tuple[float, float]]  # metric → value and standard error
Evidence = Mapping[str, Tensor]  # name → (samples, …); rows in the order of the data


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

    def reads(self, raw: Any) -> Tensor | None:
        """The tensor that this task reads of what the forward gave; None for the adapter's main tensor.

        Several tensors (start and end logits, classes and boxes) are packed into one, so that every engine handles one.
        """
        return None

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        """What `overall` is made from: one row per sample; narrower batches are padded (with NaN, whole numbers with −1).

        ``unit`` (samples,) numbers what was drawn where that is not the sample (the user, say): errors leave out whole units.
        """
        return {}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        """Metrics of a whole data set that are no means over samples, such as F1; NaN where one is not defined."""
        return {}

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        """Metrics for which `model` must act itself, such as the return of a policy: once per model, not per batch."""
        return {}


TASKS: Registry[Task] = Registry("task", "layerwise.tasks")


def task_named(name: str) -> Task:
    """The task that `name` stands for, alone or with settings, as in ``segmentation(ignored=0)``.

    Raises `UsageError` with the nearest name of a task or a setting.
    """
    return built(TASKS, name)


def token_ids(batch: Batch) -> Tensor | None:
    """The integer input of shape (samples, tokens) that the outputs belong to, where there is one: a decoder's if it has one."""
    candidates = [batch.kwargs.get("decoder_input_ids"), batch.kwargs.get("input_ids"), *batch.args[:1]]
    return next((c for c in candidates if isinstance(c, Tensor) and c.dim() == 2 and not c.is_floating_point()), None)


def token_mask(batch: Batch, like: Tensor) -> Tensor:
    """True for the positions that count, of the shape of `like` (samples, positions); all where there is no mask.

    Outputs of an encoder–decoder are the decoder's, so its mask goes first; an encoder's stream has another length. Positions of
    audio models are frames, of which each stands for an equal part of the waveform.
    """
    if batch.layout is not None and (keep := batch.layout.keep(like)) is not None:
        return keep
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == like.shape:
            return mask.bool()
    wave, mask = batch.kwargs.get("input_values"), batch.kwargs.get("attention_mask")
    if isinstance(wave, Tensor) and isinstance(mask, Tensor) and wave.shape == mask.shape and like.shape[1] < mask.shape[1]:
        middles = (torch.arange(like.shape[1], device=mask.device) + 0.5) * (mask.shape[1] / like.shape[1])
        return mask[:, middles.long()].bool()
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)


def classes_last(output: Tensor) -> Tensor:
    """(samples, …, classes): of logits per pixel (samples, C, height, width) the channels are the classes.

    A single channel is no distribution; such images stay as they are.
    """
    return output.movedim(1, -1) if output.dim() == 4 and output.shape[1] > 1 else output


def output_mask(batch: Batch, output: Tensor) -> Tensor:
    """(samples, positions) float64 weights of an output's rows; positions is 1 for outputs of shape (samples, C)."""
    if output.dim() == 3:
        return token_mask(batch, output[..., 0]).double()
    return torch.ones(as_rows(classes_last(output)[..., 0]).shape, dtype=torch.float64, device=output.device)


def as_rows(values: Tensor) -> Tensor:
    """(samples, everything else)."""
    return values.reshape(len(values), -1)
