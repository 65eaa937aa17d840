"""Plain modules: numbers as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.adapter import adapter_for
from layerwise.data import Batch
from layerwise.errors import DataError
from layerwise.rows import Record

ADAPTER = adapter_for(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"x": [1.0, 2.0]}, (1, 2)),
        ({"x": 3}, (1,)),
        ({"a": 1, "b": 2.5, "name": "left out"}, (1, 2)),
        ({"image": np.zeros((4, 5))}, (1, 1, 4, 5)),
        ({"audio": np.zeros(7, np.float32), "sample_rate": 8000}, (1, 7)),
    ],
)
def test_numbers_are_stacked(row: dict[str, Any], shape: tuple[int, ...]) -> None:
    batch = ADAPTER.collate([{**row, "label": 1}])
    assert batch.args[0].shape == shape
    assert batch.args[0].dtype == torch.float32
    assert batch.labels.tolist() == [1]


def test_token_ids_stay_whole_numbers() -> None:
    assert ADAPTER.collate([{"input_ids": [1, 2]}]).args[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("row", "code", "text"),
    [
        ({"text": "a"}, "LW-D32", "does not say how to read rows with the columns 'text'"),
        ({"x": "a"}, "LW-D32", "'x' holds str"),
        ({"image": b"\xff\xd8"}, "LW-D32", "'image' holds bytes"),
        ({"x": [1.0, float("nan")]}, "LW-D33", "NaN"),
        ({"x": [1.0]}, "LW-D32", "shape (1,), the first of the batch (2,)"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        ADAPTER.collate([{"x": [1.0, 2.0]}, Record(row, "f.csv, row 4")])
    assert caught.value.code == code
    assert text in str(caught.value)
    assert "f.csv, row 4" in str(caught.value)


def test_every_module_is_claimed_and_the_others_win() -> None:
    assert ADAPTER.modality == "other"
    assert ADAPTER.example(nn.Linear(2, 2)) is None
    assert ADAPTER.output((torch.tensor([1]), torch.tensor([2.0]))).tolist() == [2.0]
    assert isinstance(ADAPTER.collate([{"x": 1.0}]), Batch)
