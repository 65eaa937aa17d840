"""Take channels out of convolutional nets; Torch-Pruning (Fang et al. 2023) finds what hangs together and ranks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from layerwise.channel_budget import merged
from layerwise.channels import CONVS, ChannelGroup, Graph, remove_, silenced, width
from layerwise.errors import UsageError, nearest
from layerwise.method import METHODS, Check, CompressionMethod, exactly
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state

CHOICES = ("l1", "l2", "lamp", "random", "taylor", "hessian", "zeros")
WITH_DATA = {"taylor", "hessian"}


@METHODS.register("channel_pruning")
@dataclass(frozen=True)
class ChannelPruning(CompressionMethod):
    """Takes the share `amount` of the channels out of every group of channels that lies inside one of the layers.

    `by` is Torch-Pruning's importance of a group (``l1``, ``l2``, ``lamp``, ``random``, ``taylor``, ``hessian``), uniform over
    the groups; ``zeros`` takes out exactly those channels that nobody reads, since every weight on them is 0: no output changes.
    `removed` is the choice once it is made, module → side → indices, and `sizes` how many there were. Channels of the stream
    between layers, grouped kernels and norms over channels stay.
    """

    amount: float = 0.5
    by: str = "l2"
    seed: int = 0
    removed: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict, hash=False)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    name: ClassVar[str] = "channel_pruning"
    shrinks: ClassVar[frozenset[str]] = frozenset({"params", "size", "macs"})
    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise UsageError(f"channel_pruning: amount is {self.amount!r}, and must lie in 0 … 1, 1 excluded.")
        if self.by not in CHOICES:
            raise UsageError(f"channel_pruning: unknown importance {self.by!r}.", remedy=nearest(self.by, CHOICES))

    @classmethod
    def variants(cls) -> tuple[CompressionMethod, ...]:
        return tuple(cls(amount) for amount in (0.25, 0.5))

    @property
    def whole(self) -> bool:
        return True  # one graph for all its layers

    def treats(self, layer: Layer) -> str:
        convs = [m for m in layer.module.modules() if isinstance(m, CONVS)]
        return "" if len(convs) > 1 else "holds no two convolutions, so no channel lies inside it"

    def fitted(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies) -> CompressionMethod:
        if self.removed or not layers:
            return self
        if self.by in WITH_DATA:
            supplies.check(f"channel_pruning(by={self.by})", frozenset({"calibration"}))
        graph = Graph(model, layers)
        if not graph.groups:
            raise UsageError(f"channel_pruning finds no channel inside {', '.join(layers[:3])} that it can take out.")
        gone = unread(graph) if self.by == "zeros" else self._ranked(graph, supplies)
        removed = merged(group.without(channels) for group, channels in gone if channels)
        sizes = {n: {side: width(model.module.get_submodule(n), side) for side in sides} for n, sides in removed.items()}
        return replace(self, removed=removed, sizes=sizes)

    def _ranked(self, graph: Graph, supplies: Supplies) -> list[tuple[ChannelGroup, list[int]]]:
        importance = _importance(graph, self.by, supplies, self.seed)
        chosen = []
        for raw in graph.all():
            group = graph.read(raw)
            if group is not None:
                scores = importance(raw)
                count = round(self.amount * len(scores))
                chosen.append((group, sorted(torch.topk(scores, min(count, len(scores) - 1), largest=False).indices.tolist())))
        return chosen

    def apply_(self, model: UniversalModel, layers: Sequence[str], supplies: Supplies = NOTHING) -> None:
        remove_(model.module, self.removed, self.sizes)

    def reshape_(self, model: UniversalModel, layers: Sequence[str]) -> None:
        remove_(model.module, self.removed, self.sizes)

    def masked(self, model: UniversalModel, layers: Sequence[str]) -> AbstractContextManager[None]:
        return silenced(model.module, self.removed)

    def check(self, before: UniversalModel, after: UniversalModel, layers: Sequence[str]) -> Check:
        """What lost nothing is as it was."""
        touched = tuple(f"{name}." for name in self.removed)
        kept = {name: tensor for name, tensor in state(before.module).items() if not name.startswith(touched or ("\0",))}
        found = {name: tensor for name, tensor in state(after.module).items() if not name.startswith(touched or ("\0",))}
        return exactly(kept, found, "those of the uncut model")


def unread(graph: Graph) -> list[tuple[ChannelGroup, list[int]]]:
    """Each group with the channels on which every reader's weights are 0."""
    root, found = graph.copy.module, []
    for group in graph.groups:
        readers = [m for m in group.members if m.side == "in" and not isinstance(root.get_submodule(m.module), nn.BatchNorm2d)]
        gone = [c for c in range(group.size) if all(_silent(root, m.module, m.indices[c]) for m in readers)]
        found.append((group, gone[: group.size - 1]))  # one stays: no module works with none
    return found


def _silent(root: nn.Module, name: str, indices: Sequence[int]) -> bool:
    weight: Any = root.get_submodule(name).weight
    return not bool(weight.detach()[:, list(indices)].any())


def _importance(graph: Graph, by: str, supplies: Supplies, seed: int) -> Any:
    kinds = graph.tp.importance
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda group: torch.rand(len(group[0].idxs), generator=generator)
    if by in ("l1", "l2"):
        return kinds.MagnitudeImportance(p=int(by[1]))
    if by == "lamp":
        return kinds.LAMPImportance()
    assert supplies.calibration is not None
    importance = kinds.TaylorImportance() if by == "taylor" else kinds.HessianImportance()
    return _with_gradients(graph, importance, supplies, seed)


def _with_gradients(graph: Graph, importance: Any, supplies: Supplies, seed: int) -> Any:
    """The gradients that the measure reads, of the mean loss over the calibration data."""
    model, data = graph.copy, supplies.calibration
    assert data is not None
    for number, batch in enumerate(data):
        batch = batch.to(model.device)
        model.see(batch)
        assert model.task is not None
        with torch.enable_grad():
            losses = model.task.likelihood(model.output(batch), batch, torch.Generator().manual_seed(seed + number))
        if hasattr(importance, "accumulate_grad"):  # squares of single samples' gradients
            for loss in losses:
                model.module.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model.module)
        else:
            (losses.sum() / max(data.samples, 1)).backward()
    return importance
