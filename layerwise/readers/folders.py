"""Folders and zip archives: image folders with a class per subfolder, and tables in one or several files (shards)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from layerwise.errors import DataError, DataShardError, UsageError, nearest
from layerwise.files import sha256_file
from layerwise.readers.compressed import gunzipped
from layerwise.readers.table import Request, Table, columns_of, combined, empty, reading
from layerwise.rows import Record

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")
SHARD = re.compile(r"(^\d+|[-_.]\d+([-_]of[-_]\d+)?|\d{3,})$")  # 0, train-00000-of-00002, part_3, shard00017

UNTYPED = (".csv", ".tsv")

Parse = Callable[[IO[bytes], str], Iterable[Record]]


@dataclass(frozen=True)
class Tree:
    """Files by their relative name, of a folder or an archive. `image` gives what an image row holds: a path, or bytes."""

    place: str
    files: Mapping[str, Callable[[], IO[bytes]]]
    image: Callable[[str], Any]
    hashes: Callable[[Sequence[str]], str]


def folder_tree(folder: Path) -> Tree:
    """The regular files below `folder`, hidden ones left out."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    return Tree(
        str(folder),
        {name: lambda path=path: path.open("rb") for name, path in files.items()},  # type: ignore[misc]  # mypy cannot infer the default
        lambda name: str(files[name]),
        lambda names: combined(part for name in names for part in (name, sha256_file(files[name]))),
    )


def archive_tree(path: Path, files: Mapping[str, Callable[[], IO[bytes]]]) -> Tree:
    """The files of a checked archive."""
    return Tree(str(path), files, lambda name: files[name]().read(), lambda names: combined([sha256_file(path), *names]))


def read_tree(tree: Tree, request: Request, parsers: Mapping[str, Parse]) -> Table:
    """The tables in it, or else its images. Raises `DataError` LW-D29 when there is neither."""
    tables = [name for name in tree.files if kind_of(name) in parsers]
    images = [name for name in tree.files if kind_of(name) in IMAGES]
    if images and (not tables or len(images) > len(tables)):
        return _image_table(tree, images, request)
    if not tables and tree.files:
        what = f"holds {len(tree.files)} files and none that is read as data, such as {next(iter(tree.files))!r}."
        remedy = f"Rows are read from {', '.join(parsers)} and images ({', '.join(IMAGES)})."
        raise DataError(what, place=tree.place, remedy=remedy, code="LW-D29")
    if not tables:
        raise empty(tree.place)
    return _shards(tree, tables, request, parsers)


def _image_table(tree: Tree, images: Sequence[str], request: Request) -> Table:
    """A row per image; the label is the place of its folder's name in the alphabet, over all splits."""
    parts = {name: PurePosixPath(name).parts for name in images}
    splits = {p[0] for p in parts.values() if len(p) > 2 and p[0].lower() in SPLITS}
    if splits and request.split is None:
        raise UsageError("holds several splits.", place=tree.place, remedy=f"Choose one by split=: {', '.join(sorted(splits))}.")
    chosen = [n for n in images if request.split is None or parts[n][0] == request.split]
    if not chosen:
        remedy = nearest(str(request.split), splits or {p[0] for p in parts.values() if len(p) > 1})
        raise UsageError(f"has no split {request.split!r}.", place=tree.place, remedy=remedy)
    inside = 1 if request.split is not None else 0
    labelled = all(len(parts[n]) > inside + 1 for n in chosen)
    classes = tuple(sorted({p[-2] for p in parts.values() if len(p) > inside + 1})) if labelled else ()
    number = {name: i for i, name in enumerate(classes)}
    labels = {n: {"label": number[parts[n][-2]]} if labelled else {} for n in chosen}
    rows = [Record({"image": tree.image(n), **labels[n]}, f"{tree.place}, image {n}") for n in chosen]
    others = len(tree.files) - len(images)
    notes = (f"{others} files that are no images were left out",) if others else ()
    return Table(rows, Path(tree.place).name, tree.hashes(chosen), ("image", "label"), classes=classes, notes=notes)


def _of_split(names: Sequence[str], split: str | None, place: str) -> tuple[list[str], bool]:
    """The files of one split (``test.parquet``, ``test-00000-of-00002.parquet``, ``test/….parquet``); whether a name said so."""
    groups: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folder = path.parts[0] if len(path.parts) > 1 else ""
        groups.setdefault(folder or SHARD.sub("", path.name.partition(".")[0]) or "shard", []).append(name)
    if split is not None and split in groups:
        return sorted(groups[split]), True
    if len(groups) == 1:  # one table, whose column 'split' may know it
        return sorted(next(iter(groups.values()))), False
    if split is None:
        raise UsageError("holds several data sets.", place=place, remedy=f"Choose one by split=: {', '.join(sorted(groups))}.")
    raise UsageError(f"has no split {split!r}.", place=place, remedy=nearest(split, groups))


def _shards(tree: Tree, tables: Sequence[str], request: Request, parsers: Mapping[str, Parse]) -> Table:
    """All rows of the files in order. At most `max_bad_shards` damaged ones are left out, and said so."""
    names, named_by_file = _of_split(tables, request.split, tree.place)
    rows: list[Record] = []
    bad: list[str] = []
    for name in names:
        try:
            rows += _rows(tree, name, parsers)
        except DataShardError:
            bad.append(name)
            if len(bad) > request.max_bad_shards:
                raise
    notes = (f"{len(bad)} of {len(names)} files are damaged and were left out: {', '.join(bad)}",) if bad else ()
    if not rows:
        raise empty(tree.place if len(names) > 1 else f"{tree.place}/{names[0]}")
    typed = not any(kind_of(name) in UNTYPED for name in names)
    table = Table(rows, Path(tree.place).name, tree.hashes(names), columns_of(rows), typed=typed, notes=notes)
    return table if named_by_file else table.split(request.split)


def _rows(tree: Tree, name: str, parsers: Mapping[str, Parse]) -> list[Record]:
    place = f"{tree.place}/{name}"
    with reading(place), tree.files[name]() as handle:
        content = gunzipped(handle, place) if name.endswith(".gz") else handle
        return list(parsers[kind_of(name)](content, place))


def kind_of(name: str) -> str:
    """The suffix in small letters, without a final ``.gz``: ``.csv``."""
    return PurePosixPath(name.removesuffix(".gz")).suffix.lower()
