"""``hf:DATASET`` or ``hf:NAME:CONFIG``: a Hugging Face data set, by the package ``datasets`` where it is installed."""

from __future__ import annotations

from typing import Any

from layerwise.errors import DataError, MissingDependency, UsageError
from layerwise.readers.table import Request, Table, columns_of, drawn
from layerwise.rows import Record


def read_hub(name: str, request: Request) -> Table:
    """Rows of one split. Raises `MissingDependency`, `DataError` where it cannot be fetched, `UsageError` for the split."""
    try:
        import datasets
    except ImportError as error:
        what = f"hf:{name} needs the package 'datasets', which is not installed."
        remedy = "Install it with: pip install datasets. Or save the rows as parquet and give that file."
        raise MissingDependency(what, remedy=remedy) from error
    plain, _, config = name.partition(":")
    try:
        found: Any = datasets.load_dataset(plain, config or None, split=request.split)
    except Exception as error:  # the library's errors for offline, unknown and unreadable have no common base
        what = f"The data set {name!r} could not be loaded: {type(error).__name__}: {error}"
        remedy = "Without a network, load it once where there is one, or give a local parquet, CSV or JSONL file."
        raise DataError(what, place=f"hf:{name}", remedy=remedy) from error
    if isinstance(found, dict):  # a DatasetDict, since no split was named
        if len(found) > 1:
            raise UsageError(f"hf:{name} holds several splits.", remedy=f"Choose one by split=: {', '.join(found)}.")
        found = next(iter(found.values()))
    chosen = drawn(range(len(found)), request.limit, request.seed)
    rows = [Record(dict(found[int(i)]), f"hf:{name}, row {i}") for i in chosen]
    return Table(rows, f"hf:{name}", str(getattr(found, "_fingerprint", "")), columns_of(rows))
