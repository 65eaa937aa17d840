"""Fisher information: how strongly a sample's log-likelihood reacts to the layer's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.scores import LayerScore
from layerwise.statistics import MomentsStatistic
from layerwise.sweep import Seen


class SquaredGradients(MomentsStatistic):
    """Per sample: the squared norm of the gradient of all of a layer's parameters."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SAMPLE_GRADIENTS})

    def __init__(self, layers: int) -> None:
        super().__init__(Moments(layers))
        self._batch: dict[int, Tensor] = {}

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        norms = gradient.flatten(1).double().square().sum(1)
        self._batch[layer] = self._batch[layer] + norms if layer in self._batch else norms

    def observe(self, seen: Seen) -> None:
        for layer, norms in self._batch.items():
            self.moments.add_(layer, norms)
        self._batch.clear()


@dataclass(frozen=True)
@ANALYZERS.register("fisher_information")
class FisherInformationAnalyzer(ImportanceAnalyzer):
    """Mean over samples of ‖∇_θ log p(y|x)‖²: the trace of the layer's Fisher information matrix, in nats² per unit of θ².

    The gradient is each sample's own, so the value does not depend on the batch size. With labels y is the label (the empirical
    Fisher, which vanishes where the model is sure and right); without labels y is drawn from the model (the true Fisher).

    Parameters
    ----------
    per_parameter
        Divide by the number of the layer's parameters, so that size alone does not make a layer important.

    References
    ----------
    Kunstner, Hennig, Balles (2019), "Limitations of the empirical Fisher approximation for natural gradient descent".
    """

    method: ClassVar[str] = "fisher_information"
    unit: ClassVar[str] = "nats²"

    # It sees neither a dead nor a vital layer for certain: a zero output projection still has a gradient, and larger weights a
    # smaller one. It says how sharply the answers react to the parameters, which is what rounding them asks.

    per_parameter: bool = False

    def measured_in(self) -> str:
        return "nats² per parameter" if self.per_parameter else self.unit

    def statistic(self, model: UniversalModel) -> Statistic:
        return SquaredGradients(len(model.layers))

    def score(self, model: UniversalModel, statistic: SquaredGradients) -> Mapping[str, LayerScore]:
        scale = [layer.parameters if self.per_parameter else 1 for layer in model.layers]
        return statistic.scores(model.layers, scale=torch.tensor(scale).reciprocal().tolist())
