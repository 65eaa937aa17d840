"""What can be done to a layer, and what it costs and spoils: the table that plans are solved from.

An `Action` is nothing, one method with its settings, or one that lowers the parameters followed by one that stores them in fewer
bits. Every figure of a single action is measured (`layerwise.planning.tabulate`); those of a pair are estimated from its parts
until the pair itself is built, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from layerwise.method import METHODS, CompressionMethod, step_of
from layerwise.model import UniversalModel
from layerwise.plan import Step
from layerwise.planning.outside import REST
from layerwise.spec import written

KEEP = "keep"  # the label of doing nothing
Assignment = Mapping[str, str]  # layer → the label of its action


@dataclass(frozen=True, eq=False)
class Action:
    """`methods` on one layer, one after the other; none: the layer stays. The `label` identifies it."""

    methods: tuple[CompressionMethod, ...] = ()

    @cached_property
    def label(self) -> str:
        return " + ".join(map(label_of, self.methods)) or KEEP

    @property
    def cuts(self) -> bool:
        """Whether it lowers the number of parameters."""
        return any("params" in method.shrinks for method in self.methods)


def label_of(method: CompressionMethod) -> str:
    """The name with the settings that differ from the default ones: ``weight_only(bits=4)``."""
    defaults = asdict(type(method)())  # type: ignore[call-overload]  # every method is a dataclass, and everything has a default
    settings = {k: v for k, v in asdict(method).items() if v != defaults[k]}  # type: ignore[call-overload]
    return written(method.name, settings) if settings else method.name


def stage(method: CompressionMethod) -> int:
    """When a plan applies it: first what takes parameters out, then zeros, then what casts the whole model, then bits."""
    if method.structural or "params" in method.shrinks:
        return 0
    return 1 if not method.shrinks else 2 if method.whole else 3


@dataclass(frozen=True)
class Menu:
    """The `actions` for single layers, and `wholes`: methods that treat the whole model and go on top of any choice."""

    actions: tuple[Action, ...]
    wholes: tuple[CompressionMethod, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, methods: Sequence[CompressionMethod | str] | str) -> Menu:
        """`methods`: ``auto`` (every registered one that shrinks something without training or calibration), names, or instances.

        A name stands for all its variants. Methods that train are no choice for a layer and are left out with a note.
        """
        automatic = methods == "auto"
        named = [name for name, m in METHODS.items() if m.shrinks and not m.needs] if automatic else methods
        listed = [named] if isinstance(named, str) else list(named)
        found = [m for entry in listed for m in (METHODS[entry].variants() if isinstance(entry, str) else [entry])]
        trained = [m.name for m in found if m.trains and not automatic]
        names = dict.fromkeys(trained)
        notes = tuple(f"{name} trains, so it is no choice for a layer: give it as recovery=" for name in names)
        kept = [m for m in found if not m.trains]
        single = tuple(Action((m,)) for m in kept if not m.whole)
        return cls(single, tuple(m for m in kept if m.whole and not m.structural), notes)

    def pairs(self) -> tuple[Action, ...]:
        """Every action that lowers parameters followed by every one that stores them in fewer bits."""
        cutting = [a for a in self.actions if a.cuts]
        storing = [a for a in self.actions if stage(a.methods[0]) == 3]
        return tuple(Action((*a.methods, *b.methods)) for a in cutting for b in storing)


@dataclass(frozen=True)
class Entry:
    """One layer under one action: its own costs, and the `damage` ± `stderr` in nats per sample (see `planning.effects`).

    `latency` is what the layer's time changes by, in ms per batch, 0 where it is below the noise or was not asked for.
    `estimated`: from its parts, not measured.
    """

    layer: str
    action: str
    size: float = 0.0
    params: float = 0.0
    macs: float = 0.0
    nonzero: float = 0.0
    damage: float = 0.0
    stderr: float = 0.0
    latency: float = 0.0
    estimated: bool = False

    def costing(self, costs: Mapping[str, float], *, estimated: bool = False) -> Entry:
        """The same with other costs."""
        return replace(self, estimated=estimated, **dict(costs))  # type: ignore[arg-type]  # costs are numbers

    def cost(self, metric: str) -> float:
        return float(getattr(self, metric))


COSTS = ("size", "params", "macs", "nonzero", "latency")


@dataclass
class Table:
    """The entries of every layer, ``keep`` first, and the costs of what is in no layer (`rest`).

    Where something can be done to the latter, a row `REST` says what that changes costs by.
    """

    entries: dict[str, dict[str, Entry]]
    actions: dict[str, Action]
    rest: dict[str, float]
    notes: list[str] = field(default_factory=list)
    touched: dict[str, float] = field(default_factory=dict)  # action outside the layers → the bytes of what it replaces

    def total(self, chosen: Assignment, metric: str) -> float:
        """The whole model's cost under an assignment, as far as the table knows it."""
        return self.rest[metric] + sum(self.entries[layer][label].cost(metric) for layer, label in chosen.items())

    def damage(self, chosen: Assignment) -> float:
        """The sum of the layers' damages: what an additive model predicts."""
        return sum(self.entries[layer][label].damage for layer, label in chosen.items())

    def kept(self) -> dict[str, str]:
        """The assignment that changes nothing."""
        return dict.fromkeys(self.entries, KEEP)

    def add_pairs(self, pairs: Iterable[Action]) -> None:
        """Estimates each pair on each layer that both its parts treat: damages and times add, costs multiply."""
        for action in pairs:
            first, second = label_of(action.methods[0]), label_of(action.methods[1])
            for row in self.entries.values():
                if first in row and second in row and row[first].params:  # of what is gone nothing can be stored
                    row[action.label] = _pair(row[KEEP], row[first], row[second], action.label)
                    self.actions[action.label] = action

    def add_rest(self, entries: Sequence[tuple[Entry, Action, float]]) -> None:
        """A row of what can be done outside of the layers: entries of differences in cost, and the bytes that are replaced."""
        if entries:
            self.entries[REST] = {KEEP: Entry(REST, KEEP)} | {e.action: e for e, _, _ in entries}
            self.actions |= {action.label: action for _, action, _ in entries}
            self.touched |= {action.label: size for _, action, size in entries}

    def steps(self, model: UniversalModel, chosen: Assignment, wholes: Sequence[CompressionMethod] = ()) -> tuple[Step, ...]:
        """The plan's steps for an assignment, in the order of `stage`; the same method on several layers is one step."""
        groups: dict[str, tuple[CompressionMethod, list[str]]] = {}
        for layer in model.layers:
            for method in self.actions[chosen.get(layer.name, KEEP)].methods:
                groups.setdefault(label_of(method), (method, []))[1].append(layer.name)
        gone = {n for m, names in groups.values() for n in names if m.selective and m.structural}
        beside = self.actions[chosen.get(REST, KEEP)].methods  # last: what is stored in bits can no longer be cast
        for method in (*wholes, *beside):
            left = [x.name for x in model.layers if x.name not in gone and not method.treats(x)]
            groups[label_of(method)] = (method, left)

        def turn(item: tuple[str, tuple[CompressionMethod, list[str]]]) -> tuple[int, bool, str]:
            label, (method, _) = item
            return 3 if method in beside else stage(method), not method.selective, label

        ordered = sorted(groups.items(), key=turn)
        return tuple(step_of(method, names) for _, (method, names) in ordered)

    def rows(self) -> list[dict[str, Any]]:
        """The entries as plain data, for the plan's evidence."""
        return [asdict(entry) for row in self.entries.values() for entry in row.values()]


def _pair(keep: Entry, first: Entry, second: Entry, label: str) -> Entry:
    scaled = {m: first.cost(m) * second.cost(m) / max(keep.cost(m), 1e-12) for m in ("size", "params", "macs", "nonzero")}
    error = (first.stderr**2 + second.stderr**2) ** 0.5
    time = first.latency + second.latency
    entry = Entry(keep.layer, label, damage=first.damage + second.damage, stderr=error, latency=time)
    return entry.costing(scaled, estimated=True)


__all__ = ["COSTS", "KEEP", "Action", "Assignment", "Entry", "Menu", "Table", "label_of", "stage"]
