"""`Source`: where a model came from, as plain data from which its class can be built again in another process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from layerwise.registry import Registry


@dataclass(frozen=True)
class Source:
    """`kind` names the builder, `name` the model, `settings` everything else the builder needs (JSON data only)."""

    kind: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Source:
        return cls(data["kind"], data["name"], dict(data["settings"]))


@dataclass(frozen=True)
class Opened:
    """What opening a model spec gives: the module with its weights, how to build it again, and the folder of its files."""

    module: nn.Module
    source: Source
    folder: Path | None = None
    notes: tuple[str, ...] = ()


class ModelSource(ABC):
    """One way to get a model: ``kind:NAME``."""

    @abstractmethod
    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        """The model with its weights. Raises `UsageError`, `MissingDependency` or `ModelFormatError`."""

    @abstractmethod
    def build(self, source: Source) -> nn.Module:
        """The same class with the same settings and fresh weights."""


SOURCES: Registry[ModelSource] = Registry("model source", "layerwise.sources")


def build(source: Source) -> nn.Module:
    """Builds the class that `source` describes, with fresh weights."""
    return SOURCES[source.kind]().build(source)
