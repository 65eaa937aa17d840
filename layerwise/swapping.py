"""Weights exchanged for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

Values = Sequence[tuple[Tensor, Tensor]]  # a parameter and what it shall be


@contextmanager
def swapped(values: Values) -> Iterator[None]:
    """Inside, each parameter has the value beside it; afterwards its own again."""
    before = [(p, p.data) for p, _ in values]
    try:
        for p, value in values:
            p.data = value
        yield
    finally:
        for p, value in before:
            p.data = value


__all__ = ["Values", "swapped"]
