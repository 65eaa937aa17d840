"""The last word of planning: candidates carried out for real, measured, and judged against the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise.energy import energy
from layerwise.errors import LayerwiseError, TargetMissed
from layerwise.measure import costs, evaluate, latency
from layerwise.plan import Candidate, CompressionPlan, Step
from layerwise.planning.effects import Meter
from layerwise.supplies import Supplies
from layerwise.target import Target


@dataclass(frozen=True)
class Measured:
    """A candidate as `asked` for, its steps as carried out (choices made), and its figures.

    `violation`: how far it is beyond the targets, 0 where they are met; `error` is the standard error of `damage`.
    """

    asked: tuple[Step, ...]
    steps: tuple[Step, ...]
    figures: dict[str, float]
    violation: float
    damage: float
    error: float
    failure: str = ""

    @property
    def feasible(self) -> bool:
        return self.violation == 0.0


@dataclass
class Finals:
    """Measures candidates against `targets` and makes the plan of the best. `before` are the unchanged model's figures."""

    meter: Meter
    targets: Sequence[Target]
    before: Mapping[str, float]
    stderr: Mapping[str, float]
    supplies: Supplies
    notes: list[str]
    recovery: Sequence[Step] = ()
    seed: int = 0
    done: dict[tuple[Step, ...], Measured] = field(default_factory=dict)

    def measure(self, steps: tuple[Step, ...]) -> Measured:
        """The figures of `steps` carried out on a copy of the model; each is measured once."""
        if steps not in self.done:
            self.done[steps] = self._measured(steps)
        return self.done[steps]

    def _measured(self, steps: tuple[Step, ...]) -> Measured:
        model = self.meter.model
        try:
            applied = self.meter.carry_out(CompressionPlan(steps), self.supplies)
        except LayerwiseError as failed:
            return Measured(steps, steps, {}, math.inf, math.inf, math.nan, str(failed))
        effect = self.meter.compared(applied.model)
        figures = costs(applied.model) | dict(effect.figures)
        if model.task is not None and self.before.keys() - figures.keys() - {"latency", "energy"}:  # what the model must act for
            figures |= evaluate(applied.model, self.meter.data, reference=model).means()
        if "latency" in self.before:
            figures["latency"] = latency(applied.model, self.meter.data[0])
        if "energy" in self.before:
            figures["energy"] = energy(applied.model, self.meter.data[0])
        violation = math.inf if effect.failure else self.violation(figures)
        error = effect.stderr if math.isfinite(effect.stderr) else 0.0
        return Measured(steps, applied.plan.steps, figures, violation, effect.damage, error, effect.failure)

    def violation(self, figures: Mapping[str, float]) -> float:
        """How far the figures are beyond the targets, as a sum of relative distances; 0 where all are met."""
        total = 0.0
        for target in self.targets:
            limit, value = target.limit(self.before[target.metric]), figures[target.metric]
            beyond = value - limit if target.sense == "<=" else limit - value
            total += max(beyond, 0.0) / max(abs(limit), 1e-12) if math.isfinite(value) else math.inf
        return total

    def plan(self, measured: Sequence[Measured], evidence: Mapping[str, Any]) -> CompressionPlan:
        """The plan of the least damage among those that meet the targets; of equal ones the cheapest.

        Raises `TargetMissed` (LW-T01) where none does.
        """
        ran = [m for m in measured if not m.failure]
        for m in measured:
            if m.failure:
                self.notes.append(f"A candidate was given up: {m.failure}")
        feasible = [m for m in ran if m.feasible]
        if not feasible:
            raise self.refused(ran)
        return self.plan_of(min(feasible, key=lambda m: (m.damage, m.figures["macs"], m.figures["size"])), ran, evidence)

    def plan_of(self, chosen: Measured, ran: Sequence[Measured], evidence: Mapping[str, Any]) -> CompressionPlan:
        """The plan that `chosen` was measured for, with all that `ran` as its candidates."""
        return CompressionPlan(
            steps=(*chosen.steps, *self.recovery),
            model=self.meter.model.fingerprint,
            targets=tuple(self.targets),
            seed=self.seed,
            before=dict(self.before),
            predicted=chosen.figures,
            candidates=tuple(Candidate(m.steps, m.figures, m.feasible) for m in ran),
            notes=tuple(dict.fromkeys(self.notes)),
            evidence=evidence,
        )

    def refused(self, ran: Sequence[Measured]) -> TargetMissed:
        """The error that names the nearest candidate, and for each target what can be reached while the others are kept."""
        if not ran:
            return TargetMissed(
                "No candidate can be carried out.",
                place=self.meter.model.name,
                remedy=" ".join(self.notes) or "Allow more methods.",
                code="LW-T02",
            )
        near = min(ran, key=lambda m: (m.violation, m.damage))
        reached = ", ".join(
            f"{t.metric} {near.figures[t.metric]:.4g} (allowed {t.sense} {t.limit(self.before[t.metric]):.4g})"
            for t in self.targets
        )
        named = " + ".join(f"{s.method} on {len(s.layers)}" for s in near.steps) or "no change on 0"
        return TargetMissed(
            f"No candidate meets {', '.join(map(str, self.targets))}. The nearest, {named} layers, reaches {reached}.",
            place=self.meter.model.name,
            remedy=" ".join([*self._loosened(ran), "Loosen a target, or allow more methods.", *dict.fromkeys(self.notes)]),
            code="LW-T01",
        )

    def _loosened(self, ran: Sequence[Measured]) -> list[str]:
        """For each target the nearest bound with which, all others as they are, a measured candidate is feasible."""
        found = []
        for target in self.targets:
            others = [t for t in self.targets if t is not target]
            kept = [m for m in ran if all(t.met(self.before[t.metric], m.figures[t.metric]) for t in others)]
            values = [m.figures[target.metric] for m in kept if math.isfinite(m.figures[target.metric])]
            if values and not any(m.feasible for m in kept):
                value = min(values) if target.sense == "<=" else max(values)
                found.append(f"{target.metric}{target.sense}{self._bound(target, value)} would be met.")
        return found

    def _bound(self, target: Target, value: float) -> str:
        """`value` in the target's own form, rounded to the side that holds."""
        if not target.relative:
            return f"{value:.6g}"
        share = value / max(abs(self.before[target.metric]), 1e-12) * 1e4
        return f"{(math.ceil(share) if target.sense == '<=' else math.floor(share)) / 1e4:g}x"


__all__ = ["Finals", "Measured"]
