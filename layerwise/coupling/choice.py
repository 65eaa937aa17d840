"""Which units go: scores of units, higher is more important, and the choice of the lowest."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerwise.coupling.experts import routed
from layerwise.coupling.groups import MODULES, Group, Place, live
from layerwise.coupling.slicing import number_in
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.model import UniversalModel

Floats = NDArray[np.float64]
PARTS: Mapping[str, Callable[[Place], bool]] = {"filter": lambda p: p.gives, "channel": lambda p: p.eats}


class Limits(NamedTuple):
    """Units of a group go by `step`, at least so many `stay`, and of each of the equal `parts` that they lie in as many go."""

    step: int = 1
    stay: int = 1
    parts: int = 1


def magnitudes(model: UniversalModel, groups: Iterable[Group], part: str = "") -> dict[str, Floats]:
    """The L2 norm of all weights that go with a unit; of its ``filter`` (rows) or ``channel`` (columns) alone."""
    tensors = live(model.module)
    wanted = PARTS.get(part, lambda p: True)
    return {g.name: _sums(g, {n: tensors[n].detach().double() ** 2 for n in names(g, tensors)}, wanted) ** 0.5 for g in groups}


def taylor(model: UniversalModel, groups: Iterable[Group], data: Data) -> dict[str, Floats]:
    """Σ |w·∂loss/∂w| over the weights that go with a unit (Molchanov et al. 2019, first order; there per filter and squared).

    The loss is summed over all data, however that is cut into batches.
    """
    groups = list(groups)
    own = dict(model.module.named_parameters())
    parameters = {name: own[name] for g in groups for name in names(g, own)}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with _requiring(parameters.values()), torch.enable_grad():
        for batch in data:
            found = torch.autograd.grad(_loss(model, batch), list(parameters.values()), allow_unused=True)
            for (name, _), gradient in zip(parameters.items(), found, strict=True):
                total[name] += 0 if gradient is None else gradient
    if not any(bool(t.any()) for t in total.values()):
        raise UsageError(
            "The loss has no gradient, so that criterion='taylor' cannot tell units apart.",
            remedy="Give calibration data with targets, or another criterion.",
        )
    products = {name: (p.detach() * total[name]).abs().double() for name, p in parameters.items()}
    return {g.name: _sums(g, products, lambda p: p.dim == MODULES or p.name in products) for g in groups}


def _loss(model: UniversalModel, batch: Batch) -> Tensor:
    """Summed over the batch."""
    batch = batch.to(model.device)
    model.see(batch)
    assert model.task is not None  # set by see
    output = model.output(batch)
    return model.task.losses(output, batch, output.detach())[0].sum()


def activations(model: UniversalModel, groups: Iterable[Group], data: Data) -> dict[str, Floats]:
    """Σ |w|·‖x‖ over the columns that read a unit: the score of Wanda (Sun et al. 2024), summed over the columns of a unit.

    Σ |w| alone for weights that are used without their module being called, such as those of fused experts. Of whole experts
    their `frequencies`.
    """
    groups = list(groups)
    if experts := [g for g in groups if g.kind == "expert"]:
        return frequencies(model, experts, data)
    eaten = {p.name: p for g in groups for p in g.places if p.eats}
    tensors, squares = live(model.module), dict[str, Tensor]()
    with ExitStack() as stack:
        for name, place in eaten.items():
            owner = model.module.get_submodule(name.rpartition(".")[0])
            stack.callback(owner.register_forward_pre_hook(_squaring(name, place, squares)).remove)
        for batch in data:
            model.predict(batch)
    scaled = {}
    for name, place in eaten.items():
        size = tensors[name].detach().abs().double()
        form = [1] * size.dim()
        form[place.dim] = place.size
        scaled[name] = size * squares[name].double().sqrt().reshape(form) if name in squares else size
    return {g.name: _sums(g, scaled, lambda p: p.eats) for g in groups}


def frequencies(model: UniversalModel, groups: Iterable[Group], data: Data) -> dict[str, Floats]:
    """How often each expert is chosen; where all are used, the sum of its shares."""
    groups = list(groups)
    routers = {p.name: p.size for g in groups for p in g.places if p.gives}
    tensors = {name: tensor for name, tensor in live(model.module).items() if name in routers}
    found = {
        name: c.uses.numpy()
        for c in routed(model.module, (b.to(model.device) for b in data), tensors, routers)
        for name in c.names
    }
    return {g.name: next(found[p.name] for p in g.places if p.gives and p.name in found) for g in groups}


def random(groups: Iterable[Group], seed: int) -> dict[str, Floats]:
    """Uniform numbers, of each group the same whatever other groups there are."""
    return {g.name: np.random.default_rng([seed, zlib.crc32(g.name.encode())]).random(g.units) for g in groups}


def lowest(scores: Mapping[str, Floats], ratio: float, limits: Mapping[str, Limits], *, together: bool) -> dict[str, list[int]]:
    """Of each group the share `ratio` of its units with the lowest scores, as far as its limits allow.

    `together`: of all groups as one, each score divided by the mean of its group, so that sizes do not decide.
    """
    counts = _together(scores, ratio, limits) if together else {name: ratio * len(values) for name, values in scores.items()}
    return {name: _first(values, counts[name], limits[name]) for name, values in scores.items()}


def _together(scores: Mapping[str, Floats], ratio: float, limits: Mapping[str, Limits]) -> dict[str, float]:
    """How many of each group are among the lowest of all; the highest of each are out of the count, since they stay."""
    free = {n: np.sort(v / (v.mean() or 1.0))[: len(v) - limits[n].stay] for n, v in scores.items()}
    names = [name for name, values in free.items() for _ in values]
    count = round(ratio * sum(len(values) for values in scores.values()))
    gone = [names[i] for i in np.argsort(np.concatenate(list(free.values())), kind="stable")[:count]]
    return {name: float(gone.count(name)) for name in scores}


def _first(values: Floats, wanted: float, limits: Limits) -> list[int]:
    """The lowest, of each part as many."""
    step, stay, parts = limits
    count = min(round(wanted / step), (len(values) - stay) // step) * step
    width = len(values) // parts
    chosen = [
        start + int(i)
        for start in range(0, len(values), width)
        for i in np.argsort(values[start : start + width], kind="stable")[: count // parts]
    ]
    return sorted(chosen)


def _sums(group: Group, values: Mapping[str, Tensor], wanted: Callable[[Place], bool]) -> Floats:
    total = np.zeros(group.units)
    for place in group.places:
        if place.dim == MODULES:
            for name in names(group, values):
                if name.startswith(f"{place.name}."):
                    unit = number_in(name.removeprefix(f"{place.name}.").partition(".")[0])
                    total[unit] += float(values[name].sum())
        elif wanted(place):
            tensor = values[place.name]
            others = [d for d in range(tensor.dim()) if d != place.dim]
            line = (tensor.sum(others) if others else tensor).cpu().numpy()
            total += line[place.indices].sum(1)
    return total


def names(group: Group, tensors: Iterable[str]) -> list[str]:
    """Those that hold a share of its units."""
    lists = tuple(f"{p.name}." for p in group.places if p.dim == MODULES)
    own = {p.name for p in group.places}
    return [name for name in tensors if name in own or name.startswith(lists)]


def _squaring(name: str, place: Place, squares: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    """Adds up the squares of what enters a weight, for each of its columns."""

    def hook(module: nn.Module, args: Any) -> None:
        x = args[0].detach() if args else torch.zeros(1)
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.dim() - 1
        if x.shape[dim] == place.size:
            found = x.double().square().sum([d for d in range(x.dim()) if d != dim])
            squares[name] = squares[name] + found if name in squares else found

    return hook


@contextmanager
def _requiring(parameters: Iterable[Tensor]) -> Any:
    flags = [(p, p.requires_grad) for p in parameters]
    for p, _ in flags:
        p.requires_grad_()
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


__all__: Sequence[str] = ["Limits", "activations", "frequencies", "lowest", "magnitudes", "random", "taylor"]
