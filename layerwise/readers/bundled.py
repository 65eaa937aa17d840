"""``sklearn:digits`` and the other small data sets that scikit-learn carries inside: no file, no network."""

from __future__ import annotations

import hashlib

import numpy as np

from layerwise.errors import UsageError, nearest
from layerwise.readers.table import Request, Table
from layerwise.rows import Record

NAMES = ("breast_cancer", "diabetes", "digits", "iris", "wine")
REAL = ("diabetes",)  # targets are values, not classes
SPLITS = ("train", "test")


def read_sklearn(name: str, request: Request) -> Table:
    """Digits as grey images (8, 8) with values 0 … 1, the others as feature rows ``x``.

    Splits: ``train`` 80 %, ``test`` 20 %, stratified by class (if there are classes) and always the same; without `split` all
    rows.
    """
    if name not in NAMES:
        raise UsageError(f"scikit-learn carries no data set {name!r}.", remedy=nearest(name, NAMES))
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    images = name == "digits"
    values = (bunch.images / 16.0 if images else bunch.data).astype(np.float32)
    real = name in REAL
    chosen = _split(bunch.target, request.split, stratified=not real)
    column = "image" if images else "x"
    rows = [
        Record({column: values[i], "label": float(bunch.target[i]) if real else int(bunch.target[i])}, f"sklearn:{name}, row {i}")
        for i in chosen
    ]
    digest = hashlib.sha256(values.tobytes() + bunch.target.astype(np.int64).tobytes()).hexdigest()
    classes = () if real else tuple(str(c) for c in bunch.target_names)
    return Table(rows, f"sklearn:{name}", digest, (column, "label"), classes=classes)


def _split(labels: np.ndarray, split: str | None, *, stratified: bool) -> list[int]:
    from sklearn.model_selection import train_test_split

    if split is None:
        return list(range(len(labels)))
    if split not in SPLITS:
        raise UsageError(f"There is no split {split!r}.", remedy=nearest(split, SPLITS))
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels if stratified else None, random_state=0)
    return sorted(int(i) for i in parts[SPLITS.index(split)])
