"""Cut whole heads, neurons and channels out, so that the model really is smaller.

What belongs together is read from one forward (`layerwise.coupling`), for any architecture; what the forward does not run
without is refused with the reason. Li et al. 2017 (filters), Michel et al. 2019 (heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from layerwise.coupling import Coupling, Group, Tested, coupled, coupled_experts
from layerwise.coupling.choice import Floats, Limits, activations, lowest, magnitudes, random, taylor
from layerwise.coupling.groups import MODULES
from layerwise.coupling.numbers import Number, counts, get, numbers_of, set_
from layerwise.coupling.slicing import Cut, cut_, cuts_of, left, read, renumbered, silenced, written
from layerwise.errors import UsageError, nearest
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state, wraps

HEADS, CONVOLVED = frozenset({"head", "kv_group"}), frozenset({"channel"})
TYPES: Mapping[str, frozenset[str]] = {
    "all": HEADS | CONVOLVED | {"neuron"},
    "neuron": frozenset({"neuron"}),
    "head": HEADS,
    "channel": CONVOLVED,
    "filter": CONVOLVED,
    "expert": frozenset({"expert"}),
}
CRITERIA = ("magnitude", "taylor", "activation", "random")
SCOPES = ("local", "global")
CALIBRATED = ("taylor", "activation")


@METHODS.register("structured_pruning")
@dataclass(frozen=True)
class StructuredPruning(CompressionMethod):
    """Of each group of exchangeable units inside a block the share `ratio` goes; those with the lowest scores.

    `prune_type`: ``neuron`` (hidden units of linear layers), ``head`` (attention heads; with shared keys and values, whole groups
    of them), ``channel`` and ``filter`` (of convolutions: the same units, judged by the weights that read them or by those that
    make them), ``all`` of these, or ``expert`` (whole experts with what their router has for them). `criterion`: ``magnitude``,
    ``taylor`` and ``activation`` (on calibration data), ``random``. `scope`: the share is one of each group (``local``) or of all
    groups of a kind together (``global``). `groups` is the choice itself: group → [its units, those that go such as ``0-3,7``];
    `cuts` and `numbers` say what of which tensors and modules went along.
    """

    ratio: float = 0.25
    prune_type: str = "all"
    criterion: str = "magnitude"
    scope: str = "local"
    seed: int = 0
    groups: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cuts: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)  # indices → [tensor, dimension, size before]
    numbers: Sequence[Sequence[Any]] = ()  # [module, number, before, after]
    name: ClassVar[str] = "structured_pruning"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "size", "macs"})
    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"structured_pruning: ratio is {self.ratio!r}, and must lie between 0 and 1.")
        for setting, value, known in (
            ("prune_type", self.prune_type, TYPES),
            ("criterion", self.criterion, CRITERIA),
            ("scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise UsageError(f"structured_pruning: unknown {setting} {value!r}.", remedy=nearest(value, known))

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(ratio) for ratio in (0.25, 0.5, 0.75))

    @property
    def whole(self) -> bool:
        return self.scope == "global"

    def treats(self, layer: Layer) -> str:
        """What can be told without the model around the layer; the rest is said by `treats_in`."""
        if any(wraps(p) for p in layer.module.parameters()):
            return "its weights are quantized already"
        return "" if any(p.dim() > 1 for p in layer.module.parameters()) else "has no weight matrix"

    def treats_in(self, model: UniversalModel, layer: Layer) -> str:
        if reason := self.treats(layer):
            return reason
        coupling = self._coupled(model)
        if any(layer.name in t.group.blocks and t.group.kind in TYPES[self.prune_type] for t in coupling.groups):
            return ""
        reasons = [
            f"{n}: {coupling.refused[n]}" for n, homes in coupling.homes.items() if layer.name in homes and n in coupling.refused
        ]
        return "holds no units that could be cut alone: " + (
            "; ".join(reasons[:3]) or coupling.reasons.get(layer.name, f"none of the type {self.prune_type}")
        )

    def remarks_in(self, model: UniversalModel, layer: Layer) -> tuple[str, ...]:
        coupling = self._coupled(model)
        return tuple(
            f"structured_pruning leaves {name} in {layer.name} as it is: {reason}"
            for name, reason in coupling.refused.items()
            if layer.name in coupling.homes[name]
        )

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> StructuredPruning:
        """With units, cuts and numbers in the settings."""
        if self.cuts:
            return self
        found = self._within(model, layers)
        if self.groups:
            chosen = [(t, read(self.groups[t.group.name][-1])) for t in found if t.group.name in self.groups]
            if unknown := self.groups.keys() - {t.group.name for t in found}:
                names = [t.group.name for t in found]
                raise UsageError(
                    f"structured_pruning: these layers have no group {min(unknown)!r}.", remedy=nearest(min(unknown), names)
                )
            if wrong := [reason for t, units in chosen if (reason := _unfit(t, units))]:
                raise UsageError(f"structured_pruning: of {wrong[0]}.")
        else:
            scores = self._scores(model, [t.group for t in found], supplies)
            units = self._lowest(found, scores)
            chosen = [(t, units[t.group.name]) for t in found]
        chosen = [(t, units) for t, units in chosen if units]
        if not chosen:
            raise UsageError(
                f"structured_pruning: the share {self.ratio} is less than half a unit of every group.",
                remedy="Give a larger ratio.",
            )
        return self._resolved(model, chosen)

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        self.fitted(model, layers, supplies).reshape_(model, layers)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        for module, path, before, _ in self.numbers:
            if get(model.module, Number(module, path)) != before:
                raise UsageError(f"{module}.{path} is not {before}: it was cut already, or belongs to another model.")
        cut_(model.module, self._cuts())
        for module, path, _, after in self.numbers:
            set_(model.module, Number(module, path), after)

    def masked(self, model: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None]:
        """The columns that read the units are zero, found afresh and not by what was cut."""
        known = {t.group.name: t.group for t in self._coupled(model).groups}
        return silenced(model.module, [(known[name], read(entry[-1])) for name, entry in self.groups.items()])

    def resized(self) -> Sequence[tuple[int, int]]:
        units = [(entry[0], entry[0] - len(read(entry[-1]))) for entry in self.groups.values() if len(entry) > 1]
        return list(
            dict.fromkeys(
                [*units, *((c.size, c.size - len(read(c.gone))) for c in self._cuts()), *((n[2], n[3]) for n in self.numbers)]
            )
        )

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """Every tensor is the one before without the indices that went, and every number says so."""
        live = {**dict(before.module.named_parameters()), **dict(before.module.named_buffers())}
        cuts = [(id(live[cut.name]), cut) for cut in self._cuts() if cut.dim != MODULES]
        lists = [cut for cut in self._cuts() if cut.dim == MODULES]
        expected: dict[str, Tensor] = {}
        for name, tensor in state(before.module).items():
            kept = tensor.detach()
            for key, cut in cuts:
                kept = left(kept, cut) if key == id(tensor) else kept
            for cut in lists:
                name = renumbered(name, cut)
            expected |= {name: kept} if name else {}
        check = exactly(expected, state(after.module), "those of the uncut model")
        return check if not check.passed else self._stale(after) or check

    def _stale(self, after: UniversalModel) -> Check | None:
        """The failed check, if a number is not what it should be; a forward may not mind."""
        wrong = [module for module, path, _, value in self.numbers if get(after.module, Number(module, path)) != value]
        return Check(len(wrong), 0, "numbers that are not those of the sizes that are left", wrong[0]) if wrong else None

    def _cuts(self) -> list[Cut]:
        return [Cut(name, dim, size, gone) for gone, places in self.cuts.items() for name, dim, size in places]

    def _coupled(self, model: UniversalModel) -> Coupling:
        return (coupled_experts if self.prune_type == "expert" else coupled)(model)

    def _within(self, model: UniversalModel, layers: Sequence[str]) -> list[Tested]:
        inside = {"", *layers}
        return [
            t for t in self._coupled(model).groups if t.group.kind in TYPES[self.prune_type] and inside.issuperset(t.group.blocks)
        ]

    def _scores(self, model: UniversalModel, groups: Sequence[Group], supplies: Supplies) -> dict[str, Floats]:
        if self.criterion == "magnitude":
            return magnitudes(model, groups, self.prune_type)
        if self.criterion == "random":
            return random(groups, self.seed)
        supplies.check(f"structured_pruning with criterion={self.criterion!r}", frozenset({"calibration"}))
        assert supplies.calibration is not None  # checked
        return (taylor if self.criterion == "taylor" else activations)(model, groups, supplies.calibration)

    def _lowest(self, found: Sequence[Tested], scores: Mapping[str, Floats]) -> dict[str, list[int]]:
        limits = {t.group.name: Limits(t.step, max(t.least, t.step), t.parts) for t in found}
        if self.scope == "local":
            return lowest(scores, self.ratio, limits, together=False)
        units: dict[str, list[int]] = {}
        for kinds in (HEADS, CONVOLVED, TYPES["neuron"], TYPES["expert"]):
            names = [t.group.name for t in found if t.group.kind in kinds]
            units |= lowest({n: scores[n] for n in names}, self.ratio, limits, together=True) if names else {}
        return units

    def _resolved(self, model: UniversalModel, chosen: Sequence[tuple[Tested, list[int]]]) -> StructuredPruning:
        cuts: dict[str, list[list[Any]]] = {}
        for cut in cuts_of((t.group, units) for t, units in chosen):
            cuts.setdefault(cut.gone, []).append([cut.name, cut.dim, cut.size])
        numbers: dict[Number, list[Any]] = {}
        for t, units in chosen:
            for number in t.numbers:
                entry = numbers.setdefault(number, [*number, before := get(model.module, number), before])
                entry[3] = entry[3] * (t.group.units - len(units)) // t.group.units
        if self.prune_type == "expert":
            numbers |= {n: [*n, before, after] for n, before, after in _outside(model, chosen, self._coupled(model))}
        groups = {t.group.name: [t.group.units, written(units)] for t, units in chosen}
        return replace(self, groups=groups, cuts=cuts, numbers=list(numbers.values()))


def _unfit(tested: Tested, units: Sequence[int]) -> str:
    """'' or what is wrong with cutting these."""
    group, stay = tested.group, max(tested.least, tested.step)
    if len(units) % tested.step:
        return f"{group.name} only multiples of {tested.step} units can go"
    if group.units - len(units) < stay:
        return f"{group.name} at least {stay} must stay"
    each = [sum(u // (group.units // tested.parts) == part for u in units) for part in range(tested.parts)]
    return f"{group.name} as many of each of the {tested.parts} equal parts must go" if len(set(each)) > 1 else ""


def _outside(
    model: UniversalModel, chosen: Sequence[tuple[Tested, list[int]]], coupling: Coupling
) -> Iterator[tuple[Number, int, int]]:
    """How many experts there are as modules around the blocks say it, with what becomes of it if all blocks lose as many."""
    shares = {(t.group.units, t.group.units - len(units)) for t, units in chosen}
    if len(shares) > 1 or coupling.refused or len(chosen) < len(coupling.groups):
        return
    ((before, after),) = shares
    blocks = tuple(f"{layer.name}." for layer in model.blocks)
    for name, part in model.module.named_modules():
        if not f"{name}.".startswith(blocks):
            for path, value in numbers_of(part):
                if value == before and counts(Number(name, path), "expert"):
                    yield Number(name, path), before, after
