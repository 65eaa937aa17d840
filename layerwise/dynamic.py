"""`DynamicCompressionStrategy`: how far to compress for given target metrics, once beforehand and then as live metrics move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.loading import load
from layerwise.method import CompressionMethod
from layerwise.metric import METRICS
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.planner import Planner
from layerwise.planning.finals import Measured
from layerwise.planning.ladder import Climber, Rung
from layerwise.target import COSTS, Target

BISECTIONS = 6


@dataclass(frozen=True)
class DynamicCompressionStrategy:
    """`target_metrics`: metric → bound, a number in the metric's own unit or a text with sense and unit.

    ``{'accuracy': 0.9, 'latency': 100}`` asks for at least 0.9 and at most 100 ms, ``{'size': '<=0.4x'}`` for a share of bytes.
    """

    target_metrics: Mapping[str, float | str]
    methods: Sequence[CompressionMethod | str] | str = "auto"
    seed: int = 0
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def targets(self) -> list[Target]:
        """The target metrics as targets. Raises `UsageError` for one that is not known."""
        if not self.target_metrics:
            raise UsageError("No target metric was given.", remedy="Give for example {'accuracy': 0.9, 'latency': 100}.")
        return [Target.parse(_text(metric, bound)) for metric, bound in self.target_metrics.items()]

    def optimize_compression(self, model: UniversalModel | nn.Module, validation_data: Any) -> CompressionPlan:
        """The plan that meets the targets: by bisection over the size where quality proves monotone, else by the planner.

        `plan.notes` say which it was. Raises `TargetMissed` where nothing meets them.
        """
        planner = self._planner(model, validation_data)
        found, why = self._binary_search_optimal_compression(planner)
        if found is not None:
            return found
        plan = planner.make()
        return replace(plan, notes=(*plan.notes, f"Searched by the planner: {why}."))

    def _binary_search_optimal_compression(self, planner: Planner) -> tuple[CompressionPlan | None, str]:
        """The plan at the best ratio of bytes: the mildest that keeps the costs, or without costs the smallest that keeps the
        qualities. None, and why, where the measured qualities do not fall with the ratio or no measured plan meets every target.
        """
        targets = self.targets()
        costs = [t for t in targets if t.is_cost]
        ladder = planner.ladder(targets)
        low, high = ladder.least, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            measured = ladder.at(middle)
            if costs:
                low, high = (middle, high) if measured and ladder.keeps(measured, costs) else (low, middle)
            else:
                low, high = (low, middle) if measured and measured.feasible else (middle, high)
        if (fault := _not_monotone(ladder.points, planner)) or not any(m.feasible for _, m in ladder.points):
            return None, fault or "no bisected plan meets every target"
        feasible = [(ratio, m) for ratio, m in ladder.points if m.feasible]
        _, chosen = (max if costs else min)(feasible, key=lambda point: point[0])
        note = f"Found by bisection over {len(ladder.points)} ratios of bytes, along which the measured quality never rose."
        return ladder.plan(chosen, note), ""

    def ladder(self, model: UniversalModel | nn.Module, validation_data: Any, rungs: int = 5) -> list[Rung]:
        """The model as it is, and plans of ever fewer bytes, each measured and none beaten in both size and damage by another."""
        planner = self._planner(model, validation_data)
        found = planner.ladder(self.targets())
        for step in range(1, rungs):
            found.at(found.least ** (step / (rungs - 1)) * (1 + 1e-6))
        made = [Rung(CompressionPlan((), model=planner.model.fingerprint), planner.before)]
        best = float("inf")
        for _, measured in sorted(found.points, key=lambda point: point[1].damage):
            if measured.steps and measured.figures["size"] < best:
                best = measured.figures["size"]
                made.append(Rung(found.plan(measured, "A rung of a ladder."), measured.figures))
        return made

    def watch(self, rungs: Sequence[Rung], *, audit: Path | None = None, patience: int = 3, margin: float = 0.1) -> Climber:
        """Who moves along `rungs` as live metrics come in: ``climber.observe({'latency': 120.0})``, then ``climber.plan``."""
        return Climber(rungs, self.targets(), patience, margin, audit)

    def _planner(self, model: UniversalModel | nn.Module, data: Any) -> Planner:
        known = model if isinstance(model, UniversalModel) else load(model)
        return Planner(known, None, self.targets(), Data.of(data), self.methods, self.seed, self.progress)


def _text(metric: str, bound: float | str) -> str:
    if isinstance(bound, str):
        return f"{metric}{bound}" if bound.lstrip()[:2] in ("<=", ">=") else bound
    higher = metric not in COSTS and (metric not in METRICS or METRICS[metric].higher_is_better)
    return f"{metric}{'>=' if higher else '<='}{bound:g}"


def _not_monotone(points: Sequence[tuple[float, Measured]], planner: Planner) -> str:
    """'' while quality does not rise by more than its error as the bytes fall; else the two points that break this."""
    task = planner.model.task
    assert task is not None  # settled by the planner
    sign = 1 if task.higher_is_better else -1
    noise = 2 * planner.stderr.get(task.quality, 0.0)
    ordered = sorted(points, key=lambda point: point[1].figures["size"])
    for i, (_, small) in enumerate(ordered):
        for _, large in ordered[i + 1 :]:
            a, b = (m.figures[task.quality] for m in (small, large))
            if sign * a > sign * b + noise:
                sizes = " and ".join(f"{m.figures['size'] / planner.before['size']:.2f}x" for m in (small, large))
                return f"{task.quality} is not monotone in the size: {a:g} and {b:g} at {sizes}"
    return ""


__all__ = ["DynamicCompressionStrategy"]
