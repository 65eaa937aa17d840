"""From a start to a better assignment, measured: the neighbours of what is held are measured around it, so that what layers do to
each other is in the figures, and a change counts only when the whole candidate measures better.

One round: for each layer the next milder and the next stronger action is put in the place of the held one, on replay; the exact
solver picks the best combination of these under the budget, and the best single swaps follow; each is measured whole. The round's
first improvement is taken; the search ends when none is, or when its forwards are spent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from layerwise.planning.actions import KEEP, Assignment, Entry, Table
from layerwise.planning.blocks import Blocks
from layerwise.planning.effects import Effect, Meter
from layerwise.planning.outside import REST, Outside, rest_bytes
from layerwise.planning.solve import kept, solve
from layerwise.supplies import Supplies
from layerwise.tensors import byte_size, nonzero_count, parameter_count

TRIES = 3  # combinations of measured neighbours that a round measures whole


@dataclass(frozen=True)
class State:
    """A measured assignment with its changed blocks."""

    chosen: dict[str, str]
    blocks: dict[str, nn.Module] = field(repr=False)
    effect: Effect

    @property
    def damage(self) -> float:
        return self.effect.damage

    def bare(self) -> State:
        """The same without its blocks, for whoever keeps many; they can be built again."""
        return replace(self, blocks={})


@dataclass
class Search:
    """Measures assignments of `table` and improves them. `metric` is the scarce cost: it tells milder actions from stronger."""

    table: Table
    meter: Meter
    supplies: Supplies
    metric: str = "size"
    tick: Callable[[], None] | None = None
    moves: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[frozenset[tuple[str, str]], Effect] = field(default_factory=dict)
    peak: int = 0

    def state(self, chosen: Assignment, held: State | None = None) -> State | None:
        """`chosen` built, of the blocks of `held` where they agree, and measured; None where it cannot be built."""
        blocks = self._built(chosen, held)
        if blocks is None:
            return None
        key = frozenset((k, v) for k, v in chosen.items() if v != KEEP)
        if key not in self.seen:
            self.seen[key] = self.meter.effects(blocks, [{}])[0]
            self._ticked()
        return State(dict(chosen), blocks, self.seen[key])

    def heat(self, chosen: Assignment, rest: Sequence[str], share: float) -> list[float]:
        """The damages of `chosen` with each of the `rest` actions outside of the layers, on a part of the data; infinite where
        something cannot be built.
        """
        blocks = self._built(chosen, None)
        if blocks is None:
            return [math.inf] * len(rest)
        damages = {KEEP: self.meter.effects(blocks, [{}], share)[0].damage} if KEEP in rest else {}
        for group in self._groups(blocks, [(REST, label) for label in rest if label != KEEP]):
            effects = self.meter.effects(blocks, [{REST: block} for block in group.values()], share)
            damages |= {label: effect.damage for (_, label), effect in zip(group, effects, strict=True)}
        self._ticked()
        return [damages.get(label, math.inf) for label in rest]

    def improve(self, held: State, limits: Mapping[str, float], forwards: float) -> State:
        """The best state that was found from `held` within `limits`, spending about `forwards`."""
        end = self.meter.spent + forwards
        if forwards <= 0:
            return held
        held = self.state(held.chosen) or held
        while self.meter.spent < end:
            around = self._around(held, limits, end)
            better = next(self._better(held, limits, around, end), None)
            if better is None:
                return held
            held = better
        return held

    def _better(
        self, held: State, limits: Mapping[str, float], around: Mapping[tuple[str, str], float], end: float
    ) -> Iterator[State]:
        for proposal in self._proposals(held, limits, around):
            if self.meter.spent >= end:
                return
            state = self.state(proposal, held)
            if state is None or not kept(self.table, state.chosen, limits):  # an estimated pair may turn out larger
                continue
            accepted = state.damage < held.damage
            changed = {k: [held.chosen[k], v] for k, v in proposal.items() if v != held.chosen[k]}
            predicted = held.damage + sum(around[k, v] for k, (_, v) in changed.items())
            self.moves.append({"changes": changed, "predicted": predicted, "measured": state.damage, "accepted": accepted})
            if accepted:
                yield state

    def _proposals(
        self, held: State, limits: Mapping[str, float], around: Mapping[tuple[str, str], float]
    ) -> Iterator[dict[str, str]]:
        """The solver's choice among the measured neighbours, then single changes and pairs of them, most promising first."""
        done = {tuple(held.chosen.items())}
        best = solve(self.table, limits, around)
        singles = [((layer, label),) for layer, label in around if held.chosen[layer] != label]
        pairs = [(a, b) for (a,) in singles for (b,) in singles if a[0] < b[0]]
        swaps = sorted((sum(around[c] for c in swap), swap) for swap in (*singles, *pairs))
        promising = [{**held.chosen, **dict(swap)} for gain, swap in swaps if gain < 0]
        left = TRIES
        for proposal in ([best] if best else []) + promising:
            if left and tuple(proposal.items()) not in done and kept(self.table, proposal, limits):
                done.add(tuple(proposal.items()))
                left -= 1
                yield proposal

    def _around(self, held: State, limits: Mapping[str, float], end: float) -> dict[tuple[str, str], float]:
        """(layer, action) → what the whole's damage changes by when that layer alone is changed; 0 for the actions held."""
        around = dict.fromkeys(held.chosen.items(), 0.0)
        wanted = self._affordable(self._neighbours(held), end - self.meter.spent)
        for group in self._groups(held.blocks, wanted):
            effects = self.meter.effects(held.blocks, [{layer: block} for (layer, _), block in group.items()])
            around |= {pair: effect.damage - held.damage for pair, effect in zip(group, effects, strict=True)}
            self._ticked()
        return {pair: change for pair, change in around.items() if math.isfinite(change)}

    def _neighbours(self, held: State) -> list[tuple[str, str]]:
        """For each layer the next cheaper and the next dearer action of those that nothing beats in both cost and damage."""
        found = []
        for layer, label in held.chosen.items():
            row = self.table.entries[layer]
            front = pareto(row.values(), self.metric)
            cost = row[label].cost(self.metric)
            cheaper = [e for e in front if e.cost(self.metric) < cost]
            dearer = [e for e in front if e.cost(self.metric) > cost]
            equal = [e for e in front if e.cost(self.metric) == cost and e.action != label]
            found += [(layer, e.action) for e in (*cheaper[-1:], *equal, *dearer[:1])]
        return found

    def _affordable(self, wanted: list[tuple[str, str]], forwards: float) -> list[tuple[str, str]]:
        """As many neighbours as half of the forwards pay for, those of every layer by turns, the most telling layers first."""
        layers = [x.name for x in self.meter.model.layers]
        price = {name: (len(layers) - i) / len(layers) for i, name in enumerate(layers)} | {REST: 1.0}
        taken, left = [], max(forwards - 2, 0.0) / (1 if len(layers) < 4 else 1.5)
        for pair in sorted(wanted, key=lambda p: (self.table.entries[p[0]][p[1]].damage, p)):
            if price[pair[0]] <= left:
                left -= price[pair[0]]
                taken.append(pair)
        return [pair for pair in wanted if pair in set(taken)]

    def _groups(self, held: Blocks, wanted: list[tuple[str, str]]) -> Iterator[dict[tuple[str, str], nn.Module]]:
        """The blocks of the wanted pairs, no more at once than fit beside the `held` ones in the room of one model."""
        room = byte_size(self.meter.model.module) - self.meter.bytes_beside(held)
        group: dict[tuple[str, str], nn.Module] = {}
        sizes = 0
        for layer, label in wanted:
            size = rest_bytes(self.meter.model) if layer == REST else byte_size(self.meter.model.layer(layer).module)
            if group and sizes + size > room:
                yield group
                group, sizes = {}, 0
            block = self._block(layer, label)
            if block is not None:
                group[layer, label] = block
                sizes += byte_size(block)
                self.peak = max(self.peak, self.meter.bytes_beside({**held, **{str(k): b for k, b in group.items()}}))
        if group:
            yield group

    def _block(self, layer: str, label: str) -> nn.Module | None:
        if label == KEEP and layer == REST:
            return Outside({})
        if label == KEEP:
            return copy.copy(
                self.meter.model.layer(layer).module
            )  # another object, so that what is patched onto that one is not run
        built, _ = self.meter.build(self.table.actions[label].methods, [layer], self.supplies)
        if layer not in built:
            self.table.entries[layer].pop(label)
            return None
        self._note(layer, label, built[layer])
        return built[layer]

    def _built(self, chosen: Assignment, held: State | None) -> dict[str, nn.Module] | None:
        """The blocks of an assignment: those of `held` that stay, and the others built, one action at a time."""
        blocks = {k: held.blocks[k] for k, v in chosen.items() if held and v != KEEP and held.chosen[k] == v}
        wanted: dict[str, list[str]] = {}
        for layer, label in chosen.items():
            if label != KEEP and layer not in blocks:
                wanted.setdefault(label, []).append(layer)
        for label, layers in wanted.items():
            built, failed = self.meter.build(self.table.actions[label].methods, layers, self.supplies)
            for layer in {*failed, *(name for name in layers if name not in built)}:
                self.table.entries[layer].pop(label)  # whoever asks again gets another choice
            if failed or len(built) < len(layers):
                return None
            for layer, block in built.items():
                self._note(layer, label, block)
            blocks |= built
        self.peak = max(self.peak, self.meter.bytes_beside(blocks))
        return {layer: blocks[layer] for layer in chosen if layer in blocks}

    def _note(self, layer: str, label: str, block: nn.Module) -> None:
        """The costs of a pair, now that it is built, in the place of the estimated ones."""
        entry = self.table.entries[layer][label]
        if entry.estimated:
            costs = {"size": byte_size(block), "params": parameter_count(block), "nonzero": nonzero_count(block)}
            self.table.entries[layer][label] = entry.costing({k: float(v) for k, v in costs.items()}, estimated=True)

    def _ticked(self) -> None:
        if self.tick is not None:
            self.tick()


def pareto(entries: Any, metric: str) -> list[Entry]:
    """Those that no other one matches in both cost and damage, cheapest first."""
    front: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (-e.cost(metric), e.damage)):
        while front and front[-1].damage >= entry.damage:  # dearer and no better
            front.pop()
        if not front or entry.cost(metric) < front[-1].cost(metric):
            front.append(entry)
    return front[::-1]


__all__ = ["Search", "State", "pareto"]
