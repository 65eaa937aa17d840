"""From scores and a budget to a plan: candidates come from the scores, decisions from measurements.

1. Every scoring method orders the layers that can be left out; the prefixes of these orders are the sets to try, and one replay
   pass over the data measures all of them.
2. Every variant of the other methods (16 bits, 8 bits, …) is applied to a copy once, to learn what it costs and what it damages.
3. Sets × variants are ranked by these figures; the promising ones are built and measured for real until some meet the targets.
4. Of those that do, the best quality wins; within its standard error the one with the fewest multiply-accumulates, then bytes.

A budget that nothing meets is refused with the nearest candidate's figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from layerwise.damage import LayerSet, evaluate_skips
from layerwise.data import Data
from layerwise.errors import MissingDependency, TargetMissed, UsageError, nearest
from layerwise.evaluation import Evaluation
from layerwise.importance import ImportanceReport
from layerwise.measure import costs, evaluate, latency, time_paired
from layerwise.method import METHODS, CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import Candidate, CompressionPlan, Step
from layerwise.supplies import Supplies
from layerwise.target import Target
from layerwise.task import Task
from layerwise.tensors import byte_size

Progress = Callable[[int, int], None]
MOST_SETS = 64
MOST_MEASURED = 12
TOO_SLOW = 4.0  # times the original's latency, from which on an automatic menu leaves a variant out


@dataclass(frozen=True)
class Variant:
    """Steps on all layers that keep their structure, what they make of each layer's bytes, and the damage they do alone."""

    methods: tuple[CompressionMethod, ...]
    layer_bytes: Mapping[str, int]
    other_bytes: int
    quality: float


@dataclass
class Planner:
    """One planning run; `make` gives the plan. `data` is what quality is measured on."""

    model: UniversalModel
    report: ImportanceReport
    targets: Sequence[Target]
    data: Data
    methods: Sequence[CompressionMethod | str] | str = "auto"
    seed: int = 0
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)

    def make(self) -> CompressionPlan:
        """Raises `TargetMissed` (LW-T01) when no candidate meets every target, `UsageError` for a target without a figure or a
        report that does not rank blocks.
        """
        if "block" not in self.report.granularities:
            raise UsageError(
                f"The report ranks no blocks, only {' and '.join(self.report.granularities)}s, and a plan treats whole blocks.",
                remedy="Analyze with granularity='block'.",
            )
        self.report = self.report.at("block")
        self.model.see(self.data[0])
        menu = self._menu()
        cut = next((m for m in menu if m.selective), None)
        sets = self._sets(cut) if cut else [frozenset()]
        skips = evaluate_skips(self.model, self.data, sets, progress=self.progress)
        before = self._before(skips[frozenset()])
        self._check_targets(before)
        variants = [self._variant((), before), *(self._variant((m,), before) for m in menu if not m.selective)]
        ranked = self._ranked(variants, skips, before)
        measured = self._measure(ranked, cut, before)
        return self._plan(measured, before)

    @property
    def task(self) -> Task:
        assert self.model.task is not None  # settled by see
        return self.model.task

    def _menu(self) -> list[CompressionMethod]:
        """Instances to try. `auto`: every registered method that promises to shrink something and is installed."""
        if self.methods == "auto":
            chosen: list[CompressionMethod | str] = [name for name, cls in METHODS.items() if cls.shrinks]
        else:
            chosen = [self.methods] if isinstance(self.methods, str) else list(self.methods)
        menu: list[CompressionMethod] = []
        for entry in chosen:
            menu.extend(METHODS[entry].variants() if isinstance(entry, str) else [entry])
        return menu

    def _sets(self, cut: CompressionMethod) -> list[LayerSet]:
        """The empty set and the prefixes of every voting method's order, least important first, without the whole model."""
        removable = {layer.name for layer in self.model.layers if not cut.treats(layer)}
        scores = [self.report.consensus(), *(s for s in self.report.scores.values() if not s.settings.get("baseline"))]
        found: dict[LayerSet, None] = {frozenset(): None}
        for size in range(1, len(removable)):
            for score in scores:
                order = [name for name in sorted(score.usable(), key=lambda n: score[n]) if name in removable]
                found.setdefault(frozenset(order[:size]))
        sets = list(found)
        step = max(-(-len(sets) // MOST_SETS), 1)
        return sets[::step]

    def _before(self, whole: Evaluation) -> dict[str, float]:
        figures = costs(self.model) | whole.means()
        if any(t.metric == "latency" for t in self.targets):
            figures["latency"] = latency(self.model, self.data[0])
        return figures

    def _check_targets(self, before: Mapping[str, float]) -> None:
        for target in self.targets:
            if target.metric not in before:
                raise UsageError(
                    f"The target {target} cannot be measured: the task {self.task.name} has no {target.metric}.",
                    remedy=nearest(target.metric, before),
                )

    def _variant(self, methods: tuple[CompressionMethod, ...], before: Mapping[str, float]) -> Variant | None:
        """What `methods` do to all layers that they treat; None where they treat none or are not installed."""
        try:
            steps = self._steps(frozenset(), None, methods)
            changed = (
                apply_plan(self.model, CompressionPlan(steps), Supplies(calibration=self.data)).model if steps else self.model
            )
        except MissingDependency as error:
            self.notes.append(str(error))
            return None
        if methods and (not steps or self._too_slow(changed, methods)):
            return None
        sizes = {layer.name: byte_size(changed.module.get_submodule(layer.name)) for layer in self.model.layers}
        quality = self._quality(evaluate(changed, self.data, reference=self.model).means()) if methods else self._quality(before)
        return Variant(methods, sizes, byte_size(changed.module) - sum(sizes.values()), quality)

    def _too_slow(self, changed: UniversalModel, methods: tuple[CompressionMethod, ...]) -> bool:
        """Whether this device runs the variant so slowly that nobody would want it unasked (16-bit floats on many CPUs)."""
        if self.methods != "auto":
            return False
        before, after = time_paired([self.model, changed], self.data[0], repeats=3)
        factor = after.median / before.median
        if factor > TOO_SLOW:
            named = " + ".join(" ".join([m.name, *map(str, step_of(m, ()).settings.values())]) for m in methods)
            self.notes.append(f"{named} was left out: {factor:.0f} times as slow on this device. Name the method to have it.")
        return factor > TOO_SLOW

    def _steps(self, skipped: LayerSet, cut: CompressionMethod | None, methods: Iterable[CompressionMethod]) -> tuple[Step, ...]:
        left = [layer for layer in self.model.layers if layer.name not in skipped]
        steps = []
        if cut and skipped:
            steps.append(step_of(cut, [layer.name for layer in self.model.layers if layer.name in skipped]))
        for method in methods:
            if treated := [layer.name for layer in left if not method.treats(layer)]:
                steps.append(step_of(method, treated))
        return tuple(steps)

    def _quality(self, means: Mapping[str, float]) -> float:
        """The task's quality, turned so that higher is better."""
        value = means[self.task.quality]
        return value if self.task.higher_is_better else -value

    def _ranked(
        self, variants: Sequence[Variant | None], skips: Mapping[LayerSet, Evaluation], before: Mapping[str, float]
    ) -> list[tuple[LayerSet, Variant]]:
        """Pairs whose estimated figures break the targets least; then those that lose less than the noise, cheapest first;
        then the best estimated quality first."""
        whole, noise = self._quality(before), skips[frozenset()].stderr().get(self.task.quality, 0.0)
        rows: list[tuple[float, float, float, LayerSet, Variant]] = []
        for variant in variants:
            for skipped, evaluation in skips.items() if variant else ():
                assert variant is not None
                if not skipped and not variant.methods:
                    continue
                means = evaluation.means()
                quality = self._quality(means) + variant.quality - whole
                figures = dict(before) | means | self._cost_estimate(skipped, variant, before)
                figures[self.task.quality] = quality if self.task.higher_is_better else -quality
                rows.append((self._violation(figures, before), -quality, figures["macs"], skipped, variant))
        best = max((-row[1] for row in rows if not row[0]), default=whole)

        def order(row: tuple[float, float, float, LayerSet, Variant]) -> tuple[float, bool, float, float]:
            as_good = -row[1] >= best - noise
            return (row[0], not as_good, row[2] if as_good else row[1], row[1])

        return [(skipped, variant) for *_, skipped, variant in sorted(rows, key=order)]

    def _cost_estimate(self, skipped: LayerSet, variant: Variant, before: Mapping[str, float]) -> dict[str, float]:
        kept = [layer for layer in self.model.layers if layer.name not in skipped]
        macs = before["macs"] - sum(layer.macs for layer in self.model.layers if layer.name in skipped)
        return {
            "size": float(variant.other_bytes + sum(variant.layer_bytes[layer.name] for layer in kept)),
            "params": before["params"] - sum(layer.parameters for layer in self.model.layers if layer.name in skipped),
            "macs": macs,
        }

    def _violation(self, figures: Mapping[str, float], before: Mapping[str, float]) -> float:
        """How far the figures are beyond the targets, as a sum of relative distances; 0 where all are met."""
        total = 0.0
        for target in self.targets:
            limit, value = target.limit(before[target.metric]), figures[target.metric]
            beyond = value - limit if target.sense == "<=" else limit - value
            total += max(beyond, 0.0) / max(abs(limit), 1e-12) if math.isfinite(value) else math.inf
        return total

    def _measure(
        self, ranked: Sequence[tuple[LayerSet, Variant]], cut: CompressionMethod | None, before: Mapping[str, float]
    ) -> list[_Measured]:
        """Builds and measures candidates from the top until enough were tried."""
        timed = any(t.metric == "latency" for t in self.targets)
        measured = []
        for skipped, variant in ranked[:MOST_MEASURED]:
            steps = self._steps(skipped, cut, variant.methods)
            model = apply_plan(self.model, CompressionPlan(steps)).model
            evaluation = evaluate(model, self.data, reference=self.model)
            figures = costs(model) | evaluation.means()
            if timed:
                figures["latency"] = latency(model, self.data[0])
            error = evaluation.stderr().get(self.task.quality, math.nan)
            measured.append(_Measured(steps, figures, self._violation(figures, before), error))
            if self.progress is not None:
                self.progress(len(measured), min(len(ranked), MOST_MEASURED))
        return measured

    def _plan(self, measured: Sequence[_Measured], before: Mapping[str, float]) -> CompressionPlan:
        feasible = [m for m in measured if m.violation == 0.0]
        candidates = tuple(Candidate(m.steps, m.figures, m.violation == 0.0) for m in measured)
        if not feasible:
            raise self._refused(measured, before)
        best = max(feasible, key=lambda m: self._quality(m.figures))
        slack = best.stderr if math.isfinite(best.stderr) else 0.0
        as_good = [m for m in feasible if self._quality(m.figures) >= self._quality(best.figures) - slack]
        chosen = min(as_good, key=lambda m: (m.figures["macs"], m.figures["size"]))
        return CompressionPlan(
            steps=chosen.steps,
            model=self.model.fingerprint,
            targets=tuple(self.targets),
            seed=self.seed,
            before=dict(before),
            predicted=chosen.figures,
            candidates=candidates,
            notes=tuple(self.notes),
        )

    def _refused(self, measured: Sequence[_Measured], before: Mapping[str, float]) -> TargetMissed:
        if not measured:
            return TargetMissed(
                "None of the methods can treat any layer of this model.",
                place=self.model.name,
                remedy=" ".join(self.notes) or "Allow more methods.",
                code="LW-T02",
            )
        near = min(measured, key=lambda m: m.violation)
        reached = ", ".join(
            f"{t.metric} {near.figures[t.metric]:.4g} (allowed {t.sense} {t.limit(before[t.metric]):.4g})" for t in self.targets
        )
        named = " + ".join(f"{s.method} on {len(s.layers)}" for s in near.steps)
        return TargetMissed(
            f"No candidate meets {', '.join(map(str, self.targets))}. The nearest, {named} layers, reaches {reached}.",
            place=self.model.name,
            remedy="Loosen a target, or allow more methods." + (" " + " ".join(self.notes) if self.notes else ""),
            code="LW-T01",
        )


@dataclass(frozen=True)
class _Measured:
    steps: tuple[Step, ...]
    figures: dict[str, float]
    violation: float
    stderr: float
