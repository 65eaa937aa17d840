"""Who looks at whom: the attention of one modality's positions to another's, layer by layer.

Which position belongs to which modality is not asked of the model. It is found by leaving modalities out: before the first
attention of a stack has mixed anything, a position's query changes exactly when the modality it came from is missing. Keys are
positions of the same stack where they depend on the modalities as the queries do; else (cross-attention) they are what they
themselves depend on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.attention_maps import AttentionCall, Fused, attending, attention_watched
from layerwise.data import Batch, Data
from layerwise.modal_game import Estimate, Pair, players
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.progress import tracked
from layerwise.stacks import stack_of
from layerwise.trace import unfused

MODEL = "model"  # positions that depend on no modality: class tokens, learned queries, what begins a text
SEVERAL = "several"  # positions that depend on more than one
CHANGED = 1e-5  # of the largest entry: what rounding may do and a missing modality does not


@dataclass(frozen=True)
class CrossAttention:
    """`mass`: (whose query, whose key) → the share of attention, mean over samples, heads and queries; of one query's modality
    all shares sum to 1. `cross`: the mean share that queries of a modality give to the other modalities.
    """

    mass: Mapping[Pair, Estimate]
    cross: Estimate


def cross_attention_analysis(
    model: UniversalModel, data: Data, modalities: Sequence[str] | None = None
) -> dict[str, CrossAttention]:
    """Of every layer that attends: the mass of attention between modalities, 0 … 1.

    Maps are recomputed beside fused attention, in float64; of a layer that attends several times (to itself, then to an encoder)
    all calls count. Attention over rows that are not the samples (windows) is left out, and so are queries of padding.
    Attention is where a layer looks, not what it uses (Jain & Wallace 2019): compare `missing_modality_cost`. Raises `UsageError`
    for fewer than two modalities.
    """
    chosen = players(model, modalities)
    names = (*chosen, MODEL, SEVERAL)
    pairs = {pair: Moments(len(model.layers)) for pair in itertools.product(names, names)}
    crossing = Moments(len(model.layers))
    for raw in tracked(data, "cross-attention", total=len(data)):
        batch = raw.to(model.device)
        whole = _calls(model, batch)
        without = [_calls(model, model.adapter.masked(batch, [name])) for name in chosen]
        _count(model, whole, without, pairs, crossing)
    return {
        layer.name: CrossAttention(_means(pairs, layer.index), _mean(crossing, layer.index))
        for layer in model.layers
        if any(float(m.sums[1, layer.index]) for m in pairs.values())
    }


def _calls(model: UniversalModel, batch: Batch) -> list[tuple[int, Fused]]:
    """Every fused attention call whose rows are the samples, with its layer, in order."""
    found: list[tuple[int, Fused]] = []

    def note(layer: int, call: AttentionCall) -> None:
        if isinstance(call, Fused) and call.shape[0] == batch.size:
            found.append((layer, call))

    with unfused(), attention_watched(attending(model.layers), batch.size, note, None):
        model.predict(batch)
    return found


def _count(
    model: UniversalModel,
    whole: Sequence[tuple[int, Fused]],
    without: Sequence[Sequence[tuple[int, Fused]]],
    pairs: Mapping[Pair, Moments],
    crossing: Moments,
) -> None:
    names = list(dict.fromkeys(query for query, _ in pairs))
    stacks: dict[tuple[str, int], Tensor] = {}  # (stack, positions) → whose each position is
    for at, (layer, call) in enumerate(whole):
        others = [calls[at][1] for calls in without]
        asked = torch.stack([_changed(call.query, other.query) for other in others])
        offered = torch.stack([_changed(call.key, other.key) for other in others])
        queries = stacks.setdefault((stack_of(model.layers[layer]), call.shape[2]), owners(asked))
        own = asked.shape == offered.shape and torch.equal(asked, offered)
        mass, counts = _mass(call, queries, queries if own else owners(offered), len(names))
        for (i, query), (j, key) in itertools.product(enumerate(names), enumerate(names)):
            pairs[query, key].add_(layer, mass[:, i, j], counts[:, i])
        strangers = mass[:, :-2, :-2].sum((1, 2)) - mass.diagonal(dim1=1, dim2=2)[:, :-2].sum(1)
        crossing.add_(layer, strangers, counts[:, :-2].sum(1))


def _changed(one: Tensor, other: Tensor) -> Tensor:
    """(samples, positions): whether anything of the position differs, of (samples, heads, positions, features)."""
    return (one - other).abs().amax((1, 3)) > CHANGED * one.abs().amax()


def owners(changed: Tensor) -> Tensor:
    """Which modality alone changes a position, M for none, M + 1 for several: (samples, positions) of (M, samples, positions)."""
    how_many = changed.sum(0)
    alone = changed.int().argmax(0)
    several = torch.full_like(alone, len(changed) + 1)
    return torch.where(how_many == 1, alone, torch.where(how_many == 0, torch.full_like(alone, len(changed)), several))


def _mass(call: Fused, queries: Tensor, keys: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """(samples, kinds, kinds) attention from each kind of query to each kind of key, mean over heads and summed over queries,
    and (samples, kinds) how many queries.
    """
    of_key = torch.nn.functional.one_hot(keys, kinds).double()
    of_query = torch.nn.functional.one_hot(queries, kinds).double() * call.keep.to(queries.device)[..., None]
    mass = torch.zeros(len(keys), kinds, kinds, dtype=torch.float64, device=keys.device)
    for rows in call.blocks():
        weights, _ = call.weights(rows)
        mass += torch.einsum("nqi,nqk,nkj->nij", of_query[:, rows], weights.mean(1), of_key)
    return mass, of_query.sum(1)


def _means(pairs: Mapping[Pair, Moments], layer: int) -> dict[Pair, Estimate]:
    return {pair: _mean(m, layer) for pair, m in pairs.items() if float(m.sums[1, layer]) and float(m.sums[2, layer])}


def _mean(moments: Moments, layer: int) -> Estimate:
    score = moments.score(layer)
    return Estimate(score.value, score.stderr)


__all__ = ["MODEL", "SEVERAL", "CrossAttention", "cross_attention_analysis", "owners"]
