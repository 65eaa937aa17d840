"""``py:package.module:FACTORY``: a function or class of an importable package. Importing it runs its code."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from layerwise.errors import UsageError
from layerwise.source import SOURCES, ModelSource, Opened, Source
from layerwise.sources._parts import filled_, guarded, module_from, with_options


@SOURCES.register("py")
class PythonSource(ModelSource):
    """Imports the module and calls the factory; options after a question mark are its keyword arguments."""

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        plain, settings = with_options(name)
        if plain.count(":") != 1:
            raise UsageError(f"py:{plain} names no factory.", remedy="Write py:package.module:factory.")
        module = _made(Source("py", plain, settings))
        return Opened(module, Source("py", plain, settings), notes=filled_(module, weights))

    def build(self, source: Source) -> nn.Module:
        return _made(source)


def _made(source: Source) -> nn.Module:
    package, _, factory = source.name.partition(":")
    namespace = guarded(lambda: importlib.import_module(package), f"Importing {package}", package)
    return module_from(namespace, factory, source.settings)
