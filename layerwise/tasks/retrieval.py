"""Retrieval: embeddings in which what belongs together is near.

Decision: ranks are pessimistic (what is as near as the right answer counts as nearer), because an encoder that maps everything to
one point would otherwise be perfect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.tasks._contract import TASKS, Evidence, Figures, Task

TOWERS = (("text_embeds", "image_embeds"), ("query", "document"), ("anchor", "positive"))
DEPTHS = (1, 5, 10)
NEVER = -1e4  # a share of exactly 0; with −inf a sample that is alone in its batch would have the gradient NaN
CHUNK = 512  # queries that are compared with the whole gallery at once


@TASKS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(Task):
    """Two forms. *Pairs*: the forward gives two embeddings per sample (a dual encoder; packed ``(samples, 2, width)``), a query
    and its one document. *Groups*: one embedding per sample ``(samples, width)`` and labels ``(samples,)``; every sample
    seeks the others with its label.

    Metrics over the whole data set as gallery, by cosine: ``recall_at_1``, ``recall_at_5``, ``recall_at_10`` (the share of
    queries with a right answer among the first k) and ``mrr``, the mean reciprocal rank of the first right answer. Queries
    without one do not count.

    Loss: in-batch contrast, −log softmax of the cosines over `temperature`, of the right one among the batch's documents (of
    several right ones the mean), nats. It depends on the batches, and so on how the data are cut; the models that are compared
    see the same ones. In the gradient the others' embeddings are constants: each sample's gradient is its own.
    """

    temperature: float = 0.05
    name: ClassVar[str] = "retrieval"
    quality: ClassVar[str] = "mrr"
    higher_is_better: ClassVar[bool] = True

    def reads(self, raw: Any) -> Tensor | None:
        if isinstance(raw, Mapping):
            for pair in TOWERS:
                if all(isinstance(raw.get(name), Tensor) for name in pair):
                    return torch.stack([raw[name] for name in pair], 1)
        if isinstance(raw, tuple | list) and len(raw) == 2 and all(isinstance(x, Tensor) and x.dim() == 2 for x in raw):
            return torch.stack(list(raw), 1) if raw[0].shape == raw[1].shape else None
        return None

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        losses, counts = self._losses(output, batch)
        return {"loss": (losses.double(), counts.double())}

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return self._losses(output, batch)[0]

    def evidence(self, output: Tensor, batch: Batch) -> Evidence:
        if output.dim() == 3:
            return {"embedding": output}
        return {"embedding": output, "label": _groups(output, batch)}

    def overall(self, evidence: Evidence) -> dict[str, float]:
        queries, documents = _sides(F.normalize(evidence["embedding"].double(), dim=-1))
        ranks = first_right_ranks(queries, documents, evidence.get("label"))
        found = {f"recall_at_{k}": float((ranks <= k).double().mean()) for k in DEPTHS}
        return found | {"mrr": float(ranks.double().reciprocal().mean())}

    def _losses(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(samples,): the loss, 0 where the batch holds no right answer, and 1 where it holds one."""
        queries, documents = _sides(F.normalize(output.float(), dim=-1))
        labels = _groups(output, batch) if output.dim() == 2 else None
        right, sought = relevance(len(queries), labels, output.device, slice(None))
        cosines = queries @ documents.detach().T
        if labels is None:  # of a pair both sides are the sample's own
            cosines = torch.where(right, (queries * documents).sum(-1, keepdim=True), cosines)
        log_shares = (cosines / self.temperature).masked_fill(~sought, NEVER).log_softmax(-1)
        count = right.sum(-1)
        losses = -log_shares.masked_fill(~right, 0.0).sum(-1) / count.clamp_min(1)
        return losses, (count > 0).float()


def relevance(size: int, labels: Tensor | None, device: torch.device, rows: slice) -> tuple[Tensor, Tensor]:
    """For these queries: which of all `size` samples are right answers, and which are sought in at all, each (queries, size).

    A pair's query seeks among all documents; a member of a group among all others.
    """
    own = torch.eye(size, dtype=torch.bool, device=device)[rows]
    if labels is None:
        return own, torch.ones_like(own)
    return (labels[rows, None] == labels[None]) & ~own, ~own


def first_right_ranks(queries: Tensor, documents: Tensor, labels: Tensor | None) -> Tensor:
    """Of each query with a right answer the rank of the nearest one, from 1; ties with wrong ones are lost."""
    ranks = []
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, min(start + CHUNK, len(queries)))
        right, sought = relevance(len(documents), labels, queries.device, rows)
        cosines = queries[rows] @ documents.T
        best = cosines.masked_fill(~right, -torch.inf).max(-1, keepdim=True).values
        ahead = (cosines >= best) & sought & ~right
        ranks.append((1 + ahead.sum(-1))[right.any(-1)])
    return torch.cat(ranks)


def _sides(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    if embeddings.dim() not in (2, 3) or (embeddings.dim() == 3 and embeddings.shape[1] != 2):
        raise DataError(
            f"Retrieval reads one or two embeddings per sample; the output is {tuple(embeddings.shape)}.",
            remedy="Pool the tokens in the model's forward, or load it by hf:DIR, which pools them.",
        )
    return (embeddings[:, 0], embeddings[:, 1]) if embeddings.dim() == 3 else (embeddings, embeddings)


def _groups(output: Tensor, batch: Batch) -> Tensor:
    if not isinstance(batch.labels, Tensor) or output.dim() != 2 or batch.labels.shape != output.shape[:1]:
        raise DataError(
            f"Retrieval needs two embeddings per sample, or one (samples, width) and labels (samples,) that say what belongs "
            f"together; the output is {tuple(output.shape)}.",
            remedy="Give (inputs, labels), or a dual encoder that returns a pair of embeddings.",
        )
    return batch.labels.to(output.device).long()
