"""How the rows of a batch's tensors belong to its samples, where a sample is not one row of every tensor: batches of graphs.

Decision: many graphs go through a network as one big graph in several pieces, so a node's row is not a sample. `Graphs` takes a
graph for a sample and its nodes for the positions of a padded sequence, as tokens are those of a sentence: what is defined for
tokens is then defined for nodes, padding left out. `Nodes` takes single nodes for the samples; their graph goes through whole.
What a method cannot measure honestly on either is refused with a reason (`layerwise.observe`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NODE, EDGE, ENDS, GRAPH_OF, COUNT = "node", "edge", "ends", "graph_of", "count"


class Layout(ABC):
    """What belongs to a sample. The tensors themselves are the batch's keyword arguments."""

    kind: ClassVar[str]
    mixes: ClassVar[bool]  # whether the answer of one sample depends on what others hold

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of samples."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many answers one forward computes, asked for or not: what its cost is shared by."""

    @abstractmethod
    def narrow(self, kwargs: Mapping[str, Any], start: int, stop: int) -> tuple[dict[str, Any], Layout]:
        """The arguments and the layout of the samples start … stop-1."""

    @abstractmethod
    def by_sample(self, tensor: Tensor) -> Tensor:
        """`tensor` with one row per sample, where its rows are nodes; as it is where they are something else."""

    @abstractmethod
    def keep(self, like: Tensor) -> Tensor | None:
        """True for the positions of `like` (samples, positions) that hold something; None where all do."""

    @abstractmethod
    def arguments(self, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the forward is called with."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """As JSON data, the inverse of `restored`: numbers of nodes and edges, nothing of what they hold."""

    @abstractmethod
    def connected(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`kwargs` with made-up edges and numbers of graphs that are valid: each graph is a ring."""


@dataclass(frozen=True)
class Graphs(Layout):
    """A sample is a graph. `nodes` and `edges` count those of each; in every tensor the graphs lie one after the other.

    `roles` says what each keyword argument holds: ``node`` or ``edge`` rows, the edges' ``ends`` (2, edges), the number of each
    node's graph (``graph_of``), or the ``count`` of graphs. `packed`: the forward takes them as one object of PyTorch Geometric.
    """

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    packed: bool = False

    kind: ClassVar[str] = "graphs"
    mixes: ClassVar[bool] = False

    @property
    def size(self) -> int:
        return len(self.nodes)

    @property
    def answers(self) -> int:
        return self.size

    def narrow(self, kwargs: Mapping[str, Any], start: int, stop: int) -> tuple[dict[str, Any], Graphs]:
        left = Graphs(self.nodes[start:stop], self.edges[start:stop], self.roles, self.packed)
        n, e = sum(self.nodes[:start]), sum(self.edges[:start])
        node, edge = slice(n, n + sum(left.nodes)), slice(e, e + sum(left.edges))
        cut = {
            NODE: lambda t: t[node],
            EDGE: lambda t: t[edge],
            ENDS: lambda t: t[:, edge] - n,
            GRAPH_OF: lambda t: t[node] - start,
            COUNT: lambda _: left.size,
        }
        return {name: cut[self.roles[name]](value) for name, value in kwargs.items()}, left

    def by_sample(self, tensor: Tensor) -> Tensor:
        """(nodes, …) → (graphs, most nodes, features), padded with 0; any other tensor as it is."""
        total = sum(self.nodes)
        if not tensor.dim() or tensor.shape[0] == self.size or tensor.shape[0] != total:
            return tensor
        return pad_sequence(tensor.reshape(total, -1).split(self.nodes), batch_first=True)

    def keep(self, like: Tensor) -> Tensor | None:
        if like.shape[:2] != (self.size, max(self.nodes)):
            return None
        counts = torch.tensor(self.nodes).to(like.device, non_blocking=True)
        return torch.arange(like.shape[1], device=like.device) < counts[:, None]

    def arguments(self, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.packed:
            return (), dict(kwargs)
        from torch_geometric.data import Batch, Data  # the model's own library: it is there

        starts = torch.tensor([0, *accumulate(self.nodes)])
        packed = Batch(_base_cls=Data, ptr=starts.to(next(iter(kwargs.values())).device), **kwargs)
        packed._num_graphs = self.size
        return (packed,), {}

    def described(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "nodes": list(self.nodes),
            "edges": list(self.edges),
            "roles": dict(self.roles),
            "packed": self.packed,
        }

    def connected(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {
            ENDS: torch.cat([_ring(n, e, first) for n, e, first in zip(self.nodes, self.edges, self._firsts(), strict=True)], 1),
            GRAPH_OF: torch.arange(self.size).repeat_interleave(torch.tensor(self.nodes)),
        }
        return {name: made.get(self.roles[name], value) for name, value in kwargs.items()}

    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.nodes)][:-1]


def _ring(nodes: int, edges: int, first: int) -> Tensor:
    """(2, edges): from each node to the next, as often around as there are edges."""
    at = torch.arange(edges)
    return first + torch.stack([at % nodes, (at + 1) % nodes])


@dataclass(frozen=True, eq=False)
class Nodes(Layout):
    """A sample is a node: of the graphs in `graphs` those whose numbers are in `targets`, (samples,), in that order.

    The graphs go through whole, whatever part of the samples is asked for, since a node's answer depends on its neighbours.
    """

    graphs: Graphs
    targets: Tensor

    kind: ClassVar[str] = "nodes"
    mixes: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return len(self.targets)

    @property
    def answers(self) -> int:
        return sum(self.graphs.nodes)

    def narrow(self, kwargs: Mapping[str, Any], start: int, stop: int) -> tuple[dict[str, Any], Nodes]:
        return dict(kwargs), Nodes(self.graphs, self.targets[start:stop])

    def by_sample(self, tensor: Tensor) -> Tensor:
        """(nodes, …) → (samples, …); any other tensor as it is."""
        if not tensor.dim() or tensor.shape[0] != sum(self.graphs.nodes):
            return tensor
        return tensor[self.targets.to(tensor.device, non_blocking=True)]

    def keep(self, like: Tensor) -> Tensor | None:
        return None

    def arguments(self, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.graphs.arguments(kwargs)

    def described(self) -> dict[str, Any]:
        return {"kind": self.kind, "graphs": self.graphs.described(), "targets": self.targets.tolist()}

    def connected(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return self.graphs.connected(kwargs)


def restored(described: Mapping[str, Any] | None) -> Layout | None:
    """The inverse of `Layout.described`; None for a batch whose rows are its samples."""
    if described is None:
        return None
    if described["kind"] == Nodes.kind:
        return Nodes(_graphs(described["graphs"]), torch.tensor(described["targets"], dtype=torch.int64))
    return _graphs(described)


def _graphs(described: Mapping[str, Any]) -> Graphs:
    return Graphs(tuple(described["nodes"]), tuple(described["edges"]), described["roles"], described["packed"])


__all__ = ["COUNT", "EDGE", "ENDS", "GRAPH_OF", "NODE", "Graphs", "Layout", "Nodes", "restored"]
