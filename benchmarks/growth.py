"""How the cost of each method grows with samples, layers and width: exponents of processor time and of state.

``python benchmarks/growth.py`` writes ``benchmarks/results/growth.json``; ``docs/scale.md`` is made from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timing import machine, seconds

from layerwise.analyzer import ANALYZERS
from layerwise.data import Batch, Data
from layerwise.feeding import Feeder
from layerwise.model import UniversalModel
from layerwise.task import Classification

RESULTS = Path(__file__).parent / "results" / "growth.json"
BASE = {"samples": 64, "layers": 6, "width": 64}
STEPS: Mapping[str, Sequence[int]] = {"samples": (32, 64, 128, 256), "layers": (3, 6, 12), "width": (32, 64, 128, 256)}
BATCH = 32


def subject(layers: int, width: int) -> UniversalModel:
    """A small vision transformer with random weights."""
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": layers, "num_heads": 2, "num_classes": 10}
    module = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    return UniversalModel(module, task=Classification(), example=images(2)[0])


def images(samples: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(samples, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    return Data.of([Batch((pictures[i : i + BATCH],), {}, labels[i : i + BATCH]) for i in range(0, samples, BATCH)])


def cost(method: str, samples: int, layers: int, width: int) -> dict[str, float]:
    """Processor seconds (the smaller of two runs) and bytes of state after the last batch."""
    model, data = subject(layers, width), images(samples)
    analyzer = ANALYZERS[method]()
    state = 0

    def work() -> None:
        nonlocal state
        statistic = analyzer.statistic(model)
        if statistic is None:
            analyzer.score(model, None)
            return
        feeder = Feeder(model, {method: statistic}, data, 0)
        for index in range(len(data)):
            feeder.feed(index)
        feeder.finish()
        state = sum(t.numel() * t.element_size() for t in statistic.state().values())

    return {"seconds": min(seconds(work) for _ in range(2)), "state": state}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value over log size; 0 where there is no state."""
    if min(values) <= 0:
        return 0.0
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(method: str, report: Callable[[str], Any] = print) -> dict[str, Any]:
    """One method's costs along each axis, the two others at their base."""
    row: dict[str, Any] = {"method": method}
    for axis, sizes in STEPS.items():
        found = [cost(method, **(BASE | {axis: size})) for size in sizes]
        row[axis] = {"sizes": list(sizes), **{k: [f[k] for f in found] for k in ("seconds", "state")}}
        row[axis]["exponent"] = round(exponent(sizes, row[axis]["seconds"]), 2)
        row[axis]["state_exponent"] = round(exponent(sizes, row[axis]["state"]), 2)
        report(f"{method:28} {axis:8} time^{row[axis]['exponent']:+.2f} state^{row[axis]['state_exponent']:+.2f}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=list(ANALYZERS))
    chosen = parser.parse_args().methods
    torch.set_num_threads(1)
    rows = [growth(method) for method in chosen]
    record = {"machine": machine(), "base": BASE, "batch": BATCH, "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
