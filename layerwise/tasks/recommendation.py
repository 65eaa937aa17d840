"""Recommendation: which items a user takes, told from scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task
from layerwise.tasks._ranking import roc_auc
from layerwise.tasks.regression import mean_of_known


@TASKS.register("recommendation")
@dataclass(frozen=True)
class Recommendation(Task):
    """Two forms. *Lists*: a sample is a user, outputs are logits ``(samples, items)``, labels of the same shape: 1 taken, 0 not,
    NaN left out (seen while training). *Pairs*: a sample is a user with one item, outputs ``(samples,)`` or ``(samples, 1)``,
    labels ``(samples, 2)``: the user's number, and 1 taken or 0 not; a user's items are those of all their samples.

    Loss: binary cross entropy, nats per known pair. Metrics, means over the users who took something and left something: of the
    `depth` best scored items ``ndcg`` (gain 1, discount log₂(rank + 1)), ``recall`` and ``precision``; ``auc`` over all of the
    user's items. Of equal scores the item that was not taken comes first: a net that scores all alike earns nothing.
    """

    depth: int = 10
    name: ClassVar[str] = "recommendation"
    quality: ClassVar[str] = "ndcg"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        scores, taken, _ = self._parts(output, batch)
        return {"loss": (_entropies(scores, taken).double().sum(-1), (~taken.isnan()).sum(-1).double())}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        scores, taken, _ = self._parts(output, batch)
        return _entropies(scores, taken).sum(-1)

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        scores, taken, users = self._parts(output, batch)
        return {"score": scores, "taken": taken} | ({} if users is None else {"unit": users})

    def overall(self, evidence: Evidence) -> dict[str, float]:
        found = [self._judged(scores, taken) for scores, taken in _by_user(evidence)]
        judged = [f for f in found if f is not None]
        return {name: mean_of_known([f[name] for f in judged]) for name in ("ndcg", "recall", "precision", "auc")}

    def check(self, batch: Batch, output: Tensor) -> None:
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.device.type != "cpu" or labels.dim() != 2:
            return
        taken = labels[:, 1:] if _pairs(output) else labels
        wrong = (taken != 0) & (taken != 1) & ~taken.isnan()
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            what = f"A label in row {row} of the batch is neither 1 (taken), 0 nor NaN (left out)."
            raise DataError(what, remedy="Turn ratings into taken or not.", code="LW-D34")

    def _judged(self, scores: np.ndarray, taken: np.ndarray) -> dict[str, float] | None:
        """One user's figures, from scores and taken (items,), bool; None without both kinds of items."""
        if not taken.any() or taken.all():
            return None
        hits = taken[np.lexsort((taken, -scores))][: self.depth]  # of equal scores, what was not taken first
        discounts = 1 / np.log2(np.arange(2, self.depth + 2))
        best = discounts[: min(int(taken.sum()), self.depth)].sum()
        return {
            "ndcg": float((hits * discounts[: len(hits)]).sum() / best),
            "recall": float(hits.sum() / taken.sum()),
            "precision": float(hits.sum() / self.depth),
            "auc": roc_auc(scores, taken),
        }

    @staticmethod
    def _parts(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores and taken (samples, items), and of pairs the users (samples,)."""
        labels = batch.labels
        wanted = (len(output), 2) if _pairs(output) else tuple(output.shape)
        if not isinstance(labels, Tensor) or tuple(labels.shape) != wanted or output.dim() > 2:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"Recommendation needs logits and labels (samples, items), or logits (samples,) and labels (samples, 2): user, "
                f"taken; got {tuple(output.shape)} and {found}."
            )
        given = labels.to(output.device)
        if _pairs(output):
            return output.float().reshape(-1, 1), given[:, 1:].float(), given[:, 0].long()
        return output.float(), given.float(), None


def _pairs(output: Tensor) -> bool:
    return output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)


def _entropies(scores: Tensor, taken: Tensor) -> Tensor:
    values = F.binary_cross_entropy_with_logits(scores, taken.nan_to_num(0.0), reduction="none")
    return torch.where(taken.isnan(), 0.0, values)


def _by_user(evidence: Evidence) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and taken (bool) of each user's known items."""
    scores, taken = (evidence[name].cpu().double().numpy() for name in ("score", "taken"))
    if "unit" in evidence:
        users = evidence["unit"].cpu().numpy()
        order = np.argsort(users, kind="stable")
        cuts = np.flatnonzero(np.diff(users[order])) + 1
        rows = [(scores[i, 0], taken[i, 0]) for i in np.split(order, cuts)]
    else:
        rows = list(zip(scores, taken, strict=True))
    return [(s[~np.isnan(t)], t[~np.isnan(t)] > 0.5) for s, t in rows]
