"""Which files a path stands for: a file, a folder, or an index of shards; and what an index may say."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from layerwise.errors import UsageError
from layerwise.files import verify_manifest
from layerwise.weights.problems import AGAIN, DuplicateKey, bad, listed, no_duplicates, short
from layerwise.weights.sniff import kind_of

MAX_INDEX = 100_000_000  # bytes
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth")


def find_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of `path`, and for an index which file holds which tensor (else empty).

    A folder that layerwise wrote is verified against its manifest first. Raises `ModelFormatError`, `UsageError`, `CorruptRun`.
    """
    if path.is_dir():
        _verify_own(path)
        path = _in_folder(path)
    if kind_of(path) == "json":
        content = _json(path)
        if path.name.endswith(".index.json") or (isinstance(content, dict) and "weight_map" in content):
            return _shards(path, content)
    return [path], {}


def _verify_own(folder: Path) -> None:
    manifest = folder / "manifest.json"
    if not manifest.is_file() or manifest.stat().st_size > MAX_INDEX:
        return
    try:
        content = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError):
        verify_manifest(folder)  # says that it is damaged
        return
    if isinstance(content, dict) and "format" in content and "files" in content:  # other tools write a manifest.json too
        verify_manifest(folder)


def _in_folder(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).exists():
            return folder / name
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            what = f"holds several weight files and no index: {listed(file.name for file in found)}."
            raise bad(60, folder, what, "Download the *.index.json that belongs to them, or name one file.")
    there = listed(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise UsageError(f"holds no weights, only {there}.", place=str(folder.absolute()), code="LW-C05")


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_INDEX:
        raise bad(68, path, f"is an index of more than {MAX_INDEX:,} bytes.", AGAIN)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=no_duplicates)
    except DuplicateKey as error:
        raise bad(67, path, f"names {listed(error.args)} twice.", AGAIN) from error
    except (ValueError, RecursionError) as error:
        if path.name.endswith(".index.json"):
            raise bad(60, path, f"is not a readable index: {short(str(error))}.", AGAIN) from error
        return None


def _shards(index: Path, content: Any) -> tuple[list[Path], dict[str, Path]]:
    weight_map = _weight_map(index, content)
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        remedy = "Download the missing shards, or all again: an interrupted download leaves them out."
        raise bad(60, index, f"names {len(missing):,} of {len(names):,} shards that are not there: {listed(missing)}.", remedy)
    for other in sorted(index.parent.glob("*.index.json")):
        shared = [] if other.samefile(index) else sorted(set(names) & set(_weight_map(other, _json(other)).values()))
        if shared:
            what = f"and {other.name!r} both name the shard {listed(shared)}."
            raise bad(62, index, what, "Two models were mixed in one folder: put each in a folder of its own.")
    return [index.parent / name for name in names], {name: index.parent / file for name, file in weight_map.items()}


def _weight_map(index: Path, content: Any) -> dict[str, str]:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise bad(60, index, "is an index without a weight_map of tensors to files.", AGAIN)
    outside = [name for name in dict.fromkeys(weight_map.values()) if not is_inside(name)]
    if outside:
        what = f"names shards outside its folder: {listed(outside)}."
        raise bad(61, index, what, "Do not use it: an index that reaches outside its folder is an attack or broken.")
    return weight_map


def is_inside(name: str) -> bool:
    """Whether the relative path `name` stays in its folder by its text alone."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & {"\\", "\0", ":"}
