"""Cutting indices out of live tensors, what standard modules say of their sizes, and sets of indices as short text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from layerwise.coupling.groups import MODULES, Group, live
from layerwise.coupling.routing import Routing
from layerwise.errors import UsageError


@dataclass(frozen=True)
class Cut:
    """The indices `gone` (as text) leave dimension `dim` of the tensor `name`, which had `size` of them; or, where `dim` is
    `MODULES`, the list or dictionary of modules of this name.
    """

    name: str
    dim: int
    size: int
    gone: str


def cuts_of(chosen: Iterable[tuple[Group, Sequence[int]]]) -> list[Cut]:
    """What goes with the units of each group, each dimension of a tensor once."""
    gone: dict[tuple[str, int, int], set[int]] = {}
    for group, units in chosen:
        for place in group.places:
            found = gone.setdefault((place.name, place.dim, place.size), set())
            found |= {int(i) for i in place.indices[list(units)].reshape(-1)}
    return [Cut(*key, written(indices)) for key, indices in gone.items() if indices]


def cut_(module: nn.Module, cuts: Iterable[Cut]) -> None:
    """Slices the tensors in place: whoever shares one sees it cut. Raises `UsageError` where a size is not the one recorded."""
    cuts, tensors = list(cuts), live(module)
    for cut in cuts:
        if cut.dim == MODULES:
            _shorten_(module, cut)
            continue
        tensor = tensors.get(cut.name)
        if tensor is None or tensor.dim() <= cut.dim or tensor.shape[cut.dim] != cut.size:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UsageError(
                f"{cut.name} is {found} and should have {cut.size} along dimension {cut.dim}: it was cut already, "
                "or belongs to another model."
            )
        tensor.data = left(tensor.data, cut)
        tensor.grad = None
    resize_(module, {cut.name.rpartition(".")[0] for cut in cuts if cut.dim != MODULES})


def _shorten_(module: nn.Module, cut: Cut) -> None:
    """The modules that are left move up."""
    found = dict(module.named_modules()).get(cut.name)
    if not isinstance(found, nn.ModuleList | nn.ModuleDict) or len(found) != cut.size:
        raise UsageError(f"{cut.name} is no list of {cut.size} modules: it was cut already, or belongs to another model.")
    parts, gone = found._modules, set(read(cut.gone))
    kept = [part for i, part in enumerate(parts.values()) if i not in gone]
    keys = list(parts)[: len(kept)]
    parts.clear()
    parts.update(zip(keys, kept, strict=True))


def renumbered(name: str, cut: Cut) -> str:
    """The name that a tensor has after `cut`; '' for one that is gone with its module."""
    if cut.dim != MODULES or not name.startswith(f"{cut.name}."):
        return name
    key, _, rest = name.removeprefix(f"{cut.name}.").partition(".")
    number, gone = number_in(key), set(read(cut.gone))
    if number in gone:
        return ""
    return f"{cut.name}.{key.removesuffix(str(number))}{number - sum(g < number for g in gone)}.{rest}"


def number_in(key: str) -> int:
    """``3`` for ``3`` or ``expert_3``."""
    return int(key[len(key.rstrip("0123456789")) :])


def left(tensor: Tensor, cut: Cut) -> Tensor:
    """What `cut` leaves of `tensor`, a copy."""
    gone = set(read(cut.gone))
    keep = [i for i in range(cut.size) if i not in gone]
    return tensor.index_select(cut.dim, torch.tensor(keep, device=tensor.device)).contiguous()


def resize_(module: nn.Module, names: Iterable[str]) -> None:
    """Standard modules say the sizes of their weights as they are now."""
    for name in names:
        part = module.get_submodule(name)
        if isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
        elif isinstance(part, _ConvNd):
            _resize_convolution_(part)
        elif isinstance(part, nn.Embedding):
            part.embedding_dim = part.weight.shape[1]
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm) and part.weight is not None:
            part.normalized_shape = tuple(part.weight.shape)
        elif isinstance(part, nn.GroupNorm) and part.weight is not None:
            part.num_groups = part.num_groups * len(part.weight) // part.num_channels
            part.num_channels = len(part.weight)
        elif isinstance(part, _NormBase):
            sized = part.weight if part.weight is not None else part.running_mean
            part.num_features = part.num_features if sized is None else len(sized)


def _resize_convolution_(part: _ConvNd) -> None:
    rows, columns = part.weight.shape[:2]
    if part.groups > 1:  # whole groups were cut
        own = part.in_channels if part.transposed else part.out_channels
        part.groups = part.groups * rows // own
    part.out_channels, part.in_channels = (columns * part.groups, rows) if part.transposed else (rows, columns * part.groups)


@contextmanager
def silenced(module: nn.Module, chosen: Iterable[tuple[Group, Sequence[int]]]) -> Iterator[None]:
    """Inside, the columns that read these units are zero, and no router chooses one of them: the uncut module computes what it
    would without them.
    """
    chosen = list(chosen)
    tensors, before = live(module), dict[str, Tensor]()
    try:
        for group, units in chosen:
            for place in group.places:
                if place.eats:
                    tensor = tensors[place.name]
                    before.setdefault(place.name, tensor.data.clone())
                    gone = torch.tensor(place.indices[list(units)].reshape(-1), device=tensor.device)
                    tensor.data.index_fill_(place.dim, gone, 0)
        with _unrouted(tensors, [(g, units) for g, units in chosen if g.kind == "expert"]):
            yield
    finally:
        for name, values in before.items():
            tensors[name].data.copy_(values)


def _unrouted(tensors: Mapping[str, Tensor], chosen: Sequence[tuple[Group, Sequence[int]]]) -> AbstractContextManager[Any]:
    places = {place.name: (place.size, units) for group, units in chosen for place in group.places if place.gives}
    if not places:
        return nullcontext()
    return Routing(
        {name: tensors[name] for name in places}, {n: s for n, (s, _) in places.items()}, {n: u for n, (_, u) in places.items()}
    )


def written(indices: Iterable[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for i in sorted(set(indices)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read(text: str) -> list[int]:
    """The inverse of `written`. Raises `UsageError` for anything else."""
    try:
        ends = [[int(x) for x in run.split("-")] for run in text.split(",") if run]
        return [i for run in ends for i in range(run[0], run[-1] + 1)]
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of numbers such as 0-3,7.") from error
