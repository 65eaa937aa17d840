"""Activation patching: how much of what a corruption of the inputs destroys comes back when one layer acts as on clean inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.patching import adding, leaving_as
from layerwise.replay import Replay
from layerwise.scores import LayerScore, Status
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer
from layerwise.sweep import Seen
from layerwise.task import Fidelity
from layerwise.trace import unfused
from layerwise.walk import (
    PLACES,
    At,
    Change,
    Walk,
    entering_changed,
    fed_by_none,
    inputs_changed,
    one_of,
    place_of,
    sample_losses,
)

ALONE = "in a batch of one sample there is no other sample to exchange it with"
FLAT = "the divergence from the model's own clean answer has no slope at the clean answer (take denoise, or estimator='exact')"


@dataclass(frozen=True)
class Corruption:
    """Changed inputs, and changes to the streams that enter layers."""

    batch: Batch
    changes: Mapping[int, Change]

    def around(self, walk: Walk) -> AbstractContextManager[Any]:
        """One forward in which the streams are changed."""
        return entering_changed(walk.model.blocks, self.changes)


class PatchingEffects(MomentsStatistic):
    """Per sample: the effect on −loss of patching each layer; weights are the task's, or the effect of the whole corruption."""

    walks: ClassVar[bool] = True

    def __init__(self, model: UniversalModel, settings: CausalAnalyzer) -> None:
        super().__init__(Moments(len(model.layers)))
        self.settings = settings
        self.differentiates = settings.estimator == "attribution"
        self.single = torch.zeros(1, dtype=torch.float64)  # samples that had no other to be exchanged with

    def walk(self, walk: Walk) -> None:
        if self.settings.corruption == "shuffle" and walk.batch.size < 2:
            self.single = self.single + walk.batch.size
            return
        graph = self.settings.estimator == "attribution"
        with fed_by_none(walk.model.blocks) as embedded:
            clean = walk.forward(walk.batch, graph=True)
        corruption = corrupted(walk, self.settings, embedded)
        assert clean.output is not None
        reference = clean.output.detach()
        worth = _Worth(walk, reference)
        if graph:
            spoilt = walk.forward(corruption.batch, graph=self.settings.direction == "denoise", changes=corruption.changes)
            effects = _attributed(walk, worth, clean, spoilt, self.settings)
            spoilt_output = spoilt.output
        else:
            effects, spoilt_output = _measured(walk, worth, clean, corruption, self.settings)
        assert spoilt_output is not None
        lost = worth.of(reference) - worth.of(spoilt_output.detach())
        for layer, effect in effects.items():
            self.moments.add_(layer, effect, lost if self.settings.scale == "share" else worth.weights)

    def merge_(self, other: PatchingEffects) -> None:  # type: ignore[override]  # merges with its own kind
        super().merge_(other)
        self.single = self.single + other.single

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "single": self.single}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self.single = state["single"]

    @property
    def samples(self) -> int:
        return super().samples + int(self.single)


class _Worth:
    """m: minus the task's loss per sample, judged by the clean batch and the clean output."""

    def __init__(self, walk: Walk, reference: Tensor) -> None:
        self.walk, self.reference = walk, reference
        self.weights = sample_losses(walk.model, reference, walk.batch, reference)[1]

    def of(self, output: Tensor) -> Tensor:
        return -sample_losses(self.walk.model, output, self.walk.batch, self.reference)[0]


def corrupted(walk: Walk, settings: CausalAnalyzer, embedded: list[Layer]) -> Corruption:
    """The other batch: its samples moved on by one, or Gaussian noise on its inputs or embeddings."""
    batch = walk.batch
    if settings.corruption == "shuffle":
        size = batch.size
        moved = batch.map(lambda t: t.roll(1, 0) if t.dim() and t.shape[0] == size else t)
        return Corruption(Batch(moved.args, moved.kwargs, batch.labels), {})
    if place_of(settings.at, batch) == "inputs":
        return Corruption(inputs_changed(batch, noisy(settings.noise, settings.seed)), {})
    return Corruption(batch, {layer.index: noisy(settings.noise, settings.seed) for layer in embedded})


def noisy(noise: float, seed: int) -> Change:
    """Adds Gaussian noise of `noise` times each sample's own standard deviation; the same at every call."""

    def change(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        deviation = x.flatten(1).std(1, correction=0).reshape(-1, *[1] * (x.dim() - 1))
        return x + noise * deviation * drawn

    return change


def _patchable(layer: Layer, settings: CausalAnalyzer, seen: Seen) -> bool:
    return not _unpatchable(layer, settings) and seen.leaving[layer.index] is not None


def _unpatchable(layer: Layer, settings: CausalAnalyzer) -> str:
    if settings.patch == "stream":
        return "" if layer.stream is not None else f"has no stream of its own: {layer.reason or 'it is a unit inside a block'}"
    return "" if layer.skippable else f"adds nothing to a stream that goes on without it: {layer.reason}"


def _measured(
    walk: Walk, worth: _Worth, clean: Seen, corruption: Corruption, settings: CausalAnalyzer
) -> tuple[dict[int, Tensor], Tensor]:
    """Effects by running the model once per layer from that layer on, and the corrupted output."""
    denoise = settings.direction == "denoise"
    with unfused():  # as the donors ran
        if denoise:
            replay = Replay(walk.model, corruption.batch, walk.counts, lambda: corruption.around(walk))
            donor, spoilt = clean, replay.output
        else:
            replay = Replay(walk.model, walk.batch, walk.counts)
            donor = walk.forward(corruption.batch, changes=corruption.changes)
            assert donor.output is not None
            spoilt = donor.output
        base, effects = worth.of(replay.output), {}
        for layer in walk.model.layers:
            if _patchable(layer, settings, donor):
                output = replay.replacing({layer.index: _patch(layer, donor, settings.patch)})
                effects[layer.index] = worth.of(output) - base if denoise else base - worth.of(output)
    return effects, spoilt


def _patch(layer: Layer, donor: Seen, patch: str) -> Any:
    value = donor.branch(layer) if patch == "branch" else donor.leaving[layer.index]
    assert value is not None
    return adding(layer, value) if patch == "branch" else leaving_as(layer, value)


def _attributed(walk: Walk, worth: _Worth, clean: Seen, spoilt: Seen, settings: CausalAnalyzer) -> dict[int, Tensor]:
    """First-order effects ⟨clean − corrupted, gradient of m⟩; the gradient is that of the run which would be patched."""
    base = spoilt if settings.direction == "denoise" else clean
    assert base.output is not None
    walk.backward(base, worth.of(base.output))
    effects = {}
    for layer in walk.model.layers:
        gradient = base.gradients[layer.index]
        if gradient is None or not _patchable(layer, settings, base) or not base.complete(layer):
            continue
        branch = settings.patch == "branch"
        here, there = (x.branch(layer) if branch else x.leaving[layer.index] for x in (clean, spoilt))
        assert here is not None
        assert there is not None
        effects[layer.index] = ((here - there).double() * gradient.double()).flatten(1).sum(1)
    return effects


@dataclass(frozen=True)
@ANALYZERS.register("causal_analysis")
class CausalAnalyzer(ImportanceAnalyzer):
    """Mean effect on −loss of patching what a layer adds from one run into another, in nats (``scale="share"``: a ratio).

    Two runs, on clean inputs c and corrupted inputs k, with m = −loss of each sample. ``denoise``: E[m(k ← a_l(c)) − m(k)], what
    comes back when the layer alone acts as if the inputs were clean. ``noise``: E[m(c) − m(c ← a_l(k))], what is lost when the
    layer alone acts as if they were corrupted. Negative scores are possible: a layer can do harm in the other's context.

    Parameters
    ----------
    corruption
        ``gaussian`` (default): noise on continuous inputs, else on the embeddings; ``shuffle``: another sample of the batch.
    noise
        Of ``gaussian``, in standard deviations of each sample's own inputs or embeddings.
    direction
        ``denoise`` (default) or ``noise``.
    estimator
        ``exact``: the clean and the corrupted run, then L(L−1)/2 block calls (default); ``attribution``: the
        first-order estimate, two forwards and one backward for all layers.
    patch
        ``branch`` (default): what the layer adds; ``stream``: all that leaves it, which restores everything after a full cut.
    scale
        ``nats`` (default), or ``share``: Σ effects / Σ (m(c) − m(k)), a ratio of sums. It ranks as nats do, and is refused where
        the denominator is not above twice its standard error.
    at
        ``auto``: the inputs where all are continuous, else ``stream``, the streams that enter the first layers; or ``inputs``.
    seed
        Draws the noise, which is the same for every batch.

    References
    ----------
    Meng, Bau, Andonian, Belinkov (2022), "Locating and editing factual associations in GPT" (noise of 3 standard deviations);
    Kramár, Lieberum, Shah, Nanda (2024), "AtP*: An efficient and scalable method for localizing LLM behaviour to components".
    """

    method: ClassVar[str] = "causal_analysis"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"vital"})

    corruption: Literal["gaussian", "shuffle"] = "gaussian"
    noise: float = 3.0
    direction: Literal["denoise", "noise"] = "denoise"
    estimator: Literal["exact", "attribution"] = "exact"
    patch: Literal["branch", "stream"] = "branch"
    scale: Literal["nats", "share"] = "nats"
    at: At = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("corruption", self.corruption, ("gaussian", "shuffle"), self.method)
        one_of("direction", self.direction, ("denoise", "noise"), self.method)
        one_of("estimator", self.estimator, ("exact", "attribution"), self.method)
        one_of("patch", self.patch, ("branch", "stream"), self.method)
        one_of("scale", self.scale, ("nats", "share"), self.method)
        one_of("at", self.at, PLACES, self.method)
        if not self.noise > 0:
            raise UsageError(f"causal_analysis needs noise above 0, not {self.noise}: without it nothing is corrupted.")

    def measured_in(self) -> str:
        return "share of the lost nats" if self.scale == "share" else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        return PatchingEffects(model, self)

    def score(self, model: UniversalModel, statistic: PatchingEffects) -> Mapping[str, LayerScore]:
        missing = {layer.name: self._undefined(model, layer, statistic) for layer in model.layers}
        scores = statistic.scores(model.layers, missing=missing)
        for layer in model.layers:
            little = _too_little(statistic.moments, layer.index) if self.scale == "share" else ""
            if little and scores[layer.name].status is Status.OK:
                scores[layer.name] = LayerScore.missing(Status.FAILED, little)
        return scores

    def _undefined(self, model: UniversalModel, layer: Layer, statistic: PatchingEffects) -> str:
        if reason := _unpatchable(layer, self):
            return reason
        if self.estimator == "attribution" and self.direction == "noise" and isinstance(model.task, Fidelity):
            return FLAT
        return ALONE if float(statistic.single) and not statistic.moments.samples() else ""


def _too_little(moments: Moments, layer: int) -> str:
    """Why the corruption's effect cannot be divided by: its mean is not above twice its standard error."""
    n, lost, _, _, _, square = (float(x) for x in moments.sums[:, layer].cpu())
    if not n:
        return ""
    mean = lost / n
    error = math.sqrt(max(square / n - mean * mean, 0.0) / (n - 1)) if n > 1 else math.nan
    if mean > 0 and not mean <= 2 * error:
        return ""
    return f"the corruption costs {mean:.3g} ± {error:.2g} nats per sample: too little to divide by (scale='nats' has a value)"
