"""What a conversion to subspaces should compute, in terms of the dense model: its queries and values projected, nothing else.

With V the directions that were kept, (Vᵀq)·(Vᵀk) = (VVᵀq)·k: the dense attention with projected queries gives the same scores,
and with projected values the same mixture. V is read off the converted weights by least squares in float64 from all that it
must explain (VᵀW = W′ for queries, keys and values, WV = W′ for what mixes them), so that a slip in one of them does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.factors import TwoFactors, matrix
from layerwise.native.dense import Dense, Ordered, Part, PickedPairs
from layerwise.swapping import Values

SPANNED = 1e-6  # of the largest singular value: directions below it were never told apart by the weights


@dataclass(frozen=True)
class Kept:
    """Directions of each key-value head for scores and for content, (heads, size, r); `off`: how badly the weights fit."""

    scores: Tensor
    content: Tensor
    off: float


def kept_by(dense: Dense, before: nn.Module, root: nn.Module, rank: int) -> Kept:
    """What the attention at the same path in the converted model `root` kept of `dense`, which is part of the model `before`."""
    turned = (rank / dense.size) ** 0.5 if dense.rescaled else 1.0
    query, key, value = (_both(dense, part, root, rank) for part in (dense.query, dense.key, dense.value))
    mixing = _mixing(dense, before, root, rank)
    scores = [(query[0], query[1] / turned), key]
    content = [value, mixing]
    V, off = _solved(scores, _picked(dense, root))
    U, off_content = _solved(content, None)
    return Kept(V, U, max(off, off_content))


def projected(dense: Dense, kept: Kept, root: nn.Module) -> Values:
    """The dense weights and biases of queries and values, and what they are with every head projected."""
    changed: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part, V in ((dense.query, kept.scores), (dense.value, kept.content)):
        weight, bias = changed.get(part.name) or _parameters(part.module)
        rows = slice(part.start, part.start + part.heads * dense.size)
        P = V @ V.mT
        weight[rows] = (P[:, None] @ weight[rows].unflatten(0, (len(P), -1, dense.size))).flatten(0, 2)
        if bias is not None:
            bias[rows] = (P[:, None] @ bias[rows].unflatten(0, (len(P), -1, dense.size))[..., None]).flatten()
        changed[part.name] = weight, bias
    values = list[tuple[Tensor, Tensor]]()
    for name, (weight, bias) in changed.items():
        module: Any = root.get_submodule(name)
        values.append((module.weight, _stored(module, weight)))
        if bias is not None:
            values.append((module.bias, bias.to(module.bias)))
    return values


def projected_matrix(module: Any, factors: TwoFactors) -> Values:
    """The weight of a matrix taken apart, projected onto the directions that it reads or gives: the orthonormal factor tells."""
    A, B = (m.weight.detach().double() for m in (factors.first, factors.second))
    W = _parameters(module)[0]
    reading = uneven(A.T) <= uneven(B)
    return [(module.weight, _stored(module, W @ A.T @ A if reading else B @ (B.T @ W)))]


def uneven(directions: Tensor) -> float:
    """How far the columns are from orthonormal, by the largest entry."""
    V = directions.detach().double()
    return float((V.T @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).abs().max())


def lost_beyond(best: Ordered, directions: Tensor) -> float:
    """The share of the energy that `directions` (heads, size, r) lose beyond the least that r can lose, in the worst head."""
    held = (directions.mT @ best.vectors.mT.to(directions)).square().sum(-2)
    values = best.values.to(directions)
    most = values.sort(-1, descending=True).values[:, : directions.shape[-1]].sum(-1)
    return float(((most - (held * values).sum(-1)) / values.sum(-1).clamp_min(torch.finfo(values.dtype).tiny)).max())


def converted(root: nn.Module, dense: Dense, name: str) -> nn.Module:
    """The module of the converted model that stands for the dense one called `name`."""
    attention = root.get_submodule(dense.path)
    inner = attention.inner if isinstance(attention, PickedPairs) else attention
    within = f"{dense.path}."
    return inner.get_submodule(name.removeprefix(within)) if name.startswith(within) else root.get_submodule(name)


def _both(dense: Dense, part: Part, root: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """Rows with their biases by key-value head, side by side: (heads, size, queries·(d + 1)), and the converted ones."""
    new = converted(root, dense, part.name)
    return _heads(dense, part, part.module, dense.size), _heads(dense, part, new, rank)


def _heads(dense: Dense, part: Part, module: nn.Module, size: int) -> Tensor:
    weight, bias = _parameters(module)
    table = weight if bias is None else torch.cat((weight, bias[:, None]), 1)
    start = part.start // dense.size * size
    rows = table[start : start + part.heads * size]
    if len(rows) < part.heads * size:
        raise UsageError(f"{part.name} has {len(table)} rows, too few for heads of {size}.")
    return rows.unflatten(0, (dense.key.heads, -1, size)).transpose(1, 2).flatten(2)


def _mixing(dense: Dense, before: nn.Module, root: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """Columns of the mixing matrix by key-value head: (heads, size, queries·d), and the converted ones."""
    old, new = (_parameters(m)[0] for m in (before.get_submodule(dense.out_name), converted(root, dense, dense.out_name)))
    heads = dense.value.heads
    return tuple(W.T.unflatten(0, (heads, -1, n)).transpose(1, 2).flatten(2) for W, n in ((old, dense.size), (new, rank)))


def _solved(told: list[tuple[Tensor, Tensor]], picked: Tensor | None) -> tuple[Tensor, float]:
    """V with Vᵀ·old = new in the least squares, unless it is `picked`; and the largest misfit of a head, relative, or how far its
    directions are from orthonormal where the weights tell all of them apart.
    """
    old, new = (torch.cat([pair[i] for pair in told], -1).cpu() for i in (0, 1))
    V = (
        torch.linalg.lstsq(old.mT, new.mT, rcond=1e-12, driver="gelsd").solution
        if picked is None
        else picked.expand(len(old), -1, -1)
    )
    off = (V.mT @ old - new).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1).clamp_min(1e-300)
    singular = torch.linalg.svdvals(old)
    known = [head for head, s in zip(V, singular, strict=True) if s[-1] > SPANNED * s[0] and len(s) == V.shape[1]]
    return V.to(told[0][0]), max(float(off.max()), *(uneven(head) for head in known), 0.0)


def _picked(dense: Dense, root: nn.Module) -> Tensor | None:
    """The columns that stay where queries and keys are turned by their position, as unit vectors (size, r)."""
    attention = root.get_submodule(dense.path)
    if not isinstance(attention, PickedPairs):
        return None
    return torch.eye(dense.size, dtype=torch.float64)[:, attention.columns.cpu()]


def _parameters(module: Any) -> tuple[Tensor, Tensor | None]:
    """(outputs, inputs) and the bias, copies in float64."""
    weight = matrix(module)
    assert weight is not None  # asked for matrices only
    bias = module.bias
    return weight.detach().double().clone(), None if bias is None else bias.detach().double().clone()


def _stored(module: Any, weight: Tensor) -> Tensor:
    """As the module keeps it: transformers' ``Conv1D`` transposed."""
    turned = weight if isinstance(module, nn.Linear) else weight.T
    return turned.contiguous().to(module.weight)


__all__ = ["SPANNED", "Kept", "converted", "kept_by", "lost_beyond", "projected", "projected_matrix", "uneven"]
