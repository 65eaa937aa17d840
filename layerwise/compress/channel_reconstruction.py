"""Before channels go, teach the others to stand in for them: least squares on what the next layer gives (He et al. 2017).

Decision: a step of its own, which changes values only: afterwards the weights on the chosen channels are 0, and
``channel_pruning(by="zeros")`` takes them out without changing an output. So both halves can be judged exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.channel_budget import Costs, chosen_widths, merged
from layerwise.channels import CONVS, ChannelGroup, Graph, Removed, owner_of, sole_readers
from layerwise.data import Data
from layerwise.errors import UsageError
from layerwise.hessians import hessians
from layerwise.least_squares import damped, elimination, refitted
from layerwise.matrices import Matrix
from layerwise.measure import evaluate
from layerwise.method import METHODS, Check, CompressionMethod
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import differing, state

WIDTHS = 8  # how many widths of each group are measured
SLOPE = 1e-3  # float32 leaves 1e-6


@METHODS.register("channel_reconstruction")
@dataclass(frozen=True)
class ChannelReconstruction(CompressionMethod):
    """Chooses channels so that `macs` times the model's multiply-accumulates would be left without them, and makes the next
    layer do without: its other weights are refitted so that its outputs on the calibration data change least, in mean square.

    In each group of channels inside one of the layers those go first whose loss a refit mends best (`elimination`). How many is
    measured: for `WIDTHS` widths of each group the loss on calibration data with this group alone refitted, and between them the
    least sum that meets the budget. `ridge` steadies the refit. `channels` is the choice once it is made: the reading layer → the
    channels that it no longer reads. Channels read in several places or by a grouped kernel stay.
    """

    macs: float = 0.5
    ridge: float = 1e-4
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    name: ClassVar[str] = "channel_reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise UsageError(f"channel_reconstruction: macs is {self.macs!r}, and must lie in 0 … 1, 0 excluded.")
        if not self.ridge > 0:
            raise UsageError(f"channel_reconstruction: ridge is {self.ridge!r}, and must be positive.")

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(macs) for macs in (0.9, 0.75, 0.5))

    @property
    def whole(self) -> bool:
        return True  # the budget is that of all its layers

    def treats(self, layer: Layer) -> str:
        convs = [m for m in layer.module.modules() if isinstance(m, CONVS)]
        return "" if len(convs) > 1 else "holds no two convolutions, so no channel lies inside it"

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> CompressionMethod:
        if self.channels or not layers:
            return self
        assert supplies.calibration is not None  # what it `needs`
        search = _Search(model, layers, supplies, self.ridge)
        costs = Costs(model)
        kept = chosen_widths(search.groups, search.damages(supplies), search.gone, costs, self.macs * costs.total)
        if kept is None:
            raise UsageError(
                f"channel_reconstruction cannot leave {self.macs:g} of the multiply-accumulates.",
                remedy=f"What lies inside its layers allows {search.least(costs):.3f}.",
            )
        gone = {r: sorted(search.orders[r][: g.size - k]) for (r, g), k in zip(search.readers.items(), kept, strict=True)}
        return replace(self, channels={reader: channels for reader, channels in gone.items() if channels})

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        assert supplies.calibration is not None  # what it `needs`
        if self.channels and not any(_read(model.module, name, gone) for name, gone in self.channels.items()):
            raise UsageError("The channels are no longer read already.", place=model.name)
        for name, gram in _grams(model, layers, list(self.channels), supplies.calibration, self.ridge).items():
            refit_(model.module.get_submodule(name), gram, self.channels[name])

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        """Nothing: the shapes stay, and the values come with the weights."""

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """The weights on the chosen channels are 0, and nothing but the weights of these readers changed."""
        old, new = state(before.module), state(after.module)
        own = {f"{name}.weight": gone for name, gone in self.channels.items()}
        wrong = {n: differing(t, new[n]) if n in new else t.numel() for n, t in old.items() if n not in own}
        wrong |= {n: int(new[n].detach()[:, list(gone)].count_nonzero()) for n, gone in own.items()}
        count = sum(map(len, self.channels.values()))
        what = f"elements that should be 0 or unchanged; {count:,} channels are no longer read"
        return Check(sum(wrong.values()), 0, what, next((n for n, c in wrong.items() if c), ""))

    def check_on(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str], supplies: Supplies) -> Check:
        """As `check`, and on the calibration data no small change of the refitted weights would come nearer."""
        check = self.check(before, after, layers)
        if not check.passed or supplies.calibration is None:
            return check
        for name, gram in _grams(before, layers, list(self.channels), supplies.calibration, self.ridge).items():
            old, new = (m.module.get_submodule(name).weight.detach().double().flatten(1) for m in (before, after))  # type: ignore[operator]  # a tensor
            kept = _columns(before.module.get_submodule(name), self.channels[name])
            slope = float((((new - old) @ gram)[:, kept]).abs().max() / (old @ gram).abs().max())
            if not slope <= SLOPE:
                return Check(
                    slope, SLOPE, "of the largest, the slope that is left where least squares leaves none", f"{name}.weight"
                )
        return check


class _Search:
    """The groups, in which order their channels go, and what each width does to the loss."""

    def __init__(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies, ridge: float) -> None:
        assert supplies.calibration is not None
        self.model, self.data, self.reference = model, supplies.calibration, supplies.teacher or model
        self.readers: dict[str, ChannelGroup] = dict(sole_readers(model, Graph(model, layers).groups))
        if not self.readers:
            raise UsageError(
                f"channel_reconstruction finds no channel inside {', '.join(layers[:3])} that one layer alone reads."
            )
        self.grams = _grams(model, layers, list(self.readers), self.data, ridge)
        self.orders = {name: self._order(name) for name in self.readers}
        self.by_root = {group.root: name for name, group in self.readers.items()}

    @property
    def groups(self) -> list[ChannelGroup]:
        return list(self.readers.values())

    def _loss(self) -> float:
        task = self.model.task
        compares = task is not None and task.name == "fidelity"
        return evaluate(self.model, self.data, reference=self.reference if compares else None).means()["loss"]

    def _order(self, name: str) -> list[int]:
        weight: Any = self.model.module.get_submodule(name).weight
        return elimination(weight.detach().flatten(1), self.grams[name], weight[0, 0].numel())

    def gone(self, group: ChannelGroup, kept: int) -> Removed:
        return group.without(self.orders[self.by_root[group.root]][: group.size - kept])

    def least(self, costs: Costs) -> float:
        """The share of the multiply-accumulates that the narrowest widths leave."""
        return costs.left(merged(self.gone(g, max(round(g.size / WIDTHS), 1)) for g in self.groups)) / costs.total

    def damages(self, supplies: Supplies) -> list[dict[int, float]]:
        """For each group: kept channels → how much the loss rises with it alone refitted."""
        base, found = self._loss(), []
        for done, name in enumerate(self.readers, start=1):
            found.append(self._damages(name, base))
            if supplies.progress:
                supplies.progress(done, len(self.readers))
        return found

    def _damages(self, name: str, base: float) -> dict[int, float]:
        module, order, found = self.model.module.get_submodule(name), self.orders[name], {}
        weight: Any = module.weight
        before = weight.detach().clone()
        for part in range(1, WIDTHS):
            kept = max(round(len(order) * part / WIDTHS), 1)
            try:
                refit_(module, self.grams[name], order[: len(order) - kept])
                found[kept] = self._loss() - base
            finally:
                weight.data.copy_(before)
        return found


def _grams(model: UniversalModel, layers: Sequence[str], names: Sequence[str], data: Data, ridge: float) -> dict[str, Tensor]:
    """Name of a reader → Σ x xᵀ of what it reads, steadied."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        modules = {n: model.module.get_submodule(n) for n in names if owner_of(n, layers) == layer}
        chosen = {n: Matrix(n, m, m.weight) for n, m in modules.items()}  # type: ignore[arg-type]  # a parameter
        found |= hessians(model, layer, chosen, data) if chosen else {}
    return {name: damped(found[name], ridge) for name in names}


def _read(root: nn.Module, name: str, gone: Sequence[int]) -> bool:
    weight: Any = root.get_submodule(name).weight
    return bool(weight.detach()[:, list(gone)].any())


@torch.no_grad()
def refit_(module: nn.Module, gram: Tensor, gone: Sequence[int]) -> None:
    """The weights of `module` without the channels `gone`, so that its outputs change least."""
    weight: Any = module.weight
    weight.copy_(refitted(weight.detach().flatten(1), gram, _columns(module, gone)).view(weight.shape))


def _columns(module: nn.Module, gone: Sequence[int]) -> list[int]:
    """The columns of the flattened weight that stay."""
    weight: Any = module.weight
    block, without = int(np.prod(weight.shape[2:], dtype=int)), set(gone)
    return [i for i in range(weight[0].numel()) if i // block not in without]
