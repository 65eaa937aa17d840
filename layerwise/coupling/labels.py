"""Labels: a number for every index of every dimension of every parameter, and what was found to belong together.

A tensor carries *layers*: arrays of labels of its own shape, one for each way in which its elements can vanish. The element
(o, i) of a weight vanishes with row o or with column i: two layers, each constant along the other's dimension. 0 is the label of
elements whose place is fixed.

What is recorded while the model runs is of three kinds. *Bonds*: two labels that vanish together. *Meetings*: labels that stand
in the same elements of two operands; one to one they are bonds, but a weight that all heads share meets every head and stays when
one goes. *Grids*: dimensions side by side, from which only whole slices can be cut. Meetings and grids are settled at the end,
when it is known what the bonds make of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Numbers = NDArray[np.int64]
Layers = list[Tensor]
MOST = 1 << 22  # elements of a grid
ALONE = "it is used alone"  # what is left of labels after all that they differ along was mixed, or one was picked


class Span(NamedTuple):
    """The labels start … start+size-1 number the indices of dimension `dim` of the parameter or buffer `name`."""

    name: str
    dim: int
    start: int
    size: int


class Meeting(NamedTuple):
    """Pairs of labels in the same elements. Where one side outlives the other, `both` may not be cut, or else the second."""

    pairs: Numbers
    both: bool
    reason: str


@dataclass(eq=False)
class Labels:
    """What one run recorded."""

    count: int = 1
    spans: list[Span] = field(default_factory=list)
    bonds: list[Numbers] = field(default_factory=list)
    meetings: dict[bytes, Meeting] = field(default_factory=dict)
    grids: dict[bytes, Numbers] = field(default_factory=dict)
    fixed: list[tuple[Numbers, str]] = field(default_factory=list)
    mixed: list[tuple[Numbers, str]] = field(default_factory=list)
    eaten: list[Numbers] = field(default_factory=list)  # columns that contract them
    given: list[Numbers] = field(default_factory=list)  # rows that produce them
    heads: list[Numbers] = field(default_factory=list)  # that stand for one product of a batch each
    kernels: set[str] = field(default_factory=set)  # weights of convolutions

    def fresh(self, name: str, tensor: Tensor, dims: Iterable[int]) -> list[Tensor]:
        """One new layer for each of `dims` of the parameter."""
        layers = []
        for dim in dims:
            size = tensor.shape[dim]
            self.spans.append(Span(name, dim, self.count, size))
            line = torch.arange(self.count, self.count + size, dtype=torch.int32)
            layers.append(along(line, dim, tensor.shape))
            self.count += size
        return layers

    def fix(self, layer: Tensor, reason: str) -> None:
        """These labels may not be cut."""
        self.fixed.append((unique(layer), reason))

    def unite(self, layer: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Bonds what differs only along `dims`: all of it goes or none. Gives the layer with one label for each."""
        dims = [d for d in dims if d in varying(layer)]
        if not dims:
            return layer
        first = layer
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.bond(layer, first.expand(layer.shape))
        self.mixed.append((unique(first), reason))
        return first.expand(layer.shape)

    def bond(self, a: Tensor, b: Tensor) -> None:
        """Element by element."""
        found = pairs(a, b)
        zero = (found == 0).any(1)
        if zero.any():
            self.fixed.append((found[zero].max(1), "it meets elements of fixed size"))
        self.bonds.append(found[~zero])

    def meet(self, kept: Tensor, dropped: Tensor, reason: str, *, both: bool = False) -> None:
        """Notes which labels stand in the same elements."""
        found = pairs(kept, dropped)
        if len(found) == len(np.unique(found[:, 0])) == len(np.unique(found[:, 1])):
            self.bond(kept, dropped)
        else:
            zero = (found == 0).any(1)
            if zero.any():
                self.fixed.append((found[zero].max(1), "it meets elements of fixed size"))
            found = found[~zero]
            self.meetings.setdefault(found.tobytes() + bytes([both]), Meeting(found, both, reason))

    def grid(self, layer: Tensor) -> None:
        """From a tensor with these labels only whole slices can be cut."""
        core = layer
        for dim in range(layer.dim()):
            if dim not in varying(layer):
                core = core.narrow(dim, 0, 1)
        core = core.squeeze()
        if core.dim() > 1 and core.numel() <= MOST:
            found = core.numpy().astype(np.int64)
            self.grids.setdefault(bytes(str(found.shape), "ascii") + found.tobytes(), found)

    def solved(self) -> Solution:
        """Which labels go together, and which may not go."""
        roots = self._joined([])
        extra: list[Numbers] = []
        while True:
            new = [m for meeting in self.meetings.values() if (m := _one_to_one(roots[meeting.pairs])) is not None]
            new = new or [m for meeting in self.meetings.values() if (m := _partly(roots[meeting.pairs])) is not None]
            new = new or [g for grid in self.grids.values() for g in _sliced(self._held(roots)[grid])]
            if not new:
                break
            extra += new
            roots = self._joined(extra)
        fixed: dict[int, str] = {int(roots[0]): "it lies beside elements of fixed size"}
        for labels, reason in self.fixed:
            for root in np.unique(roots[labels]):
                fixed.setdefault(int(root), reason)
        for meeting in self.meetings.values():
            left = roots[meeting.pairs]
            if (left[:, 0] != left[:, 1]).any():
                for root in np.unique(left if meeting.both else left[:, 1]):
                    fixed.setdefault(int(root), meeting.reason)
        mixed = {int(root): reason for labels, reason in reversed(self.mixed) for root in np.unique(roots[labels])}
        heads = frozenset(int(root) for labels in self.heads for root in np.unique(roots[labels]))
        return Solution(roots, fixed, mixed, heads, _flags(self.eaten, self.count), _flags(self.given, self.count))

    def _held(self, roots: Numbers) -> Numbers:
        """The roots, all that may not be cut as one: 0."""
        fixed = [roots[labels] for labels, _ in self.fixed]
        return np.where(np.isin(roots, np.concatenate([*fixed, roots[:1]])), 0, roots)

    def _joined(self, extra: Sequence[Numbers]) -> Numbers:
        edges = np.concatenate([*self.bonds, *extra, np.zeros((0, 2), np.int64)])
        ones = np.ones(len(edges), np.bool_)  # doubles stay true; as numbers they would be added up
        graph = coo_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(self.count, self.count))
        found = connected_components(graph, directed=False)[1]
        return np.unique(found, return_index=True)[1][found]  # the first label of each stands for all


class Solution(NamedTuple):
    """`roots` of each label; of roots the reasons why they are fixed, or why many labels are one, and which are heads; flags of
    labels.
    """

    roots: Numbers
    fixed: dict[int, str]
    mixed: dict[int, str]
    heads: frozenset[int]
    eaten: NDArray[np.bool_]
    given: NDArray[np.bool_]


def _flags(found: Sequence[Numbers], count: int) -> NDArray[np.bool_]:
    flags = np.zeros(count, np.bool_)
    for labels in found:
        flags[labels] = True
    return flags


def _one_to_one(pairs: Numbers) -> Numbers | None:
    """The pairs, where each root meets one other; None where that is no news."""
    pairs = np.unique(pairs, axis=0)
    news = bool((pairs[:, 0] != pairs[:, 1]).any())
    return pairs if news and len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) else None


def _partly(pairs: Numbers) -> Numbers | None:
    """The pairs, where some but not all of one side meet one of the other: then they go together."""
    pairs = np.unique(pairs, axis=0)
    a, b = len(np.unique(pairs[:, 0])), len(np.unique(pairs[:, 1]))
    if len(pairs) == a * b or not (pairs[:, 0] != pairs[:, 1]).any():
        return None
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _sliced(grid: Numbers) -> list[Numbers]:
    """Bonds along all dimensions but the longest of those along which the roots still differ, if they differ along several."""
    dims = [d for d in range(grid.ndim) if (grid != grid.take([0], d)).any()]
    if len(dims) < 2:
        return []
    longest = max(dims, key=lambda d: grid.shape[d])
    first = grid
    for dim in dims:
        if dim != longest:
            first = first.take([0], dim)
    found = np.stack([grid, np.broadcast_to(first, grid.shape)], -1).reshape(-1, 2)
    return [np.unique(found[found[:, 0] != found[:, 1]], axis=0)]


def varying(layer: Tensor) -> list[int]:
    """The dimensions along which labels differ; `compact` sees to it that the others have stride 0."""
    return [d for d in range(layer.dim()) if layer.shape[d] > 1 and layer.stride(d)]


def compact(layer: Tensor) -> Tensor:
    """The same with stride 0 along every dimension along which it does not vary."""
    for dim in varying(layer):
        first = layer.narrow(dim, 0, 1)
        if bool((layer == first).all()):
            layer = first.expand(layer.shape)
    return layer


def reshaped(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """`layer.reshape(shape)`, dimensions that stay at both ends cut to one element where labels do not vary along them."""
    shape = tuple(shape)
    lead = 0
    while lead < min(layer.dim(), len(shape)) and layer.shape[lead] == shape[lead]:
        lead += 1
    tail = 0
    while tail < min(layer.dim(), len(shape)) - lead and layer.shape[-1 - tail] == shape[-1 - tail]:
        tail += 1
    small, form = layer, list(shape)
    ends = [*range(lead), *range(-tail, 0)]
    for dim in ends:
        if layer.shape[dim] > 1 and not layer.stride(dim):
            small = small.narrow(dim, 0, 1)
            form[dim] = 1
    return compact(small.reshape(form)).expand(shape) if layer.numel() else layer.reshape(shape)


def along(line: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels (size,) along `dim` of a tensor of `shape`, constant along the others."""
    form = [1] * len(shape)
    form[dim] = line.numel()
    return line.reshape(form).expand(tuple(shape))


def line(layer: Tensor, dim: int) -> Tensor:
    """The labels along `dim` at the first place of all other dimensions."""
    for other in range(layer.dim()):
        if other != dim % layer.dim():
            layer = layer.narrow(other, 0, 1)
    return layer.reshape(-1)


def core(*layers: Tensor) -> list[Tensor]:
    """Layers of one shape, each dimension along which none varies cut to one element."""
    dims = {d for layer in layers for d in varying(layer)}
    found = list(layers)
    for dim in range(layers[0].dim()):
        if dim not in dims:
            found = [layer.narrow(dim, 0, min(1, layer.shape[dim])) for layer in found]
    return found


def pairs(a: Tensor, b: Tensor) -> Numbers:
    """The different pairs of labels at equal places, (pairs, 2)."""
    a, b = core(a, b)
    keys = torch.unique((a.long() << 32) | b.long()).numpy()
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], -1)


def unique(layer: Tensor) -> Numbers:
    found: Any = torch.unique(core(layer)[0]).numpy().astype(np.int64)
    return found[found > 0]
