"""``FILE.py:FACTORY``: a function or class of the user's own file. **This runs the file**, with all the rights of the user."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from layerwise.errors import UsageError
from layerwise.source import SOURCES, ModelSource, Opened, Source
from layerwise.sources._parts import filled_, guarded, module_from, with_options


@SOURCES.register("file")
class FileSource(ModelSource):
    """Executes the file as ``python FILE.py`` would (its folder is importable meanwhile) and calls the factory.

    Code is code: only open files that you would run. Options after a question mark are the factory's keyword arguments.
    """

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        plain, settings = with_options(name)
        file, _, factory = plain.rpartition(":")
        path = _existing(file)
        module = module_from(_executed(path), factory, settings)
        kept = {"file": str(path), "sha256": _sha256(path), "arguments": settings}
        return Opened(module, Source("file", factory, kept), notes=filled_(module, weights))

    def build(self, source: Source) -> nn.Module:
        path = _existing(source.settings["file"])
        if _sha256(path) != source.settings["sha256"]:
            warnings.warn(f"{path} has changed since the model was saved.", stacklevel=2)
        return module_from(_executed(path), source.name, source.settings["arguments"])


def _existing(file: str) -> Path:
    path = Path(file).absolute()
    if not path.exists():
        raise UsageError("There is no such file.", place=str(path), remedy="Check the path before ':FACTORY'.", code="LW-C04")
    if not path.is_file():
        raise UsageError("is a folder, not a Python file.", place=str(path), code="LW-C05")
    return path


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError as error:
        raise UsageError("cannot be read.", place=str(path), remedy="Change its permissions.", code="LW-C06") from error


def _executed(path: Path) -> ModuleType:
    """The file as a module under a name of its own: dataclasses and copies look their module up by name."""
    name = f"layerwise_user_{path.stem}_{_sha256(path)[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # only names without a loader's suffix give none, and this one ends in .py
    assert spec.loader is not None, path
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace
    with _importable(path.parent):
        guarded(lambda: spec.loader.exec_module(namespace), "Importing the file", str(path))  # type: ignore[union-attr]
    return namespace


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, modules beside the file can be imported by it."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
