"""Plain modules that say nothing about what they read: ready batches, and rows of numbers stacked as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter
from layerwise.adapters._labels import labels_of
from layerwise.data import Batch, Row
from layerwise.errors import DataError
from layerwise.rows import place_of

INPUTS = ("x", "image", "audio", "input_ids")


@ADAPTERS.register("tensor")
@dataclass(frozen=True)
class TensorAdapter(ModalityAdapter):
    """Stacks ``x`` (or ``image``, ``audio``, ``input_ids``) of the rows, or else all their numeric columns in order.

    Grey images (height, width) get the channel that convolutions want. Numbers are taken as they are, in float32.
    """

    modality: ClassVar[str] = "other"
    priority: ClassVar[int] = -100

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> TensorAdapter:
        return cls()

    def collate(self, rows: Sequence[Row]) -> Batch:
        """One tensor (samples, …). Raises `DataError` LW-D32 for what is no number, LW-D33 for NaN, naming the row."""
        tensors = [_numbers(row, place_of(row, i)) for i, row in enumerate(rows)]
        for i, tensor in enumerate(tensors):
            if tensor.shape != tensors[0].shape:
                what = f"The row has the shape {tuple(tensor.shape)}, the first of the batch {tuple(tensors[0].shape)}."
                raise DataError(what, place=place_of(rows[i], i), remedy="Bring all rows to one shape.", code="LW-D32")
        return Batch((torch.stack(tensors),), {}, labels_of(rows))


def _numbers(row: Row, place: str) -> Tensor:
    name = next((n for n in INPUTS if row.get(n) is not None), None)
    if name is not None:
        tensor = _tensor(row[name], name, place)
        return tensor[None] if name == "image" and tensor.dim() == 2 else tensor
    numeric = [_tensor(v, n, place) for n, v in row.items() if n != "label" and isinstance(v, int | float | np.number)]
    if not numeric:
        what = f"The model does not say how to read rows with the columns {', '.join(map(repr, row))}."
        remedy = "Give numbers (columns={'x': …}), ready batches, or a module with a pretrained_cfg that describes its images."
        raise DataError(what, place=place, remedy=remedy, code="LW-D32")
    return torch.stack(numeric)


def _tensor(value: Any, name: str, place: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        what = f"{name!r} holds {type(value).__name__}, which is no number and no array of numbers."
        remedy = "A plain module takes numbers: encoded images and text need a model that says how to read them."
        raise DataError(what, place=place, remedy=remedy, code="LW-D32") from error
    if name == "input_ids":
        return tensor.long()
    tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{name!r} holds NaN or infinity.", place=place, remedy="Mend or leave out the row.", code="LW-D33")
    return tensor
