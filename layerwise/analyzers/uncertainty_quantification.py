"""Noise sensitivity: how far the answer moves when noise is added to what one layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise import trees
from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.patching import Replacement, altering
from layerwise.replay import Replay
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer
from layerwise.task import classes_last, output_mask
from layerwise.walk import Walk, one_of

MEASURES = ("divergence", "bald", "linear")
EMBEDDINGS = "the model gives embeddings, whose entropy is not defined (measure='divergence' has a value)"


class NoiseEffects(MomentsStatistic):
    """Per sample: the mean over draws of how far the output moves when a layer is disturbed."""

    walks: ClassVar[bool] = True

    def __init__(self, model: UniversalModel, settings: UncertaintyAnalyzer) -> None:
        super().__init__(Moments(len(model.layers)))
        self.settings = settings
        self.differentiates = settings.measure == "linear"
        self.fidelity = model.adapter.fidelity(model.module)

    def walk(self, walk: Walk) -> None:
        if self.settings.measure == "linear":
            self._expand(walk)
        elif self.settings.measure == "divergence" or self.fidelity.kind == "kl":
            self._draw(walk)

    def _draw(self, walk: Walk) -> None:
        replay = Replay(walk.model, walk.batch, walk.counts)
        weights = self._losses(replay.output, walk, replay.output)[1]
        for layer in walk.model.layers:
            if not layer.observable:
                continue
            outputs = (
                replay.replacing({layer.index: disturbed(layer, self.settings, draw)}) for draw in range(self.settings.draws)
            )
            self.moments.add_(layer.index, self._moved(outputs, walk, replay.output), weights)

    def _moved(self, outputs: Iterator[Tensor], walk: Walk, clean: Tensor) -> Tensor:
        if self.settings.measure == "bald":
            return information(outputs, output_mask(walk.batch, clean))
        return torch.stack([self._losses(output, walk, clean)[0] for output in outputs]).mean(0)

    def _losses(self, output: Tensor, walk: Walk, clean: Tensor) -> tuple[Tensor, Tensor]:
        values, weights = self.fidelity.losses(output, walk.batch, clean)
        return values.reshape(len(values), -1).sum(1), weights.reshape(len(weights), -1).sum(1)

    def _expand(self, walk: Walk) -> None:
        """½ s² Var · E_y ‖∂(−log p(y))/∂y_l‖² with y drawn from the model: one forward, and one backward per draw."""
        seen = walk.forward(walk.batch, graph=True)
        assert seen.output is not None
        weights = self._losses(seen.output.detach(), walk, seen.output.detach())[1]
        totals: dict[int, Tensor] = {}
        for draw in range(self.settings.draws):
            seen.forget_gradients()
            generator = torch.Generator().manual_seed(self.settings.seed + draw)
            values = self.fidelity.likelihood(seen.output, walk.batch, generator)
            walk.backward(seen, values, again=draw + 1 < self.settings.draws)
            for layer in walk.model.layers:
                gradient = seen.gradients[layer.index]
                if gradient is not None and seen.complete(layer):
                    square = gradient.double().square().flatten(1).sum(1) / self.settings.draws
                    totals[layer.index] = totals.get(layer.index, 0) + square
        for index, total in totals.items():
            branch, leaving = seen.branch(walk.model.layers[index]), seen.leaving[index]
            part = branch if self.settings.of == "branch" else leaving
            assert part is not None
            self.moments.add_(index, 0.5 * (deviation(part, self.settings).double().flatten() ** 2) * total, weights)


def deviation(part: Tensor, settings: UncertaintyAnalyzer) -> Tensor:
    """The noise's standard deviation for each sample, shaped to broadcast over `part`."""
    ones = [1] * (part.dim() - 1)
    if not settings.relative:
        return torch.full((len(part), *ones), settings.noise, dtype=part.dtype, device=part.device)
    return settings.noise * part.flatten(1).std(1, correction=0).reshape(-1, *ones)


def disturbed(layer: Layer, settings: UncertaintyAnalyzer, draw: int) -> Replacement:
    """The layer's output plus noise. Every layer gets the same standard normal numbers, as far as its shape allows."""
    generator = torch.Generator().manual_seed(settings.seed + draw)
    stream = layer.stream
    if stream is None:  # a unit inside a block
        return altering(layer, lambda part: part + _drawn(part, part, settings, generator))

    def noisy(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entering = trees.get((args, kwargs), stream.enters).clone()  # the block may write into its input
        output = forward(*args, **kwargs)
        leaving = trees.get(output, stream.leaves)
        part = leaving - entering if settings.of == "branch" and layer.skippable else leaving
        # added to what leaves, not to the branch, so that without noise the output is the same to the bit
        return trees.replaced(output, stream.leaves, leaving + _drawn(leaving, part, settings, generator))

    return noisy


def _drawn(like: Tensor, part: Tensor, settings: UncertaintyAnalyzer, generator: torch.Generator) -> Tensor:
    return deviation(part, settings) * torch.randn(like.shape, generator=generator).to(like)


def information(outputs: Iterator[Tensor], keep: Tensor) -> Tensor:
    """H[E p] − E H[p] per sample, summed over the positions that `keep` weighs: what the draws tell about the answer."""
    logs = torch.stack([classes_last(output.double()).log_softmax(-1) for output in outputs])
    mean = logs.logsumexp(0) - torch.tensor(float(len(logs)), dtype=torch.float64).log().to(logs.device)
    gap = _entropy(mean) - _entropy(logs).mean(0)
    return (gap.reshape(len(gap), -1) * keep).sum(1).clamp_min(0)


def _entropy(logs: Tensor) -> Tensor:
    return -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(-1)


@dataclass(frozen=True)
@ANALYZERS.register("uncertainty_quantification")
class UncertaintyAnalyzer(ImportanceAnalyzer):
    """Mean divergence of the answer when noise is added to what a layer adds: E KL(p ‖ p_ε), nats; of embeddings, 1 − cosine.

    The noise is Gaussian with s times the standard deviation of what the layer adds, each sample's own over positions and
    features. All layers get the same random numbers, and so does every batch. A model without dropout has no uncertainty of its
    own to measure; this is its sensitivity to a stated one. Labels are not looked at. The standard error is over samples.

    Parameters
    ----------
    noise
        s ≥ 0.
    draws
        m, the number of noise samples.
    measure
        ``divergence`` (default); ``bald``: H[E p_ε] − E H[p_ε], too small for few draws; ``linear``: ½ tr(Σ Jᵀ F J) for small
        noise of covariance Σ, F the Fisher information of the answer, by m backward passes for all layers at once.
    of
        What sets the size of the noise. ``branch`` (default): what the layer adds; ``output``: all that leaves it.
    relative
        False: s is the standard deviation itself.
    seed
        Of the noise.

    References
    ----------
    Houlsby, Huszár, Ghahramani, Lengyel (2011), "Bayesian active learning for classification and preference learning" (``bald``).
    """

    method: ClassVar[str] = "uncertainty_quantification"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    noise: float = 0.5
    draws: int = 4
    measure: Literal["divergence", "bald", "linear"] = "divergence"
    of: Literal["branch", "output"] = "branch"
    relative: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("measure", self.measure, MEASURES, self.method)
        one_of("of", self.of, ("branch", "output"), self.method)
        if self.draws < 1 or not self.noise >= 0:
            raise UsageError(f"uncertainty_quantification needs noise ≥ 0 and draws ≥ 1, not {self.noise} and {self.draws}.")

    def statistic(self, model: UniversalModel) -> Statistic:
        return NoiseEffects(model, self)

    def score(self, model: UniversalModel, statistic: NoiseEffects) -> Mapping[str, LayerScore]:
        blind = EMBEDDINGS if self.measure == "bald" and statistic.fidelity.kind == "cosine" else ""
        return statistic.scores(model.layers, missing={layer.name: blind for layer in model.layers})
