"""Data that is there already: torch data sets and loaders, lists of rows, and ready batches, which pass as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.progress import tracked
from layerwise.readers.graphs import graph_record, graphs_in, is_graph
from layerwise.readers.table import Request, Table, columns_of, combined, drawn, empty
from layerwise.rows import Record


def read_object(value: Any, request: Request, batch_size: int) -> Table | Data:
    """Rows that an adapter has to read, as a `Table`; or batches of tensors, as `Data`.

    A torch data set gives single samples: tensors are stacked, anything else is a row. In a list or another iterable
    a dict or tuple of tensors is a ready batch, and a dict with text, bytes, arrays or numbers is a row.
    """
    name = type(value).__name__
    if graphs := graphs_in(value):
        return _table([(i, graphs[i]) for i in drawn(range(len(graphs)), request.limit, request.seed)], name, request.split)
    if isinstance(value, DataLoader | Tensor):
        return _ready(value, name, request)
    if isinstance(value, Dataset):
        samples = _samples(value, request)
        return _stacked(samples, name, batch_size) if _all_tensors(samples[0][1]) else _table(samples, name)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        return _ready(value, name, request)
    items = value if isinstance(value, Sequence) else list(value)
    if not len(items):
        raise empty(name)
    if _all_tensors(items[0]) or isinstance(items[0], Batch):
        return _ready(items, name, request)
    return _table([(i, items[i]) for i in drawn(range(len(items)), request.limit, request.seed)], name)


def _ready(value: Any, name: str, request: Request) -> Data:
    return Data.of(value, name=name, limit=request.limit)


def _samples(dataset: Any, request: Request) -> list[tuple[int, Any]]:
    """(index, sample) of a torch data set. One without random access gives its first ones.

    All are read once and kept: a data set that augments at random would give other rows each time.
    """
    if isinstance(dataset, IterableDataset):
        samples = list(enumerate(tracked(islice(dataset, request.limit), "reading", total=request.limit)))
    else:
        indices = drawn(range(len(dataset)), request.limit, request.seed)
        samples = [(int(i), dataset[int(i)]) for i in tracked(indices, "reading", total=len(indices))]
    if not samples:
        raise empty(type(dataset).__name__)
    return samples


def _all_tensors(item: Any) -> bool:
    """Whether the inputs of a sample or a batch are tensors, so that there is nothing left to read."""
    if isinstance(item, Tensor):
        return True
    if isinstance(item, tuple | list) and len(item) in (1, 2):
        return _all_tensors(item[0])
    inputs = [v for k, v in item.items() if k not in ("label", "labels")] if isinstance(item, Mapping) else []
    labels = [v for k, v in item.items() if k in ("label", "labels")] if isinstance(item, Mapping) else []
    scalars = any(not isinstance(v, Tensor) or v.dim() == 0 for v in labels)
    single = "label" in item and scalars if isinstance(item, Mapping) else False  # a row of a list, not a batch
    return bool(inputs) and not single and all(isinstance(v, Tensor) for v in inputs)


def _stacked(samples: Sequence[tuple[int, Any]], name: str, batch_size: int) -> Data:
    chunks = [[item for _, item in samples[i : i + batch_size]] for i in range(0, len(samples), batch_size)]

    def collate(items: Any) -> Batch:
        try:
            batch = default_collate(items)
        except (RuntimeError, TypeError) as error:  # shapes that differ, types that torch cannot stack
            raise DataError(
                f"The samples cannot be stacked: {error}", place=name, remedy="Bring them to one shape.", code="LW-D32"
            ) from error
        if isinstance(batch, dict) and "label" in batch:
            batch["labels"] = batch.pop("label")
        return Batch.of(batch)

    return Data(chunks, name, collate)


def _table(samples: Sequence[tuple[int, Any]], name: str, split: str | None = None) -> Table:
    rows = [_record(item, f"{name}, row {i}", split) for i, item in samples]
    return Table(rows, name, combined(repr(sorted(row.items(), key=str)) for row in rows), columns_of(rows))


def _record(item: Any, place: str, split: str | None) -> Record:
    if is_graph(item):
        return graph_record(item, place, split)
    if isinstance(item, Mapping):
        return Record(item, place)
    value, label = (item[0], {"label": _plain(item[1])}) if isinstance(item, tuple | list) and len(item) == 2 else (item, {})
    return Record({_role(value, place): value, **label}, place)


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, Tensor | np.ndarray) and label.ndim == 0 else label


def _role(value: Any, place: str) -> str:
    """By the type of the value; an image of the package pillow is known without importing it."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes | Path) or type(value).__module__.startswith("PIL."):
        return "image"
    if isinstance(value, np.ndarray | list | Tensor | int | float):
        return "image" if isinstance(value, np.ndarray) and value.ndim > 1 else "x"
    remedy = "Give (input, label) with a tensor, an array, text, image bytes or a PIL image, or a dict of columns."
    raise DataError(f"The sample is {type(value).__name__}.", place=place, remedy=remedy, code="LW-D32")
