"""`Landmarks`: a small sample of the data for methods that need points, not sums; which samples it holds depends on no order.

A sample is chosen by a seeded hash of its number in the data set: the `capacity` smallest hashes stay. The union of two such
samples, cut to `capacity`, is the sample of the union, so shards merge to the same rows whatever their order and their sizes.
(A reservoir depends on the order, and the first n samples are whatever the data set was sorted by.)

The hash is a bijection of 64-bit numbers, so two samples never tie. Hashes stay on the CPU, where the numbers come from: choosing
costs no host synchronization, and only the chosen rows are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of SplitMix64
FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hashed(ids: Tensor, seed: int = 0) -> Tensor:
    """SplitMix64 of int64 `ids`, (samples,) on the CPU: uniform over all 64-bit numbers, different for each id of one seed."""
    offset = _mixed(torch.tensor([seed], dtype=torch.int64))  # mixed, so that id and seed cannot stand in for each other
    return _mixed(ids.detach().cpu().to(torch.int64) + offset)


def _mixed(x: Tensor) -> Tensor:
    x = x + GOLDEN
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """The logical shift: int64's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Landmarks:
    """At most `capacity` rows: those of the samples with the smallest hashes, in the order of the hashes."""

    capacity: int
    seed: int = 0
    hashes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kept: Tensor = field(default_factory=lambda: torch.empty(0))

    def add_(self, ids: Tensor, rows: Tensor) -> None:
        """Offers samples: `ids` (samples,) and `rows` (samples, …), which stay on their device."""
        hashes, order = hashed(ids, self.seed).sort()
        chosen = order[: self.capacity]
        if len(self.hashes) == self.capacity > 0:  # most batches of a long pass offer nothing that stays
            chosen = chosen[hashes[: self.capacity] < self.hashes[-1]]
        self._join(hashes[: len(chosen)], rows.detach()[chosen.to(rows.device)])

    def merge_(self, other: Landmarks) -> None:
        """Takes in another shard's sample, of the same capacity and seed."""
        self._join(other.hashes, other.kept)

    def state(self) -> dict[str, Tensor]:
        """The hashes and the rows."""
        return {"hashes": self.hashes, "rows": self.kept}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.hashes, self.kept = state["hashes"].cpu(), state["rows"]

    def rows(self) -> Tensor:
        """(at most capacity, …) in the order of the hashes; of shape (0,) before anything was seen."""
        return self.kept

    def _join(self, hashes: Tensor, rows: Tensor) -> None:
        if not len(hashes):
            return
        if not len(self.hashes):
            self.hashes, self.kept = hashes, rows
            return
        ordered, order = torch.cat([self.hashes, hashes]).sort()
        both = torch.cat([self.kept.to(rows.device), rows])
        self.hashes, self.kept = ordered[: self.capacity], both[order[: self.capacity].to(rows.device)]


__all__ = ["Landmarks", "hashed"]
