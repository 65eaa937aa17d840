"""Goes through the data once and feeds every statistic; any way of sharing the work between workers gives the same bits.

After any batch the states can be saved; a later call goes on from there to the same bits (`layerwise.checkpoint`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from layerwise import checkpoint as checkpoints
from layerwise.analyzer import Signal, Statistic
from layerwise.data import Data
from layerwise.executors import executor_named
from layerwise.feeding import Feeder, Observation
from layerwise.layout import Layout
from layerwise.model import UniversalModel
from layerwise.tensors import wraps

SAVE_EVERY = 5.0  # seconds between checkpoints
BACKWARD = frozenset({Signal.GRADIENTS, Signal.SAMPLE_GRADIENTS})
CHANGES = "changes a sample's own inputs or streams, which is not defined here where the rows of a tensor are nodes of graphs"
UNORDERED = "compares the samples position by position, and the nodes of a graph have no order"
MIXED = "the samples are nodes of a graph: what flows back through a node is of its neighbours' losses as well as its own"

Progress = Callable[[int, int], None]  # batches done, batches in all


def observe(
    model: UniversalModel,
    data: Data,
    statistics: Mapping[str, Statistic],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    executor: str = "local",
) -> Observation:
    """Feeds `statistics` (name → blank statistic) with every batch of `data`, resuming from `checkpoint` if it holds a state.

    `executor`: ``local``, or ``ray`` / ``ray:N`` to share the batches between N processes (default: one per core); the scores
    are the same to the bit. Raises `OutOfMemory` (LW-R01) when an eighth of a batch does not fit, `WorkerLost` (LW-R13) when a
    worker dies again and again, and whatever the model's forward raises.
    """
    execute = executor_named(executor)
    model.see(data[0])
    for statistic in statistics.values():
        statistic.refused = without_gradients(statistic, model) or refusal(statistic, data[0].layout)
    feeder = Feeder(model, {name: s for name, s in statistics.items() if not s.refused}, data, seed)
    if checkpoint is not None:
        checkpoints.resume(checkpoint, feeder)
    saved, total = time.monotonic(), len(data)
    for _ in execute(feeder, [i for i in range(total) if i not in feeder.done]):
        due = time.monotonic() - saved > SAVE_EVERY or len(feeder.done) == total
        if checkpoint is not None and due:
            checkpoints.save(checkpoint, feeder)
            saved = time.monotonic()
        if progress is not None:
            progress(len(feeder.done), total)
    return feeder.finish()


def without_gradients(statistic: Statistic, model: UniversalModel) -> str:
    """Why `statistic` cannot be fed on `model`, because it differentiates and the weights are quantized; '' if it can.

    Rounding has no derivative: what passes is at best a part (the residual branch), and a score from it would mislead.
    """
    if not statistic.differentiates and not statistic.needs & BACKWARD:
        return ""
    name = next((name for name, parameter in model.module.named_parameters() if wraps(parameter)), "")
    return f"no gradient passes quantized weights, such as {name}: analyze the model as it was before" if name else ""


def refusal(statistic: Statistic, layout: Layout | None) -> str:
    """Why `statistic` cannot honestly be taken from batches with this layout; '' if it can."""
    if layout is None:
        return ""
    if statistic.walks:
        return CHANGES
    if statistic.aligned:
        return UNORDERED
    return MIXED if layout.mixes and statistic.needs & {Signal.GRADIENTS, Signal.ATTENTION} else ""


__all__ = ["Observation", "Progress", "observe"]
