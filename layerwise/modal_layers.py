"""Modalities layer by layer: where they meet, and what a layer's share of a missing one costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.errors import UserModelError
from layerwise.games import Coalition, coalitions
from layerwise.modal_game import Estimate, coalition_batches, players
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.patching import Replacement, adding, leaving_as
from layerwise.progress import tracked
from layerwise.replay import Replay
from layerwise.structure import Layer

Streams = Mapping[str, tuple[Tensor, Tensor]]  # layer → what enters and what leaves


@dataclass(frozen=True)
class Fusion:
    """`shares`: sets of modalities (names in order) → the share of a layer's variance that their presence explains together, and
    no smaller set does; all shares sum to 1. `moved`: that variance over the mean square of what leaves the layer.
    """

    shares: Mapping[tuple[str, ...], Estimate]
    moved: Estimate

    @property
    def fused(self) -> float:
        """The share of all sets of two or more: 0 where the modalities do not meet, or only add up."""
        return sum(estimate.value for names, estimate in self.shares.items() if len(names) > 1)


def information_fusion_analysis(model: UniversalModel, data: Data, modalities: Sequence[str] | None = None) -> dict[str, Fusion]:
    """Of every layer, the 2^M factorial ANOVA of what leaves it over which modalities are there.

    For each sample, position and unit the effect of a set T is β_T = 2^−M Σ_S (−1)^|T − S| z(S), over all sets S of modalities
    that are there; Σ_T β_T² over T ≠ ∅ is the variance of z over the sets, and a share is its part (Fisher 1935; Sobol' indices
    of a design in which each modality is there half of the time). Layers that no modality moves, or whose rows are not the
    samples, are left out. Raises `UsageError` for fewer than two modalities.
    """
    chosen = players(model, modalities)
    sets = [s for s in coalitions(len(chosen), len(chosen)) if s]
    moments = [Moments(len(model.layers)) for _ in (*sets, None)]  # the last: how much the layer is moved at all
    layers = [layer for layer in model.layers if layer.stream is not None]
    for raw in tracked(data, "fusion", total=len(data)):
        batch = raw.to(model.device)
        leaving: dict[Coalition, dict[str, Tensor]] = {}
        for present, changed in coalition_batches(model, batch, chosen):
            leaving[present] = {name: out for name, (_, out) in _streams(model, layers, changed).items()}
            missing = [name for i, name in enumerate(chosen) if i not in present]
            _same_layers(model, next(iter(leaving.values())), leaving[present], missing)
        for layer in layers:
            found = {present: outputs.get(layer.name) for present, outputs in leaving.items()}
            if all(z is not None and z.shape[0] == batch.size for z in found.values()):
                _add(moments, layer.index, {s: z for s, z in found.items() if z is not None}, sets)
    return _fusions(layers, chosen, sets, moments)


def _streams(model: UniversalModel, layers: Sequence[Layer], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    with model.capture([layer.name for layer in layers]) as seen:
        model.predict(batch)
    return seen


def _same_layers(model: UniversalModel, whole: Iterable[str], found: Iterable[str], missing: Sequence[str]) -> None:
    """Raises `UserModelError` LW-U76 where a layer runs only when a modality is there."""
    differ = sorted(set(whole) ^ set(found))
    if differ:
        what = f"Whether the layer {differ[0]} runs depends on the data: without {' and '.join(missing)} it is another answer."
        remedy = "Layers that are chosen by the data cannot be compared; let them run on the stand-in for what is missing."
        raise UserModelError(what, place=model.name, remedy=remedy, code="LW-U76")


def _add(moments: Sequence[Moments], layer: int, found: Mapping[Coalition, Tensor], sets: Sequence[Coalition]) -> None:
    energies = [effect(found, t).square().flatten(1).sum(1) for t in sets]
    total = torch.stack(energies).sum(0)
    for kept, energy in zip(moments, energies, strict=False):
        kept.add_(layer, energy, total)
    moments[-1].add_(layer, total, found[sets[0]].double().square().flatten(1).sum(1))


def effect(found: Mapping[Coalition, Tensor], of: Coalition) -> Tensor:
    """β_T, of the shape of the streams, float64: half the change that one modality's presence makes, for a set of one."""
    return sum(((-1.0) ** len(of - s) * z.double() for s, z in found.items()), start=torch.zeros(())) / len(found)


def _fusions(
    layers: Sequence[Layer], chosen: Sequence[str], sets: Sequence[Coalition], moments: Sequence[Moments]
) -> dict[str, Fusion]:
    fusions = {}
    for layer in layers:
        scores = [m.score(layer.index) for m in moments]
        if scores[-1].value > 0:
            estimates = [Estimate(s.value, s.stderr) for s in scores]
            named = {tuple(chosen[i] for i in sorted(s)): e for s, e in zip(sets, estimates[:-1], strict=True)}
            fusions[layer.name] = Fusion(dict(sorted(named.items(), key=lambda item: len(item[0]))), estimates[-1])
    return fusions


def missing_modality_cost(
    model: UniversalModel, data: Data, modalities: Sequence[str] | None = None
) -> dict[str, dict[str, Estimate]]:
    """Of every layer and modality: how much the loss rises when this layer alone does as if the modality were missing, nats.

    What the layer adds to its stream is exchanged for what it adds in a run without the modality, everything else staying as it
    is: the part of the modality's effect that goes through this layer's own computation (a path-specific effect, Vig et al.
    2020). A layer that changes its stream's shape is exchanged as a whole. Layers that run several times, or whose rows are
    not the samples, are left out.
    """
    chosen = players(model, modalities)
    layers = [layer for layer in model.layers if layer.stream is not None and layer.calls == 1]
    moments = {name: Moments(len(model.layers)) for name in chosen}
    for raw in tracked(data, "missing modalities", total=len(data)):
        batch = raw.to(model.device)
        model.see(batch)
        replay = Replay(model, batch)
        whole = [layer.name for layer, _ in replay.calls if layer in layers]
        for name in chosen:
            seen = _streams(model, layers, model.adapter.masked(batch, [name]))
            _same_layers(model, whole, seen, [name])
            _measure(replay, layers, seen, moments[name])
    return {
        layer.name: {name: Estimate(score.value, score.stderr) for name in chosen for score in [moments[name].score(layer.index)]}
        for layer in layers
        if float(moments[chosen[0]].sums[0, layer.index])
    }


def _measure(replay: Replay, layers: Sequence[Layer], seen: Streams, moments: Moments) -> None:
    task, batch = replay.model.task, replay.batch
    assert task is not None  # settled before
    before, weights = task.losses(replay.output, batch, replay.output)
    for layer in layers:
        if all(tensor.shape[0] == batch.size for tensor in seen[layer.name]):
            output = replay.replacing({layer.index: _deaf(layer, *seen[layer.name])})
            after, _ = task.losses(output, batch, replay.output)
            moments.add_(layer.index, (after - before).reshape(len(before), -1).sum(1), weights.reshape(len(weights), -1).sum(1))


def _deaf(layer: Layer, entering: Tensor, leaving: Tensor) -> Replacement:
    """The layer does what it did in another run."""
    return adding(layer, leaving - entering) if layer.skippable else leaving_as(layer, leaving)


__all__ = ["Fusion", "effect", "information_fusion_analysis", "missing_modality_cost"]
