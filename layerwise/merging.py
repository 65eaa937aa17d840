"""`MergeTree`: states of single batches merged along one fixed binary tree over the batch numbers.

Floating-point addition is not associative: a sum over shards differs from a sum over batches in its last bits, and so would the
scores of one worker and of eight. Here batch i is leaf i; two neighbours (2j, 2j + 1) of one level become node j of the next as
soon as both are there, whoever computed them and in whatever order. The tree depends on the number of batches alone, so every
way of sharding gives the same bits, and what is kept meanwhile is at most one state per level and gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

State = TypeVar("State")
Place = tuple[int, int]  # level, position: covers the batches position·2^level … (position + 1)·2^level − 1


class MergeTree(Generic[State]):
    """`merge` takes the left and the right state and gives a new one; it must be a function of the two alone."""

    def __init__(self, merge: Callable[[State, State], State]) -> None:
        self.merge = merge
        self.nodes: dict[Place, State] = {}

    def add(self, batch: int, state: State) -> None:
        """The state of one batch, each batch once."""
        self.put((0, batch), state)

    def absorb(self, nodes: Mapping[Place, State]) -> None:
        """The nodes of a tree that saw other batches."""
        for place, state in nodes.items():
            self.put(place, state)

    def put(self, place: Place, state: State) -> None:
        """A finished node; merges upwards as far as neighbours are there."""
        level, position = place
        while (neighbour := (level, position ^ 1)) in self.nodes:
            other = self.nodes.pop(neighbour)
            state = self.merge(other, state) if position % 2 else self.merge(state, other)
            level, position = level + 1, position // 2
        self.nodes[level, position] = state

    def total(self) -> State:
        """All that was added, the nodes that are left merged from left to right. Raises `ValueError` when nothing was."""
        ordered = [self.nodes[place] for place in sorted(self.nodes, key=lambda p: p[1] << p[0])]
        if not ordered:
            raise ValueError("nothing was added")
        whole = ordered[0]
        for state in ordered[1:]:
            whole = self.merge(whole, state)
        return whole
