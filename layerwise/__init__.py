"""layerwise: which layers of any PyTorch model matter, what can go, and what it really costs.

Importing this package loads nothing heavy: each public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # three of the verbs are modules as well: see layerwise.verb
    from layerwise.engine import compress as compress
    from layerwise.engine import export as export
    from layerwise.engine import plan as plan

__version__ = "0.1.0"

_HOMES = {
    "layerwise.engine": (
        "load",
        "load_data",
        "fit_head",
        "analyze",
        "plan",
        "compress",
        "distill",
        "export",
        "track",
        "leaderboard",
    ),
    "layerwise.analyzer": ("ImportanceAnalyzer",),
    "layerwise.adapters.graph": ("GraphModalityAdapter",),
    "layerwise.adapters.tabular": ("TabularModalityAdapter",),
    "layerwise.architecture": ("ArchitectureDetector",),
    "layerwise.artifact": ("Artifact",),
    "layerwise.data": ("Batch", "Data"),
    "layerwise.dynamic": ("DynamicCompressionStrategy",),
    "layerwise.enhanced": ("EnhancedAnalysisRegistry",),
    "layerwise.distillation": ("Distillation",),
    "layerwise.errors": ("LayerwiseError",),
    "layerwise.extensions": ("ComputerVisionExtension", "ScientificComputingExtension"),
    "layerwise.importance": ("ImportanceReport",),
    "layerwise.model": ("UniversalModel",),
    "layerwise.multimodal": ("MultiModalAnalysis",),
    "layerwise.plan": ("CompressionPlan", "Step"),
    "layerwise.plugins.distillation": ("ModelDistillationPlugin",),
    "layerwise.result": ("CompressionResult", "Measurement", "Proof"),
    "layerwise.scores": ("LayerScore", "Scores", "Status"),
    "layerwise.selection": ("IntelligentMethodSelector",),
    "layerwise.source": ("Source",),
    "layerwise.strategy": ("TaskAdapter", "TaskType"),
    "layerwise.structure": ("Layer",),
    "layerwise.target": ("Target",),
    "layerwise.supplies": ("Supplies",),
    "layerwise.tracking": ("PerformanceTracker",),
    "layerwise.training": ("TrainingSettings",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    value = getattr(importlib.import_module(_HOME[name]), name) if name in _HOME else _analyzer(name)
    globals()[name] = value
    return value


def _analyzer(name: str) -> Any:
    """The class of a registered analyzer by its own name: no list to edit when one is added."""
    if name.endswith("Analyzer"):  # all others are answered without loading a module
        from layerwise.analyzer import ANALYZERS

        for cls in ANALYZERS.values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'layerwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
