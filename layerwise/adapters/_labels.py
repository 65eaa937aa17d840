"""Labels of raw rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.data import Row
from layerwise.errors import DataError
from layerwise.rows import place_of


def labels_of(rows: Sequence[Row]) -> Tensor | None:
    """(samples,) int64, or None where no row has a label. Raises `DataError` for a row without one among others."""
    values = [row.get("label") for row in rows]
    if all(value is None for value in values):
        return None
    numbers = []
    for i, value in enumerate(values):
        if value is None or isinstance(value, str | float):
            raise DataError(f"The label is {value!r}, not a class number.", place=place_of(rows[i], i), code="LW-D32")
        numbers.append(int(value))
    return torch.tensor(numbers)
