"""CSV, TSV, JSON lines and plain text. Rows count from 0, lines from 1."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO

from layerwise.errors import DataError
from layerwise.rows import Record

FIELD = 10_000_000  # characters in one field: a document, not a whole file swallowed by an open quote


def parse_csv(handle: IO[bytes], place: str, *, separator: str = ",") -> Iterator[Record]:
    """Rows of text. Raises `DataError` LW-D41 for an open quote or a wrong number of fields, with row and line."""
    reader = csv.reader(_text(handle, place), delimiter=separator, strict=True)
    csv.field_size_limit(max(FIELD, csv.field_size_limit()))  # the module has no limit per reader
    header: list[str] = []
    count = 0
    while True:
        where = f"{place}, row {count} (line {reader.line_num + 1})" if header else f"{place}, header (line 1)"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _malformed(where, error) from error
        if fields is None:
            return
        if not header:
            header = _header(fields, place)
        elif fields:  # an empty line is no row, but counts as a line
            if len(fields) != len(header):
                what = f"The row has {len(fields)} fields, the header {len(header)}."
                raise DataError(what, place=where, remedy="Quote fields that hold the separator.", code="LW-D41")
            yield Record(dict(zip(header, fields, strict=True)), where)
            count += 1


def _header(fields: list[str], place: str) -> list[str]:
    twice = {name for name in fields if fields.count(name) > 1}
    if twice or not any(fields):
        what = f"The header names {min(twice)!r} twice." if twice else "The header is empty."
        raise DataError(what, place=f"{place}:1", remedy="Give each column a name of its own in line 1.", code="LW-D41")
    return fields


def _malformed(place: str, error: csv.Error) -> DataError:
    open_quote = "unexpected end" in str(error) or "field larger" in str(error)
    what = "A quote is opened here and never closed." if open_quote else f"The row is no CSV: {error}."
    remedy = 'Close the quote; a quote inside a quoted field is written twice ("").'
    return DataError(what, place=place, remedy=remedy, code="LW-D41")


def parse_tsv(handle: IO[bytes], place: str) -> Iterator[Record]:
    """As `parse_csv`, separated by tabs."""
    return parse_csv(handle, place, separator="\t")


def parse_jsonl(handle: IO[bytes], place: str) -> Iterator[Record]:
    """One object per line. Raises `DataError` LW-D41 with the line for what is no JSON object."""
    count = 0
    for number, line in enumerate(_text(handle, place), 1):
        if not line.strip():
            continue
        where = f"{place}, row {count} (line {number})"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"The line is no JSON: {error}."
            raise DataError(what, place=where, remedy="Write one object per line.", code="LW-D41") from error
        if not isinstance(value, dict):
            what = f"The line holds {type(value).__name__}, not an object with columns."
            raise DataError(what, place=where, remedy='Write {"column": value, …} on each line.', code="LW-D41")
        yield Record(value, where)
        count += 1


def parse_text(handle: IO[bytes], place: str) -> Iterator[Record]:
    """A row per paragraph, in the column ``text``; paragraphs are separated by blank lines."""
    paragraph: list[str] = []
    count = begun = 0
    for number, line in enumerate(_text(handle, place), 1):
        if line.strip():
            begun = begun or number
            paragraph.append(line.strip("\r\n"))
        elif paragraph:
            yield Record({"text": "\n".join(paragraph)}, f"{place}, row {count} (line {begun})")
            paragraph, begun, count = [], 0, count + 1
    if paragraph:
        yield Record({"text": "\n".join(paragraph)}, f"{place}, row {count} (line {begun})")


def _text(handle: IO[bytes], place: str) -> Iterator[str]:
    """The lines, of which the first may begin with a byte order mark. Raises `DataError` LW-D41 for what is no UTF-8."""
    lines = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
    number = 0
    try:
        while line := lines.readline():
            number += 1
            yield line
    except UnicodeDecodeError as error:
        where = f"{place}, after line {number}"
        remedy = "Save it as UTF-8."
        raise DataError(f"The file is not UTF-8: {error}.", place=where, remedy=remedy, code="LW-D41") from error
    finally:
        if not handle.closed:
            lines.detach()  # who opened the file closes it; the wrapper would do it whenever it is collected
