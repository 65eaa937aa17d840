"""Checks of arguments before anything heavy starts: paths, the device, patterns of layer names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from layerwise.config import RunConfig, flag
from layerwise.errors import UsageError

SCHEME = re.compile(r"[a-z][a-z0-9_]*:")
NEAR = 5  # names that are shown when a pattern matches none
PATHS = ("model", "weights", "head", "data", "eval_data", "train_data")


def inputs(config: RunConfig) -> list[Path]:
    """The files and folders that the settings name, checked: they exist (LW-C04), can be read (LW-C06), are of the right
    kind (LW-C05)."""
    found = []
    for key in PATHS:
        path = local_path(getattr(config, key))
        if path is not None:
            found.append(readable(path, flag(key), kind="file" if key == "weights" else "any"))
    return found


def local_path(spec: str | None) -> Path | None:
    """The file or folder that a spec names: a path, ``FILE.py:FACTORY``, ``weights:`` and a path, ``hf:`` and an existing folder.

    None for what may be another kind of name: the verbs know which there are.
    """
    if not spec:
        return None
    file, colon, _ = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return Path(file).expanduser()
    if SCHEME.match(spec):
        path = Path(spec.partition(":")[2]).expanduser()
        return path if spec.startswith("weights:") or (spec.startswith("hf:") and path.exists()) else None
    path = Path(spec).expanduser()
    return path if os.path.lexists(path) or "/" in spec or path.suffix else None


def readable(path: Path, where: str, *, kind: str = "file") -> Path:
    """`path`, if it is there, is a `kind` (file, folder, any) and can be read."""
    place = f"{where}: {path.absolute()}"
    if not os.path.lexists(path):
        raise UsageError("There is no such file or folder.", place=place, remedy="Check the path.", code="LW-C04")
    if kind == "file" and path.is_dir():
        raise UsageError("This is a folder; a file is needed.", place=place, code="LW-C05")
    if kind == "folder" and not path.is_dir():
        raise UsageError("This is a file; a folder is needed.", place=place, code="LW-C05")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UsageError("This cannot be read: no permission.", place=place, remedy="Change its permissions.", code="LW-C06")
    return path


def output(out: str | None, sources: Iterable[Path], *, force: bool, kind: str = "file") -> Path:
    """Where to write, checked: not there yet or `force` (LW-C07), not inside an input or around one (LW-C08)."""
    if not out:
        raise UsageError("--out is missing: where to write.", remedy="See --help.", code="LW-C03")
    path = Path(out)
    apart(path, sources)
    place = f"--out: {path.absolute()}"
    if os.path.lexists(path):
        if kind == "file" and path.is_dir():
            raise UsageError("This is a folder; a file is to be written.", place=place, code="LW-C05")
        if kind == "folder" and not path.is_dir():
            raise UsageError("This is a file; a folder is to be written.", place=place, code="LW-C05")
        if not force:
            raise UsageError("output exists.", place=place, remedy="Choose another name, or add --force.", code="LW-C07")
    return path


def apart(path: Path, sources: Iterable[Path]) -> None:
    """Raises `UsageError` LW-C08 when `path` is, lies in, or holds one of the `sources`."""
    target = path.absolute().resolve()
    for source in sources:
        real = source.absolute().resolve()
        inside = target.is_relative_to(real) and (real.is_dir() or target == real)
        if inside or real.is_relative_to(target):
            how = "is an input" if target == real else "lies inside the input" if inside else "holds the input"
            raise UsageError(f"The output {how} {real}.", place=f"--out: {target}", remedy="Write somewhere else.", code="LW-C08")


def device(name: str | None) -> None:
    """Raises `UsageError` LW-C10, with the devices that there are, for one that is not here."""
    if name is not None:
        from layerwise.loading import available

        available(name)


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression. Raises `UsageError` LW-C11 with the position of a mistake in it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error.msg} at position {error.pos}.",
            place="--layers",
            remedy="Put a backslash before a character that is meant literally.",
            code="LW-C11",
        ) from None


def matching(expression: re.Pattern[str], names: Sequence[str]) -> list[str]:
    """The layer `names` in which `expression` is found. Raises `UsageError` LW-C12 with near names when there is none."""
    found = [name for name in names if expression.search(name)]
    if not found:
        near = difflib.get_close_matches(expression.pattern, names, n=NEAR, cutoff=0.0)
        raise UsageError(
            f"{expression.pattern!r} matches none of the {len(names)} layers.",
            place="--layers",
            remedy=f"Near: {', '.join(near)}.",
            code="LW-C12",
        )
    return found
