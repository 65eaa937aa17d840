"""``manifest.json``: the SHA-256 and size of every file of a folder, written last and verified before use.

Weight files do not protect their content: most flipped bits load without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerwise.errors import CorruptRun, UsageError
from layerwise.files.atomic import TEMPORARY, write_atomic

MANIFEST = "manifest.json"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Write ``manifest.json``: for every other file below `folder` its SHA-256 and size in bytes.

    Raises `UsageError` for what is not a regular file (a pipe, a dangling link), and as `write_atomic` does.
    """
    files = {
        name: {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        for name, file in sorted(regular_files(Path(folder)).items())
    }
    write_atomic(Path(folder) / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def verify_manifest(folder: str | os.PathLike[str]) -> None:
    """Raise `CorruptRun` that lists every file of `folder` that is missing, changed, or not in the manifest."""
    folder = Path(folder)
    listed = _read_manifest(folder)
    present = _entries(folder)
    problems = [f"missing {name}" for name in sorted(listed.keys() - present.keys())]
    problems += [f"changed {name}" for name in sorted(listed.keys() & present.keys()) if _changed(present[name], listed[name])]
    problems += [f"unexpected {name}" for name in sorted(present.keys() - listed.keys())]
    if problems:
        raise _corrupt(folder, f"does not match its manifest: {', '.join(problems)}.")


def newest_intact(folders: Iterable[str | os.PathLike[str]]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Of checkpoint `folders` the newest that verifies, or None, and the newer ones with why they were skipped.

    Newest: the highest last number in the name (``step-10`` after ``step-9``), then the latest manifest.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in sorted(map(Path, folders), key=_age_key, reverse=True):
        try:
            verify_manifest(folder)
        except (CorruptRun, OSError) as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def _age_key(folder: Path) -> tuple[int, int]:
    numbers = re.findall(r"\d+", folder.name)
    manifest = folder / MANIFEST
    return (int(numbers[-1]) if numbers else -1, manifest.stat().st_mtime_ns if manifest.exists() else 0)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _corrupt(folder, f"has no {MANIFEST}: it was never finished, or it is not a run.") from None
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("files"), dict):
        raise _corrupt(path, "is not a manifest of format 1.")
    for name, entry in content["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or type(entry.get("bytes")) is not int:
            raise _corrupt(path, f"has no sha256 and bytes for {name!r}.")
    return content["files"]


def _changed(file: Path, entry: dict[str, Any]) -> bool:
    if not file.is_file():  # a pipe would hang the hash
        return True
    return file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]


def _entries(folder: Path) -> dict[str, Path]:
    """Everything below `folder` that is not a real folder, by relative posix path; without the manifest.

    Temporary files, by the pattern of their name, are what a killed write leaves; nobody reads them: left out.
    """
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name != MANIFEST and not TEMPORARY.match(path.name):
            found[name] = path
    return found


def regular_files(folder: Path) -> dict[str, Path]:
    files = _entries(folder)
    for name, file in files.items():
        if not file.is_file():
            raise UsageError(f"{name!r} is not a regular file and cannot be saved in a run.", place=str(folder.absolute()))
    return files


def _corrupt(place: Path, what: str) -> CorruptRun:
    remedy = "Do not use it: restore it from a copy, or repeat the run from the last intact checkpoint."
    return CorruptRun(what, place=str(place.absolute()), remedy=remedy)
