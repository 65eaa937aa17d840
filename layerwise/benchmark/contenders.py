"""The methods that are judged: every registered analyzer with default settings, and the protocol's variants; each run alone."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.benchmark.protocol import VARIANTS
from layerwise.data import Data
from layerwise.errors import UsageError, nearest
from layerwise.model import UniversalModel
from layerwise.observe import observe


def contenders(seed: int, only: tuple[str, ...] = ()) -> dict[str, ImportanceAnalyzer]:
    """Label → analyzer, in alphabetical order. Raises `UsageError` for a label in `only` that is not known."""
    found = {name: ANALYZERS[name]() for name in ANALYZERS}
    found |= {label: ANALYZERS[name](**settings) for label, (name, settings) in VARIANTS.items() if name in found}
    for label in only:
        if label not in found:
            raise UsageError(f"Unknown method {label!r}.", remedy=nearest(label, found))
    return {label: _seeded(found[label], seed) for label in sorted(only or found)}


def _seeded(analyzer: Any, seed: int) -> ImportanceAnalyzer:
    seeded: ImportanceAnalyzer = replace(analyzer, seed=seed) if "seed" in {f.name for f in fields(analyzer)} else analyzer
    return seeded


def source_of(analyzer: ImportanceAnalyzer) -> str:
    """A hash of the analyzer's own file and settings: when either changes, its scores are made again."""
    code = Path(inspect.getfile(type(analyzer))).read_bytes()
    return hashlib.sha256(code + repr(analyzer).encode()).hexdigest()[:12]


def judged(analyzer: ImportanceAnalyzer, model: UniversalModel, data: Data, seed: int) -> dict[str, Any]:
    """Layer name → score (finite ones), the reasons for the others, and what the pass cost; or why the method failed."""
    try:
        statistic = analyzer.statistic(model)
        counts: Mapping[str, int] = {"forwards": 0, "backwards": 0, "block_calls": 0}
        if statistic is not None:
            counts = vars(observe(model, data, {analyzer.method: statistic}, seed=seed).counts)
        scores = analyzer.finish(model, statistic, 0.0)
    except Exception as error:  # one method that fails must not end the benchmark: it is recorded and listed
        return {"failure": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    usable = {name: float(e.value) for name, e in scores.entries.items() if math.isfinite(e.value)}
    missing = {name: e.reason or str(e.status) for name, e in scores.entries.items() if name not in usable}
    return {"scores": usable, "missing": missing, "passes": passes(counts, len(data), len(model.layers)), "counts": dict(counts)}


def passes(counts: Mapping[str, int], batches: int, layers: int) -> float:
    """Passes over the data: forwards (for interventions block calls / layers) plus two for each backward."""
    forwards = counts["block_calls"] / layers if counts["block_calls"] else counts["forwards"]
    return (forwards + 2 * counts["backwards"]) / batches


def drawn_anew(model: UniversalModel, seed: int) -> UniversalModel:
    """A copy whose layers' matrices and kernels are normal noise of variance 1 / fan-in."""
    copy = model.clone()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in copy.layers:
            for p in layer.module.parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
    return copy
