"""Paired timing on a machine that others use too: processor time, the two sides in turn, ratios only."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pair:
    """`ratio` is the median over rounds of ours / theirs in processor seconds, `low` and `high` its extremes."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int

    def to_dict(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in asdict(self).items()}


def seconds(work: Callable[[], Any]) -> float:
    """Processor seconds of this process, all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 5) -> Pair:
    """Both once to warm up, then in turn."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    return Pair(min(a for a, _ in times), min(b for _, b in times), statistics.median(ratios), min(ratios), max(ratios), rounds)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpu": next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
