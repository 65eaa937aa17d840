"""Results to track, and (run as a script) a process that tracks them one after the other, telling each id once it is safe."""

from __future__ import annotations

import sys
from typing import Any, cast

from layerwise.plan import CompressionPlan, Step
from layerwise.result import CompressionResult, Measurement, Proof
from layerwise.tracking import PerformanceTracker


def measurement(*, accuracy: float = 0.9, size: int = 1000, device: str = "cpu", **metrics: float) -> Measurement:
    quality = {"accuracy": accuracy} | metrics
    return Measurement(
        params=size // 4,
        nonzero=size // 4,
        size=size,
        macs=size * 10,
        latency=size / 100,
        latency_spread=0.1,
        batch_size=8,
        metrics=quality,
        stderr=dict.fromkeys(quality, 0.01),
        samples=200,
        device=device,
    )


def result(
    *, accuracy: float = 0.88, size: int = 500, device: str = "cpu", proofs: tuple[Proof, ...] | None = None, **original: Any
) -> CompressionResult:
    """A verified classification result; `original` replaces facts of the run such as task, data and fingerprint."""
    facts = {
        "name": "tiny",
        "source": {"kind": "timm", "id": "resnet18"},
        "fingerprint": "f" * 64,
        "domain": "vision",
        "task": "classification",
        "data": "digits",
        "data_fingerprint": "d" * 64,
        "seed": 3,
        "methods": ["fisher_information", "layer_ablation"],
    }
    plan = CompressionPlan((Step("remove", ("blocks.1",), {"heal": False}), Step("quantize", ("blocks.0",))), model="f" * 64)
    held = (Proof("shrank", True, "size", 0.5, 0.6), Proof("export", None, "nothing was exported"))
    before = measurement(device=device)
    after = measurement(accuracy=accuracy, size=size, device=device)
    return CompressionResult(cast(Any, None), plan, before, after, held if proofs is None else proofs, facts | original)


def write_rows(url: str, worker: int, rows: int) -> None:
    with PerformanceTracker(url) as tracker:
        for row in range(rows):
            print(tracker.track(result(seed=worker * 1_000_000 + row, name=f"w{worker}")), flush=True)


def faithfulness_results(rho: float = 0.5) -> dict[str, object]:
    """One correlation, as the benchmark tells it."""
    entry = {
        "model": "net",
        "method": "depth",
        "damage": "skip",
        "metric": "dce",
        "layers": 8,
        "rho": rho,
        "low": 0.1,
        "high": 0.9,
    }
    entry |= {"tau": 0.4, "p": 0.02, "partial": None, "score": 0.6}
    return {"protocol": {"version": 1}, "subjects": [{"model": "net", "domain": "vision"}], "correlations": [entry]}


if __name__ == "__main__":
    write_rows(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
