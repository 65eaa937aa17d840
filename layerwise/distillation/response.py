"""Response distillation: the student's answers follow the teacher's softened ones (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.distillation.seen import Seen, wide
from layerwise.distillation.term import TERMS, Term
from layerwise.errors import UsageError
from layerwise.task import Task, classes_last, output_mask


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, keep: Tensor | None = None) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) in nats; classes are the last dimension.

    The mean over all rows, however they are arranged, that `keep` (the shape without the classes) counts: as many tokens as a
    sample may have, each is one row, so that the loss is not larger by their number.
    """
    p = (wide(teacher.detach()) / temperature).log_softmax(-1)
    q = (wide(student) / temperature).log_softmax(-1)
    # log q may be −inf where a model forbids a class outright; there p is 0 too, and 0·inf would be NaN
    rows = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    return temperature**2 * _mean(rows, keep)


def soft_binary_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, keep: Tensor | None = None) -> Tensor:
    """The same for logits of yes/no questions: the mean over questions of the divergence of their Bernoulli distributions."""
    softened = wide(teacher.detach()) / temperature
    target = softened.sigmoid()
    entropy = -(target * F.logsigmoid(softened) + (1 - target) * F.logsigmoid(-softened))
    cross = F.binary_cross_entropy_with_logits(wide(student) / temperature, target, reduction="none")
    return temperature**2 * _mean((cross - entropy).mean(-1), keep)


def value_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """½ (student − teacher)², the KL of Gaussians with variance 1; there is no temperature for real values."""
    return _mean((wide(student) - wide(teacher.detach())).square().mean(-1) / 2, keep)


def direction_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """1 − cosine, of embeddings."""
    return _mean(1 - F.cosine_similarity(wide(student), wide(teacher.detach()), dim=-1), keep)


def _mean(rows: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return rows.mean()
    keep = keep.to(rows.dtype)
    return (rows * keep).sum() / keep.sum().clamp_min(1e-12)


Comparison = Callable[..., Tensor]
COMPARISONS: Mapping[str, Comparison] = {
    "classes": soft_loss, "questions": soft_binary_loss, "values": value_loss, "directions": direction_loss
}  # fmt: skip
KINDS: Mapping[str, str] = {  # task → what its outputs are
    "classification": "classes", "token_classification": "classes", "segmentation": "classes", "language_modelling": "classes",
    "generation": "classes", "summarization": "classes", "translation": "classes", "multi_label": "questions",
    "regression": "values", "retrieval": "directions", "reinforcement_learning": "classes",
}  # fmt: skip


def kind_of(task: Task, output: Tensor) -> str:
    """What `output` is: ``classes``, ``questions``, ``values`` or ``directions``. Raises `UsageError` for anything else."""
    if task.name == "fidelity":
        return "directions" if getattr(task, "kind", "") == "cosine" else "values" if _single(output) else "classes"
    if task.name not in KINDS:
        raise UsageError(
            f"Response distillation cannot treat outputs of the task {task.name}: they are no distribution over classes.",
            remedy="Use feature, relation or attention distillation.",
        )
    return KINDS[task.name]


def _single(output: Tensor) -> bool:
    return output.dim() == 1 or output.shape[-1] == 1


@TERMS.register("response")
@dataclass(frozen=True)
class Response(Term):
    """Classes: `soft_loss` at `temperature`, of tokens over all that are not padding, of pixels over all. Yes/no questions,
    real values and embeddings are compared by `soft_binary_loss`, `value_loss` and `direction_loss`. `kind` is one of
    ``classes``, ``questions``, ``values``, ``directions``; '' takes that of the task.
    """

    temperature: float = 4.0
    kind: str = ""
    name: ClassVar[str] = "response"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"The temperature is {self.temperature!r}, and must be above 0.")

    def check(self, student: Seen, teacher: Seen, task: Task) -> None:
        if student.output.shape != teacher.output.shape:
            raise UsageError(
                f"The student's outputs are {tuple(student.output.shape)} and the teacher's {tuple(teacher.output.shape)}: they "
                "answer different questions.",
                remedy="Both need the same classes (or vocabulary) in the same order.",
            )
        if self.kind not in COMPARISONS:
            kind_of(task, student.output)

    def resolved(self, task: Task, output: Tensor) -> Response:
        """With the kind of outputs settled."""
        return self if self.kind else Response(self.temperature, kind_of(task, output))

    def loss(self, student: Seen, teacher: Seen, batch: Batch, companion: nn.Module | None) -> Tensor:
        mine, other = student.output, teacher.output
        if self.kind in ("values", "directions") and mine.dim() == 1:
            mine, other = mine[:, None], other[:, None]
        if mine.dim() < 2:
            raise UsageError("Response distillation needs outputs (samples, …, classes); these are one number per sample.")
        keep = _keep(batch, mine, self.kind)
        return COMPARISONS[self.kind](classes_last(mine), classes_last(other), self.temperature, keep)


def _keep(batch: Batch, output: Tensor, kind: str) -> Tensor | None:
    """Of tokens and pixels the positions that count, of the shape of the output without the classes."""
    if output.dim() == 2 or kind in ("directions", "values"):
        return None
    return output_mask(batch, output).reshape(classes_last(output).shape[:-1])


__all__ = ["Response", "direction_loss", "kind_of", "soft_binary_loss", "soft_loss", "value_loss"]
