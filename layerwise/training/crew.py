"""Who trains: this process alone, or the processes that ``accelerate launch`` or ``torchrun`` started, one per device.

Decision: each batch is shared between the processes and the gradients are summed, weighted by the samples. So the recipe does
not change with the number of devices, and the weights are those of one device up to rounding; exceptions are what looks at a
whole batch (batch normalization, relations between samples) or weighs samples unequally. Gradients are summed after the backward
pass and not by a wrapper around the module: hooks, names and classes stay as they are.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.errors import UsageError, missing_dependency, nearest
from layerwise.training.objective import Portion


class Crew(ABC):
    """`first`: whether this process is the one that writes and reports."""

    first: bool = True

    @abstractmethod
    def part(self, batch: Batch, index: int) -> tuple[Batch, Portion] | None:
        """This process's samples of the batch; None where there are fewer samples than processes."""

    @abstractmethod
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the processes."""

    @abstractmethod
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its mean over the processes."""

    @abstractmethod
    def gather_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes its sum over the processes; None stays where no process has one."""

    @abstractmethod
    def wait(self) -> None:
        """Until all processes are here."""


class Alone(Crew):
    def part(self, batch: Batch, index: int) -> tuple[Batch, Portion] | None:
        return batch, Portion(index, 0, batch.size, batch.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def gather_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def wait(self) -> None:
        pass


class Together(Crew):
    """One of several processes, through Accelerate."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.first = accelerator.is_main_process

    def part(self, batch: Batch, index: int) -> tuple[Batch, Portion] | None:
        count, rank, size = self.accelerator.num_processes, self.accelerator.process_index, batch.size
        start, stop = size * rank // count, size * (rank + 1) // count
        if start == stop:
            return None
        return (batch if count == 1 else batch.narrow(start, stop)), Portion(index, start, stop, size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        self._reduce_(tensors, "sum")

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        self._reduce_(tensors, "mean")

    def gather_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        device = self.accelerator.device
        reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        self.sum_([reached])
        used = [p for p, count in zip(parameters, reached.tolist(), strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([p.grad for p in used if p.grad is not None])

    def _reduce_(self, tensors: Sequence[Tensor], how: str) -> None:
        """All of one type in one message."""
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            own = [t for t in tensors if t.dtype == dtype]
            joined = self.accelerator.reduce(torch.cat([t.reshape(-1) for t in own]), how)
            for tensor, value in zip(own, joined.split([t.numel() for t in own]), strict=True):
                tensor.copy_(value.view_as(tensor))

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


@contextmanager
def _alone(module: nn.Module) -> Iterator[Crew]:
    yield Alone()


@contextmanager
def _accelerate(module: nn.Module) -> Iterator[Crew]:
    """Inside, the module is on this process's device."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise missing_dependency("accelerate", "train", "The executor 'accelerate'") from None
    home = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    accelerator = Accelerator()
    module.to(accelerator.device)
    try:
        yield Together(accelerator)
    finally:
        module.to(home)


def _auto(module: nn.Module) -> Any:
    """Accelerate where a launcher started several processes."""
    return (_accelerate if int(os.environ.get("WORLD_SIZE", "1")) > 1 else _alone)(module)


CREWS: Mapping[str, Callable[[nn.Module], Any]] = {"auto": _auto, "local": _alone, "accelerate": _accelerate}


def crew_for(executor: str, module: nn.Module) -> Any:
    """The context that gives the `Crew` which ``auto``, ``local`` or ``accelerate`` names. Raises `UsageError`."""
    if executor not in CREWS:
        raise UsageError(f"Unknown executor for training {executor!r}.", remedy=nearest(executor, CREWS))
    return CREWS[executor](module)
