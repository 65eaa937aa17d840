"""Where the layers are in a traced forward: chains of blocks, found in the tree of module calls. No model names.

Two rules find the chains:

- *repeated*: siblings of one class that run one after the other, each taking what the one before gave, or that stand in one
  ``ModuleList``/``Sequential`` and pass on the same shape;
- *piped*: siblings of different classes where each takes only what the one before gave (a stage of mixed blocks).

A module is opened as long as there is a repeated chain further in that says as much as the module itself: it holds most of the
module's parameters (`OPEN`), or a good part (`OPEN_UNSKIPPABLE`) of a kind of module that mostly changes the shape, such as a
stage that ends in a smaller one. A piped chain opens a module only if that module is not itself one of a repeated chain, since a
transformer block's attention and feed-forward form a pipe as well. Modules with a single weight matrix (a convolution with its
normalization) are atoms, never blocks, unless nothing else is found.

Where the blocks hold less than `ENOUGH` of what ran, what stands beside them (stems, transitions between stages) becomes layers
of its own, what is smaller than every block only if that does not suffice. Not counted are *tables*, which are looked up or added
and never multiplied with data (embeddings, positions), and the *head*, whose products give the output and enter no other. A
single layer that cannot be skipped is opened into its parts; one that can be (ALBERT's, which runs again and again) stays whole,
and `layerwise.units` looks inside.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from layerwise.trace import Call, Use, is_matrix

OPEN, OPEN_UNSKIPPABLE, ENOUGH = 0.8, 0.5, 0.8  # shares of parameters

Found = list[tuple["Chain", list[Call]]]


@dataclass
class Chain:
    """Calls that run one after the other; `group` is the dotted path they share."""

    group: str
    calls: list[Call] = field(default_factory=list)


def find_layers(root: Call) -> Found:
    """The layers as (chain, the calls of the layer's module), in the order of their first calls; disjoint."""
    finder = _Finder(root)
    found = _by_module(finder.chains(root))
    if not any(_keeps_shape(calls[0]) or type(calls[0].module) in finder.in_rows for _, calls in found):
        found = _by_module([_atoms(root)]) or found  # pipes of unlike stages (VGG) say less than what they are made of
    least = min((calls[0].parameters for _, calls in found), default=0)
    for size in (least, 0):
        if covered(root, {calls[0].module for _, calls in found}) < ENOUGH:
            found = _by_module([*(chain for chain, _ in found), *_beside_layers(root, found, size)])
    return _opened(found) if len(found) == 1 and not _keeps_shape(found[0][1][0]) else found


def covered(root: Call, modules: set[nn.Module]) -> float:
    """The share, 0 … 1, of the parameters that ran outside tables and head which the layers `modules` hold."""
    inside = {p for module in modules for p in module.parameters()}
    beside = sum(p.numel() for p, use in root.uses.items() if use is Use.WEIGHT and p not in inside)
    held = sum(p.numel() for p in inside)
    return held / max(held + beside, 1)


def _by_module(chains: Iterable[Chain]) -> Found:
    """One layer per module, in the order of its first call."""
    members = [(chain, call) for chain in chains for call in chain.calls]
    firsts: dict[nn.Module, tuple[Chain, list[Call]]] = {}
    for chain, call in sorted(members, key=lambda m: m[1].order):
        firsts.setdefault(call.module, (chain, []))[1].append(call)
    inner = {m for module in firsts for m in module.modules() if m is not module}
    return [value for module, value in firsts.items() if module not in inner]


def _beside_layers(root: Call, found: Found, least: int) -> Iterator[Chain]:
    """The outermost modules of at least `least` parameters outside the layers that multiply, the head apart."""
    layers = {calls[0].module for _, calls in found}
    holding = {id(call) for call in root.walk() if any(inner.module in layers for inner in call.walk())}
    for call in _outside(root, holding, layers):
        if call.parameters >= least and any(root.uses.get(p) is Use.WEIGHT for p in call.module.parameters()):
            yield Chain(call.parent_path, [call])


def _outside(call: Call, holding: set[int], layers: set[nn.Module]) -> Iterator[Call]:
    """The outermost calls below `call` without a layer inside; containers of several of weight are opened."""
    for child in call.children:
        if child.module in layers or not child.matrices:
            continue
        several = _is_container(child) and sum(c.matrices > 0 for c in child.children) > 1
        if id(child) in holding or several:
            yield from _outside(child, holding, layers)
        else:
            yield child


def _opened(found: Found) -> Found:
    """Nothing can be done with a single layer: what it is made of, if that is several modules that hold most of it."""
    ((_, calls),) = found
    whole = calls[0].parameters
    while len(calls[0].children) == 1:
        calls = [part for call in calls for part in call.children]
    parts = _by_module(Chain(calls[0].name, [part]) for call in calls for part in _outside(call, set(), set()))
    held = sum(calls[0].parameters for _, calls in parts)
    return parts if len(parts) > 1 and held >= ENOUGH * whole else found


def _keeps_shape(call: Call) -> bool:
    """Whether some tensor that enters has the shape and type of the first that leaves."""
    leaving = [(shape, dtype) for _, shape, _, dtype in call.outputs if dtype.is_floating_point][:1]
    return any((shape, dtype) == leaving[0] for _, shape, _, dtype in call.inputs) if leaving else False


class _Finder:
    """Finds chains. Knows of each class whether its calls mostly change the shape, and whether it stands in a row somewhere."""

    def __init__(self, root: Call) -> None:
        kept: dict[type, list[bool]] = defaultdict(list)
        self.in_rows: set[type] = set()
        for call in root.walk():
            kept[type(call.module)].append(_keeps_shape(call))
            self.in_rows |= {type(a.module) for a, _ in _alike(_blocks(call)) if not _is_container(a)}
        self.changes = {kind: sum(found) * 2 < len(found) for kind, found in kept.items()}

    def chains(self, call: Call, *, inside_repeated: bool = False) -> Iterator[Chain]:
        """The chains of blocks at or below `call`."""
        inner = [c for c in call.children if c.matrices > 1]
        blocks = _blocks(call)
        repeated = {id(c) for pair in _alike(blocks) for c in pair}
        repeated |= {id(c) for c in blocks if type(c.module) in self.in_rows}  # a stage may have a single block
        piped = _piped(call.children, blocks) if not inside_repeated else set()
        deeper = {id(c): list(self.chains(c, inside_repeated=_is_block(c, repeated))) for c in inner}
        self._close([block for block in blocks if id(block) in repeated or _beside(block, blocks, repeated)], deeper)
        if repeated or any(deeper[member] for member in piped):  # an embedding piped into a stack: the stack has the blocks
            piped = {member for member in piped if deeper[member]}
        members = repeated | piped
        if not members:
            for block in inner:
                yield from deeper[id(block)]
            return
        own = Chain(_common(call, [c for c in blocks if id(c) in members]))
        for block in inner:  # single blocks between the members (a stage with one block, a downsampling) are layers as well
            if deeper[id(block)]:
                yield from deeper[id(block)]
            elif id(block) in members or _beside(block, blocks, members):
                own.calls.append(_unwrapped(block))
        if own.calls:
            yield own

    def _close(self, blocks: Sequence[Call], deeper: dict[int, list[Chain]]) -> None:
        """Forgets the chains inside `blocks` where they say less than the blocks; alike for all of one class."""
        kinds: dict[Any, list[Call]] = defaultdict(list)
        for block in blocks:
            kinds[block if _is_container(block) else type(block.module)].append(block)
        for kind, alike in kinds.items():
            inside = sum(_size(deeper[id(block)]) for block in alike)
            needed = OPEN_UNSKIPPABLE if self.changes.get(kind, True) else OPEN
            if inside < needed * sum(block.parameters for block in alike):
                deeper.update((id(block), []) for block in alike)


def _size(chains: Iterable[Chain]) -> int:
    """Parameters in the chains, each once."""
    return sum(p.numel() for p in {p for chain in chains for call in chain.calls for p in call.module.parameters()})


def _is_block(call: Call, repeated: set[int]) -> bool:
    """One of a repeated chain; a plain container is no block even when there are several in a row."""
    return id(call) in repeated and not _is_container(call)


def _is_container(call: Call) -> bool:
    return isinstance(call.module, nn.Sequential | nn.ModuleList)


def _blocks(call: Call) -> list[Call]:
    """The calls inside that may be blocks."""
    return [c for c in call.children if c.matrices > 1 and c.takes and c.gives]  # an embedding takes no stream


def _alike(blocks: Sequence[Call]) -> list[tuple[Call, Call]]:
    """Neighbours of one class where the second takes what the first gave, or which stand in one list and pass on the shape."""
    pairs = [(a, b) for a, b in itertools.pairwise(blocks) if type(a.module) is type(b.module)]
    return [(a, b) for a, b in pairs if a.gives & b.takes or _listed(a, b)]


def _listed(a: Call, b: Call) -> bool:
    same_list = a.parent_path == b.parent_path and a.key.isdigit() and b.key.isdigit()
    parallel = bool(a.takes & b.takes & _streams(a))
    return same_list and not parallel and a.out_shape == b.in_shape


def _streams(call: Call) -> frozenset[int]:
    return frozenset(call.inputs[0][2:3]) if call.inputs else frozenset()


def _piped(siblings: Sequence[Call], blocks: Sequence[Call]) -> set[int]:
    """Blocks in a pipe: each takes only its forerunner's output, which nobody else takes."""
    members: set[int] = set()
    for a, b in itertools.pairwise(blocks):
        taken_from = [s for s in siblings if s is not b and s.order < b.order and s.parameters and s.gives & b.takes]
        takers = [s for s in siblings if s is not a and s.order > a.order and a.gives & s.takes and not a.gives <= s.gives]
        if taken_from == [a] and len([t for t in takers if t.parameters]) <= 1:
            members |= {id(a), id(b)}
    return members


def _beside(block: Call, blocks: Sequence[Call], members: set[int]) -> bool:
    """Stands in the same list as a member."""
    return block.key.isdigit() and any(id(c) in members and c.parent_path == block.parent_path for c in blocks)


def _unwrapped(call: Call) -> Call:
    """The only block in a container of one: ``Sequential(block)`` → block."""
    while isinstance(call.module, nn.Sequential) and len(call.children) == 1 and call.children[0].matrices > 1:
        call = call.children[0]
    return call


def _common(call: Call, members: Sequence[Call]) -> str:
    paths = {m.parent_path for m in members}
    return paths.pop() if len(paths) == 1 else call.name


def _atoms(root: Call) -> Chain:
    """For models without blocks: every module that owns a weight matrix and holds no other such module."""
    chain = Chain("")
    for call in root.walk():
        owns = any(is_matrix(p) for p in call.module.parameters(recurse=False))
        if owns and not any(c.matrices for c in call.children) and not isinstance(call.module, nn.Embedding):
            chain.calls.append(call)
    return chain
