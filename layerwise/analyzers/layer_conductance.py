"""Conductance: how much of the change of the answer along a path of inputs flows through a layer. One path for all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Statistic
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore, Status
from layerwise.statistics import MomentsStatistic
from layerwise.structure import Layer
from layerwise.sweep import Seen, copied
from layerwise.tangents import forward_mode, moving, velocity
from layerwise.task import classes_last
from layerwise.walk import PLACES, At, Change, Walk, fed_by_none, inputs_changed, one_of, place_of, sample_losses

TARGETS = ("likelihood", "logit")
PARTS = ("branch", "output")
ORIGINS = ("auto", "zeros", "mean")
UNRESOLVED = 2.0  # a full cut has 0 and a part of one up to about 1: more is the sum's own error


class Step(NamedTuple):
    """One term of the sum: `weight` times the gradients times (upper − lower), or times `upper` where that is a derivative."""

    gradients: list[Tensor | None]
    upper: Seen
    lower: Seen | None
    weight: float


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
    """The path integral of one batch, from the inputs down to the origin x′; three points of the path are held at a time."""
    place = place_of(settings.at, walk.batch)
    origin = settings.origin if settings.origin != "auto" else {"inputs": "zeros", "stream": "mean"}[place]
    with fed_by_none(walk.model.blocks) as embedded:
        first = walk.forward(walk.batch, graph=True)
    assert first.output is not None
    target, weights = TARGET_FUNCTIONS[settings.target](walk, first.output.detach())
    # a first block's own output is all that is asked of it, so no later pass goes back through it; units lie inside blocks
    whole = all(layer.site is None for layer in walk.model.layers)
    cut = [block for block in embedded if whole and block.calls == 1]
    path = Path(walk, place, origin, embedded, cut, target)
    units: list[Tensor | None] = [None] * len(walk.model.layers)
    totals = torch.zeros(len(units), walk.batch.size, dtype=torch.float64, device=weights.device)
    for step in RULES[settings.rule](path, first, settings.steps):
        _add_(units, totals, step, settings.of)
    return Conductances(units, totals, (path.value(1.0) - path.value(0.0)).double(), weights)


@dataclass
class Path:
    """A straight path of inputs of one batch, from x′ at α = 0 to the inputs at α = 1. `values` are the target's, by α."""

    walk: Walk
    place: str
    origin: str
    embedded: Sequence[Layer]
    cut: Sequence[Layer]
    target: Change
    values: dict[float, Tensor] = field(default_factory=dict)

    def gradients(self, alpha: float, seen: Seen | None = None) -> Seen:
        """The layers at this point, with the target's gradients. `seen` may be a forward with a graph that was run already."""
        found = self._forward(alpha, away_from, graph=True) if seen is None else seen
        assert found.output is not None
        values = self.target(found.output)
        self.walk.backward(found, values)
        self.values[alpha] = values.detach()
        found.output = None
        return found

    def velocities(self, alpha: float) -> Seen:
        """d/dα of all that is seen of the layers at this point."""
        with forward_mode("Use rule='trapezoid', which needs none."):
            return self._forward(alpha, moving_away_from, graph=False)

    def value(self, alpha: float) -> Tensor:
        """The target at this point, per sample; costs a forward where no other pass went through it."""
        if alpha not in self.values:
            output = self._forward(alpha, away_from, graph=False).output
            assert output is not None
            self.values[alpha] = self.target(output)
        return self.values[alpha]

    def _forward(self, alpha: float, towards: Callable[[str, float], Change], *, graph: bool) -> Seen:
        change, batch, cut = towards(self.origin, alpha), self.walk.batch, self.cut if graph else ()
        keep = velocity if towards is moving_away_from else copied
        if self.place == "inputs":
            return self.walk.forward(inputs_changed(batch, change), graph=graph, cut=cut, keep=keep)
        changes = {layer.index: change for layer in self.embedded}
        return self.walk.forward(batch, graph=graph, changes=changes, cut=cut, keep=keep)


def away_from(origin: str, alpha: float) -> Change:
    """x ↦ x′ + α(x − x′) with x′ = 0 or the mean over the second dimension, a stream's positions."""

    def change(x: Tensor) -> Tensor:
        start = torch.zeros_like(x) if origin == "zeros" else x.mean(1, keepdim=True)
        return start + alpha * (x - start)

    return change


def moving_away_from(origin: str, alpha: float) -> Change:
    """The same with its derivative x − x′."""

    def change(x: Tensor) -> Tensor:
        return moving(away_from(origin, alpha)(x), x - away_from(origin, 0.0)(x))

    return change


def trapezoid(path: Path, first: Seen, steps: int) -> Iterator[Step]:
    """Σ (y_{k+1} − y_k)(g_k + g_{k+1})/2, gathered by gradient: each meets half the way from the point below to the one above."""
    above = here = path.gradients(1.0, first)
    for k in range(steps - 1, -1, -1):
        below = path.gradients(k / steps)
        yield Step(here.gradients, above, below, 0.5)
        here.forget_gradients()
        above, here = here, below
    yield Step(here.gradients, above, here, 0.5)


def left(path: Path, first: Seen, steps: int) -> Iterator[Step]:
    """Σ (y_{k+1} − y_k) g_k."""
    above = path.gradients(1.0, first)
    for k in range(steps - 1, -1, -1):
        here = path.gradients(k / steps)
        yield Step(here.gradients, above, here, 1.0)
        above = here


def gauss_legendre(path: Path, first: Seen, steps: int) -> Iterator[Step]:
    """Σ w_k g_k dy_k/dα at the nodes α_k; neither end is one."""
    assert first.output is not None
    path.values[1.0] = path.target(first.output.detach())
    for node, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        alpha = float(node + 1) / 2
        yield Step(path.gradients(alpha).gradients, path.velocities(alpha), None, float(weight) / 2)


RULES = {"trapezoid": trapezoid, "left": left, "gauss_legendre": gauss_legendre}


def _add_(units: list[Tensor | None], totals: Tensor, step: Step, of: str) -> None:
    """Adds one term to each layer's sums, where it was seen with one row per sample and a gradient came."""
    moves = Moves(step)
    for layer in step.upper.layers:
        i = layer.index
        gradient = step.gradients[i]
        if gradient is None or not all(seen.complete(layer) for seen in (step.upper, step.lower) if seen is not None):
            continue
        entering = moves.of("entering", i) if of == "branch" and layer.site is None and layer.skippable else None
        whole = moves.of("leaving", i)
        part = whole if entering is None else whole - entering
        totals[i] += step.weight * _inner(whole, gradient)
        held = units[i]
        units[i] = (torch.zeros_like(part) if held is None else held).addcmul_(part, gradient, value=step.weight)


class Moves:
    """upper − lower of a step. The last one is kept: what a layer gives is mostly what the next one takes."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, side: Literal["entering", "leaving"], layer: int) -> Tensor:
        above = getattr(self.step.upper, side)[layer]
        if self.step.lower is None:
            return above
        below = getattr(self.step.lower, side)[layer]
        if self.last is None or self.last[0] is not above or self.last[1] is not below:
            self.last = above, below, above - below
        return self.last[2]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y per sample, (samples,), float64; added up in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vecdot(x.flatten(1).to(wide), y.flatten(1).to(wide)).double()


def _likelihood(walk: Walk, reference: Tensor) -> tuple[Change, Tensor]:
    batch: Batch = walk.batch
    weights = sample_losses(walk.model, reference, batch, reference)[1]
    return (lambda output: -sample_losses(walk.model, output, batch, reference)[0]), weights


def _logit(walk: Walk, reference: Tensor) -> tuple[Change, Tensor]:
    """The logit of the label, or without labels of the class that the model prefers on the unchanged inputs."""
    labels, logits = walk.batch.labels, classes_last(reference)
    chosen = logits.argmax(-1)
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == chosen.shape:
        chosen = torch.where((labels >= 0) & (labels < logits.shape[-1]), labels.long(), chosen)  # padding has no label
    weights = torch.ones(len(reference), dtype=torch.float64, device=reference.device)
    return (lambda output: classes_last(output).gather(-1, chosen[..., None]).flatten(1).sum(1)), weights


TARGET_FUNCTIONS = {"likelihood": _likelihood, "logit": _logit}


@dataclass(frozen=True)
@ANALYZERS.register("layer_conductance")
class LayerConductanceAnalyzer(ImportanceAnalyzer):
    """Mean over samples of Σ_j |∫₀¹ ∂F/∂y_j · dy_j/dα dα| along a straight path of inputs, in the unit of F.

    y is what a layer adds to its stream, because the *signed* sum over a whole residual stream is F(x) − F(x′) at every depth and
    ranks nothing. All layers share one path: `steps` + 1 forwards and backwards of the activations, whatever their number. Three
    points of the path are held at a time. A token model's path runs in the streams that enter its first layers. A shared layer is
    taken from its first input to its last output. The standard error is over samples. The error of the sum itself is watched by
    completeness: a layer whose sum misses the target's change by more than twice that change has no score (`failed`).

    Parameters
    ----------
    steps
        Intervals of the path, n ≥ 1.
    rule
        ``trapezoid`` (default): each step takes the mean of the gradients at its ends; ``left``: the one at its lower end, as
        captum's ``LayerConductance`` does at these points. ``gauss_legendre``: `steps` nodes with their weights and dy/dα by
        forward-mode differentiation; on a smooth model the error falls exponentially, for one more, dearer forward per node.
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
    rule: Literal["trapezoid", "left", "gauss_legendre"] = "trapezoid"
    target: Literal["likelihood", "logit"] = "likelihood"
    of: Literal["branch", "output"] = "branch"
    at: At = "auto"
    origin: Literal["auto", "zeros", "mean"] = "auto"

    def __post_init__(self) -> None:
        one_of("rule", self.rule, tuple(RULES), self.method)
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
