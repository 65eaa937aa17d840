"""Labels of raw rows: class numbers, real values, or several values with gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.data import Row
from layerwise.errors import DataError
from layerwise.rows import place_of


def labels_of(rows: Sequence[Row]) -> Tensor | None:
    """(samples,) int64 of class numbers or float32 of real values; (samples, targets) float32 of lists, NaN for gaps.

    None where no row has a label. Raises `DataError` for a row without one among others, or with one of another kind.
    """
    values = [_plain(row.get("label")) for row in rows]
    if all(value is None for value in values):
        return None
    width = _width(values[0])
    for i, value in enumerate(values):
        if _width(value) != width or width is None:
            what = f"The label is {value!r}, not a class number, a real value, or as many values as in the first row."
            raise DataError(what, place=place_of(rows[i], i), remedy="Give all rows labels of one kind.", code="LW-D32")
    if width:
        return torch.tensor([[math.nan if v is None else float(v) for v in value] for value in values])
    return torch.tensor(values, dtype=torch.float32 if any(isinstance(v, float) for v in values) else torch.int64)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else value


def _width(value: Any) -> int | None:
    """0 for a number, the length of a list of numbers and gaps, None for what is no label."""
    if isinstance(value, list | tuple):
        return len(value) or None if all(v is None or isinstance(v, Real) for v in value) else None
    return 0 if isinstance(value, Real) and math.isfinite(value) else None
