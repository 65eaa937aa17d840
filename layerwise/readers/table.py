"""`Table`: the rows of one source, and `Request`: what of it was asked for."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from layerwise.errors import DataError, DataShardError, LayerwiseError, UsageError, nearest
from layerwise.rows import Record

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """`split` and `columns` (role → column) as given; `limit` rows drawn with `seed`; how many damaged files are left out."""

    split: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int | None = 0
    max_bad_shards: int = 0


@dataclass(frozen=True)
class Table:
    """Rows in order with their `columns`; `fingerprint` is the SHA-256 (hex) of where they come from.

    `typed`: values have their types; False for CSV, where all are text. `classes`: the labels' names, where the source has them.
    """

    rows: Sequence[Record]
    name: str
    fingerprint: str
    columns: tuple[str, ...]
    typed: bool = True
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def split(self, wanted: str | None) -> Table:
        """The rows whose column ``split`` says `wanted`. Raises `UsageError` where there is no such column or value."""
        if wanted is None:
            return self
        if "split" not in self.columns:
            remedy = "Leave split= out, or give a folder with one file per split."
            raise UsageError(f"{self.name} has no splits, so none is called {wanted!r}.", remedy=remedy)
        rows = [row for row in self.rows if row.get("split") == wanted]
        if not rows:
            known = {str(row.get("split")) for row in self.rows}
            raise UsageError(f"{self.name} has no split {wanted!r}.", remedy=nearest(wanted, known))
        return replace(self, rows=rows)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Every column that a row has, in the order in which they appear."""
    return tuple(dict.fromkeys(key for row in rows for key in row))


def drawn(items: Sequence[T], limit: int | None, seed: int | None) -> Sequence[T]:
    """All, or `limit` of them drawn at random with `seed` (None: the first ones): files are often sorted by class."""
    if limit is None or limit >= len(items):
        return items
    order = range(limit) if seed is None else np.random.default_rng(seed).permutation(len(items))[:limit].tolist()
    return [items[i] for i in order]


def combined(parts: Iterable[str]) -> str:
    """One SHA-256 (hex) of several texts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def existing(path: Path) -> Path:
    """`path` where there is something. Raises `UsageError` LW-C04 with the absolute path."""
    if not path.exists():
        remedy = "Check the spelling; relative paths start at the current folder."
        raise UsageError("There is no such file or folder.", place=str(path.absolute()), remedy=remedy, code="LW-C04")
    return path


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Inside, an `OSError` becomes `UsageError` LW-C06 (no permission), LW-C05 (a folder) or `DataShardError` (the disk)."""
    try:
        yield
    except LayerwiseError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "Change its permissions."
            raise UsageError(f"cannot be read: {reason}.", place=place, remedy=remedy, code="LW-C06") from error
        if error.errno == errno.EISDIR:
            raise UsageError("is a folder, not a file.", place=place, code="LW-C05") from error
        raise DataShardError(f"could not be read: {reason}.", place=place, remedy="Copy it again.") from error


def damaged(place: str, what: str, *, code: str = "LW-D35") -> DataShardError:
    """The error for a file that is not whole."""
    remedy = "Copy or download it again, and compare its size with the source."
    return DataShardError(what, place=place, remedy=remedy, code=code)


def empty(place: str) -> DataError:
    """The error for a source without a single row."""
    return DataError("The data set is empty.", place=place, remedy="Give at least one row.", code="LW-D29")
