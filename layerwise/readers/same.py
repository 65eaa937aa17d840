"""Training rows among the test rows make every figure look better than it is."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from layerwise import trees
from layerwise.data import Batch, Data

TOLERATED = 0.1  # share of test rows; real data sets repeat a few short texts


class SameDataWarning(UserWarning):
    """Test rows that are training rows as well (LW-D42)."""


def warn_if_same(train: Data, test: Data) -> str | None:
    """Warns with `SameDataWarning`, and gives its text, where more than a tenth of the test rows are training rows."""
    known, tested = set(_hashes(train)), list(_hashes(test))
    shared = sum(digest in known for digest in tested)
    if shared <= TOLERATED * len(tested):
        return None
    every = "All" if shared == len(tested) else f"{shared} of"
    text = (
        f"LW-D42 {every} {len(tested)} rows of {test.name} are rows of {train.name} too: its figures say nothing about new data."
    )
    warnings.warn(text, SameDataWarning, stacklevel=2)
    return text


def _hashes(data: Data) -> Iterator[bytes]:
    """One digest per row: of the row itself, or of a ready batch's tensors without the labels."""
    for item in data.batches:
        if isinstance(item, list):
            yield from (_digest(row) for row in item)
        else:
            batch = data.collate(item)
            yield from (_digest(_inputs(batch.narrow(i, i + 1))) for i in range(batch.size))


def _inputs(batch: Batch) -> Any:
    return [tensor for _, tensor in trees.tensors((batch.args, dict(batch.kwargs)))]


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part + b"\0")
    return digest.digest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, torch.Tensor):
        yield from _parts(value.detach().cpu().contiguous().numpy())
    elif isinstance(value, np.ndarray):
        yield str((value.shape, value.dtype)).encode() + value.tobytes()
    else:
        yield value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogateescape")
