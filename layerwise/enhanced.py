"""`EnhancedAnalysisRegistry`: the one registry of analyzers as a class that can be instantiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer


@dataclass(frozen=True)
class EnhancedAnalysisRegistry(Mapping[str, type[ImportanceAnalyzer]]):
    """A view of `layerwise.analyzer.ANALYZERS`: name → class. It holds nothing itself: registering in one registers in both."""

    @property
    def methods(self) -> dict[str, type[ImportanceAnalyzer]]:
        """Every registered analyzer by its name."""
        return dict(ANALYZERS)

    def register(self, name: str) -> Callable[[type[ImportanceAnalyzer]], type[ImportanceAnalyzer]]:
        """Class decorator, that of the one registry."""
        return ANALYZERS.register(name)

    def create(self, name: str, **settings: Any) -> ImportanceAnalyzer:
        """An analyzer with these settings. Raises `UsageError` with the nearest name for one that is not known."""
        return ANALYZERS[name](**settings)

    def __getitem__(self, name: str) -> type[ImportanceAnalyzer]:
        return ANALYZERS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ANALYZERS)

    def __len__(self) -> int:
        return len(ANALYZERS)
