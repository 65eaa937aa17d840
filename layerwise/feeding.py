"""`Feeder`: batches through the engines into statistics, each batch into a blank state, merged along the fixed tree.

A batch that does not fit into memory is halved, at most three times, starting again from the blank state.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.analyzer import Statistic
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import DataError, OutOfMemory
from layerwise.merging import MergeTree, Place
from layerwise.model import UniversalModel
from layerwise.replay import Replay
from layerwise.sweep import Sweep
from layerwise.trace import out_of_memory
from layerwise.walk import Walk

HALVINGS = 3
MOST_SAMPLES = 2**20  # per batch: what numbers the samples of a data set without counting them first

State = Mapping[str, Tensor]


@dataclass
class Observation:
    """What one pass over the data cost, and what had to be said about it."""

    counts: Counts
    seconds: float = 0.0  # of the shared sweep
    own_seconds: dict[str, float] = field(default_factory=dict)  # of each intervening or walking method
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls) -> Observation:
        """Nothing was observed."""
        return cls(Counts())

    def cost_of(self, statistic: Statistic | None, name: str) -> float:
        """Seconds that `name` would have cost alone, about: the shared sweep if it used it, its own runs if it made some."""
        if statistic is None:
            return 0.0
        return self.own_seconds.get(name, 0.0) + (self.seconds if statistic.needs else 0.0)

    def merge_(self, other: Observation) -> None:
        """Adds what another worker did."""
        for key, value in vars(other.counts).items():
            setattr(self.counts, key, getattr(self.counts, key) + value)
        self.seconds += other.seconds
        for name, seconds in other.own_seconds.items():
            self.own_seconds[name] = self.own_seconds.get(name, 0.0) + seconds
        self.notes += other.notes


class Merger:
    """Merges two states of one kind of statistic, with two instances of its own."""

    def __init__(self, statistic: Statistic, keep: Iterable[Any]) -> None:
        memo = {id(x): x for x in keep}  # the model and its layers are shared, not copied
        self.left, self.right = (copy.deepcopy(statistic, dict(memo)) for _ in range(2))

    def __call__(self, left: State, right: State) -> State:
        self.left.load_(copied(left))
        self.right.load_(copied(right))
        self.left.merge_(self.right)
        return copied(self.left.state())


class Feeder:
    """Feeds `statistics` (name → blank statistic); `trees` hold what was fed until `finish` loads it into them."""

    def __init__(self, model: UniversalModel, statistics: Mapping[str, Statistic], data: Data, seed: int) -> None:
        self.model = model
        self.data = data
        self.statistics = dict(statistics)
        self.seed = seed
        keep = [model, model.task, *model.layers, *model.module.modules(), *model.module.parameters()]
        self.trees: dict[str, MergeTree[State]] = {name: MergeTree(Merger(s, keep)) for name, s in self.statistics.items()}
        self.blank = {name: copied(s.state()) for name, s in self.statistics.items()}
        self.done: set[int] = set()
        self.sweep = Sweep(model, [s for s in self.statistics.values() if s.needs])
        self.probes = {name: s for name, s in self.statistics.items() if s.intervenes}
        self.walkers = {name: s for name, s in self.statistics.items() if s.walks}
        self.observation = Observation(self.sweep.counts, own_seconds=dict.fromkeys([*self.probes, *self.walkers], 0.0))

    def feed(self, index: int) -> None:
        """The batch with the number `index`, in as many pieces as memory asks for."""
        batch = self.data[index]
        if batch.size == 0:
            raise DataError(f"Batch {index} of {self.data.name} is empty.", code="LW-D29")
        for halving in range(HALVINGS + 1):
            size = -(-batch.size // 2**halving)
            self._clear()
            try:
                for start in range(0, batch.size, size):
                    self._piece(batch.narrow(start, min(start + size, batch.size)), index, start)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(halving, batch.size, error)
            else:
                break
        for name, statistic in self.statistics.items():
            state = statistic.state()
            self.blank[name] = {key: value.to(state[key].device) for key, value in self.blank[name].items()}
            self.trees[name].add(index, state)
        self.done.add(index)

    def absorb(self, done: Iterable[int], nodes: Mapping[str, Mapping[Place, State]]) -> None:
        """What another feeder has done: the numbers of its batches and its trees' nodes."""
        self.done |= set(done)
        for name, found in nodes.items():
            self.trees[name].absorb(found)

    def finish(self) -> Observation:
        """Loads the merged states into the statistics."""
        for name, statistic in self.statistics.items():
            statistic.load_(copied(self.trees[name].total()))
        return self.observation

    def nodes(self) -> dict[str, dict[Place, State]]:
        """Statistic → what its tree holds now."""
        return {name: dict(tree.nodes) for name, tree in self.trees.items()}

    def _clear(self) -> None:
        for name, statistic in self.statistics.items():
            statistic.load_(copied(self.blank[name]))

    def _halve(self, halving: int, size: int, error: BaseException) -> None:
        if halving == HALVINGS or size <= 2**halving:
            raise OutOfMemory(
                f"A piece of {-(-size // 2**halving)} samples does not fit into memory ({str(error).splitlines()[0]}).",
                place=self.model.name,
                remedy="Use a smaller batch size or shorter inputs; what is finished is kept.",
            ) from error
        self.observation.notes.append(f"Memory ran out with {-(-size // 2**halving)} samples; the batch was halved.")

    def _piece(self, batch: Batch, index: int, start: int) -> None:
        seed, first = self.seed * 1_000_003 + index + start * 7_919, index * MOST_SAMPLES + start
        started = time.perf_counter()
        if self.sweep.statistics:
            self.sweep.batch(batch, seed, first)
        self.observation.seconds += time.perf_counter() - started
        if self.probes:
            self._probe(batch)
        if self.walkers:
            self._walk(batch, seed, first)

    def _probe(self, batch: Batch) -> None:
        started = time.perf_counter()
        replay = Replay(self.model, batch, self.sweep.counts)
        shared = time.perf_counter() - started
        for name, statistic in self.probes.items():
            started = time.perf_counter()
            statistic.probe(replay)
            self.observation.own_seconds[name] += shared + time.perf_counter() - started

    def _walk(self, batch: Batch, seed: int, first: int) -> None:
        ids = torch.arange(first, first + batch.size)
        walk = Walk(self.model, batch.to(self.model.device), seed, ids, self.sweep.counts)
        for name, statistic in self.walkers.items():
            started = time.perf_counter()
            statistic.walk(walk)
            self.observation.own_seconds[name] += time.perf_counter() - started


def copied(state: State) -> dict[str, Tensor]:
    """The tensors of a state, cloned."""
    return {key: tensor.clone() for key, tensor in state.items()}
