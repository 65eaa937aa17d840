"""The schema of a table: which columns are numbers and which are categories, in what order, learnt from training rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from layerwise.data import Row
from layerwise.errors import DataError, nearest
from layerwise.rows import place_of

MEND = "Mend the value or leave the row out."


@dataclass(frozen=True)
class Schema:
    """`numeric` columns in order; `categories` (column, its categories in the order of their codes).

    Numbers are standardised by `mean` and `std`, one each per numeric column; as they are where these are empty.
    """

    numeric: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.numeric, *(name for name, _ in self.categories))

    def numbers(self, row: Row, place: str) -> np.ndarray:
        """(numeric columns,) float64. Raises `DataError` LW-D31, LW-D32 or LW-D33 naming the row and the column."""
        values = np.array([number(row, name, place) for name in self.numeric], dtype=np.float64)
        return (values - np.array(self.mean)) / np.array(self.std) if self.mean else values

    def codes(self, row: Row, place: str) -> list[int]:
        """(categorical columns,). Raises `DataError` LW-D39 for a category that the training rows did not have."""
        return [_code(row, name, known, place) for name, known in self.categories]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "numeric": list(self.numeric),
            "categories": {name: list(known) for name, known in self.categories},
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        """The inverse of `to_dict`; what is left out is empty."""
        categories = tuple((name, tuple(map(str, known))) for name, known in data.get("categories", {}).items())
        numbers = [tuple(map(float, data.get(key, ()))) for key in ("mean", "std")]
        return cls(tuple(data.get("numeric", ())), categories, *numbers)


def learnt(rows: Sequence[Row], numeric: Sequence[str], categorical: Sequence[str], standardize: bool) -> Schema:
    """Categories in alphabetical order, and means and deviations of the numbers, 1 for a column that never varies."""
    places = [place_of(row, i) for i, row in enumerate(rows)]
    known = tuple((n, tuple(sorted({category(row, n, p) for row, p in zip(rows, places, strict=True)}))) for n in categorical)
    if not standardize or not numeric:
        return Schema(tuple(numeric), known)
    values = np.array([[number(row, name, place) for name in numeric] for row, place in zip(rows, places, strict=True)])
    spread = values.std(0)
    return Schema(tuple(numeric), known, tuple(values.mean(0).tolist()), tuple(np.where(spread > 0, spread, 1.0).tolist()))


def is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Whether every value that is there is a number, or text that reads as one."""
    return all(
        isinstance(v, Real) or (isinstance(v, str) and _reads_as_number(v)) for row in rows if (v := row.get(name)) is not None
    )


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def number(row: Row, name: str, place: str) -> float:
    """The value as a finite number, also where it is written as text (CSV)."""
    value = _present(row, name, place)
    if not isinstance(value, Real) and not (isinstance(value, str) and _reads_as_number(value)):
        what = f"{name!r} holds {value!r} ({type(value).__name__}), which is no number."
        raise DataError(what, place=place, remedy="Bring the column to one type, or read it as categories.", code="LW-D32")
    found = float(value)
    if not math.isfinite(found):
        raise DataError(f"{name!r} holds {found}.", place=place, remedy=MEND, code="LW-D33")
    return found


def category(row: Row, name: str, place: str) -> str:
    """The value as the name of a category: whole numbers without a point, whatever type they came in."""
    value = _present(row, name, place)
    if not isinstance(value, Real):
        return str(value)
    found = number(row, name, place)
    return str(int(found)) if found.is_integer() else str(found)


def _present(row: Row, name: str, place: str) -> Any:
    if name not in row:
        remedy = f"The columns are: {', '.join(map(str, row))}."
        raise DataError(f"There is no column {name!r}.", place=place, remedy=remedy, code="LW-D31")
    if row[name] is None or row[name] == "":
        raise DataError(f"{name!r} is empty.", place=place, remedy=MEND, code="LW-D32")
    return row[name]


def _code(row: Row, name: str, known: Sequence[str], place: str) -> int:
    found = category(row, name, place)
    if found not in known:
        what = f"{name!r} holds {found!r}, a category that the training rows did not have."
        raise DataError(what, place=place, remedy=nearest(found, known), code="LW-D39")
    return known.index(found)
