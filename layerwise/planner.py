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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.data import Data
from layerwise.energy import energy
from layerwise.errors import UsageError, nearest
from layerwise.importance import ImportanceReport
from layerwise.measure import costs, evaluate, latency
from layerwise.method import CompressionMethod, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.planning.actions import Menu
from layerwise.planning.choice import Budget, Choice
from layerwise.planning.effects import Effect, Meter
from layerwise.planning.finals import Finals, Measured
from layerwise.planning.search import Search
from layerwise.planning.solve import smallest
from layerwise.planning.tabulate import Tabulator, check_any
from layerwise.planning.wholes import Sorting
from layerwise.supplies import Supplies
from layerwise.target import Target

Progress = Callable[[int, int], None]
TABLE = 0.4  # of the forwards go to the table
CALIBRATION = (64, 4)  # samples that methods watch while planning: so many, or that part of the data if it is less


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
        choice = self._choice(targets, begun)
        measured = choice.candidates()
        self.peak = max(self.peak, choice.search.peak)
        plan = choice.finals.plan(measured, self.evidence(choice))
        if self.progress is not None:
            self.progress(round(self.forwards), round(self.forwards))
        return plan

    def ladder(self, targets: Sequence[Target]) -> Ladder:
        """Plans along the ratio of bytes, from the same table, judged by `targets`."""
        self._check_report()
        self._prepare(targets)
        self._check_targets(targets)
        return Ladder(self, self._choice(targets, self.meter.spent))

    def _choice(self, targets: Sequence[Target], begun: float) -> Choice:
        """A later choice from the same table gets at least a third of the forwards again."""
        budget = Budget(targets, self.before)
        search = Search(self.table, self.meter, self.supplies, budget.scarce, self.tick, seen=self.seen)
        recovery = [step_of(m, [x.name for x in self.model.layers]) for m in self.recovery]
        finals = Finals(self.meter, targets, self.before, self.stderr, self.supplies, self.notes, recovery, self.seed)
        left = max(self.forwards - begun, self.forwards / 3)
        return Choice(self.table, self.wholes, budget, search, finals, self.orders(), left)

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
        tabulator = Tabulator(self.meter, menu, self.supplies, TABLE * self.forwards, timed, slow_is_out, self.tick, self.notes)
        self.table = tabulator.make(self.before)
        sorting = Sorting(self.meter, self.supplies, self.notes, slow_is_out, tabulator.share, menu.actions, self.tick)
        self.wholes, beside = sorting.sort(menu.wholes)
        self.table.add_rest(beside)
        self.seen: dict[frozenset[tuple[str, str]], Effect] = {}
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

    def evidence(self, choice: Choice) -> dict[str, Any]:
        """What a choice was made from, as plain data."""
        return {
            "forwards": round(self.meter.spent, 2),
            "peak_bytes": self.peak,
            "samples": self.meter.samples,
            "table": self.table.rows(),
            "moves": choice.search.moves,
            "starts": choice.told(),
        }


class Ladder:
    """The solver's choices at ratios of the bytes, carried out and measured as they are asked for."""

    def __init__(self, planner: Planner, choice: Choice) -> None:
        self.planner, self.choice = planner, choice
        self.points: list[tuple[float, Measured]] = []
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
        before = self.planner.before
        return all(t.met(before[t.metric], measured.figures[t.metric]) for t in targets)

    def plan(self, measured: Measured, note: str) -> CompressionPlan:
        """The plan of a measured point; the other points are its candidates."""
        found = self.choice.finals.plan_of(measured, [m for _, m in self.points], self.planner.evidence(self.choice))
        return replace(found, notes=(*found.notes, note))


__all__ = ["Planner"]
