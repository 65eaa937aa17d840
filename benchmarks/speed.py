"""Every speed figure in one run: ``python benchmarks/speed.py [PART ...]`` writes ``benchmarks/results/speed.json``.

With names of parts only those are measured anew, and each of them says what machine and load it met.
Pairs take turns in one process; only their ratios mean anything on a machine that others use too. Block calls and passes are
counted in the tests and are not timed here.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import speed_all
import speed_conductance
import speed_fisher
import speed_inspect
import speed_spectral
import speed_sweep
import torch
from timing import machine

RESULTS = Path(__file__).parent / "results" / "speed.json"


def fisher() -> dict[str, str]:
    """Multiples of one forward and backward: median (lowest … highest)."""
    found = speed_fisher.measure(16, 5)
    return {name: f"{statistics.median(r):.2f} ({min(r):.2f} … {max(r):.2f})" for name, r in found.items()}


PARTS = {
    "conductance": lambda: speed_conductance.main(3, 4),
    "fisher": fisher,
    "spectral": speed_spectral.main,
    "sweep": speed_sweep.main,
    "reading the layers": speed_inspect.main,
    "analyze --methods all": speed_all.main,
}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if names else {"machine": machine()}
    for name in names or PARTS:
        record[name] = PARTS[name]()
        record[name] |= {"load meanwhile": machine()["load"]} if names else {}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
