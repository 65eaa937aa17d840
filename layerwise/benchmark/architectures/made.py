"""What every group of architectures gives: names, and for each a module with a batch that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data import Batch
from layerwise.errors import ModelError
from layerwise.examples import failure


@dataclass(frozen=True)
class Made:
    """A module in eval mode with an example that runs; `how` says in words what was chosen."""

    module: nn.Module
    example: Batch
    how: str = ""


class NotBuilt(ModelError):
    """The model cannot be made here: a package, a download or a default that its library does not have."""


@dataclass(frozen=True)
class Group:
    """`names` in a fixed order; `make` raises `NotBuilt`; `kinds` of a name are the tables of the page that it counts in."""

    title: str
    names: Callable[[], Sequence[str]]
    make: Callable[[str], Made]
    kinds: Callable[[str], Sequence[str]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_that_runs(attempts: Iterable[tuple[str, Callable[[], tuple[nn.Module, Batch]]]]) -> Made:
    """The first attempt that builds and runs. Raises `NotBuilt` with what each of them said."""
    said: list[str] = []
    for how, attempt in attempts:
        torch.manual_seed(0)
        try:
            module, batch = attempt()
        except Exception as error:  # whatever a library's constructor raises
            said.append(f"{how}: {brief(error)}")
            continue
        reason = failure(module.eval(), batch)
        if reason is None:
            return Made(module, batch, how)
        said.append(f"{how}: {reason}")
    raise NotBuilt("; ".join(dict.fromkeys(said)) or "nothing to try")


def brief(error: BaseException) -> str:
    """The error's class and the first line of its text."""
    lines: list[Any] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


__all__ = ["Group", "Made", "NotBuilt", "brief", "first_that_runs", "noise"]
