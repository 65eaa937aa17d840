"""Methods that treat the whole model (16 bits), as the planner sees them: what they make of bytes, and the damage alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from layerwise.errors import LayerwiseError
from layerwise.measure import time_paired
from layerwise.method import CompressionMethod, step_of
from layerwise.plan import CompressionPlan
from layerwise.planning.actions import Menu, Table, label_of, stage
from layerwise.planning.effects import Effect, Meter
from layerwise.planning.tabulate import TOO_SLOW, left_out
from layerwise.supplies import Supplies
from layerwise.tensors import byte_size


@dataclass(frozen=True)
class Whole:
    """`methods` on everything: factors on the bytes of each layer and of the rest, and the damage alone. Empty: nothing."""

    methods: tuple[CompressionMethod, ...] = ()
    layers: dict[str, float] = field(default_factory=dict)
    rest: float = 1.0
    effect: Effect = field(default_factory=lambda: Effect(0.0, 0.0, {}))

    def on(self, table: Table) -> Table:
        """The table with bytes as they are on top of these methods.

        What is stored in few bits already is counted as if they changed nothing there, which is never too little.
        """
        if not self.methods:
            return table

        def scaled(layer: str, label: str) -> float:
            stored = any(stage(m) == 3 for m in table.actions[label].methods)
            return table.entries[layer][label].size * (1.0 if stored else self.layers[layer])

        entries = {
            layer: {label: replace(entry, size=scaled(layer, label)) for label, entry in row.items()}
            for layer, row in table.entries.items()
        }
        return Table(entries, table.actions, table.rest | {"size": table.rest["size"] * self.rest}, table.notes)


def wholes_of(menu: Menu, meter: Meter, supplies: Supplies, notes: list[str], slow_is_out: bool) -> list[Whole]:
    """Nothing on top, and every method of the menu that treats the whole model, can be applied and is not too slow here."""
    found = [Whole()]
    for method in menu.wholes:
        try:
            whole = _measured(method, meter, supplies, notes, slow_is_out)
        except LayerwiseError as error:
            notes.append(f"{label_of(method)} is left out: {error.what}")
            continue
        found += [whole] if whole else []
    return found


def _measured(method: CompressionMethod, meter: Meter, supplies: Supplies, notes: list[str], slow_is_out: bool) -> Whole | None:
    model = meter.model
    treated = [x.name for x in model.layers if not method.treats(x)]
    if not treated:
        return None
    changed = meter.carry_out(CompressionPlan((step_of(method, treated),)), supplies).model
    if byte_size(changed.module) >= byte_size(model.module):
        return None  # nothing here that it could treat
    if slow_is_out:
        before, after = time_paired([model, changed], meter.data[0], repeats=3)
        if after.median > TOO_SLOW * before.median:
            name = " ".join([method.name, *map(str, step_of(method, ()).settings.values())])
            notes.append(left_out(name, after.median / before.median))
            return None
    sizes = {x.name: (byte_size(x.module), byte_size(changed.module.get_submodule(x.name))) for x in model.layers}
    outside = [byte_size(m.module) - sum(s[i] for s in sizes.values()) for i, m in enumerate((model, changed))]
    factors = {name: new / max(old, 1) for name, (old, new) in sizes.items()}
    return Whole((method,), factors, outside[1] / max(outside[0], 1), meter.compared(changed))


__all__ = ["Whole", "wholes_of"]
