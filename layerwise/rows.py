"""`Record`: a raw row that knows where it came from, so that every complaint about it can name the file and the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.data import Row


class Record(dict[str, Any]):
    """Column → value, and `place` in words: ``train.csv, row 3 (line 5)``. Rows count from 0, lines from 1."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        super().__init__(values)
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:  # a dict with slots loses them when it is copied or sent to a worker
        return Record, (dict(self), self.place)


def place_of(row: Row, position: int) -> str:
    """Where `row` came from; a plain dict only has its position in the batch."""
    place = row.place if isinstance(row, Record) else ""
    return place or f"row {position}"
