"""Ablation: the measured damage of leaving a layer out. The yardstick that cheaper methods are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise import trees
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic, unskippable
from layerwise.data import Batch
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.patching import Replacement, altering, skip
from layerwise.replay import Replay
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer
from layerwise.task import Fidelity, token_mask


def zero(layer: Layer) -> Replacement:
    """The layer's main output becomes 0. In a residual net this kills the stream, not only the layer's share of it.

    For a unit inside a block it is the same as `skip`.
    """
    if layer.site is not None:
        return skip(layer)
    stream = layer.stream
    assert stream is not None, layer.name

    def silenced(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        return trees.replaced(output, stream.leaves, torch.zeros_like(trees.get(output, stream.leaves)))

    return silenced


OPERATIONS: dict[str, Callable[[Layer], Replacement]] = {"skip": skip, "zero": zero}
Change = Callable[[Tensor], Tensor]
ROWS = "needs batches of at least 2 samples, and a stream whose rows are the samples"


def mean_of_batch(batch: Batch, seed: int) -> Change:
    """Every sample's branch becomes the mean over the batch's samples, position by position, padding left out."""

    def mean(branch: Tensor) -> Tensor:
        keep = torch.ones_like(branch[..., :1])
        if branch.dim() == 3:
            keep = token_mask(batch, branch[..., 0])[..., None].to(branch)
        return ((branch * keep).sum(0) / keep.sum(0).clamp_min(1)).expand_as(branch)

    return mean


def another_sample(batch: Batch, seed: int) -> Change:
    """Every sample gets the branch of another one: the next in a random circle, the same for every layer."""
    circle = torch.randperm(batch.size, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(circle)
    others[circle] = circle.roll(1)
    return lambda branch: branch[others.to(branch.device)]


EXCHANGES: dict[str, Callable[[Batch, int], Change]] = {"mean": mean_of_batch, "resample": another_sample}


def _loss(replay: Replay, output: Tensor) -> tuple[Tensor, Tensor]:
    assert replay.model.task is not None  # settled before the first batch
    return replay.model.task.losses(output, replay.batch, replay.output)


def _divergence(replay: Replay, output: Tensor) -> tuple[Tensor, Tensor]:
    task = replay.model.task if isinstance(replay.model.task, Fidelity) else Fidelity()
    return task.losses(output, replay.batch, replay.output)


def _wrong_answers(replay: Replay, output: Tensor) -> tuple[Tensor, Tensor]:
    assert replay.model.task is not None
    figures = replay.model.task.figures(output, replay.batch, replay.output)
    name = next((n for n in RIGHT if n in figures), None)
    if name is None:
        raise UsageError(f"The task {replay.model.task.name} counts no right answers.", remedy="Use metric='loss'.")
    hits, weights = figures[name]
    return weights - hits, weights


RIGHT = ("accuracy", "token_accuracy", "pixel_accuracy", "exact_match", "agreement")  # a task's count of right answers


METRICS: dict[str, Callable[[Replay, Tensor], tuple[Tensor, Tensor]]] = {
    "loss": _loss,
    "kl": _divergence,
    "accuracy": _wrong_answers,
}


class AblationDamage(MomentsStatistic):
    """Per sample: the metric's loss with the layer changed minus that without, on the same samples (paired)."""

    intervenes: ClassVar[bool] = True

    def __init__(self, model: UniversalModel, operation: str, metric: str = "loss", seed: int = 0) -> None:
        super().__init__(Moments(len(model.layers)))
        self.operation, self.seed, self.metric = operation, seed, METRICS[metric]
        self.layers = [x for x in model.layers if x.observable and (operation != "skip" or x.skippable)]

    def probe(self, replay: Replay) -> None:
        before, weights = self._sums(replay, replay.output)
        for layer, change in self._changes(replay):
            after, _ = self._sums(replay, replay.replacing({layer.index: change}))
            self.moments.add_(layer.index, after - before, weights)

    def _changes(self, replay: Replay) -> Iterator[tuple[Layer, Replacement]]:
        if self.operation in OPERATIONS:
            yield from ((layer, OPERATIONS[self.operation](layer)) for layer in self.layers)
            return
        size = replay.batch.size
        change = EXCHANGES[self.operation](replay.batch, self.seed)
        rows = {
            layer.name: trees.get(output, layer.stream.leaves).shape[0]
            for layer, output in replay.calls
            if layer.stream is not None
        }
        example = replay.model.example.size
        rows |= {x.name: size for x in self.layers if x.site is not None and x.shape[0] == example}
        yield from ((layer, altering(layer, change)) for layer in self.layers if rows.get(layer.name) == size > 1)

    def _sums(self, replay: Replay, output: Tensor) -> tuple[Tensor, Tensor]:
        values, weights = self.metric(replay, output)
        return values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1)


@dataclass(frozen=True)
@ANALYZERS.register("layer_ablation")
class LayerAblationAnalyzer(ImportanceAnalyzer):
    """Mean loss with the layer changed minus mean loss of the whole model, in nats; the standard error is that of the pairs.

    Costs L + L(L−1)/2 block calls per batch for L layers that can be skipped. A layer that changes the stream's shape cannot be
    skipped and has no score: no substitute is made up for it.

    Parameters
    ----------
    operation
        ``skip``: the layer passes its input on (default); ``zero``: its output becomes 0; ``mean``: what it adds to its stream
        becomes the mean over the samples of the *batch*, position by position with padding left out; ``resample``: what it adds
        is that of another sample of the batch. The last two are of the batch, so that nothing but the batches decides the
        result; they need at least 2 samples in a batch, and the mean holds 1/B of the sample itself.
    metric
        ``loss``: the task's (default); ``kl``: the divergence from the whole model's outputs; ``accuracy``: the share of right
        answers that is lost (without labels, of answers like the whole model's).
    seed
        Draws who gets whose branch.

    References
    ----------
    Kim et al. (2024), "Shortened LLaMA"; Song et al. (2024), "SLEB" (there greedy and repeated, here one layer at a time);
    Li, Janson (2024), "Optimal ablation for interpretability" (what zero, mean and resample ablation leave in).
    """

    method: ClassVar[str] = "layer_ablation"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    operation: Literal["skip", "zero", "mean", "resample"] = "skip"
    metric: Literal["loss", "kl", "accuracy"] = "loss"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("operation", [*OPERATIONS, *EXCHANGES]), ("metric", list(METRICS))):
            given = getattr(self, name)
            if given not in known:
                raise UsageError(f"Unknown {name} {given!r} of layer_ablation.", remedy=nearest(given, known))

    def measured_in(self) -> str:
        return "share of answers" if self.metric == "accuracy" else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        return AblationDamage(model, self.operation, self.metric, self.seed)

    def score(self, model: UniversalModel, statistic: AblationDamage) -> Mapping[str, LayerScore]:
        missing = {layer.name: unskippable(layer) for layer in model.layers} if self.operation == "skip" else {}
        if self.operation in EXCHANGES:
            unfed = [layer for layer in statistic.layers if not float(statistic.moments.sums[0, layer.index])]
            missing = {layer.name: ROWS for layer in unfed}
        return statistic.scores(model.layers, missing=missing)
