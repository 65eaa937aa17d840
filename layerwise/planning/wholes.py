"""Methods that treat the whole model (16 bits), as the planner sees them: what they make of bytes, and the damage alone.

Those that leave every layer as it is are no such thing: they are choices for what lies outside of the layers, a row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from layerwise.errors import LayerwiseError
from layerwise.measure import time_paired
from layerwise.method import CompressionMethod, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.planning.actions import Action, Entry, Table, label_of, stage
from layerwise.planning.blocks import bytes_of, installed
from layerwise.planning.effects import Effect, Meter
from layerwise.planning.outside import REST, Outside, outside
from layerwise.planning.tabulate import TOO_SLOW, left_out
from layerwise.supplies import Supplies
from layerwise.tensors import byte_size

RestEntry = tuple[Entry, Action, float]  # with the bytes that are replaced


@dataclass(frozen=True)
class Whole:
    """`methods` on everything: factors on the bytes of each layer and of the rest, and the damage alone. Empty: nothing."""

    methods: tuple[CompressionMethod, ...] = ()
    layers: dict[str, float] = field(default_factory=dict)
    rest: float = 1.0
    effect: Effect = field(default_factory=lambda: Effect(0.0, 0.0, {}))
    refused: frozenset[tuple[str, str]] = frozenset()  # (layer, method that stores bits) that has nothing to do by then

    def on(self, table: Table) -> Table:
        """The table with bytes as they are on top of these methods.

        What is stored in few bits already is counted as if they changed nothing there, which is never too little.
        """
        if not self.methods:
            return table

        def scaled(layer: str, label: str) -> float:
            size = table.entries[layer][label].size
            if layer == REST:  # as much is replaced as is left of it by then
                return size + table.touched.get(label, 0.0) * (1 - self.rest)
            stored = any(stage(m) == 3 for m in table.actions[label].methods)
            return size * (1.0 if stored else self.layers[layer])

        entries = {
            layer: {
                label: replace(entry, size=scaled(layer, label))
                for label, entry in row.items()
                if self._offers(layer, label, table)
            }
            for layer, row in table.entries.items()
        }
        return Table(entries, table.actions, table.rest | {"size": table.rest["size"] * self.rest}, table.notes, table.touched)

    def _offers(self, layer: str, label: str, table: Table) -> bool:
        return not any((layer, label_of(method)) in self.refused for method in table.actions[label].methods)


@dataclass
class Sorting:
    """Which of `methods` treat the whole model and which only what lies outside of the layers; measured on `share` of the data.

    A method that cannot be applied, or is too slow where `slow_is_out`, is noted.
    """

    meter: Meter
    supplies: Supplies
    notes: list[str]
    slow_is_out: bool = True
    share: float = 1.0
    actions: Sequence[
        Action
    ] = ()  # for single layers: those that a whole-model method leaves nothing to do are no choice under it
    tick: Callable[[], None] | None = None

    def sort(self, methods: Sequence[CompressionMethod]) -> tuple[list[Whole], list[RestEntry]]:
        """Nothing on top and the whole-model methods; and the entries of the others."""
        wholes, rest = [Whole()], list[RestEntry]()
        for method in methods:
            try:
                found = self._measured(method)
            except LayerwiseError as error:
                self.notes.append(f"{label_of(method)} is left out: {error.what}")
                continue
            if isinstance(found, Whole):
                wholes.append(found)
            elif found is not None:
                rest.append(found)
            if self.tick is not None:
                self.tick()
        return wholes, rest

    def _measured(self, method: CompressionMethod) -> Whole | RestEntry | None:
        model = self.meter.model
        treated = [x.name for x in model.layers if not method.treats(x)]
        if not treated:
            return None
        changed = self.meter.carry_out(CompressionPlan((step_of(method, treated),)), self.supplies).model
        if byte_size(changed.module) >= byte_size(model.module):
            return None  # nothing here that it could treat
        if self.slow_is_out and self._too_slow(method, changed):
            return None
        block = outside(model, changed)
        if block is not None and _stands_in(model, block, changed):
            return self._entry(method, block)
        return self._whole(method, changed)

    def _too_slow(self, method: CompressionMethod, changed: UniversalModel) -> bool:
        before, after = time_paired([self.meter.model, changed], self.meter.data[0], repeats=3)
        if after.median <= TOO_SLOW * before.median:
            return False
        name = " ".join([method.name, *map(str, step_of(method, ()).settings.values())])
        self.notes.append(left_out(name, after.median / before.median))
        return True

    def _entry(self, method: CompressionMethod, block: Outside) -> RestEntry:
        action = Action((method,))
        effect = self.meter.effects({}, [{REST: block}], self.share)[0]
        old = {id(p): p.nbytes for p in map(self.meter.model.module.get_parameter, block.places)}
        entry = Entry(REST, action.label, damage=effect.damage, stderr=effect.stderr)
        return entry.costing({"size": float(bytes_of({REST: block}) - sum(old.values()))}), action, float(sum(old.values()))

    def _whole(self, method: CompressionMethod, changed: UniversalModel) -> Whole:
        model = self.meter.model
        sizes = {x.name: (byte_size(x.module), byte_size(changed.module.get_submodule(x.name))) for x in model.layers}
        beside = [byte_size(m.module) - sum(s[i] for s in sizes.values()) for i, m in enumerate((model, changed))]
        factors = {name: new / max(old, 1) for name, (old, new) in sizes.items()}
        storing = [m for action in self.actions for m in action.methods if stage(m) == 3]
        refused = frozenset((x.name, label_of(m)) for x in changed.layers for m in storing if m.treats(x))
        return Whole((method,), factors, beside[1] / max(beside[0], 1), self.meter.compared(changed), refused)


def _stands_in(model: UniversalModel, block: Outside, changed: UniversalModel) -> bool:
    """Whether the changed parameters are all there is to it: no hook, no module of another class."""
    with installed(model, {REST: block}):
        found = model.predict(model.example)
    return torch.equal(found, changed.predict(model.example))


__all__ = ["RestEntry", "Sorting", "Whole"]
