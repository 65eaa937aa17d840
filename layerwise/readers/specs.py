"""From a spec in words to a `Table`: by the prefix (``sklearn:…``, ``hf:…``), by the suffix of a file, or as a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from layerwise.errors import UsageError, nearest
from layerwise.files import sha256_file
from layerwise.readers.bundled import read_sklearn
from layerwise.readers.compressed import unzipped
from layerwise.readers.delimited import parse_csv, parse_jsonl, parse_text, parse_tsv
from layerwise.readers.folders import Parse, Tree, archive_tree, folder_tree, kind_of, read_tree
from layerwise.readers.hub import read_hub
from layerwise.readers.parquet import parse_parquet
from layerwise.readers.table import Request, Table, empty, existing, reading

PARSERS: Mapping[str, Parse] = {
    ".parquet": parse_parquet,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
    ".jsonl": parse_jsonl,
    ".ndjson": parse_jsonl,
    ".txt": parse_text,
}
LIBRARIES: Mapping[str, Callable[[str, Request], Table]] = {"hf": read_hub, "sklearn": read_sklearn}
FORMS = (
    "FILE.parquet, .csv, .tsv, .jsonl or .txt (also .gz), FILE.zip, a folder of images (a subfolder per class) or of such files, "
    "sklearn:digits, hf:DATASET"
)


def read(spec: str | Path, request: Request) -> Table:
    """All rows of one split. Raises `UsageError` for the spec, `DataError` for the content."""
    prefix, _, name = str(spec).partition(":")
    if name and isinstance(spec, str) and prefix in LIBRARIES:
        return LIBRARIES[prefix](name, request)
    path = Path(spec).expanduser()
    if not path.exists() and not _looks_like_path(str(spec)):
        remedy = f"{nearest(prefix, LIBRARIES)} Accepted: {FORMS}."
        raise UsageError(
            f"Unknown data {str(spec)!r}; there is no file or folder {str(path.absolute())!r} either.", remedy=remedy
        )
    with reading(str(path.absolute())):
        table = _read_path(existing(path), request)
    if not table.rows:
        raise empty(str(path))
    return table


def _read_path(path: Path, request: Request) -> Table:
    if path.is_dir():
        return read_tree(folder_tree(path), request, PARSERS)
    if path.suffix.lower() == ".zip":
        return read_tree(archive_tree(path, unzipped(path)), request, PARSERS)
    if kind_of(path.name) not in PARSERS:
        raise UsageError(f"A file {path.suffix!r} is not read as data.", place=str(path), remedy=f"Accepted: {FORMS}.")
    single = Tree(str(path.parent), {path.name: lambda: path.open("rb")}, str, lambda _: sha256_file(path))
    return replace(read_tree(single, request, PARSERS), name=path.name)


def _looks_like_path(spec: str) -> bool:
    return "/" in spec or spec.startswith((".", "~")) or kind_of(spec) in {*PARSERS, ".zip"}
