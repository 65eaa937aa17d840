"""Conductance: how much of the change of the answer along a path of inputs flows through a layer. One path for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.statistics import MomentsStatistic
from layerwise.sweep import Seen
from layerwise.walk import PLACES, At, Change, Walk, fed_by_none, inputs_changed, one_of, place_of, sample_losses

RULES = ("trapezoid", "left")
TARGETS = ("likelihood", "logit")
PARTS = ("branch", "output")
ORIGINS = ("auto", "zeros", "mean")
UNRESOLVED = 2.0  # a full cut has 0 and a part of one up to about 1: more is the sum's own error


class Point(NamedTuple):
    """One layer at one point of the path: the part whose conductance is asked for, all that leaves, the target's gradient."""

    part: Tensor
    leaving: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Conductances:
    """Of one batch: `units` and `totals` per layer, the target's `change` along the path and the weights, each per sample.

    `units` are of the part asked for (None where no gradient came), `totals` (layers, samples) sums over all that leaves a layer.
    """

    units: list[Tensor | None]
    totals: Tensor
    change: Tensor
    weights: Tensor


class PathSums(MomentsStatistic):
    """Per sample: Σ over the units of what a layer adds of |conductance|; and how far each layer's sums are from complete."""

    walks: ClassVar[bool] = True
    differentiates = True

    def __init__(self, model: UniversalModel, settings: LayerConductanceAnalyzer) -> None:
        super().__init__(Moments(len(model.layers)))
        self.settings = settings
        self.gaps = torch.zeros(2, len(model.layers), dtype=torch.float64)  # Σ|total − change|, Σ|change|

    def walk(self, walk: Walk) -> None:
        found = conductances(walk, self.settings)
        gaps = torch.stack([(found.totals - found.change).abs().sum(1), found.change.abs().sum().expand(len(found.units))])
        self.gaps = self.gaps.to(gaps.device) + gaps
        for layer, units in enumerate(found.units):
            if units is not None:
                self.moments.add_(layer, units.flatten(1).abs().sum(1, dtype=torch.float64), found.weights)

    def incompleteness(self) -> Tensor:
        """Per layer Σ_n |Σ_j Cond_j − ΔF| / Σ_n |ΔF| over all that leaves it: the error of the sum where that is a full cut."""
        return self.gaps[0] / self.gaps[1].clamp_min(1e-300)

    def merge_(self, other: PathSums) -> None:  # type: ignore[override]  # merges with its own kind
        super().merge_(other)
        self.gaps = self.gaps + other.gaps.to(self.gaps.device)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "gaps": self.gaps}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self.gaps = state["gaps"]


def conductances(walk: Walk, settings: LayerConductanceAnalyzer) -> Conductances:
    """The path integral of one batch, from the inputs down to the origin x′: n + 1 passes, two points held at a time."""
    place = place_of(settings.at, walk.batch)
    origin = settings.origin if settings.origin != "auto" else {"inputs": "zeros", "stream": "mean"}[place]
    with fed_by_none(walk.model.blocks) as embedded:
        seen = walk.forward(walk.batch, graph=True)
    assert seen.output is not None
    target, weights = TARGET_FUNCTIONS[settings.target](walk, seen.output.detach())
    units: list[Tensor | None] = [None] * len(walk.model.layers)
    totals = torch.zeros(len(units), walk.batch.size, dtype=torch.float64, device=weights.device)
    first, above = _points(walk, seen, target, settings.of)
    below = first
    # a first block's own output is all that is asked of it, so no later pass goes back through it; units lie inside blocks
    whole = all(layer.site is None for layer in walk.model.layers)
    cut = [block for block in embedded if whole and block.calls == 1]
    for step in range(settings.steps - 1, -1, -1):
        change = away_from(origin, step / settings.steps)
        if place == "inputs":
            seen = walk.forward(inputs_changed(walk.batch, change), graph=True, cut=cut)
        else:
            seen = walk.forward(walk.batch, graph=True, changes={layer.index: change for layer in embedded}, cut=cut)
        below, here = _points(walk, seen, target, settings.of)
        _integrate_(units, totals, here, above, settings.rule)
        above = here
    return Conductances(units, totals, (first - below).double(), weights)


def away_from(origin: str, alpha: float) -> Change:
    """x ↦ x′ + α(x − x′) with x′ = 0 or the mean over the second dimension, a stream's positions."""

    def change(x: Tensor) -> Tensor:
        start = torch.zeros_like(x) if origin == "zeros" else x.mean(1, keepdim=True)
        return start + alpha * (x - start)

    return change


def _points(walk: Walk, seen: Seen, target: Change, of: str) -> tuple[Tensor, list[Point | None]]:
    """The target per sample, and each layer at this point of the path."""
    assert seen.output is not None
    values = target(seen.output)
    walk.backward(seen, values)
    points: list[Point | None] = []
    for layer in seen.layers:
        leaving, gradient = seen.leaving[layer.index], seen.gradients[layer.index]
        part = seen.branch(layer) if of == "branch" else leaving
        known = part is not None and leaving is not None and gradient is not None and seen.complete(layer)
        points.append(Point(part, leaving, gradient) if known else None)  # type: ignore[arg-type]  # `known` says they are there
    return values.detach(), points


def _integrate_(
    units: list[Tensor | None], totals: Tensor, lower: list[Point | None], upper: list[Point | None], rule: str
) -> None:
    """Adds one step of the sum: (y above − y below) times the gradient below, or the mean of both gradients."""
    for i, (below, above) in enumerate(zip(lower, upper, strict=True)):
        if below is None or above is None:
            continue
        slope = below.gradient if rule == "left" else (below.gradient + above.gradient).mul_(0.5)
        whole = (above.leaving - below.leaving).mul_(slope)
        part = whole if below.part is below.leaving else (above.part - below.part).mul_(slope)
        totals[i] += whole.flatten(1).sum(1, dtype=torch.float64)
        held = units[i]
        units[i] = part if held is None else held.add_(part)


def _likelihood(walk: Walk, reference: Tensor) -> tuple[Change, Tensor]:
    batch: Batch = walk.batch
    weights = sample_losses(walk.model, reference, batch, reference)[1]
    return (lambda output: -sample_losses(walk.model, output, batch, reference)[0]), weights


def _logit(walk: Walk, reference: Tensor) -> tuple[Change, Tensor]:
    """The logit of the label, or without labels of the class that the model prefers on the unchanged inputs."""
    labels = walk.batch.labels
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == reference.shape[:-1]:
        chosen = labels.long().clamp_min(0)
    else:
        chosen = reference.argmax(-1)
    weights = torch.ones(len(reference), dtype=torch.float64, device=reference.device)
    return (lambda output: output.gather(-1, chosen[..., None]).flatten(1).sum(1)), weights


TARGET_FUNCTIONS = {"likelihood": _likelihood, "logit": _logit}


@dataclass(frozen=True)
@ANALYZERS.register("layer_conductance")
class LayerConductanceAnalyzer(ImportanceAnalyzer):
    """Mean over samples of Σ_j |∫₀¹ ∂F/∂y_j · dy_j/dα dα| along a straight path of inputs, in the unit of F.

    y is what a layer adds to its stream, because the *signed* sum over a whole residual stream is F(x) − F(x′) at every depth and
    ranks nothing. All layers share one path: `steps` + 1 forwards and backwards of the activations, whatever their number. Two
    points of the path are held at a time. A token model's path runs in the streams that enter its first layers. A shared layer is
    taken from its first input to its last output. The standard error is over samples. The error of the sum itself is watched by
    completeness: a layer whose sum misses the target's change by more than twice that change has no score (`failed`).

    Parameters
    ----------
    steps
        Intervals of the path, n ≥ 1.
    rule
        ``trapezoid`` (default): each step takes the mean of the gradients at its ends; ``left``: the one at its lower end, as
        captum's ``LayerConductance`` does at these points.
    target
        F. ``likelihood`` (default): minus the task's loss per sample, nats; without labels minus the divergence from the model's
        own answer, so nothing is drawn. ``logit``: the logit of the label, or of the class that the model prefers.
    of
        ``branch`` (default): what the layer adds; ``output``: all that leaves it.
    at
        ``auto``: the inputs where all are continuous, else ``stream``, the streams that enter the first layers; or ``inputs``.
    origin
        x′. ``zeros``; ``mean``: the mean over each sample's positions. ``auto`` (default): zeros for inputs, the mean for
        streams, since a normalization has no finite slope at a stream of zeros and no sum over a few points can follow it there.

    References
    ----------
    Dhamdhere, Sundararajan, Yan (2018), "How important is a neuron?"; Shrikumar, Su, Kundaje (2018), "Computationally efficient
    measures of internal neuron importance". There the conductance of a unit is signed; the sum of absolute values is ours.
    """

    method: ClassVar[str] = "layer_conductance"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    steps: int = 20
    rule: Literal["trapezoid", "left"] = "trapezoid"
    target: Literal["likelihood", "logit"] = "likelihood"
    of: Literal["branch", "output"] = "branch"
    at: At = "auto"
    origin: Literal["auto", "zeros", "mean"] = "auto"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES, self.method)
        one_of("target", self.target, TARGETS, self.method)
        one_of("of", self.of, PARTS, self.method)
        one_of("origin", self.origin, ORIGINS, self.method)
        one_of("at", self.at, PLACES, self.method)
        if self.steps < 1:
            raise UsageError(f"layer_conductance needs at least 1 step, not {self.steps}.")

    def measured_in(self) -> str:
        return "logit" if self.target == "logit" else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        return PathSums(model, self)

    def score(self, model: UniversalModel, statistic: PathSums) -> Mapping[str, LayerScore]:
        scores = statistic.scores(model.layers)
        for layer, gap in zip(model.layers, statistic.incompleteness().tolist(), strict=True):
            if layer.site is None and scores[layer.name].status is Status.OK and not gap <= UNRESOLVED:
                reason = f"{self.steps} steps do not resolve the path: the sum is off by {gap:.3g} times the target's change"
                scores[layer.name] = LayerScore.missing(Status.FAILED, reason)
        return scores
