"""From a budget to a plan: a table of what each action on each layer costs and spoils, an exact solver, and measurements.

1. Every action of the menu is measured on every layer alone (`layerwise.planning.tabulate`), on replay.
2. A solver picks the action per layer that spoils least within the budget (`layerwise.planning.solve`), as if damages added up.
   Further starts come from other readings of the table, from the uniform choices, and from the scores: the layers they call least
   important are left out first. Each start is measured whole.
3. The best start is improved by measured swaps (`layerwise.planning.search`).
4. It and its rivals, at this and at neighbouring budgets, are carried out for real and measured on the data: the Pareto set.
   Of those that meet every target the one with the least damage wins; of equal ones the cheapest.

A budget that nothing meets is refused with the nearest candidate's figures and the nearest budget that can be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.data import Data
from layerwise.energy import energy
from layerwise.errors import UsageError, nearest
from layerwise.importance import ImportanceReport
from layerwise.measure import costs, evaluate, latency
from layerwise.method import CompressionMethod, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step
from layerwise.planning.actions import KEEP, Menu, Table
from layerwise.planning.effects import Meter
from layerwise.planning.finals import Finals, Measured
from layerwise.planning.search import Search, State
from layerwise.planning.solve import kept, smallest, solve
from layerwise.planning.tabulate import Tabulator, check_any
from layerwise.planning.wholes import Whole, wholes_of
from layerwise.supplies import Supplies
from layerwise.target import COSTS, Target

Progress = Callable[[int, int], None]
CALIBRATION = (64, 4)  # samples that methods watch while planning: so many, or that part of the data if it is less
TIGHTER, LOOSER = (0.8,), (1.15, 1.4)  # neighbouring budgets, times the limits
HALVINGS = 6  # steps to the smallest budget where only quality is asked for


@dataclass
class Planner:
    """One model, one menu, one data set. `make` gives the plan for the `targets`; `choose` for others, from the same table.

    `report` may be None; its scores only add starts. `calibration` is what methods watch activations on (default: the first of
    `data`). `recovery` are methods that train, appended to the plan. `forwards`: how often the work of one pass over `data` may
    be spent on a plan, the table included.
    """

    model: UniversalModel
    report: ImportanceReport | None
    targets: Sequence[Target]
    data: Data
    methods: Sequence[CompressionMethod | str] | str = "auto"
    seed: int = 0
    progress: Progress | None = None
    calibration: Data | None = None
    recovery: Sequence[CompressionMethod] = ()
    forwards: float = 60.0
    notes: list[str] = field(default_factory=list)
    timed: bool = False  # whether the table knows latencies
    peak: int = 0  # the most bytes of changed blocks that were held at once beside the model

    def make(self) -> CompressionPlan:
        """Raises `TargetMissed` (LW-T01) when no candidate meets every target, `UsageError` for a target without a figure or a
        report that does not rank blocks.
        """
        return self.choose(self.targets)

    def choose(self, targets: Sequence[Target]) -> CompressionPlan:
        """The plan for `targets`; the table is measured the first time only, and again when latencies are first asked for."""
        self._check_report()
        self._prepare(targets)
        self._check_targets(targets)
        begun = self.meter.spent
        budget = _Budget(targets, self.before, self.model.task)
        choice = _Choice(self, budget, begun)
        measured, states = choice.candidates()
        self.peak = max(self.peak, choice.search.peak)
        plan = choice.finals.plan(measured, self.evidence(choice, states))
        if self.progress is not None:
            self.progress(round(self.forwards), round(self.forwards))
        return plan

    def ladder(self, targets: Sequence[Target]) -> Ladder:
        """Plans along the ratio of bytes, from the same table, judged by `targets`."""
        self._check_report()
        self._prepare(targets)
        self._check_targets(targets)
        return Ladder(_Choice(self, _Budget(targets, self.before, self.model.task), self.meter.spent))

    def _prepare(self, targets: Sequence[Target]) -> None:
        timed = any(t.metric in {"latency", "energy"} for t in targets)
        if hasattr(self, "table") and (self.timed or not timed):
            return  # what is known is enough
        self.timed = timed
        self.meter = Meter(self.model, self.data)
        few = self.calibration or self.data.head(min(CALIBRATION[0], -(-self.meter.samples // CALIBRATION[1])))
        self.supplies = Supplies(calibration=few, teacher=self.model)
        self.before, self.stderr = self._before(timed, {t.metric for t in targets})
        self._check_targets(targets)
        menu = Menu.of(self.methods)
        self.notes = [*menu.notes]
        slow_is_out = self.methods == "auto"
        tabulator = Tabulator(self.meter, menu, self.supplies, self.forwards / 2, timed, slow_is_out, self.tick, self.notes)
        self.table = tabulator.make(self.before)
        self.wholes = wholes_of(menu, self.meter, self.supplies, self.notes, slow_is_out)
        self.peak = tabulator.peak
        check_any(self.table, menu, self.model.name)

    def _before(self, timed: bool, asked: set[str]) -> tuple[dict[str, float], dict[str, float]]:
        whole = evaluate(self.model, self.data)
        self.meter.spent += 1
        figures = costs(self.model) | whole.means()
        if timed:
            figures["latency"] = latency(self.model, self.data[0])
        if "energy" in asked:
            figures["energy"] = energy(self.model, self.data[0])
        return figures, whole.stderr()

    def _check_report(self) -> None:
        if self.report is not None and "block" not in self.report.granularities:
            raise UsageError(
                f"The report ranks no blocks, only {' and '.join(self.report.granularities)}s, and a plan treats whole blocks.",
                remedy="Analyze with granularity='block'.",
            )

    def _check_targets(self, targets: Sequence[Target]) -> None:
        assert self.model.task is not None  # settled by the meter
        for target in targets:
            if target.metric not in self.before:
                raise UsageError(
                    f"The target {target} cannot be measured: the task {self.model.task.name} has no {target.metric}.",
                    remedy=nearest(target.metric, self.before),
                )

    def tick(self) -> None:
        """Tells how much of the work that may be spent is done."""
        if self.progress is not None:
            self.progress(min(round(self.meter.spent), round(self.forwards)), round(self.forwards))

    def orders(self) -> list[list[str]]:
        """The layers from the least to the most important, by the consensus of the report and by depth from the end."""
        names = [layer.name for layer in self.model.layers]
        found = [names[::-1]]
        if self.report is not None:
            consensus = self.report.at("block").consensus()
            found.insert(0, [n for n in sorted(consensus.usable(), key=lambda n: consensus[n]) if n in names])
        return found

    def evidence(self, choice: _Choice, states: Sequence[State]) -> dict[str, Any]:
        """What a choice was made from, as plain data."""
        return {
            "forwards": round(self.meter.spent, 2),
            "peak_bytes": self.peak,
            "samples": self.meter.samples,
            "table": self.table.rows(),
            "moves": choice.search.moves,
            "starts": [{"actions": _told(s), "damage": s.damage} for s in states],
        }


@dataclass(frozen=True)
class _Budget:
    """The targets as limits on costs and as questions to the quality."""

    targets: Sequence[Target]
    before: Mapping[str, float]
    task: Any

    @property
    def limits(self) -> dict[str, float]:
        """Cost → limit, the tightest where there are several."""
        found: dict[str, float] = {}
        for target in self.targets:
            if target.metric in COSTS:
                limit = target.limit(self.before[target.metric])
                if target.metric == "energy":  # no block has a counter of its own: energy is taken to fall as time does
                    target, limit = Target("latency", "<=", 0.0, False), limit / self.before["energy"] * self.before["latency"]
                found[target.metric] = min(limit, found.get(target.metric, limit))
        return found

    def qualities_met(self, figures: Mapping[str, float]) -> bool:
        return all(t.met(self.before[t.metric], figures.get(t.metric, math.nan)) for t in self.targets if not t.is_cost)

    @property
    def scarce(self) -> str:
        return next(iter(self.limits), "size")


class _Choice:
    """One search for one budget."""

    def __init__(self, planner: Planner, budget: _Budget, begun: float) -> None:
        self.planner, self.budget = planner, budget
        self.search = Search(planner.table, planner.meter, planner.supplies, budget.scarce, planner.tick)
        self.left = max(planner.forwards - begun, planner.forwards / 3)  # a later choice from the same table gets as much again
        self.end = planner.meter.spent + self.left
        recovery = [step_of(m, [x.name for x in planner.model.layers]) for m in planner.recovery]
        self.finals = Finals(
            planner.meter, budget.targets, planner.before, planner.stderr, planner.supplies, planner.notes, recovery
        )
        self.finals.seed = planner.seed

    def candidates(self) -> tuple[list[Measured], list[State]]:
        """Every candidate that was carried out, and the starts that were measured on the way."""
        limits = self.budget.limits or self._found_limits()
        states: list[State] = []
        best: tuple[float, Whole, State] | None = None
        for whole in self.planner.wholes:
            for chosen in self._starts(whole, limits):
                state = self._measured(chosen, whole, limits)
                if state is None:
                    continue
                states.append(state)
                if best is None or state.damage + whole.effect.damage < best[0]:
                    best = (state.damage + whole.effect.damage, whole, state)
        measured: list[Measured] = []
        if best is not None:
            _, whole, state = best
            state = self.search_under(whole).improve(state, limits, max(self.end - self.planner.meter.spent - 8, 0.0))
            measured += self._carried_out(whole, state, limits)
            rivals = sorted((s for s in states if s.chosen != state.chosen), key=lambda s: s.damage)[:1]
            measured += [self.finals.measure(self._steps(rival.chosen, whole)) for rival in rivals]
        measured += self._neighbouring(limits, met=any(not m.violation for m in measured))
        return _distinct(measured), states

    def search_under(self, whole: Whole) -> Search:
        """The search, with bytes as they are on top of `whole`."""
        self.search.table = whole.on(self.planner.table)
        return self.search

    def _starts(self, whole: Whole, limits: Mapping[str, float]) -> Iterator[dict[str, str]]:
        """Assignments within the limits: the solver's on the damages and on their roots and squares, with the least important
        layers left out, and the best uniform ones.
        """
        table = whole.on(self.planner.table)
        known = {(e.layer, e.action): e.damage for row in table.entries.values() for e in row.values()}
        seen: set[tuple[str, ...]] = set()
        for chosen in (*self._solved(table, limits, known), *self._uniform(table, limits)):
            key = tuple(chosen.values())
            if key not in seen:
                seen.add(key)
                yield chosen

    def _solved(
        self, table: Table, limits: Mapping[str, float], known: Mapping[tuple[str, str], float]
    ) -> Iterator[dict[str, str]]:
        for power in (1.0, 0.5, 2.0):
            if chosen := solve(table, limits, {pair: damage**power for pair, damage in known.items() if math.isfinite(damage)}):
                yield chosen
        drops = [label for label, action in table.actions.items() if action.cuts and any(m.selective for m in action.methods)]
        for order in self.planner.orders() if drops else ():
            ordered = [name for name in order if drops[0] in table.entries[name]]
            for count in sorted({1, len(ordered) // 4, len(ordered) // 2} - {0, len(ordered)}):
                gone = set(ordered[:count])
                allowed = {p: d for p, d in known.items() if (p[1] == drops[0]) == (p[0] in gone)}
                if chosen := solve(table, limits, allowed):
                    yield chosen

    def _uniform(self, table: Table, limits: Mapping[str, float]) -> list[dict[str, str]]:
        """The two least damaging of the actions that, on every layer that they treat, keep the limits."""
        found = []
        for label in table.actions:
            chosen = {layer: label if label in row else KEEP for layer, row in table.entries.items()}
            if label != KEEP and kept(table, chosen, limits) and math.isfinite(table.damage(chosen)):
                found.append(chosen)
        alive = [c for c in found if any(table.entries[k][v].params for k, v in c.items())]
        return sorted(alive, key=table.damage)[:2]

    def _measured(self, chosen: dict[str, str], whole: Whole, limits: Mapping[str, float]) -> State | None:
        """The state, unless what was estimated turns out to break the limits; then the solver's next best that does not."""
        search = self.search_under(whole)
        for _ in range(3):
            if self.planner.meter.spent > self.end - self.left / 2:
                return None
            state = search.state(chosen)
            if state is not None and kept(search.table, chosen, limits):
                return state
            again = solve(search.table, limits)
            if again is None or again == chosen:
                return None
            chosen = again
        return None

    def _found_limits(self) -> dict[str, float]:
        """The smallest size at which the solver's choice, measured, keeps the qualities: found by halving the way to it."""
        table = self.planner.table
        low, high = table.total(smallest(table, "size"), "size"), self.planner.before["size"]
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            chosen = solve(table, {"size": middle})
            state = self.search_under(Whole()).state(chosen) if chosen else None
            met = state is not None and self.budget.qualities_met(state.effect.figures)
            low, high = (low, middle) if met else (middle, high)
        return {"size": high}

    def _steps(self, chosen: Mapping[str, str], whole: Whole) -> tuple[Step, ...]:
        return self.planner.table.steps(self.planner.model, chosen, whole.methods)

    def _carried_out(self, whole: Whole, state: State, limits: Mapping[str, float]) -> Iterator[Measured]:
        """The state for real, and again under tighter limits while a cost comes out above what the table foretold."""
        aimed = dict(limits)
        for _ in range(3):
            measured = self.finals.measure(self._steps(state.chosen, whole))
            yield measured
            over = {m: measured.figures[m] / limit for m, limit in limits.items() if m in measured.figures}
            if all(factor <= 1 for factor in over.values()):
                return
            aimed = {m: aimed[m] / max(over[m], 1) - (over[m] > 1) * 1e-3 * aimed[m] for m in aimed}
            search = self.search_under(whole)
            chosen = solve(search.table, aimed)
            found = search.state(chosen, state) if chosen else None
            if found is None or found.chosen == state.chosen:
                return
            state = found

    def _neighbouring(self, limits: Mapping[str, float], met: bool) -> Iterator[Measured]:
        """The Pareto set around the budget: tighter where it was met; else looser, and the smallest there is."""
        best = {
            m: min(w.on(self.planner.table).total(smallest(w.on(self.planner.table), m), m) for w in self.planner.wholes)
            for m in limits
        }
        for factor in TIGHTER if met else (*LOOSER, 0.0):
            steps = self.solved({m: max(limit * factor, best[m] * (1 + 1e-9)) for m, limit in limits.items() if m != "latency"})
            if steps is not None:
                yield self.finals.measure(steps)

    def solved(self, limits: Mapping[str, float]) -> tuple[Step, ...] | None:
        """The steps of the least damage that the table foretells within `limits`, on top of any of the whole-model methods."""
        found: list[tuple[float, int, dict[str, str], Whole]] = []
        for whole in self.planner.wholes:
            table = whole.on(self.planner.table)
            if chosen := solve(table, limits):
                found.append((table.damage(chosen) + whole.effect.damage, len(found), chosen, whole))
        if not found:
            return None
        *_, chosen, whole = min(found, key=lambda entry: entry[:2])
        return self._steps(chosen, whole)


class Ladder:
    """The solver's choices at ratios of the bytes, carried out and measured as they are asked for."""

    def __init__(self, choice: _Choice) -> None:
        self.choice = choice
        self.points: list[tuple[float, Measured]] = []
        planner = choice.planner
        self.size = planner.before["size"]
        tables = [whole.on(planner.table) for whole in planner.wholes]
        self.least = min(t.total(smallest(t, "size"), "size") for t in tables) / self.size

    def at(self, ratio: float) -> Measured | None:
        """The choice of the least damage with at most this share of the bytes; None where there is none."""
        steps = self.choice.solved({"size": ratio * self.size})
        if steps is None:
            return None
        measured = self.choice.finals.measure(steps)
        if measured.failure:
            return None
        self.points.append((ratio, measured))
        return measured

    def keeps(self, measured: Measured, targets: Sequence[Target]) -> bool:
        """Whether these of the targets are met."""
        before = self.choice.planner.before
        return all(t.met(before[t.metric], measured.figures[t.metric]) for t in targets)

    def plan(self, measured: Measured, note: str) -> CompressionPlan:
        """The plan of a measured point; the other points are its candidates."""
        found = self.choice.finals.plan_of(measured, [m for _, m in self.points], self.choice.planner.evidence(self.choice, ()))
        return replace(found, notes=(*found.notes, note))


def _distinct(measured: Sequence[Measured]) -> list[Measured]:
    return list({m.asked: m for m in measured}.values())


def _told(state: State) -> dict[str, str]:
    return {layer: label for layer, label in state.chosen.items() if label != KEEP}


__all__ = ["Planner"]
