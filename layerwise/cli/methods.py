"""List every analyzer, compression method, exporter and adapter."""

from __future__ import annotations

import inspect
from typing import Any

from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.config import RunConfig
from layerwise.registry import Registry


@verb()
def command(config: RunConfig, screen: Screen) -> None:
    """Names are those that --methods, --compress-methods and --export take."""
    found = {registry.kind: entries(registry) for registry in registries()}
    screen.document(found)
    for kind, rows in found.items():
        screen.table([kind, "what it does"], [[row["name"], row["about"]] for row in rows])


def registries() -> list[Registry[Any]]:
    """Every registry of the library, in the order of the walk."""
    from layerwise.adapter import ADAPTERS
    from layerwise.analyzer import ANALYZERS
    from layerwise.artifact import EXPORTERS
    from layerwise.method import METHODS
    from layerwise.source import SOURCES

    return [SOURCES, ADAPTERS, ANALYZERS, METHODS, EXPORTERS]


def entries(registry: Registry[Any]) -> list[dict[str, str]]:
    """Name and first line of the docstring of every class, by name."""
    return [{"name": name, "about": _about(cls)} for name, cls in registry.items()]


def _about(cls: type) -> str:
    module = inspect.getmodule(cls)
    text = (module and module.__doc__) or cls.__doc__ or ""
    return text.strip().partition("\n")[0].translate(str.maketrans("", "", "`*"))
