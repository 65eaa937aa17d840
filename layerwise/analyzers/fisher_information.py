"""Fisher information: how strongly a sample's log-likelihood reacts to the layer's parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic, masked_gradients, squared_norms
from layerwise.sweep import Seen, Sweep
from layerwise.task import Fidelity
from layerwise.walk import Walk

SLICED = "is a slice of its matrices: rounding is judged on whole ones"
KINDS = ("auto", "true", "empirical")


def rounding_change(weight: Tensor, bits: int) -> Tensor | None:
    """What rounding to the nearest of 2^bits − 1 steps per row, symmetric about zero, adds to a weight; None for vectors."""
    if weight.dim() < 2:
        return None
    rows = weight.detach().flatten(1)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (rows / step.masked_fill(step == 0, 1.0)).round() * step
    return (rounded - rows).reshape(weight.shape)


def _trace(parameter: Tensor, gradient: Tensor, bits: int) -> Tensor:
    return squared_norms(gradient)


def _fit(parameter: Tensor, gradient: Tensor, bits: int) -> Tensor:
    change = rounding_change(parameter, bits)
    power = gradient.new_zeros(()) if change is None else change.double().square().mean()
    return squared_norms(gradient) * power


def _directional(parameter: Tensor, gradient: Tensor, bits: int) -> Tensor:
    change = rounding_change(parameter, bits)
    if change is None:
        return gradient.new_zeros(len(gradient), dtype=torch.float64)
    return (gradient * change).flatten(1).double().sum(1)


# weighting → (what a parameter adds per sample, what is done with a layer's sum)
WEIGHTINGS: dict[str, tuple[Callable[[Tensor, Tensor, int], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (_trace, lambda total: total),
    "quantization": (_fit, lambda total: total),
    "direction": (_directional, torch.square),
}


class SquaredGradients(MomentsStatistic):
    """Per sample: the squared norm of the gradient of all of a layer's parameters, or what the weighting makes of it."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self, layers: int, weighting: str = "none", bits: int = 4) -> None:
        super().__init__(Moments(layers))
        self.part, self.whole = WEIGHTINGS[weighting]
        self.masks = weighting == "none"
        self.bits = bits
        self._batch: dict[int, Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        part = self.part(parameter, gradient, self.bits)
        self._batch[layer] = self._batch[layer] + part if layer in self._batch else part

    def observe(self, seen: Seen) -> None:
        for layer, total in self._batch.items():
            self.moments.add_(layer, self.whole(total))
        self._batch.clear()
        for units, gradients in masked_gradients(seen) if self.masks else ():
            self.moments.add_columns_([unit.index for unit in units], gradients.square())


class DrawnAnswers(MomentsStatistic):
    """The same in a sweep of its own, whose answers are drawn from the model although the data have labels."""

    walks: ClassVar[bool] = True
    differentiates = True

    def __init__(self, inner: SquaredGradients) -> None:
        super().__init__(inner.moments)
        self.inner = inner

    def load_(self, state: Mapping[str, Tensor]) -> None:
        super().load_(state)
        self.inner.moments = self.moments  # the sweep adds to those of the inner one

    def walk(self, walk: Walk) -> None:
        model = copy.copy(walk.model)
        model.task = model.task if isinstance(model.task, Fidelity) else Fidelity()
        self.inner.moments = self.moments  # again at each batch, because loading a state exchanges them
        sweep = Sweep(model, [self.inner])
        sweep.counts = walk.counts
        sweep.batch(walk.batch, walk.seed)


@dataclass(frozen=True)
@ANALYZERS.register("fisher_information")
class FisherInformationAnalyzer(ImportanceAnalyzer):
    """Mean over samples of ‖∇_θ log p(y|x)‖²: the trace of the layer's Fisher information matrix, in nats² per unit of θ².

    The gradient is each sample's own, so the value does not depend on the batch size. Costs one forward and one backward,
    shared with every other observing method; the true Fisher of data with labels takes a forward and two backwards per batch
    of its own. The standard error is over samples.

    Of a head or a channel it is that of one parameter, a mask m = 1 on what is seen at its site: mean (d log p / d m)², in nats².

    Parameters
    ----------
    per_parameter
        Divide by the number of the layer's parameters, so that size alone does not make a layer important.
    kind
        ``true``: y is drawn from the model, one answer per sample (per token); ``empirical``: y is the label, which vanishes
        where the model is sure and right; ``auto`` (default): empirical with labels, true without.
    weighting
        ``none`` (default); ``quantization``: for each weight matrix the trace times the mean squared change that rounding to
        `bits` makes, summed over matrices (FIT), in nats²; ``direction``: mean over samples of ⟨∇ log p, change⟩², which
        with the true Fisher is twice the divergence that rounding this layer causes, to second order.
    bits
        The width that weights are rounded to, to the nearest step of each row; vectors (norms, biases) are not rounded.

    References
    ----------
    Kunstner, Hennig, Balles (2019), "Limitations of the empirical Fisher approximation for natural gradient descent";
    Zandonati et al. (2023), "FIT: a metric for model sensitivity". There the change is modelled as uniform noise and
    activations count as well; here the change of the weights alone is measured.
    """

    method: ClassVar[str] = "fisher_information"
    unit: ClassVar[str] = "nats²"

    # It sees neither a dead nor a vital layer for certain: a zero output projection still has a gradient, and larger weights a
    # smaller one. It says how sharply the answers react to the parameters, which is what rounding them asks.

    per_parameter: bool = False
    kind: Literal["auto", "true", "empirical"] = "auto"
    weighting: Literal["none", "quantization", "direction"] = "none"
    bits: int = 4

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("weighting", tuple(WEIGHTINGS))):
            given = getattr(self, name)
            if given not in known:
                raise UsageError(f"Unknown {name} {given!r} of fisher_information.", remedy=nearest(given, known))
        if not 2 <= self.bits <= 16:
            raise UsageError(f"fisher_information: bits is {self.bits}.", remedy="Give 2 to 16.")
        if self.per_parameter and self.weighting != "none":
            raise UsageError("per_parameter divides the plain trace only.", remedy="Leave out per_parameter or weighting.")

    def measured_in(self) -> str:
        return "nats² per parameter" if self.per_parameter else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        self._check(model)
        squares = SquaredGradients(len(model.layers), self.weighting, self.bits)
        return DrawnAnswers(squares) if self.kind == "true" and not isinstance(model.task, Fidelity) else squares

    def score(self, model: UniversalModel, statistic: MomentsStatistic) -> Mapping[str, LayerScore]:
        self._check(model)  # again, because the task may have been settled by the first batch
        scale = [layer.parameters if self.per_parameter and not layer.masked else 1 for layer in model.layers]
        missing = {x.name: SLICED for x in model.layers if x.masked and self.weighting != "none"}
        return statistic.scores(model.layers, scale=torch.tensor(scale).reciprocal().tolist(), missing=missing)

    def _check(self, model: UniversalModel) -> None:
        if self.kind == "empirical" and isinstance(model.task, Fidelity):
            raise UsageError(
                "The empirical Fisher needs labels, and the task 'fidelity' has none.", remedy="Give labels, or use kind='true'."
            )
