"""Fills the planner's table: every action on every layer, measured one at a time.

One action is built for many layers at once, so that a method reads its calibration data once, and no more of them than the model
itself has bytes, so that planning needs at most twice the memory; then each changed block alone is put in its place on replay.
Forwards are rationed: with a large menu or a deep model the table is measured on the first part of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from layerwise.errors import MissingDependency, TargetMissed
from layerwise.planning.actions import KEEP, Action, Entry, Menu, Table
from layerwise.planning.blockcosts import arguments_of, block_costs, rest_of, time_blocks
from layerwise.planning.effects import Effect, Meter
from layerwise.structure import Layer
from layerwise.supplies import Supplies
from layerwise.tensors import byte_size

Tick = Callable[[], None]
TOO_SLOW = 4.0  # times the original's latency, from which on an automatic menu leaves a choice out
NOTICED = 1.0  # ms per layer and batch: less than that is nobody's reason against anything
LEAST = 16  # samples: fewer tell nothing


@dataclass
class Tabulator:
    """Measures `menu` on `meter`'s model.

    `forwards` is what may be spent; `timed`: latencies are wanted; `slow_is_out`: leave out what this device runs `TOO_SLOW`.
    """

    meter: Meter
    menu: Menu
    supplies: Supplies
    forwards: float = 50.0
    timed: bool = False
    slow_is_out: bool = True
    tick: Tick | None = None
    notes: list[str] = field(default_factory=list)
    peak: int = 0  # bytes of changed blocks that were held at once

    def make(self, before: Mapping[str, float]) -> Table:
        """The table. `before` are the whole model's costs. Raises `TargetMissed` LW-T02 where no action treats any layer."""
        layers = self.meter.model.layers
        self.arguments = arguments_of(self.meter.model, self.meter.model.example)
        self.timing = arguments_of(self.meter.model, self.meter.data[0]) if self.timed or self.slow_is_out else {}
        kept = {x.name: Entry(x.name, KEEP).costing(block_costs(x, x.module, None)) for x in layers}
        table = Table({x.name: {KEEP: kept[x.name]} for x in layers}, {KEEP: Action()}, rest_of(self.meter.model, before))
        share = self.share
        for action in self.menu.actions:
            for entry in self._measured(action, share):
                table.entries[entry.layer][action.label] = entry
                table.actions[action.label] = action
            if self.tick is not None:
                self.tick()
        table.add_pairs(self.menu.pairs())
        table.notes = self.notes
        return table

    @property
    def share(self) -> float:
        """The part of the data that lets the whole menu be measured with the forwards that may be spent."""
        layers = self.meter.model.layers
        alone = sum((len(layers) - i) / len(layers) for i in range(len(layers)))  # forwards for one action on each layer in turn
        wanted = len(self.menu.actions) * (1 + alone)
        share = min(self.forwards / max(wanted, 1), 1.0)
        return min(max(share, LEAST / self.meter.samples), 1.0)

    def _measured(self, action: Action, share: float) -> Iterator[Entry]:
        """The entries of one action; what cannot be built or run is noted."""
        treated = [x for x in self.meter.model.layers if not action.methods[0].treats(x)]
        try:
            if treated and self._too_slow(action, treated[0]):
                return
            for group in self._groups(treated):
                yield from self._group(action, group, share)
        except MissingDependency as error:
            self.notes.append(str(error))

    def _group(self, action: Action, group: Sequence[Layer], share: float) -> Iterator[Entry]:
        built, failed = self.meter.build(action.methods, [x.name for x in group], self.supplies)
        self.peak = max(self.peak, self.meter.bytes_beside(built))
        names = list(built)
        effects = self.meter.effects({}, [{name: built[name]} for name in names], share)
        for name, effect in zip(names, effects, strict=True):
            if effect.failure:
                failed[name] = effect.failure
            else:
                yield self._entry(self.meter.model.layer(name), action, built[name], effect)
        for reason in dict.fromkeys(failed.values()):
            where = ", ".join(name for name, why in failed.items() if why == reason)
            self.notes.append(f"{action.label} is no choice for {where}: {reason}")

    def _entry(self, layer: Layer, action: Action, block: nn.Module, effect: Effect) -> Entry:
        costs = block_costs(layer, block, self.arguments.get(layer.name) if action.cuts else None)
        error = effect.stderr if math.isfinite(effect.stderr) else 0.0
        entry = Entry(layer.name, action.label, damage=effect.damage, stderr=error).costing(costs)
        return replace(entry, latency=self._time(layer, block)) if self.timed else entry

    def _time(self, layer: Layer, block: nn.Module) -> float:
        """What the block's time on the first batch changes by, in ms; a block that is called several times counts as often."""
        before, after = time_blocks(layer.module, block, self.timing[layer.name])
        return (after - before) * layer.calls

    def _too_slow(self, action: Action, layer: Layer) -> bool:
        """Whether nobody would want this unasked: one block of it takes `TOO_SLOW` times as long on this device."""
        if not self.slow_is_out or action.cuts or layer.name not in self.timing:
            return False
        built, _ = self.meter.build(action.methods, [layer.name], self.supplies)
        if layer.name not in built:
            return False
        before, after = time_blocks(layer.module, built[layer.name], self.timing[layer.name], repeats=3)
        slow = after > TOO_SLOW * before and after > before + NOTICED
        if slow:
            self.notes.append(left_out(action.label, after / before))
        return slow

    def _groups(self, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
        """Runs of layers whose blocks take no more room together than the model; one layer at least."""
        room = byte_size(self.meter.model.module) - self.meter.bytes_beside({})
        group, held = list[Layer](), 0
        for layer in layers:
            size = byte_size(layer.module)
            if group and held + size > room:
                yield group
                group, held = [], 0
            group.append(layer)
            held += size
        if group:
            yield group


def left_out(label: str, factor: float) -> str:
    """The note about a choice that is too slow."""
    return f"{label} was left out: {factor:.0f} times as slow on this device. Name the method to have it."


def check_any(table: Table, menu: Menu, model: str) -> None:
    """Raises `TargetMissed` (LW-T02) where nothing in `menu` treats any layer."""
    if len(table.actions) < 2 and not menu.wholes:
        raise TargetMissed(
            "None of the methods can treat any layer of this model.",
            place=model,
            remedy=" ".join(table.notes) or "Allow more methods.",
            code="LW-T02",
        )


__all__ = ["TOO_SLOW", "Tabulator", "check_any", "left_out"]
