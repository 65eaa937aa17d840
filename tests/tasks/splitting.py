"""Metrics of one output, gathered in batches of any sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layerwise.data import Batch
from layerwise.evaluation import Evaluation
from layerwise.task import Task

SPLITS = ((12,), (5, 7), (1, 2, 3, 6), (1,) * 12)  # of twelve samples


def evaluated(task: Task, output: Tensor, batch: Batch, sizes: Sequence[int] = (12,)) -> Evaluation:
    """`output` and `batch` fed in consecutive pieces of these sizes."""
    assert sum(sizes) == len(output)
    evaluation, start = Evaluation(task), 0
    for size in sizes:
        stop = start + size
        evaluation.add(output[start:stop], batch.narrow(start, stop), output[start:stop])
        start = stop
    return evaluation
