"""Channels that belong together: what has to go from which module when one channel goes. Torch-Pruning reads the graph.

Decision: its graph, its importance measures and its choice are used, and nothing of it is trusted: the cut is made by `remove_`,
a table over four kinds of modules that writes every attribute back, and what comes out is judged by masked equivalence. Groups
that reach into other modules (a norm over the channels, a grouped kernel, a bare parameter) are left alone.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwise.errors import UsageError, missing_dependency
from layerwise.hessians import reads_alike
from layerwise.model import UniversalModel
from layerwise.trace import run

Removed = Mapping[str, Mapping[str, Sequence[int]]]  # module → "out" or "in" → the indices that go

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MOST = 8192  # inputs of a reader; their Gram matrix has the square
SECONDS = 60.0  # some graphs take Torch-Pruning hours


@dataclass(frozen=True)
class Member:
    """One side (``out`` or ``in``) of a module, and for each channel of the group the indices there that are its own."""

    module: str
    side: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels made by `root`; when one goes, every member loses its indices."""

    root: str
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.members[0].indices)

    def without(self, channels: Sequence[int]) -> dict[str, dict[str, list[int]]]:
        """What goes from each module when these channels go."""
        gone: dict[str, dict[str, list[int]]] = {}
        for member in self.members:
            sides = gone.setdefault(member.module, {})
            sides[member.side] = sorted({*sides.get(member.side, ()), *(i for c in channels for i in member.indices[c])})
        return gone


class Graph:
    """Torch-Pruning's dependency graph of a copy of `model`, with the groups that can be cut inside single `layers`.

    Raises `UsageError` in words where the graph cannot be built, or not within `seconds`.
    """

    def __init__(self, model: UniversalModel, layers: Sequence[str], seconds: float = SECONDS) -> None:
        tp = torch_pruning()
        self.tp, self.copy = tp, model.clone()
        module = self.copy.module
        for p in module.parameters():
            p.requires_grad_(True)
        self.names = {m: name for name, m in module.named_modules()}
        self.layers = tuple(layers)

        def build() -> Any:
            forward = lambda net, batch: model.adapter.output(run(net, batch))  # noqa: E731
            return tp.DependencyGraph().build_dependency(module, model.example, forward_fn=forward)

        try:
            self.graph = limited(build, seconds)
        except TimeoutError as error:
            raise UsageError(f"Torch-Pruning did not read its graph within {seconds:g} s.", place=model.name) from error
        except Exception as error:
            raise UsageError(f"Torch-Pruning cannot read its graph: {type(error).__name__}: {error}", place=model.name) from error
        self.groups = [found for g in self.all() if (found := self.read(g)) is not None]

    def all(self) -> Iterator[Any]:
        yield from self.graph.get_all_groups(root_module_types=(*CONVS, nn.Linear))

    def read(self, group: Any) -> ChannelGroup | None:
        """The group as plain data; None where it leaves its layer or holds what `remove_` does not know."""
        members, channels = [], len(group[0].idxs)
        for item in group.items:
            name = self.names.get(item.dep.target.module)
            if name is None:
                if isinstance(item.dep.target.module, nn.Parameter):
                    return None
                continue  # an operation without weights
            side = "out" if self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            own: list[list[int]] = [[] for _ in range(channels)]
            for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                own[channel].append(index)
            members.append(Member(name, side, tuple(tuple(i) for i in own)))
        members = [m for m in members if any(True for _ in self.copy.module.get_submodule(m.module).parameters(recurse=False))]
        inside = any(all(_within(m.module, layer) for m in members) for layer in self.layers)
        ends = any(m.side == "in" for m in members)
        if not inside or not ends or any(refused(self.copy.module.get_submodule(m.module), m.side) for m in members):
            return None
        return ChannelGroup(members[0].module, tuple(members))


def sole_readers(model: UniversalModel, groups: Sequence[ChannelGroup]) -> Iterator[tuple[str, ChannelGroup]]:
    """The groups that one layer alone reads, each channel in one place, with the name of that layer."""
    for group in groups:
        readers = [m for m in group.members if m.side == "in"]
        alone = len(readers) == 1 and all(own == (i,) for i, own in enumerate(readers[0].indices))
        module = model.module.get_submodule(readers[0].module)
        if alone and reads_alike(module) and module.weight[0].numel() <= MOST:  # type: ignore[index]  # a tensor
            yield readers[0].module, group


def owner_of(name: str, layers: Sequence[str]) -> str:
    """The one of `layers` in which the module `name` lies."""
    return next(layer for layer in layers if _within(name, layer))


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def refused(module: nn.Module, side: str) -> str:
    """'' or why `remove_` cannot take channels from this side of `module`."""
    if isinstance(module, NORMS) or (isinstance(module, nn.Linear) and type(module) is nn.Linear):
        return ""
    if isinstance(module, CONVS):
        alone = module.groups == 1 or module.groups == module.in_channels == module.out_channels
        return "" if alone else "its kernel is grouped"
    return f"{type(module).__name__} is no convolution, linear layer or batch normalization"


@torch.no_grad()
def remove_(root: nn.Module, removed: Removed, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Takes the indices out of weights, statistics and attributes; in place. `sizes` are the channels that there must be.

    Raises `UsageError`, before anything is changed, where there are others.
    """
    for name, sides in removed.items():
        for side in sides:
            if (found := width(root.get_submodule(name), side)) != sizes[name][side]:
                raise UsageError(f"{name} has {found} channels, not {sizes[name][side]}: some were taken out already.")
    for name, sides in removed.items():
        module = root.get_submodule(name)
        for side, gone in sides.items():
            if gone:
                _remove_(module, side, gone)


def width(module: Any, side: str) -> int:
    """The channels on this side of a module that `remove_` knows."""
    if isinstance(module, NORMS):
        return int(module.num_features)
    return int(getattr(module, f"{side}_features" if isinstance(module, nn.Linear) else f"{side}_channels"))


def _remove_(module: nn.Module, side: str, gone: Sequence[int]) -> None:
    if isinstance(module, NORMS):
        _keep_(module, ("weight", "bias", "running_mean", "running_var"), 0, gone)
        module.num_features -= len(gone)
    elif isinstance(module, CONVS) and module.groups > 1:  # one kernel per channel: both sides are one
        if side == "out":
            _keep_(module, ("weight", "bias"), 0, gone)
            module.groups = module.in_channels = module.out_channels = module.out_channels - len(gone)
    elif side == "out":
        _keep_(module, ("weight", "bias"), 0, gone)
        _count_(module, "out", len(gone))
    else:
        _keep_(module, ("weight",), 1, gone)
        _count_(module, "in", len(gone))


def _count_(module: Any, side: str, gone: int) -> None:
    attribute = f"{side}_features" if isinstance(module, nn.Linear) else f"{side}_channels"
    setattr(module, attribute, getattr(module, attribute) - gone)


def _keep_(module: nn.Module, names: Sequence[str], dim: int, gone: Sequence[int]) -> None:
    for name in names:
        tensor = getattr(module, name)
        if tensor is None:
            continue
        kept = sorted(set(range(tensor.shape[dim])) - set(gone))
        part = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(part, requires_grad=tensor.requires_grad))
        else:
            setattr(module, name, part)


@contextmanager
def silenced(root: nn.Module, removed: Removed) -> Iterator[None]:
    """Inside, whoever reads a removed channel reads 0 instead; the cut itself is not used."""
    handles = []
    try:
        for name, sides in removed.items():
            if sides.get("in"):
                handles.append(root.get_submodule(name).register_forward_pre_hook(_silencer(sides["in"])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silencer(gone: Sequence[int]) -> Any:
    def hook(module: nn.Module, args: Any) -> Any:
        dim = args[0].dim() - 1 if isinstance(module, nn.Linear) else 1
        return (args[0].index_fill(dim, torch.tensor(list(gone), device=args[0].device), 0), *args[1:])

    return hook


def limited(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` gives; raises `TimeoutError` after `seconds`, when the thread it runs in is stopped at its next line."""
    result: dict[str, Any] = {}

    def inside() -> None:
        try:
            with torch.enable_grad():
                result["value"] = work()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=inside, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    if "error" in result:
        raise result["error"]
    return result["value"]


def torch_pruning() -> Any:
    """The package. Raises `MissingDependency`."""
    try:
        import torch_pruning
    except ImportError as error:
        raise missing_dependency("torch-pruning", "prune", "channel_pruning") from error
    return torch_pruning
