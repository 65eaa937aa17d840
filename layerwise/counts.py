"""`Counts`: the work that the engines did, for tests and reports. Speed is counted here and timed only in benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Whole forwards and backwards, and calls of blocks that really ran (not those answered from a cache)."""

    forwards: int = 0
    backwards: int = 0
    block_calls: int = 0
