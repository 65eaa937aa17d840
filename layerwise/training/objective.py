"""`Objective`: the loss of a batch that training lowers. The default is the loss of the model's own task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.trace import run

if TYPE_CHECKING:
    from layerwise.model import UniversalModel
    from layerwise.supplies import Supplies


@dataclass(frozen=True)
class Portion:
    """Where a batch stands in the data: the samples `start` … `stop` − 1 of the `size` of batch number `index`."""

    index: int
    start: int
    stop: int
    size: int

    @property
    def share(self) -> float:
        """0 … 1, of its batch."""
        return (self.stop - self.start) / self.size


class Objective(ABC):
    """Frozen settings; what `begin` makes lives as long as the training."""

    @abstractmethod
    def begin(self, model: UniversalModel, supplies: Supplies) -> Lesson:
        """Settles what depends on model and data. Raises `UsageError` for a model that it does not suit."""

    @abstractmethod
    def key(self, supplies: Supplies) -> str:
        """All that the loss depends on besides model and data, as text: a checkpoint is resumed only by its like."""


class Lesson(ABC):
    """An objective at work on one model. `companion` holds what is trained along and thrown away afterwards (projections)."""

    companion: nn.Module | None = None

    @abstractmethod
    def loss(self, batch: Batch, portion: Portion) -> Tensor:
        """The mean loss of the batch, a scalar with its graph; the model's train flags are the caller's."""

    def figures(self) -> dict[str, float]:
        """What there is to say about the epoch that ends (parts of the loss, weights); starts counting anew."""
        return {}


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The mean loss of the model's task, in nats."""

    def key(self, supplies: Supplies) -> str:
        return "task loss"

    def begin(self, model: UniversalModel, supplies: Supplies) -> Lesson:
        assert model.task is not None  # the loop has seen the data
        if model.task.name == "fidelity":
            raise UsageError(
                "Without labels there is nothing to learn from: how far a model is from itself is 0.",
                place=supplies.training.name if supplies.training else "",
                remedy="Give labelled training data, name the task, or distill from a teacher.",
            )
        return _OfTask(model)


class _OfTask(Lesson):
    def __init__(self, model: UniversalModel) -> None:
        self.model = model

    def loss(self, batch: Batch, portion: Portion) -> Tensor:
        return task_loss(self.model, training_output(self.model, batch), batch)


@dataclass(frozen=True)
class Given(Objective):
    """A function of model and batch that gives the mean loss of the batch."""

    function: Callable[[UniversalModel, Batch], Tensor]

    def key(self, supplies: Supplies) -> str:
        found: Any = self.function
        return f"{found.__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"

    def begin(self, model: UniversalModel, supplies: Supplies) -> Lesson:
        return _OfFunction(model, self.function)


class _OfFunction(Lesson):
    def __init__(self, model: UniversalModel, function: Callable[[UniversalModel, Batch], Tensor]) -> None:
        self.model, self.function = model, function

    def loss(self, batch: Batch, portion: Portion) -> Tensor:
        return self.function(self.model, batch)


TASK_LOSS = TaskLoss()


def training_output(model: UniversalModel, batch: Batch) -> Tensor:
    """The tensor that the task reads, with its graph and under the train flags as they are."""
    return batch.by_sample(model.read(run(model.module, batch)))


def task_loss(model: UniversalModel, output: Tensor, batch: Batch) -> Tensor:
    """The mean loss of the model's task for these outputs."""
    assert model.task is not None
    values, weights = model.task.losses(output, batch, output.detach())
    return values.sum() / weights.sum().clamp_min(1e-12)
