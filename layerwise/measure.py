"""What a model costs and how well it does, measured: parameters, bytes, multiply-accumulates, latency, the task's metrics.

Decision: two models that are compared are timed alternately in one run, so that whatever else the machine does hits both;
the median and half the interquartile range are reported, since a mean over a shared machine measures the neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from layerwise.data import Batch, Data
from layerwise.energy import energy
from layerwise.errors import UsageError
from layerwise.evaluation import Evaluation
from layerwise.model import UniversalModel
from layerwise.result import Measurement
from layerwise.tensors import byte_size, nonzero_count, parameter_count
from layerwise.trace import evaluating, run, traced

Progress = Callable[[int, int], None]  # batches done, batches in all

WARM_UP = 2  # forwards before the clock counts: the first ones allocate memory and choose kernels
SECONDS = 10.0  # a slow model is timed on fewer forwards, but never on fewer than LEAST
LEAST = 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds per forward: `median` and half the interquartile range `spread` over `repeats`."""

    median: float
    spread: float
    repeats: int


def measure(
    model: UniversalModel,
    data: Data,
    *,
    reference: UniversalModel | None = None,
    latency_batches: int = 20,
    progress: Progress | None = None,
) -> Measurement:
    """Every figure of `model` on `data`; `reference` is the uncompressed model that fidelity compares with (itself if None)."""
    latency = time_paired([model], data[0], repeats=latency_batches)[0]
    return _measured(model, data, reference or model, latency, progress)


def compare(
    before: UniversalModel,
    after: UniversalModel,
    data: Data,
    *,
    latency_batches: int = 20,
    joules: bool = False,
    progress: Progress | None = None,
) -> tuple[Measurement, Measurement]:
    """Both models on the same data and device, timed alternately; their energy too where `joules` are asked for.

    Raises `UsageError` when they are on different devices, or (LW-C17) where energy cannot be measured.
    """
    if before.device != after.device:
        raise UsageError(f"Models on {before.device} and {after.device} cannot be compared.", remedy="Move both to one device.")
    times = time_paired([before, after], data[0], repeats=latency_batches)
    found = (_measured(before, data, before, times[0], progress), _measured(after, data, before, times[1], progress))
    if not joules:
        return found
    return (replace(found[0], energy=energy(before, data[0])), replace(found[1], energy=energy(after, data[0])))


def costs(model: UniversalModel) -> dict[str, float]:
    """``params``, ``size`` (bytes) and ``macs`` (per sample, on the model's example): the costs that need no clock."""
    return {
        "params": float(parameter_count(model.module)),
        "size": float(byte_size(model.module)),
        "macs": float(macs_per_sample(model, model.example)),
    }


def latency(model: UniversalModel, batch: Batch, *, repeats: int = 20) -> float:
    """The median milliseconds of one forward on `batch`."""
    return time_paired([model], batch, repeats=repeats)[0].median


def time_paired(models: Sequence[UniversalModel], batch: Batch, *, repeats: int = 20) -> list[Latency]:
    """The latency of each model on `batch`, in rounds of one forward each; every second round goes backwards."""
    return alternated([partial(_milliseconds, model, batch.to(model.device)) for model in models], repeats)


def alternated(clocks: Sequence[Callable[[], float]], repeats: int = 20) -> list[Latency]:
    """The latency that each of `clocks` gives (milliseconds per call), called in turn; every second round goes backwards."""
    times: list[list[float]] = [[] for _ in clocks]
    for _ in range(WARM_UP):
        once = [clock() for clock in clocks]
    rounds = max(LEAST, min(repeats, int(SECONDS * 1000 / max(sum(once), 1e-6))))
    for round_ in range(rounds):
        order = range(len(clocks)) if round_ % 2 == 0 else reversed(range(len(clocks)))
        for i in order:
            times[i].append(clocks[i]())
    quartiles = [np.percentile(t, [25, 50, 75]) for t in times]
    return [Latency(float(q[1]), float(q[2] - q[0]) / 2, rounds) for q in quartiles]


def evaluate(
    model: UniversalModel, data: Data, *, reference: UniversalModel | None = None, progress: Progress | None = None
) -> Evaluation:
    """The task's metrics of `model` over all of `data`; nothing is read back from the device before the end."""
    model.see(data[0].to(model.device))
    task = (reference or model).task or model.task
    assert task is not None  # set by see
    evaluation = Evaluation(task)
    for done, batch in enumerate(data, start=1):
        here = batch.to(model.device)
        output = model.predict(here)
        # only fidelity reads the uncompressed model's outputs, but that is the task's business; our own cost nothing
        evaluation.add(output, here, output if reference is None or reference is model else reference.predict(here))
        if progress:
            progress(done, len(data))
    evaluation.acted = task.acted(model, data)
    return evaluation


def macs_per_sample(model: UniversalModel, batch: Batch) -> int:
    """Multiply-accumulates of one forward per sample (matrix products, convolutions and attention)."""
    few = batch.narrow(0, min(batch.size, 2)).to(model.device)  # the trace holds every tensor it sees
    return traced(model.module, few).macs // few.answers


def _measured(
    model: UniversalModel, data: Data, reference: UniversalModel, latency: Latency, progress: Progress | None
) -> Measurement:
    evaluation = evaluate(model, data, reference=reference, progress=progress)
    return Measurement(
        params=parameter_count(model.module),
        nonzero=nonzero_count(model.module),
        size=byte_size(model.module),
        macs=macs_per_sample(model, data[0]),
        latency=latency.median,
        latency_spread=latency.spread,
        batch_size=data[0].size,
        metrics=evaluation.means(),
        stderr=evaluation.stderr(),
        samples=evaluation.samples,
        device=describe(model.device),
    )


def describe(device: torch.device) -> str:
    """The device in words: ``cpu (2 threads)``, ``cuda (NVIDIA H200)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def _milliseconds(model: UniversalModel, batch: Batch) -> float:
    with evaluating(model.module), torch.no_grad():
        _wait(model.device)
        start = time.perf_counter()
        run(model.module, batch)
        _wait(model.device)
        return (time.perf_counter() - start) * 1000


def _wait(device: torch.device) -> None:
    """A GPU works behind Python's back; the clock must not stop before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
