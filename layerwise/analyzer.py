"""`ImportanceAnalyzer` and `Statistic`: how a method says what it needs, gathers it batch by batch, and turns it into scores.

An analyzer is a frozen dataclass of settings. It gives a statistic, a small mergeable state that the engines feed:

- `needs` names the signals of the shared sweep (see `layerwise.sweep`); `observe` gets one batch of them;
- a statistic that intervenes gets each batch's `Replay` in `probe` instead (see `layerwise.replay`);
- a statistic that walks runs the model itself, on inputs of its own making, in `walk` (see `layerwise.walk`);
- an analyzer that only reads weights gives no statistic at all.

So any number of observing methods cost one pass, and a state can be saved after any batch, resumed and merged.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from layerwise.errors import UsageError
from layerwise.registry import Registry
from layerwise.scores import LayerScore, Scores, Status

if TYPE_CHECKING:
    from layerwise.attention_maps import AttentionCall
    from layerwise.data import Data
    from layerwise.model import UniversalModel
    from layerwise.replay import Replay
    from layerwise.structure import Layer
    from layerwise.sweep import Seen
    from layerwise.walk import Walk


class Signal(Enum):
    """What a sweep can show of each layer."""

    ACTIVATIONS = "activations"  # the stream entering and leaving each layer
    GRADIENTS = "gradients"  # and d(sum of losses)/d(leaving)
    ATTENTION = "attention"  # each call of attention, in the backward pass if GRADIENTS are needed as well
    SAMPLE_GRADIENTS = "sample_gradients"  # each sample's gradient of each parameter, one parameter at a time


class Statistic(ABC):
    """A method's running state: sums, never data."""

    needs: ClassVar[frozenset[Signal]] = frozenset()
    intervenes: ClassVar[bool] = False
    walks: ClassVar[bool] = False
    differentiates: bool = False  # a walk that runs a backward pass of its own
    aligned: ClassVar[bool] = False  # whether it compares one sample's positions with the same ones of another
    refused: str = ""  # why it is not fed with this model or these data, which leaves every layer not applicable

    def observe(self, seen: Seen) -> None:
        """One batch of the sweep, after its backward pass."""

    def sample_gradient(self, layer: int, parameter: Tensor, gradient: Tensor) -> None:
        """The gradient of one parameter for each sample, (samples, *parameter.shape); called during the backward pass."""

    def attention(self, layer: int, call: AttentionCall) -> None:
        """One call of attention in the layer, to be reduced at once: `call` holds what the model is about to let go of."""

    def probe(self, replay: Replay) -> None:
        """One batch's replay, for statistics that intervene."""

    def walk(self, walk: Walk) -> None:
        """One batch to run the model on as it likes (interpolated, corrupted, perturbed inputs), for statistics that walk."""

    @abstractmethod
    def merge_(self, other: Any) -> None:
        """Adds another shard's state of the same kind."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The whole state as tensors; `load_` of it gives the same bits."""

    @abstractmethod
    def load_(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many samples have been seen."""


class ImportanceAnalyzer(ABC):
    """One importance measure. Subclasses are frozen dataclasses whose fields are their settings."""

    method: ClassVar[str]
    unit: ClassVar[str]
    baseline: ClassVar[bool] = False  # a yardstick that has no vote in the consensus
    asks: ClassVar[frozenset[str]] = frozenset()  # of "attention": without it a layer is not applicable
    sees: ClassVar[frozenset[str]] = frozenset()  # of "dead", "vital": planted layers that it must find

    @abstractmethod
    def statistic(self, model: UniversalModel) -> Statistic | None:
        """A fresh statistic for this model, or None for a method that reads weights only."""

    @abstractmethod
    def score(self, model: UniversalModel, statistic: Any) -> Mapping[str, LayerScore]:
        """Layer name → score from a fed statistic; higher means more important. Layers that are left out are an error."""

    def measured_in(self) -> str:
        """The unit of the scores with these settings; `unit` is that of the default ones."""
        return self.unit

    def get_method_name(self) -> str:
        """The public name."""
        return self.method

    def analyze(self, model: UniversalModel, data: Data | None = None, *, seed: int = 0) -> Scores:
        """Scores of all layers of `model` on `data` (None is enough for methods that read weights only)."""
        from layerwise.observe import observe  # observe imports the engines, which import this module

        statistic = self.statistic(model)
        started = time.perf_counter()
        if statistic is not None:
            if data is None:
                raise UsageError(f"{self.method} needs data.", remedy="Pass batches, or load_data(...).")
            observe(model, data, {self.method: statistic}, seed=seed)
        return self.finish(model, statistic, time.perf_counter() - started)

    def finish(self, model: UniversalModel, statistic: Statistic | None, seconds: float) -> Scores:
        """The fed statistic's scores in model order, with unit, sample count, settings and `seconds` of work."""
        started = time.perf_counter()
        if statistic is not None and statistic.refused:
            nothing = LayerScore.missing(Status.NOT_APPLICABLE, statistic.refused)
            entries = {layer.name: nothing for layer in model.layers}
        else:
            scored = self.score(model, statistic)
            entries = {layer.name: scored[layer.name] for layer in model.layers}
        samples = statistic.samples if statistic is not None else 0
        seconds += time.perf_counter() - started
        return Scores(self.method, self.measured_in(), entries, samples, seconds, self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings as plain data, and whether this is a baseline."""
        fields: dict[str, Any] = asdict(self) if is_dataclass(self) and not isinstance(self, type) else {}
        return fields | ({"baseline": True} if self.baseline else {})


ANALYZERS: Registry[ImportanceAnalyzer] = Registry("analyzer", "layerwise.analyzers")


def streamless(layer: Layer) -> str:
    """Why a method that compares what enters and leaves a layer has no score for this one; '' if it has."""
    if layer.site is not None:
        return f"is a part inside {layer.parent}: no stream enters and leaves it"
    return "" if layer.stream is not None else layer.reason or "has no stream"


def unskippable(layer: Layer) -> str:
    """Why a method that skips layers has no score for this one; '' if it has."""
    return "" if layer.skippable else f"cannot be skipped: {layer.reason}"
