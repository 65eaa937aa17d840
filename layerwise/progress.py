"""A progress bar for whatever takes longer than a second, on a terminal only; what it writes goes to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 1.0  # seconds without a bar


def tracked(items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
    """The `items`, one by one; after a second a bar called `what` appears. Without a terminal nothing is written."""
    if not sys.stderr.isatty():
        yield from items
        return
    begun, done, iterator = time.monotonic(), 0, iter(items)
    for item in iterator:
        yield item
        done += 1
        if time.monotonic() - begun > PATIENCE:
            break
    else:
        return
    yield from _with_bar(iterator, what, total, done)


def _with_bar(rest: Iterator[T], what: str, total: int | None, done: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        for item in rest:
            yield item
            bar.advance(task)
