"""Moving the range of activations into the weights that read them; the model computes the same (SmoothQuant, Xiao 2022).

A *link* is a norm or a linear layer (the giver) and the linear layers that alone read what it gives, channel by channel: divided
by s in the giver and multiplied by s in the readers, a channel changes nothing. Links are found by data flow and then tried: with
random scales the model must give the same outputs. So what lies between may be anything that scales with its channels (attention
between values and output projection, a gate, ReLU), and no architecture is named.

Where we differ from the paper: scales are rounded to powers of two, so that the move loses no bit of any float; and linear layers
are givers too, since in a model with its norms behind the residual sum no norm is read by linear layers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.data import Data
from layerwise.flow import Flow, read_flow
from layerwise.hessians import rows_read
from layerwise.model import UniversalModel
from layerwise.trace import evaluating, run, unfused

EXACT = 1e-5  # of the largest output
LINEAR = {"aten::addmm", "aten::mm", "aten::linear"}


@dataclass(frozen=True)
class Link:
    """Dotted paths of the giver and its readers."""

    giver: str
    readers: tuple[str, ...]


def links(model: UniversalModel, layer: str, linear: Mapping[str, nn.Linear]) -> list[Link]:
    """The links within `layer` whose readers are among `linear` (dotted path from the root → module), each tried."""
    block = model.layer(layer).module
    flow = read_flow(model.module, model.example, [block])
    paths = {m: n for n, m in model.module.named_modules()}
    found: list[Link] = []
    for link in (*_from_norms(flow, block, linear, paths), *_from_linears(flow, linear, paths)):
        taken = {reader for known in found for reader in known.readers}
        if not taken & {*link.readers} and link.giver not in {known.giver for known in found} and holds(model, link):
            found.append(link)
    return found


def _from_norms(flow: Flow, block: nn.Module, linear: Mapping[str, nn.Linear], paths: Mapping[nn.Module, str]) -> Iterator[Link]:
    """Modules with a vector of weights, all of whose readers are linear layers inside the block."""
    leaving = {node for v in flow.visits if v.module is block for _, node, _ in v.gives}
    for visit in flow.visits:
        weight = visit.module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or len(visit.gives) != 1:
            continue
        ((_, node, shape),) = visit.gives
        steps = [s for s in flow.steps if node in s.reads and s.tick > visit.ended]
        readers = dict.fromkeys(paths.get(s.module, "") for s in steps if s.name in LINEAR)
        alone = len(readers) and all(s.name in LINEAR and paths.get(s.module) in linear for s in steps)
        if alone and node not in leaving and shape[-1:] == weight.shape:
            yield Link(paths[visit.module], tuple(readers))


def _from_linears(flow: Flow, linear: Mapping[str, nn.Linear], paths: Mapping[nn.Module, str]) -> Iterator[Link]:
    """For each linear layer the ones before it whose outputs reach it and are as many as its inputs, the nearest first."""
    visits = [v for v in flow.visits if paths.get(v.module) in linear]
    for i, visit in enumerate(visits):
        reader = paths[visit.module]
        for before in reversed(visits[:i]):
            giver = paths[before.module]
            if linear[giver].out_features == linear[reader].in_features and _reaches(flow, before.gives[0][1], visit.takes[0][1]):
                yield Link(giver, (reader,))


def _reaches(flow: Flow, start: int, goal: int) -> bool:
    nodes = {start}
    for step in flow.steps:
        if nodes & {*step.reads}:
            nodes |= {*step.writes}
    return goal in nodes


def holds(model: UniversalModel, link: Link) -> bool:
    """Whether moving random scales along `link` leaves the model's outputs as they are."""
    g = torch.Generator().manual_seed(0)
    powers = torch.randint(-2, 3, (weight_of(model, link.readers[0]).shape[1],), generator=g).to(model.device)
    before = model.predict(model.example)
    with _kept(model, link):
        move_(model, link, powers)
        return apart(model.predict(model.example), before) <= EXACT


def move_(model: UniversalModel, link: Link, exponents: Tensor) -> None:
    """Divides each channel by 2^exponent in the giver and multiplies it by that in the readers, in place."""
    giver = model.module.get_submodule(link.giver)
    scale = torch.exp2(exponents.float()).to(next(giver.parameters()))
    with torch.no_grad():
        for parameter in giver._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data / (scale[:, None] if parameter.dim() == 2 else scale)
        for name in link.readers:
            weight = weight_of(model, name)
            weight.data = weight.data * scale


def weight_of(model: UniversalModel, name: str) -> Tensor:
    """The live weight of the module at this path."""
    return model.module.get_parameter(f"{name}.weight")


def exponents(model: UniversalModel, found: Sequence[Link], strength: float, data: Data) -> list[Tensor]:
    """For each link the power of two nearest to max|x|^strength / max|w|^(1 − strength) of each channel; 0 where one is zero."""
    ranges = _ranges(model, found, data)
    powers = []
    for link, x in zip(found, ranges, strict=True):
        weights = [weight_of(model, name).detach().abs().amax(0) for name in link.readers]
        w = torch.stack(weights).amax(0).float()
        both = strength * x.log2() - (1 - strength) * w.log2()
        powers.append(torch.where((x > 0) & (w > 0), both.round(), 0.0).clamp(-30, 30).int())
    return powers


def _ranges(model: UniversalModel, found: Sequence[Link], data: Data) -> list[Tensor]:
    """max|x| of each channel that the readers of each link take on `data`, padding left out."""
    largest: dict[int, Tensor] = {}
    now = list(data)[:1]

    def watch(i: int, owner: nn.Module) -> None:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = rows_read(owner, args[0].detach(), now[0]).abs()
            seen = rows.amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
            largest[i] = torch.maximum(largest[i], seen) if i in largest else seen

        stack.callback(owner.register_forward_pre_hook(see).remove)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model.module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        for i, link in enumerate(found):
            watch(i, model.module.get_submodule(link.readers[0]))
        for batch in data if found else ():
            now[0] = batch.to(model.device)
            run(model.module, now[0])
    widths = [weight_of(model, link.readers[0]).shape[1] for link in found]
    return [largest.get(i, torch.zeros(width, device=model.device)) for i, width in enumerate(widths)]


def apart(found: Tensor, wanted: Tensor) -> float:
    """max |a − b| / max |b|."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))


@contextmanager
def _kept(model: UniversalModel, link: Link) -> Iterator[None]:
    modules = [model.module.get_submodule(name) for name in (link.giver, *link.readers)]
    kept = [(p, p.data) for m in modules for p in m._parameters.values() if p is not None]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
