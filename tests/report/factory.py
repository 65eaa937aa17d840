"""Small reports, plans and results to render: every number is made up, fixed and easy to find again on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from layerwise.importance import ImportanceReport, LayerInfo, RemovalCurve
from layerwise.plan import Candidate, CompressionPlan, Step
from layerwise.result import CompressionResult, Measurement, Proof
from layerwise.scores import LayerScore, Scores, Status
from layerwise.target import Target

TARGETS = ("size<=0.5x", "accuracy>=0.98x")


def report(layers: int = 6, methods: int = 4, noise: float = 0.1, **changes: Any) -> ImportanceReport:
    """Methods that see one hidden order of the layers through `noise`; the last method is a baseline."""
    generator = np.random.default_rng(7)
    infos = tuple(LayerInfo(f"encoder.layer.{i}", i, "block", 7_087_872, True, "encoder") for i in range(layers))
    hidden = np.linspace(1.0, 0.1, layers)
    scores = {}
    for m in range(methods):
        values = hidden + noise * generator.normal(size=layers)
        entries = {info.name: LayerScore(float(v), 0.01 * (m + 1)) for info, v in zip(infos, values, strict=True)}
        scores[f"method_{m}"] = Scores(f"method_{m}", "nats", entries, 64, 1.5)
    scores["random"] = replace(scores["method_0"], method="random", settings={"baseline": True})
    base = ImportanceReport("vit_tiny", "classification", "flowers, 512 images", infos, scores, fingerprint="f1a2b3", seed=3)
    return replace(base, **changes)


def with_missing(base: ImportanceReport, layer: str, status: Status, reason: str) -> ImportanceReport:
    """The report in which the first method has no score for `layer`."""
    method = base.methods[0]
    scores = base.scores[method]
    entries = {**scores.entries, layer: LayerScore.missing(status, reason)}
    return replace(base, scores={**base.scores, method: replace(scores, entries=entries)})


def renamed(base: ImportanceReport, layer: str, name: str) -> ImportanceReport:
    """The report in which `layer` is called `name`."""
    infos = tuple(replace(info, name=name) if info.name == layer else info for info in base.layers)
    scores = {
        method: replace(s, entries={name if n == layer else n: e for n, e in s.entries.items()})
        for method, s in base.scores.items()
    }
    return replace(base, layers=infos, scores=scores)


def removal(base: ImportanceReport) -> RemovalCurve:
    """Accuracy that falls as the layers go, last layer first."""
    order = tuple(layer.name for layer in reversed(base.layers))[:4]
    return RemovalCurve("accuracy", order, (0.924, 0.921, 0.907, 0.82, 0.55))


def plan(targets: tuple[str, ...] = TARGETS) -> CompressionPlan:
    """Drop two layers, chosen from four candidates of which one misses the budget."""
    steps = (Step("drop_layers", ("encoder.layer.4", "encoder.layer.5")), Step("quantize_int8", ("head",), {"per_channel": True}))
    figures = [(60e6, 0.922, False), (42e6, 0.917, True), (40e6, 0.91, True), (30e6, 0.80, False)]
    candidates = tuple(
        Candidate(steps if size == 42e6 else (Step("drop_layers", (f"encoder.layer.{i}",)),), {"size": size, "accuracy": q}, ok)
        for i, (size, q, ok) in enumerate(figures)
    )
    before, predicted = {"size": 86e6, "accuracy": 0.924}, {"size": 42e6, "accuracy": 0.917}
    return CompressionPlan(steps, "f1a2b3", tuple(map(Target.parse, targets)), 3, before, predicted, candidates)


def measured(**changes: Any) -> Measurement:
    """The uncompressed model: 86 MB, 12 ms, 92.4 % accuracy."""
    base = Measurement(
        params=21_665_664,
        nonzero=21_665_000,
        size=86_000_000,
        macs=4_608_338_304,
        latency=12.0,
        latency_spread=0.3,
        batch_size=8,
        metrics={"accuracy": 0.924, "loss": 0.31},
        stderr={"accuracy": 0.004, "loss": 0.012},
        samples=512,
        device="cpu",
    )
    return replace(base, **changes)


def smaller(**changes: Any) -> Measurement:
    """The compressed model: 42 MB, 8 ms, 91.7 % accuracy."""
    metrics, stderr = {"accuracy": 0.917, "loss": 0.35}, {"accuracy": 0.0041, "loss": 0.013}
    base = measured(params=10_832_832, nonzero=10_832_000, size=42_000_000, macs=2_304_169_152, latency=8.0)
    return replace(replace(base, metrics=metrics, stderr=stderr), **changes)


PROOFS = (
    Proof("masked_equivalence", True, "largest absolute difference of the outputs", 3.1e-6, 1e-4),
    Proof("shrank", True, "bytes after ÷ bytes before", 42 / 86, 0.5),
    Proof("reload", True, "largest absolute difference after reload", 0.0, 1e-6),
    Proof("export_parity", None, "no export was asked for"),
)


def result(
    after: Measurement | None = None,
    proofs: tuple[Proof, ...] = PROOFS,
    targets: tuple[str, ...] = TARGETS,
    before: Measurement | None = None,
) -> CompressionResult:
    """A compression that kept its budget, unless told otherwise. The page never touches the model itself."""
    model: Any = None
    return CompressionResult(model, plan(targets), before or measured(), after or smaller(), proofs)


ARTIFACTS: tuple[Mapping[str, Any], ...] = (
    {"name": "Hugging Face folder", "kind": "hf", "path": "model/", "size": 42_013_512, "sha256": "9f" * 32},
    {"name": "ONNX", "kind": "onnx", "path": "model.onnx", "size": 42_500_000, "parity": 2.4e-5, "sha256": math.nan},
)
