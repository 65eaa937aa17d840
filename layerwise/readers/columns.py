"""Which column is what: the names that adapters know, labels as class numbers or real values, one type per column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from layerwise.errors import DataError, UsageError, nearest
from layerwise.readers.audio import SUFFIXES
from layerwise.readers.table import Table
from layerwise.rows import Record

INPUTS = ("text", "image", "audio", "x", "input_ids", "smiles")
GRAPH = ("edge_index", "edge_attr", "edge_weight", "pos", "z", "node_label", "node_mask")  # what goes with a graph's x
ROLES = (*INPUTS, *GRAPH, "text_pair", "target", "answer", "sample_rate", "label")
RATES = ("sample_rate", "sampling_rate")  # beside audio only: elsewhere it is a number like any other
ALIASES: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "review", "content", "document"),
    "image": ("image", "img"),
    "audio": ("audio", "flac", "wav"),
    "x": ("x",),
    "input_ids": ("input_ids",),
    "smiles": ("smiles",),
    "label": ("label", "labels", "category", "class", "y"),
}
SHOWN = 20  # class names in a note


def with_roles(table: Table, given: Mapping[str, Any], *, keep: Sequence[str] = ()) -> Table:
    """The rows with the names that adapters know; without a text, image, audio or ``x``, all numeric columns are features.

    With `keep` the rows hold these columns, as they are, and the label.

    Raises `DataError` LW-D31 for a column that is not there, LW-D32 for mixed types, LW-D33 for NaN, each naming the row.
    """
    roles = _roles(table, given)
    column = roles.pop("label", None)
    table = _several(table, column) if isinstance(column, list | tuple) else _labelled(table, column)
    label = ("label",) if "label" in table.columns else ()
    if keep:
        return _kept(table, keep, label)
    if not roles:
        return _features(table, label)
    listed = roles["x"] if isinstance(roles.get("x"), list | tuple) else None
    if listed is not None:
        table = _checked_numbers(table, listed)
        roles.pop("x")
    rows = []
    for row in table.rows:
        values = {role: row.get(column) for role, column in roles.items()}
        values |= {"x": [row[c] for c in listed]} if listed is not None else {}
        rows.append(Record({**values, **{name: row[name] for name in label}}, row.place))
    several = len(roles.keys() & set(INPUTS)) > 1  # then a row may lack one of them
    for role in roles.keys() & {"text", "text_pair", "target"}:
        _check_text([row for row in rows if not (several and row[role] is None)], role, roles[role])
    return replace(table, rows=rows, columns=(*roles, *(("x",) if listed else ()), *label))


def _kept(table: Table, keep: Sequence[str], label: Sequence[str]) -> Table:
    missing = [name for name in keep if name not in table.columns]
    if missing:
        what = f"There is no column {missing[0]!r}, which the model was trained on."
        raise DataError(what, place=table.name, remedy=f"The columns are: {', '.join(table.columns)}.", code="LW-D31")
    names = (*keep, *label)
    return replace(table, rows=[Record({n: row[n] for n in names if n in row}, row.place) for row in table.rows], columns=names)


def _roles(table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """Role → column: what was given, then the usual names."""
    for role, named in given.items():
        if role not in ROLES:
            raise UsageError(f"Unknown column role {role!r}.", remedy=nearest(role, ROLES))
        for column in named if isinstance(named, list | tuple) else [named]:
            if column not in table.columns:
                what = f"There is no column {column!r} for {role!r}."
                remedy = f"The columns are: {', '.join(table.columns)}."
                raise DataError(what, place=table.name, remedy=remedy, code="LW-D31")
    found = dict(given)
    inputs_given = any(role in given for role in INPUTS)
    for role, aliases in ALIASES.items():
        if role in given or (role in INPUTS and inputs_given):
            continue
        column = next((c for c in aliases if c in table.columns and c not in given.values()), None)
        if column is not None:
            found[role] = column
    if not any(role in found for role in INPUTS) and _names_audio(table):
        found["audio"] = "path"
    if "edge_index" in table.columns:
        found |= {role: role for role in GRAPH if role in table.columns and role not in given}
    rate = next((c for c in RATES if c in table.columns and c not in found.values()), None)
    return {"sample_rate": rate, **found} if "audio" in found and rate else found


def _names_audio(table: Table) -> bool:
    """A manifest: a column ``path`` with audio files."""
    first = table.rows[0].get("path") if table.rows else None
    return isinstance(first, str) and first.lower().endswith(SUFFIXES)


def _labelled(table: Table, column: str | None) -> Table:
    """With ``label`` as class numbers; names are numbered in alphabetical order, and a note says how.

    A column in which one value is no whole number holds real values, and one of lists several targets.
    """
    if column is None:
        return table
    values: list[Any] = [_label(row, column, table) for row in table.rows]
    if any(isinstance(value, list) for value in values):
        return _with_label(table, (column,), values)
    kinds = [isinstance(value, str) for value in values]
    if any(kinds) and not all(kinds):
        odd = kinds.index(not kinds[0])
        what = f"{column!r} holds {values[odd]!r} here and {values[0]!r} before: names and numbers are mixed."
        raise DataError(what, place=table.rows[odd].place, remedy="Bring the column to one type.", code="LW-D32")
    notes, classes = table.notes, table.classes
    if any(kinds):
        classes = tuple(sorted({str(v) for v in values}))
        number = {name: i for i, name in enumerate(classes)}
        values = [number[str(v)] for v in values]
        shown = ", ".join(f"{i} = {name}" for i, name in enumerate(classes[:SHOWN]))
        notes = (*notes, f"{len(classes)} label classes: {shown}{', …' if len(classes) > SHOWN else ''}")
    elif any(isinstance(v, float) for v in values):
        values, notes = [float(v) for v in values], (*notes, f"{column!r} holds real values: they are targets, not classes")
    return replace(_with_label(table, (column,), values), notes=notes, classes=classes)


def _with_label(table: Table, taken: Sequence[str], values: Sequence[Any]) -> Table:
    """The rows with `values` as ``label`` in place of the columns they were `taken` from."""
    rows = [
        Record({**{k: v for k, v in row.items() if k not in taken}, "label": value}, row.place)
        for row, value in zip(table.rows, values, strict=True)
    ]
    columns = (*(c for c in table.columns if c not in (*taken, "label")), "label")
    return replace(table, rows=rows, columns=columns)


def _several(table: Table, columns: Sequence[str]) -> Table:
    """Several targets: ``label`` is a list of numbers, NaN where a value is missing. Rows without any value are left out.

    Notes say how many of both there are. Raises `DataError` LW-D32 where no row has a value.
    """
    every = [[_target(row, column, table) for column in columns] for row in table.rows]
    kept = [i for i, row in enumerate(every) if not all(map(math.isnan, row))]
    if not kept:
        raise DataError("None of the target columns has a value in any row.", place=table.name, code="LW-D32")
    values, notes = [every[i] for i in kept], list(table.notes)
    if len(kept) < len(every):
        notes.append(f"{len(every) - len(kept)} rows without a value in any target column were left out")
    if gaps := sum(math.isnan(v) for row in values for v in row):
        notes.append(f"{len(columns)} targets, {gaps} of {len(columns) * len(values)} values missing")
    known = replace(table, rows=[table.rows[i] for i in kept], notes=tuple(notes))
    return _with_label(known, tuple(columns), values)


def _target(row: Record, column: str, table: Table) -> float:
    value = row.get(column)
    number = _number(value) if isinstance(value, str) and not table.typed else value
    if number is None or number == "" or (isinstance(number, Real) and math.isnan(number)):
        return math.nan
    if not isinstance(number, Real) or math.isinf(number):
        what = f"{column!r} holds {value!r}, which is no finite number."
        raise DataError(what, place=row.place, remedy="One of several targets is a number or empty.", code="LW-D32")
    return float(number)


def _label(row: Record, column: str, table: Table) -> int | float | str | list[Any]:
    value = row.get(column)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and value:
        return list(value)  # several targets in one column
    if not table.typed and isinstance(value, str):
        value = _number(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Real) and math.isfinite(value) and float(value).is_integer():
        return int(float(value))  # a column with gaps elsewhere is read as floating point
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if value is None or value == "" or isinstance(value, Real):
        state = "infinite" if isinstance(value, Real) and math.isinf(value) else "empty"
        what, remedy = f"{column!r} is {state}.", "Give every row a label, or leave the row out."
    else:
        what, remedy = f"{column!r} holds {type(value).__name__}.", "A label is a number, a name, or a list of numbers."
    raise DataError(what, place=row.place, remedy=remedy, code="LW-D32")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _features(table: Table, label: Sequence[str]) -> Table:
    """All columns whose values are numbers; text columns are kept as they are, for the adapter to complain about."""
    others = [c for c in table.columns if c not in label and c != "split"]
    numeric = [c for c in others if any(_is_number(row.get(c), table.typed) for row in table.rows)]
    if not numeric:
        return table
    kept = _checked_numbers(table, numeric)
    rows = [Record({name: row[name] for name in (*numeric, *label)}, row.place) for row in kept.rows]
    dropped = [c for c in others if c not in numeric]
    notes = (*table.notes, f"columns left out because they hold no numbers: {', '.join(dropped)}") if dropped else table.notes
    return replace(table, rows=rows, columns=(*numeric, *label), notes=notes)


def _is_number(value: Any, typed: bool) -> bool:
    if isinstance(value, str) and not typed:
        value = _number(value)
    return isinstance(value, Real)


def _checked_numbers(table: Table, columns: Sequence[str]) -> Table:
    """The same rows with these columns as finite floats."""
    return replace(table, rows=[Record({**row, **{c: _finite(row, c, table) for c in columns}}, row.place) for row in table.rows])


def _finite(row: Record, column: str, table: Table) -> float:
    value = row.get(column)
    number = _number(value) if isinstance(value, str) and not table.typed else value
    if not isinstance(number, Real):
        shown = "is empty" if value in (None, "") else f"holds {value!r} ({type(value).__name__}), other rows numbers"
        remedy = "Bring the column to one type, or name the columns to use (columns={'x': [...]})."
        raise DataError(f"{column!r} {shown}.", place=row.place, remedy=remedy, code="LW-D32")
    if not math.isfinite(number):
        raise DataError(
            f"{column!r} holds {number}.", place=row.place, remedy="Mend the value or leave the row out.", code="LW-D33"
        )
    return float(number)


def _check_text(rows: Sequence[Record], role: str, column: str) -> None:
    for row in rows:
        if not isinstance(row[role], str):
            state = "is empty" if row[role] is None else f"holds {row[role]!r} ({type(row[role]).__name__}), not text"
            raise DataError(f"{column!r} {state}.", place=row.place, remedy="Bring the column to one type.", code="LW-D32")


def check_labels(table: Table, classes: int) -> None:
    """Raises `DataError` LW-D34, naming the row, for a class number outside 0 … `classes` − 1."""
    for row in table.rows:
        if isinstance(row.get("label"), int) and not 0 <= row["label"] < classes:
            what = f"The label {row['label']} lies outside the model's {classes} classes (0 … {classes - 1})."
            remedy = "Check the label column, or the number of classes the model was built with."
            raise DataError(what, place=row.place, remedy=remedy, code="LW-D34")
