"""Several cheap methods in one sweep, combined by a stacker that was fitted to measured damage of other models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer, Signal, Statistic
from layerwise.consensus import UNIT
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore, Status
from layerwise.stacking import COMPONENTS, stacked, stackers, standing
from layerwise.sweep import Seen

ONLY_BLOCKS = "the stacker is fitted on whole blocks, and this is a part inside one"
UNFITTED = "skip"  # an operation that may be named before a stacker was fitted for it
JOINT = "/"


class Composite(Statistic):
    """The statistics of several observing analyzers, fed together; their states lie under ``label/key``."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.ACTIVATIONS, Signal.GRADIENTS, Signal.SAMPLE_GRADIENTS})

    def __init__(self, parts: Mapping[str, Statistic]) -> None:
        self.parts = dict(parts)

    def observe(self, seen: Seen) -> None:
        for part in self.parts.values():
            part.observe(seen)

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        for part in self.parts.values():
            if Signal.SAMPLE_GRADIENTS in part.needs:
                part.sample_gradient(layer, parameter, gradient)

    def merge_(self, other: Composite) -> None:
        for label, part in self.parts.items():
            part.merge_(other.parts[label])

    def state(self) -> dict[str, Tensor]:
        return {f"{label}{JOINT}{key}": tensor for label, part in self.parts.items() for key, tensor in part.state().items()}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        for label, part in self.parts.items():
            start = label + JOINT
            part.load_({key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)})

    @property
    def samples(self) -> int:
        return max(part.samples for part in self.parts.values())


@dataclass(frozen=True)
@ANALYZERS.register("meta_learning")
class MetaLearningAnalyzer(ImportanceAnalyzer):
    """The share of layers that would do less damage, 0 … 1, predicted from cheap methods' ranks, depth, kind and size.

    It runs block influence, first-order estimates (weights and branch), Fisher information and the weight norm in one sweep. A
    ridge fitted to measured damage, judged by leaving whole models out, weighs their ranks. Where no fit beats both depth alone
    and the plain mean of ranks, that mean is used, and the settings say ``learned: False`` and why. It is no measure of its own
    and has no vote in a consensus.

    The standard error is the root mean square error on models that were left out; without a fit, that over the methods.

    Parameters
    ----------
    op
        The damage that is predicted: ``skip`` (default), or another operation of the shipped table.

    References
    ----------
    Wolpert (1992), "Stacked generalization". Here the left-out unit is a model and not a sample.
    """

    method: ClassVar[str] = "meta_learning"
    unit: ClassVar[str] = UNIT

    op: str = UNFITTED

    def __post_init__(self) -> None:
        known = {UNFITTED, *stackers()}
        if self.op not in known:
            raise UsageError(f"meta_learning has no stacker for the operation {self.op!r}.", remedy=nearest(self.op, known))

    def settings(self) -> dict[str, Any]:
        return super().settings() | standing(self.op) | {"components": list(COMPONENTS)}

    def statistic(self, model: UniversalModel) -> Composite:
        parts = {label: analyzer.statistic(model) for label, analyzer in components().items()}
        return Composite({label: part for label, part in parts.items() if part is not None})

    def score(self, model: UniversalModel, statistic: Composite) -> Mapping[str, LayerScore]:
        scores = {label: a.finish(model, statistic.parts.get(label), 0.0) for label, a in components().items()}
        blocks = [layer for layer in model.layers if layer.site is None]
        names = {layer.name for layer in blocks}
        scores = {m: replace(s, entries={n: e for n, e in s.entries.items() if n in names}) for m, s in scores.items()}
        voters = {label: s for label, s in scores.items() if not s.settings.get("baseline")}
        units = {x.name: LayerScore.missing(Status.NOT_APPLICABLE, ONLY_BLOCKS) for x in model.layers if x.site is not None}
        return {**stacked(blocks, scores, voters, self.op).entries, **units} if blocks else units


def components() -> dict[str, ImportanceAnalyzer]:
    """Label → analyzer of everything that is combined."""
    return {label: ANALYZERS[name](**settings) for label, (name, settings) in COMPONENTS.items()}
