"""Parquet files, row group by row group, so that damage is reported with the rows it hits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from layerwise.readers.table import damaged
from layerwise.rows import Record


def parse_parquet(handle: IO[bytes], place: str) -> Iterator[Record]:
    """The rows. Raises `DataShardError`: LW-D35 for a file that is cut short, LW-D12 for damage inside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(place, f"is no whole parquet file: {_reason(error)}.") from error
    before = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        try:
            values = file.read_row_group(group).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            rows = f"rows {before} to {before + count - 1} of {place}"
            raise damaged(place, f"is damaged in {rows}: {_reason(error)}.", code="LW-D12") from error
        for i, row in enumerate(values):
            yield Record(row, f"{place}, row {before + i}")
        before += count


def _reason(error: Any) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
