"""One search for one budget: starts measured, the best improved by measured swaps, candidates carried out for real.

Decision: what goes on top of everything else (16 bits everywhere) is no row of the table. With each such method the most
promising state is carried out for real, and the search goes on under the method that then does least damage: the sum of two
damages that were measured apart is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise.plan import Step
from layerwise.planning.actions import KEEP, Table
from layerwise.planning.finals import Finals, Measured
from layerwise.planning.search import Search, State
from layerwise.planning.solve import kept, smallest, solve
from layerwise.planning.uniform import raced, uniform_choices
from layerwise.planning.wholes import Whole
from layerwise.target import COSTS, Target

TIGHTER, LOOSER = (0.8,), (1.15, 1.4)  # neighbouring budgets, times the limits
HALVINGS = 6  # steps to the smallest budget where only quality is asked for
RACE, STARTS = 0.1, 0.5  # parts of the forwards that go to the uniform choices, and by when all starts must be measured
FINALS = 6.0  # forwards kept back for what is carried out for real
RIVAL = 3.0  # times the least damage, up to which a whole-model method is searched under as well


@dataclass(frozen=True)
class Budget:
    """The targets as limits on costs and as questions to the quality. `before` are the unchanged model's figures."""

    targets: Sequence[Target]
    before: Mapping[str, float]

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


@dataclass
class Choice:
    """Finds candidates for `budget` from `table` and `wholes`, for `forwards`. `orders` are layers, least important first."""

    table: Table
    wholes: Sequence[Whole]
    budget: Budget
    search: Search
    finals: Finals
    orders: Sequence[Sequence[str]] = ()
    forwards: float = 60.0
    states: list[State] = field(default_factory=list)  # every start that was measured

    def __post_init__(self) -> None:
        self.begun = self.search.meter.spent

    @property
    def left(self) -> float:
        return self.begun + self.forwards - self.search.meter.spent

    def candidates(self) -> list[Measured]:
        """Every candidate that was carried out for real."""
        limits = self.budget.limits or self._found_limits()
        best = [found for whole in self.wholes if (found := self._best_start(whole, limits)) is not None]
        measured: list[Measured] = []
        promising = self._promising(best, measured)
        for number, (whole, state) in enumerate(promising):
            share = (self.left - FINALS) / (len(promising) - number)
            improved = self._under(whole).improve(state, limits, max(share, 0.0)).bare()
            measured += self._carried_out(whole, improved, limits)
            if improved.chosen != state.chosen:
                measured.append(self.finals.measure(self._steps(state.chosen, whole)))
        measured += self._rivals(measured)
        measured += self._neighbouring(limits, met=any(not m.violation for m in measured))
        return list({m.asked: m for m in measured}.values())

    # ---- starts

    def _best_start(self, whole: Whole, limits: Mapping[str, float]) -> tuple[Whole, State] | None:
        """The least damaging of the starts under `whole`, each measured without it."""
        search, found = self._under(whole), list[State]()  # told apart by damage alone: their blocks would fill the memory
        uniform = uniform_choices(search.table, limits)
        found += self._measured_starts(search, limits, short=bool(whole.methods))
        if whole.methods:
            found += [s.bare() for s in map(search.state, uniform[:1]) if s is not None]
        else:
            found += raced(search, uniform, RACE * self.forwards)
        self.states += found
        kept_ones = [s for s in found if kept(search.table, s.chosen, limits)]
        return (whole, min(kept_ones, key=lambda s: s.damage)) if kept_ones else None

    def _measured_starts(self, search: Search, limits: Mapping[str, float], short: bool) -> Iterator[State]:
        """The solver's choices; where what was estimated turns out to break the limits, its next best that does not."""
        seen: list[dict[str, str]] = []
        for start in self._solved(search.table, limits, short):
            chosen: dict[str, str] | None = start
            for _ in range(3):
                if chosen is None or chosen in seen or (seen and self.left < (1 - STARTS) * self.forwards):
                    break
                seen.append(chosen)
                state = search.state(chosen)
                if state is not None and kept(search.table, chosen, limits):
                    yield state.bare()
                    break
                chosen = solve(search.table, limits)

    def _solved(self, table: Table, limits: Mapping[str, float], short: bool) -> Iterator[dict[str, str]]:
        """The solver's on the damages, and unless it should be `short` on their roots and squares, and with the least important
        layers left out.
        """
        known = {(e.layer, e.action): e.damage for row in table.entries.values() for e in row.values()}
        for power in (1.0,) if short else (1.0, 0.5, 2.0):
            if chosen := solve(table, limits, {pair: damage**power for pair, damage in known.items() if math.isfinite(damage)}):
                yield chosen
        drops = [label for label, action in table.actions.items() if action.cuts and any(m.selective for m in action.methods)]
        for order in self.orders if drops and not short else ():
            ordered = [name for name in order if drops[0] in table.entries[name]]
            for count in sorted({1, len(ordered) // 4, len(ordered) // 2} - {0, len(ordered)}):
                gone = set(ordered[:count])
                allowed = {p: d for p, d in known.items() if (p[1] == drops[0]) == (p[0] in gone)}
                if chosen := solve(table, limits, allowed):
                    yield chosen

    def _promising(self, best: Sequence[tuple[Whole, State]], measured: list[Measured]) -> list[tuple[Whole, State]]:
        """The starts from which to search, the least damaging for real first; what was carried out is added to `measured`."""
        ranked: list[tuple[float, int]] = []
        for number, (whole, state) in enumerate(best):
            damage = state.damage
            if whole.methods:
                real = self.finals.measure(self._steps(state.chosen, whole))
                measured.append(real)
                damage = real.damage
            ranked.append((damage, number))
        near = [number for damage, number in sorted(ranked) if damage <= RIVAL * min(ranked)[0] and math.isfinite(damage)]
        return [best[number] for number in near]

    def _under(self, whole: Whole) -> Search:
        """The search, with bytes as they are on top of `whole`."""
        self.search.table = whole.on(self.table)
        return self.search

    def _found_limits(self) -> dict[str, float]:
        """The smallest size at which the solver's choice, measured, keeps the qualities: found by halving the way to it."""
        low, high = self.table.total(smallest(self.table, "size"), "size"), self.budget.before["size"]
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            chosen = solve(self.table, {"size": middle})
            state = self._under(Whole()).state(chosen) if chosen else None
            met = state is not None and self.budget.qualities_met(state.effect.figures)
            low, high = (low, middle) if met else (middle, high)
        return {"size": high}

    # ---- carried out

    def _steps(self, chosen: Mapping[str, str], whole: Whole) -> tuple[Step, ...]:
        return self.table.steps(self.search.meter.model, chosen, whole.methods)

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
            search = self._under(whole)
            chosen = solve(search.table, aimed)
            found = search.state(chosen) if chosen else None
            if found is None or found.chosen == state.chosen:
                return
            state = found.bare()

    def _rivals(self, measured: Sequence[Measured]) -> Iterator[Measured]:
        """The best starts without a whole-model method for real, if that was not done: blocks built apart may differ a little."""
        done = {m.asked for m in measured}
        plain = [s for s in self.states if self._steps(s.chosen, Whole()) not in done]
        for state in sorted(plain, key=lambda s: s.damage)[:1]:
            yield self.finals.measure(self._steps(state.chosen, Whole()))

    def _neighbouring(self, limits: Mapping[str, float], met: bool) -> Iterator[Measured]:
        """The Pareto set around the budget: tighter where it was met; else looser, and the smallest there is."""
        best = {m: min(w.on(self.table).total(smallest(w.on(self.table), m), m) for w in self.wholes) for m in limits}
        for factor in TIGHTER if met else (*LOOSER, 0.0):
            steps = self.solved({m: max(limit * factor, best[m] * (1 + 1e-9)) for m, limit in limits.items() if m != "latency"})
            if steps is not None:
                yield self.finals.measure(steps)

    def solved(self, limits: Mapping[str, float]) -> tuple[Step, ...] | None:
        """The steps of the least damage that the table foretells within `limits`, on top of any of the whole-model methods."""
        found: list[tuple[float, int, dict[str, str], Whole]] = []
        for whole in self.wholes:
            table = whole.on(self.table)
            if chosen := solve(table, limits):
                found.append((table.damage(chosen) + whole.effect.damage, len(found), chosen, whole))
        if not found:
            return None
        *_, chosen, whole = min(found, key=lambda entry: entry[:2])
        return self._steps(chosen, whole)

    def told(self) -> list[dict[str, Any]]:
        """The starts, as plain data."""
        return [{"actions": {k: v for k, v in s.chosen.items() if v != KEEP}, "damage": s.damage} for s in self.states]


__all__ = ["Budget", "Choice"]
