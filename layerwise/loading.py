"""`load` and `load_data`: from a spec in words, or from what is there already, to a `UniversalModel` and to `Data`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, adapter_for
from layerwise.data import Batch, Data
from layerwise.errors import UsageError, nearest
from layerwise.heads import fit_head
from layerwise.model import UniversalModel
from layerwise.progress import tracked
from layerwise.readers.audio import decoded
from layerwise.readers.columns import check_labels, with_roles
from layerwise.readers.objects import read_object
from layerwise.readers.specs import FORMS, read
from layerwise.readers.table import Request, Table, combined, drawn, empty
from layerwise.source import SOURCES, Opened
from layerwise.task import Classification, Fidelity, Task, task_named
from layerwise.weights import load_into, read_weights

SAVED = "layerwise.json"  # marks a folder that layerwise wrote
MODEL_FORMS = "an nn.Module, timm:NAME, hf:ID_OR_DIR, FILE.py:FACTORY, py:MODULE:FACTORY, or a folder saved by layerwise"


def load(
    spec_or_module: str | Path | nn.Module | UniversalModel,
    task: str | Task | None = None,
    weights: str | Path | None = None,
    *,
    example: Any = None,
    name: str | None = None,
    device: str | torch.device | None = None,
    head: str | Path | Data | None = None,
) -> UniversalModel:
    """A model from a spec, in eval mode; a module of yours is wrapped as it is (with `weights`: a copy is filled).

    `task`: its name, or None to let model and data decide. `example`: a batch to read the structure with, for modules that do
    not say what they read. `head`: labelled data (or its spec) to fit a linear classifier on, for models that give embeddings.
    ``FILE.py:FACTORY`` and ``py:`` run code. Raises `UsageError` for the spec, `ModelFormatError` for the files.
    """
    if isinstance(spec_or_module, UniversalModel):
        model = spec_or_module.around(spec_or_module.module, source=spec_or_module.source)
    elif isinstance(spec_or_module, nn.Module):
        model = UniversalModel(_with_weights(spec_or_module, weights))
        model.source = model.adapter.source(model.module)
    else:
        model = _from_spec(str(spec_or_module), weights)
    if device is not None:
        model.module.to(available(device))
    if example is not None:
        model.read_with(Batch.of(example))
    if head is not None:
        model = fit_head(model, head if isinstance(head, Data) else load_data(head, model))
    model.name = name or model.name
    model.task = _task(task, model) or model.task
    return model


def _with_weights(module: nn.Module, weights: str | Path | None) -> nn.Module:
    if weights is None:
        return module
    filled = copy.deepcopy(module)
    load_into(filled, read_weights(weights), source=str(Path(weights).absolute()))
    return filled


def _task(task: str | Task | None, model: UniversalModel) -> Task | None:
    chosen = task_named(task) if isinstance(task, str) else task
    return model.adapter.fidelity(model.module) if task == Fidelity.name else chosen


def available(device: str | torch.device) -> torch.device:
    """The device, where this machine has it. Raises `UsageError` LW-C10 that lists those there are."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"There is no device {str(device)!r}.", remedy=f"Here: {', '.join(there)}.", code="LW-C10") from error
    index = f"{wanted.type}:{wanted.index or 0}" if wanted.type == "cuda" else wanted.type
    if index not in there:
        raise UsageError(f"This machine has no device {str(device)!r}.", remedy=f"Here: {', '.join(there)}.", code="LW-C10")
    return wanted


def _from_spec(spec: str, weights: str | Path | None) -> UniversalModel:
    path = Path(spec).expanduser()
    if (path / SAVED).is_file():
        if weights is not None:
            raise UsageError("A folder saved by layerwise holds its own weights.", place=str(path), remedy="Leave weights out.")
        from layerwise.saved import load_saved  # built on the verbs' results: imported only where it is needed

        return load_saved(path)
    kind, name = _kind(spec, path)
    return _wrapped(SOURCES[kind]().open(name, weights=weights))


def _wrapped(opened: Opened) -> UniversalModel:
    adapter = adapter_for(opened.module, opened.folder)
    name = opened.source.name.rpartition(":")[2]
    model = UniversalModel(opened.module, adapter=adapter, source=opened.source, name=name)
    model.notes = (*model.notes, *opened.notes)
    return model


def _kind(spec: str, path: Path) -> tuple[str, str]:
    """The model source and the name in it. Raises `UsageError` that lists the accepted forms."""
    prefix, _, rest = spec.partition(":")
    if ".py:" in spec:
        return "file", spec
    if rest and prefix in SOURCES:
        return prefix, rest
    if (path / "config.json").is_file():
        return "hf", spec
    absolute = str(path.absolute())
    if path.is_dir():
        what = "is a folder without layerwise.json or config.json, so it holds no model."
        raise UsageError(what, place=absolute, remedy=f"Accepted: {MODEL_FORMS}.", code="LW-C05")
    if path.is_file():
        what = "is a file; a file of weights does not say which class they belong to."
        raise UsageError(what, place=absolute, remedy=f"Give it as weights=. Accepted: {MODEL_FORMS}.", code="LW-C05")
    if "/" in spec and not rest:
        raise UsageError("There is no such folder.", place=absolute, remedy=f"Accepted: {MODEL_FORMS}.", code="LW-C04")
    near = nearest(prefix, SOURCES) if rest else ""
    raise UsageError(f"Unknown model {spec!r}.", remedy=f"{near} Accepted: {MODEL_FORMS}.".strip())


def load_data(
    spec_or_dataset: Any,
    model: UniversalModel | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    *,
    columns: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    max_bad_shards: int = 0,
) -> Data:
    """Batches for `model` from a spec or from what is there already; ready batches pass as they are.

    `limit` rows are drawn at random with `seed` (None: the first ones), since files are often sorted by class. `columns` says
    which column is what: ``{"text": "sentence", "label": "stars"}``, ``{"x": ["a", "b"]}``. Without a `model` only numbers can be
    read. Raises `UsageError` for the arguments and `DataError` (LW-D29 … LW-D42) naming file and row.
    """
    _check_numbers(limit, batch_size)
    request = Request(split, dict(columns or {}), limit, seed, max_bad_shards)
    if isinstance(spec_or_dataset, Data):
        return spec_or_dataset if limit is None else spec_or_dataset.head(limit)
    named = isinstance(spec_or_dataset, str | Path)
    found = read(spec_or_dataset, request) if named else read_object(spec_or_dataset, request, batch_size)
    if isinstance(found, Data):
        return found
    folder = Path(spec_or_dataset).expanduser().parent if named else None
    return _batched(found, request, model, batch_size, folder)


def _check_numbers(limit: int | None, batch_size: int) -> None:
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}; it counts from 1.", code="LW-C09")


def _batched(table: Table, request: Request, model: UniversalModel | None, batch_size: int, folder: Path | None) -> Data:
    adapter: ModalityAdapter = model.adapter if model is not None else ADAPTERS["tensor"].of(nn.Identity())
    table = with_roles(table, request.columns, keep=adapter.columns)
    total = len(table.rows)
    table = replace(table, rows=drawn(table.rows, request.limit, request.seed))
    if not table.rows:
        raise empty(table.name)
    classes = _classes(model) if "label" in table.columns else None
    if classes is not None:
        check_labels(table, classes)
    if "audio" in table.columns:
        table = replace(
            table, rows=list(tracked(map(partial(decoded, folder=folder), table.rows), "decoding", total=len(table.rows)))
        )
    rows, notes = adapter.prepare(table.rows)
    fingerprint = combined(
        [table.fingerprint, repr((request.split, request.limit, request.seed, sorted(request.columns.items())))]
    )
    return Data(
        batches=[list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)],
        name=table.name if request.split is None else f"{table.name}[{request.split}]",
        collate=adapter.collate,
        source_fingerprint=fingerprint,
        notes=(*table.notes, *_notes(len(table.rows), total), *notes),
    )


def _notes(rows: int, total: int) -> Sequence[str]:
    notes = [f"{rows} of {total} rows, drawn at random"] if rows < total else []
    return [*notes, "one row only: no standard error can be given"] if rows == 1 else notes


def _classes(model: UniversalModel | None) -> int | None:
    """How many classes the model tells apart, where that can be seen on its example. One output is no class but a value."""
    if model is None or not isinstance(model.task, Classification | None) or not _has_example(model):
        return None
    embeds = model.adapter.fidelity(model.module).kind == "cosine"
    output = model.predict(model.example)
    return int(output.shape[-1]) if output.dim() == 2 and output.shape[-1] > 1 and not embeds else None


def _has_example(model: UniversalModel) -> bool:
    try:
        model.example  # noqa: B018  # asks whether it can be made
    except UsageError:
        return False
    return True


__all__ = ["FORMS", "MODEL_FORMS", "available", "load", "load_data"]
