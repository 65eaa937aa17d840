"""Who runs the batches: this process, or Ray's workers. Either way the feeder ends up with the same states.

Decision: the unit of work is a run of neighbouring batches. It has no side effects and its result is keyed by the batches'
numbers, so that Ray may repeat it when a worker dies. The driver alone writes checkpoints; a new driver goes on from them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from layerwise.analyzer import Statistic
from layerwise.data import Data
from layerwise.errors import LayerwiseError, UsageError, WorkerLost, missing_dependency, nearest
from layerwise.feeding import Feeder
from layerwise.model import UniversalModel

SHARDS_PER_WORKER = 4  # so that a lost one costs little and a slow one does not keep the others waiting
RETRIES = 3

Executor = Callable[[Feeder, Sequence[int]], Iterator[int]]


def local(feeder: Feeder, todo: Sequence[int]) -> Iterator[int]:
    """One batch after the other, here. Yields each one's number when it is done."""
    for index in todo:
        feeder.feed(index)
        yield index


def ray(feeder: Feeder, todo: Sequence[int], workers: int | None = None) -> Iterator[int]:
    """Runs of batches in `workers` Ray processes (default: one per core), in the cluster that Ray is connected to, if it is."""
    count = workers or os.cpu_count() or 1
    with _cluster(count) as library:
        shared = library.put((feeder.model, dict(feeder.statistics), feeder.data, feeder.seed, torch.get_num_threads()))
        shard = library.remote(max_retries=RETRIES, num_cpus=1)(_shard)
        waiting = {shard.remote(shared, indices): indices for indices in split(todo, count * SHARDS_PER_WORKER)}
        while waiting:
            (ready, *_), _ = library.wait(list(waiting), num_returns=1)
            indices = waiting.pop(ready)
            nodes, observation = _fetched(library, ready, indices)
            feeder.observation.merge_(observation)
            feeder.absorb(indices, nodes)
            yield indices[-1]


EXECUTORS: Mapping[str, Callable[..., Iterator[int]]] = {"local": local, "ray": ray}


def executor_named(spec: str) -> Executor:
    """The executor that ``local``, ``ray`` or ``ray:WORKERS`` names. Raises `UsageError` with the nearest name."""
    name, colon, workers = spec.partition(":")
    if name not in EXECUTORS:
        raise UsageError(f"Unknown executor {name!r}.", remedy=nearest(name, EXECUTORS))
    if not colon:
        return EXECUTORS[name]
    if name == "local" or not workers.isdecimal() or not int(workers):
        raise UsageError(f"{spec!r} is no executor.", remedy="Use local, ray, or ray:N with N workers, such as ray:4.")
    return partial(EXECUTORS[name], workers=int(workers))


def split(items: Sequence[int], parts: int) -> list[list[int]]:
    """At most `parts` runs of neighbours, as equal as can be, none empty."""
    parts = min(parts, len(items))
    bounds = [len(items) * k // parts for k in range(parts + 1)] if parts else []
    return [list(items[a:b]) for a, b in itertools.pairwise(bounds)]


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    try:
        import ray as library
    except ImportError:
        raise missing_dependency("ray", "ray", "The executor 'ray'") from None
    ours = not library.is_initialized()
    if ours:
        library.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield library
    finally:
        if ours:
            library.shutdown()


def _shard(
    work: tuple[UniversalModel, dict[str, Statistic], Data, int, int], indices: Sequence[int]
) -> tuple[dict[str, Any], Any]:
    """In a worker: the nodes of the trees over the batches `indices`, and what it cost."""
    model, statistics, data, seed, threads = work
    torch.set_num_threads(threads)  # another number of threads adds in another order
    feeder = Feeder(model, statistics, data, seed)
    for index in indices:
        feeder.feed(index)
    return feeder.nodes(), feeder.observation


def _fetched(library: Any, ready: Any, indices: Sequence[int]) -> Any:
    try:
        return library.get(ready)
    except library.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LayerwiseError) else error) from None
    except (library.exceptions.WorkerCrashedError, library.exceptions.OutOfMemoryError) as error:
        raise WorkerLost(
            f"The worker with the batches {indices[0]} … {indices[-1]} died {RETRIES + 1} times ({type(error).__name__}).",
            remedy="Use fewer workers or smaller batches; what is finished is in the checkpoint.",
        ) from error
