"""Units inside blocks: sublayers (residual branches), attention heads and channels, found by data flow. No model names.

- A *sublayer* is a residual branch: what runs from a stream to the other operand of the add that takes both. It is seen at, and
  switched off through, the last module whose output is that operand; off means that the branch adds nothing.
- A *head* is a slice of what enters the linear module that mixes the heads of an attention. That the slices are the heads is
  compared by value on the example, not believed.
- A *channel* is a hidden unit of a feed-forward branch (a slice of what enters its last linear module) or an output channel of a
  convolution, after the batch normalization that directly follows it.

Every unit is a `Layer` with a `Site`, so that analyzers treat it as any layer. What cannot be found is said in notes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwise.data import Batch
from layerwise.errors import UsageError, nearest
from layerwise.flow import LAYOUT, MATRIX, Flow, Step, Use, Visit, read_flow
from layerwise.structure import Layer, Share, Site

GRANULARITIES = ("block", "sublayer", "head", "channel")
Granularity = str | Sequence[str]

# zero in, zero out: behind one of these a silenced branch still adds nothing
KEEPS_ZERO = LAYOUT | {f"aten::{name}" for name in ("mul", "mul_", "div", "div_", "neg", "roll", "slice", "constant_pad_nd")}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHOWN = 4  # names in a note


def granularities(wanted: Granularity) -> tuple[str, ...]:
    """The values of `wanted`, from coarse to fine. Raises `UsageError` with the nearest for one that is not known."""
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for name in names:
        if name not in GRANULARITIES:
            raise UsageError(f"Unknown granularity {name!r}.", remedy=nearest(name, GRANULARITIES))
    if not names:
        raise UsageError("No granularity was named.", remedy=f"One or several of {', '.join(GRANULARITIES)}.")
    return tuple(g for g in GRANULARITIES if g in names)


@dataclass
class Found:
    """Units in the order in which they run, and what was not found: reason → blocks or sublayers."""

    units: list[Layer] = field(default_factory=list)
    missed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def notes(self) -> list[str]:
        """The missed ones in words, one note per reason."""
        return [f"{reason}: {_few(names)}." for reason, names in self.missed.items()]


def read_units(module: nn.Module, batch: Batch, blocks: Sequence[Layer], wanted: Granularity) -> Found:
    """The layers of `module` at the granularities `wanted`, coarse to fine, numbered from 0.

    Raises `UsageError` (LW-U77) when there is not one at some granularity.
    """
    names, found = granularities(wanted), Found()
    opened = []
    if set(names) != {"block"}:
        flow = read_flow(module, batch, [b.module for b in blocks])
        opened = [_Opened(module, block, flow) for block in blocks]
    for granularity in names:
        units = list(blocks) if granularity == "block" else list(_read(opened, granularity, found))
        if not units:
            raise UsageError(
                f"No {granularity} was found in this model. {' '.join(found.notes())}".rstrip(),
                remedy="See docs/granularity.md for what is looked for; granularity='block' always works.",
                code="LW-U77",
            )
        found.units += units
    found.units = [replace(unit, index=i) for i, unit in enumerate(found.units)]
    return found


def _read(opened: Iterable[_Opened], granularity: str, found: Found) -> Iterator[Layer]:
    parts = {"sublayer": _sublayers, "head": _heads, "channel": _channels}[granularity]
    return (unit for block in opened for unit in parts(block, found))


class _Opened:
    """One block with the data flow of its first call."""

    def __init__(self, root: nn.Module, layer: Layer, flow: Flow) -> None:
        self.root, self.layer = root, layer
        self.own = own = next(v for v in flow.visits if v.module is layer.module)
        self.visits = [v for v in flow.visits if own.began < v.began and v.ended < own.ended]
        self.steps = [s for s in flow.steps if own.began < s.tick < own.ended]
        self.times = Counter(v.module for v in self.visits)
        elsewhere = {v.module for v in flow.visits if not own.began <= v.began <= own.ended} - {layer.module}
        self.foreign = elsewhere if layer.calls == 1 else set()  # modules that other blocks call as well
        self.names = {m: name for name, m in root.named_modules()}
        stream = layer.stream
        self.elements = next((math.prod(shape) for path, _, shape in own.gives if stream and path == stream.leaves), 0)
        self.before: dict[int, frozenset[int]] = {}  # node → all that it was made from
        self.maker: dict[int, Step] = {}
        for step in self.steps:
            past = frozenset(step.reads).union(*(self.before.get(n, frozenset()) for n in step.reads))
            for node in step.writes:
                self.before[node], self.maker[node] = past, step
        self.branches = list(self._branches())

    def past(self, node: int) -> frozenset[int]:
        """The node and all that it was made from inside the block."""
        return self.before.get(node, frozenset()) | {node}

    def between(self, stream: int, end: int) -> list[Step]:
        """The steps that made `end` and not already `stream`."""
        nodes = self.past(end) - self.past(stream)
        return [s for s in self.steps if nodes.intersection(s.writes)]

    def _branches(self) -> Iterator[_Branch]:
        found = []
        for step in self.steps:
            if self._is_sum(step):
                found += [_Branch(self, step, s, end) for s, end in self._operands(step)]
        found = [b for b in found if b.matrices]
        for branch in found:
            if not any(branch.sum in other.steps for other in found if other is not branch):  # not one inside another
                yield branch

    def _is_sum(self, step: Step) -> bool:
        return step.name in ("aten::add", "aten::add_") and len(step.reads) == 2 and set(step.elements) == {self.elements}

    def _operands(self, step: Step) -> list[tuple[int, int]]:
        """(stream, branch) of y = x + f(x); also of (x + f(x)) + g(x) and of x + (f(x) + g(x)), whose branches are parallel."""
        a, b = step.reads
        for stream, end in ((a, b), (b, a)):
            if self._precedes(stream, end):
                return [(stream, term) for term in self._terms(stream, end)]
            before = self.maker.get(stream)
            if before is not None and self._is_sum(before):
                x, y = before.reads
                for common, other in ((x, y), (y, x)):
                    if self._precedes(common, end) and self._precedes(common, other):
                        return [(common, end)]
        return []

    def _terms(self, stream: int, end: int) -> list[int]:
        step = self.maker.get(end)
        if step is None or not self._is_sum(step):
            return [end]
        a, b = step.reads
        parallel = self._precedes(stream, a) and self._precedes(stream, b)
        if not parallel or self._precedes(a, b) or self._precedes(b, a):
            return [end]
        return [*self._terms(stream, a), *self._terms(stream, b)]

    def _precedes(self, a: int, b: int) -> bool:
        return a in self.before.get(b, frozenset())

    def site(self, end: int) -> Site | None:
        """The output of the last module that is the node `end`, or of which it is a multiple."""
        node: int | None = end
        while node is not None:
            calls = [(v, path) for v in self.visits for path, n, _ in v.gives if n == node and self.alone(v.module)]
            if calls:
                visit, path = min(calls, key=lambda c: (not any(True for _ in c[0].module.parameters()), c[0].began))
                return Site(visit.module, path)
            step = self.maker.get(node)
            node = step.reads[0] if step is not None and step.name in KEEPS_ZERO and step.reads else None
        return None

    def alone(self, module: nn.Module) -> bool:
        """Called once in this block and in no other."""
        return (self.times[module] == 1 or module is self.layer.module) and module not in self.foreign

    def unit(self, granularity: str, name: str, module: nn.Module, site: Site, kind: str, shares: Iterable[Share]) -> Layer:
        """A layer for a part of this block; its shape is that of the whole site."""
        own = tuple({share.name: share for share in shares}.values())
        block, size = self.layer, sum(s.tensor.numel() for s in own)
        visit = next(v for v in (self.own, *self.visits) if v.module is site.module)
        seen = visit.takes if site.entering else visit.gives
        shape = next(shape for path, _, shape in seen if path == site.path)
        return Layer(
            name=name, index=0, module=module, kind=kind, parameters=size, skippable=True, group=block.group, calls=block.calls,
            granularity=granularity, parent=block.name, site=site, shares=own, shape=shape,
        )  # fmt: skip


class _Branch:
    """One residual branch: the steps from `stream` to `end`, the operand of the add `sum`."""

    def __init__(self, block: _Opened, total: Step, stream: int, end: int) -> None:
        self.block, self.sum, self.end = block, total, end
        self.steps = block.between(stream, end)
        self.uses = [use for step in self.steps for use in step.uses]
        self.matrices = [use for use in self.uses if use.parameter.dim() > 1]

    @property
    def kind(self) -> str:
        names = {step.name for step in self.steps}
        if any("scaled_dot_product" in n or "softmax" in n for n in names):
            return "attention"
        if any("convolution" in n for n in names):
            return "convolution"
        return "mlp" if len(self.matrices) > 1 else "linear"

    def place(self, common: Container[str] = ()) -> tuple[str, nn.Module]:
        """The smallest module that holds the branch's matrices (those in `common` apart) and no others; else block and kind."""
        matrices = [use for use in self.matrices if use.name not in common]
        parts = [use.name.split(".")[:-1] for use in matrices]
        same = [keys[0] for keys in itertools.takewhile(lambda keys: len(set(keys)) == 1, zip(*parts, strict=False))]
        block, own = self.block.layer, {use.name for use in matrices}
        path = ".".join(same)
        module = self.block.root.get_submodule(path)
        inside = {f"{path}.{name}" for name, p in module.named_parameters() if p.dim() > 1}
        if inside <= own and len(path) > len(block.name):
            return path, module
        return f"{block.name}:{self.kind}", block.module


def _sublayers(block: _Opened, found: Found) -> Iterator[Layer]:
    names: Counter[str] = Counter()
    if not block.branches:
        found.missed["No residual branch was found in"].append(block.layer.name)
    common = _common(block.branches)
    yield from _shared(block, common, found)
    for branch in block.branches:
        name, module = branch.place(common)
        site = block.site(branch.end)
        if site is None:
            found.missed["No module gives what the residual branch adds, so it is no sublayer of its own:"].append(name)
            continue
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}{names[name]}"
        own = [Share(u.name, u.parameter) for u in branch.uses if u.name not in common]
        yield block.unit("sublayer", unique, module, site, branch.kind, own)


def _common(branches: Sequence[_Branch]) -> dict[str, Tensor]:
    """The matrices that several branches of one block read: no branch's own."""
    times = Counter(name for branch in branches for name in {use.name for use in branch.matrices})
    return {use.name: use.parameter for b in branches for use in b.matrices if times[use.name] > 1}


def _shared(block: _Opened, common: Mapping[str, Tensor], found: Found) -> Iterator[Layer]:
    """What several branches read through: the module that owns their common matrices, silenced in all its calls."""
    owners: dict[str, list[Share]] = defaultdict(list)
    for name, parameter in common.items():
        owners[name.rpartition(".")[0]].append(Share(name, parameter))
    for name, shares in owners.items():
        module = block.root.get_submodule(name)
        visit = next((v for v in block.visits if v.module is module and v.gives), None)
        if visit is None or module in block.foreign:
            found.missed["No module of the block's own gives what its branches share:"].append(name)
            continue
        yield block.unit("sublayer", name, module, Site(module, visit.gives[0][0]), "linear", shares)


def _heads(block: _Opened, found: Found) -> Iterator[Layer]:
    attentions = [s for s in block.steps if "scaled_dot_product" in s.name or "softmax" in s.name]
    mixing = [s for s in block.steps if s.heads]
    if attentions and not mixing:
        found.missed["The heads do not enter a linear operator side by side in"].append(block.layer.name)
    for step in mixing:
        site, name = _entering(block, step), block.names[step.module]
        if site is None:
            found.missed["The module that mixes the heads is not called by itself in"].append(block.layer.name)
            continue
        size = step.width // step.heads
        owner = name.rpartition(".")[0] or name
        for i in range(step.heads):
            piece = replace(site, start=i * size, stop=(i + 1) * size)
            yield block.unit(
                "head", f"{owner}:head{i}", step.module, piece, "attention", _columns(step, i * size, (i + 1) * size)
            )


def _channels(block: _Opened, found: Found) -> Iterator[Layer]:
    before = len(found.missed)
    units = [*_hidden(block, found), *_convolved(block)]
    if not units and len(found.missed) == before:
        found.missed["No feed-forward branch and no convolution was found in"].append(block.layer.name)
    yield from units


def _hidden(block: _Opened, found: Found) -> Iterator[Layer]:
    """The hidden units of the feed-forward branches."""
    common = _common(block.branches)
    for branch in block.branches:
        own = [{u.name for u in s.uses if u.parameter.dim() == 2} - set(common) for s in branch.steps]
        linear = [s for s, names in zip(branch.steps, own, strict=True) if s.name in MATRIX and names]
        if branch.kind == "attention" or len(linear) < 2:
            continue
        step = linear[-1]
        site = _entering(block, step)
        if site is None:
            found.missed["The last linear operator is not a module called by itself in"].append(branch.place()[0])
            continue
        owner = block.names[step.module]
        for i in range(step.width):
            piece = replace(site, start=i, stop=i + 1)
            yield block.unit("channel", f"{owner}:channel{i}", step.module, piece, "mlp", _columns(step, i, i + 1))


def _convolved(block: _Opened) -> Iterator[Layer]:
    """The output channels of the convolutions."""
    for step in (s for s in block.steps if "convolution" in s.name):
        module = step.module
        visit = next((v for v in (block.own, *block.visits) if v.module is module), None)
        if visit is None or not isinstance(module, CONVOLUTIONS) or not block.alone(module):
            continue
        norm = next((v for v in block.visits if _follows(v, step.writes[0]) and block.alone(v.module)), None)
        last = norm or visit
        owner = block.names[module]
        parts = [*_own(module, owner), *(_own(norm.module, block.names[norm.module]) if norm else [])]
        dim = 1 - module.weight.dim()  # from the end: there may be no dimension of samples
        for i in range(module.out_channels):
            site = Site(last.module, last.gives[0][0], False, dim, i, i + 1)
            shares = [Share(name, p, 0, i, i + 1) for name, p in parts]
            yield block.unit("channel", f"{owner}:channel{i}", module, site, "convolution", shares)


def _follows(visit: Visit, node: int) -> bool:
    return isinstance(visit.module, _BatchNorm) and any(n == node for _, n, _ in visit.takes)


def _own(module: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    return [(f"{name}.{key}", p) for key, p in module.named_parameters(recurse=False)]


def _entering(block: _Opened, step: Step) -> Site | None:
    """The input of the module that multiplies by the step's matrix; None when no module does just that."""
    visit = next((v for v in block.visits if v.module is step.module and v.began < step.tick < v.ended), None)
    if visit is None or not block.alone(step.module) or len(_matrices(step)) != 1:
        return None
    held = [p for p in step.module.parameters() if p.dim() > 1]
    if len(held) != 1 or not visit.takes or visit.takes[0][2][-1] != step.width:
        return None
    return Site(step.module, visit.takes[0][0], True, -1)


def _columns(step: Step, start: int, stop: int) -> list[Share]:
    """The part of the step's matrix that reads these inputs."""
    return [Share(u.name, u.parameter, 0 if u.inputs_first else 1, start, stop) for u in _matrices(step)]


def _matrices(step: Step) -> list[Use]:
    return [use for use in step.uses if use.parameter.dim() == 2]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


__all__ = ["GRANULARITIES", "Found", "Granularity", "granularities", "read_units"]
