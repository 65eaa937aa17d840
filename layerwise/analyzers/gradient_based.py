"""First-order (Taylor) importance: what the loss would change by, to first order, if the layer's weights or branch were zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic, masked_gradients, squared_norms
from layerwise.sweep import Seen

Form = Literal["absolute", "signed", "norm", "activation"]


def _absolute(parameter: Tensor, gradient: Tensor) -> Tensor:
    return (gradient * parameter.detach()).flatten(1).abs().double().sum(1)


def _signed(parameter: Tensor, gradient: Tensor) -> Tensor:
    return (gradient * parameter.detach()).flatten(1).double().sum(1)


def _squared(parameter: Tensor, gradient: Tensor) -> Tensor:
    return squared_norms(gradient)


# form → (what a parameter adds per sample, what is done with a layer's sum)
PARAMETER_FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "absolute": (_absolute, lambda total: total),
    "signed": (_signed, lambda total: total.abs()),
    "norm": (_squared, lambda total: total.sqrt()),
}


class ParameterTaylor(MomentsStatistic):
    """Per sample: a sum over the layer's parameters, then a function of it."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self, layers: int, form: str) -> None:
        super().__init__(Moments(layers))
        self.part, self.whole = PARAMETER_FORMS[form]
        self._batch: dict[int, Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        part = self.part(parameter, gradient)
        self._batch[layer] = self._batch[layer] + part if layer in self._batch else part

    def observe(self, seen: Seen) -> None:
        for layer, total in self._batch.items():
            self.moments.add_(layer, self.whole(total))
        self._batch.clear()
        for units, gradients in masked_gradients(seen):
            self.moments.add_columns_([unit.index for unit in units], gradients.abs())


class BranchTaylor(MomentsStatistic):
    """Per sample: |⟨gradient of what leaves, what the layer adds to the stream⟩|; without a residual, what leaves itself."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS, Signal.GRADIENTS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))

    def observe(self, seen: Seen) -> None:
        for units, gradients in seen.mask_gradients():
            self.moments.add_columns_([unit.index for unit in units], gradients.abs())
        for layer in (x for x in seen.layers if x.site is None):
            gradient, branch = seen.gradients[layer.index], seen.branch(layer)
            if gradient is None or branch is None or not seen.complete(layer):
                continue
            self.moments.add_(layer.index, (gradient.double() * branch.double()).flatten(1).sum(1).abs())


@dataclass(frozen=True)
@ANALYZERS.register("gradient_based")
class GradientBasedAnalyzer(ImportanceAnalyzer):
    """Mean over samples of a first-order estimate of the loss change, in nats (`norm`: nats per unit of θ).

    Of a head or a channel every form is |d loss / d m| of a mask m = 1 on what is seen at its site: |⟨g, a⟩|, the estimate of
    silencing it.

    Parameters
    ----------
    form
        ``absolute``: Σ_w |g_w w| (default); ``signed``: |Σ_w g_w w|, exactly 0 for layers whose weights' scale does not matter;
        ``norm``: ‖g‖; ``activation``: |⟨g, f(x)⟩| with f what the layer adds to its stream, the estimate of skipping it.

    References
    ----------
    Molchanov, Mallya, Tyree, Frosio, Kautz (2019), "Importance estimation for neural network pruning". There the gradient is a
    batch's; here it is each sample's, so that the value does not depend on the batch size.
    """

    method: ClassVar[str] = "gradient_based"
    unit: ClassVar[str] = "nats"
    sees: ClassVar[frozenset[str]] = frozenset({"dead", "vital"})

    form: Form = "absolute"

    def __post_init__(self) -> None:
        known = [*PARAMETER_FORMS, "activation"]
        if self.form not in known:
            raise UsageError(f"Unknown form {self.form!r} of gradient_based.", remedy=nearest(self.form, known))

    def measured_in(self) -> str:
        return "nats per unit of θ" if self.form == "norm" else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        layers = len(model.layers)
        return BranchTaylor(layers) if self.form == "activation" else ParameterTaylor(layers, self.form)

    def score(self, model: UniversalModel, statistic: MomentsStatistic) -> Mapping[str, LayerScore]:
        return statistic.scores(model.layers)
