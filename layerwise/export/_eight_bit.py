"""An 8-bit ONNX artifact: made of the float one, proved against it, and both judged side by side in onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.artifact import Parity
from layerwise.data import Batch, Data
from layerwise.evaluation import Evaluation
from layerwise.export._grids import check_grids, grids, related, with_extremes
from layerwise.export._inputs import Inputs
from layerwise.export._parity import BOUNDS, compared, fed, other_sizes, removed, run, session
from layerwise.export._quantize import Choice, choose, quantized, split_gemm
from layerwise.export._rounding import Graphs, check_weights
from layerwise.export._unrounding import with_float_products, without_rounding
from layerwise.measure import Latency, alternated
from layerwise.model import UniversalModel
from layerwise.proofs import relative_error


@dataclass(frozen=True)
class Rounded:
    """How a graph is to become 8-bit: `mode` and `keep` as `choose` takes them, on what to watch activations, and to judge."""

    mode: str
    keep: str
    calibration: Data
    data: Data


@dataclass(frozen=True)
class Proved:
    """The parity of an 8-bit file, the record of what was done and measured, and both in words."""

    parity: Parity
    figures: Mapping[str, Any]
    notes: tuple[str, ...]


def make(reference: Path, path: Path, inputs: Inputs, rounded: Rounded) -> tuple[Path, Choice]:
    """Writes `path` from the float graph at `reference`; gives the float graph with the same nodes, and what was chosen."""
    import onnx_ir as ir

    choice = choose(ir.load(reference).graph, rounded.mode, rounded.keep)
    if choice.mode == "dynamic":
        split = reference.with_name(f"split-{reference.name}")
        split_gemm(reference, split)
        reference, choice = split, choose(ir.load(split).graph, "dynamic", rounded.keep)
    quantized(reference, path, choice, inputs, rounded.calibration)
    return reference, choice


def prove(
    model: UniversalModel, reference: Path, path: Path, choice: Choice, inputs: Inputs, rounded: Rounded,
    batches: Sequence[Batch], places: Mapping[str, str],
) -> Proved:  # fmt: skip
    """Checks the file as `layerwise.export._rounding` says, then runs it: raises `ExportMismatch` naming the layer."""
    graphs = Graphs.load(reference, path)
    steps = check_weights(graphs, choice)
    fixed = check_grids(graphs, _extremes(reference, graphs, inputs, rounded.calibration))
    sizes, bare = other_sizes(batches), path.with_name(f"unrounded-{path.name}")
    with removed(bare):
        without_rounding(graphs, bare)
        wiring = compared(model, bare, inputs, sizes, BOUNDS["float32"], places)
    bound = max(BOUNDS["int8"], 2 * _noise(model, reference, path, inputs, sizes))
    parity = compared(model, path, inputs, sizes, bound, places)
    figures = judged(model, {"float32": reference, "int8": path}, inputs, rounded.data)
    record = {
        "quantize": choice.mode,
        "nodes": list(choice.nodes),
        "kept": dict(choice.kept),
        "calibration": {"data": rounded.calibration.name, "samples": sum(b.size for b in rounded.calibration)},
        "proof": {"weight_steps": steps, "grids": fixed, "without_rounding": wiring.relative, "bound": wiring.bound},
        **figures,
    }
    return Proved(parity, record, tuple(_notes(record, choice)))


def _extremes(reference: Path, graphs: Graphs, inputs: Inputs, data: Data) -> dict[str, tuple[float, float]]:
    """The smallest and largest value on `data` of every tensor of the float graph that has, or might share, a fixed grid."""
    values = {v.name: v for n in graphs.reference.graph for v in n.outputs} | {v.name: v for v in graphs.reference.graph.inputs}
    wanted = [values[g.tensor] for g in grids(graphs) if g.tensor in values]
    names = list(dict.fromkeys(v.name for value in wanted for v in related(value)))
    if not names:
        return {}
    probe = reference.with_name(f"extremes-{reference.name}")
    found: dict[str, tuple[float, float]] = {}
    with removed(probe):
        with_extremes(reference, probe, names)
        opened = session(probe)
        for batch in data:
            ends = iter(run(opened, inputs, batch)[-2 * len(names) :])
            for name in names:
                low, high = float(next(ends)), float(next(ends))
                before = found.get(name, (low, high))
                found[name] = min(before[0], low), max(before[1], high)
    return found


def _noise(model: UniversalModel, reference: Path, path: Path, inputs: Inputs, batches: Sequence[Batch]) -> float:
    """How far the roundings alone move the outputs: the same integers, every product in floats."""
    plain = path.with_name(f"plain-{path.name}")
    with removed(plain):
        with_float_products(Graphs.load(reference, path), plain)
        opened = session(plain, optimized=False)
        return max(relative_error(run(opened, inputs, b)[0], model.predict(b)) for b in batches)


def judged(model: UniversalModel, files: Mapping[str, Path], inputs: Inputs, data: Data) -> dict[str, Any]:
    """The task's metrics over all of `data` and the latency on its first batch, of each of two files in onnxruntime."""
    assert model.task is not None  # `see` settled it before exporting
    sessions = {name: session(path) for name, path in files.items()}
    sums = {name: Evaluation(model.task) for name in files}
    for batch in data:
        outputs = {name: run(opened, inputs, batch)[0] for name, opened in sessions.items()}
        for name, output in outputs.items():
            sums[name].add(output, batch, outputs["float32"])  # the float file was compared with torch
    times = alternated([_clock(opened, inputs, data[0]) for opened in sessions.values()])
    return {
        name: {
            "bytes": path.stat().st_size,
            "latency": times[i].median,
            "latency_spread": times[i].spread,
            "batch_size": data[0].size,
            "threads": torch.get_num_threads(),
            "metrics": sums[name].means(),
            "stderr": sums[name].stderr(),
            "samples": sums[name].samples,
        }
        for i, (name, path) in enumerate(files.items())
    } | {"speed_up": speed_up(*times)}


def speed_up(before: Latency, after: Latency) -> str:
    """In words: only where the medians are further apart than their spreads is one faster."""
    times = f"{before.median:.3g} → {after.median:.3g} ms"
    if abs(before.median - after.median) <= before.spread + after.spread:
        return f"no speed-up beyond the noise ({times})"
    ratio = before.median / after.median
    return f"{ratio:.2f}x faster ({times})" if ratio > 1 else f"no speed-up: {1 / ratio:.2f}x slower ({times})"


def _clock(opened: Any, inputs: Inputs, batch: Batch) -> Any:
    feed = fed(opened, inputs, batch)

    def milliseconds() -> float:
        start = time.perf_counter()
        opened.run(None, feed)
        return (time.perf_counter() - start) * 1000

    return milliseconds


def _notes(record: Mapping[str, Any], choice: Choice) -> list[str]:
    before, after, proof = record["float32"], record["int8"], record["proof"]
    grids_said = f", {proof['grids']} grids of activations are those of the calibration data" if proof["grids"] else ""
    notes = [
        f"{choice.mode} 8-bit: {len(choice.nodes)} nodes, {len(choice.kept)} with weights stay float",
        f"weights are {proof['weight_steps']:.3f} steps or less from the originals{grids_said}",
        f"without the roundings the largest relative difference is {proof['without_rounding']:.2g} (bound {proof['bound']:g})",
        f"in onnxruntime against its float file: {record['speed_up']} per batch of {after['batch_size']}, "
        f"{after['bytes'] / before['bytes']:.2f}x the bytes",
    ]
    changes = [f"{name} {before['metrics'][name]:.4g} → {value:.4g}" for name, value in after["metrics"].items()]
    return [*notes, f"on {after['samples']:,} samples: {', '.join(changes)}"]
