"""Goes through the data once and feeds every statistic: the sweep first, then one replay per batch for those that intervene.

After any batch the states can be saved; a later call goes on from there to the same bits. A batch that does not fit into memory
is halved, at most three times, with the statistics put back to where they were before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from layerwise.analyzer import Statistic
from layerwise.counts import Counts
from layerwise.data import Batch, Data
from layerwise.errors import CorruptRun, DataError, OutOfMemory
from layerwise.files import newest_intact, staged_folder
from layerwise.model import UniversalModel
from layerwise.replay import Replay
from layerwise.sweep import Sweep
from layerwise.trace import out_of_memory
from layerwise.walk import Walk
from layerwise.weights import read_weights, save_weights

HALVINGS = 3
MOST_SAMPLES = 2**20  # per batch: what numbers the samples of a data set without counting them first
SAVE_EVERY = 5.0  # seconds between checkpoints
Progress = Callable[[int, int], None]  # batches done, batches in all


@dataclass
class Observation:
    """What one pass over the data cost, and what had to be said about it."""

    counts: Counts
    seconds: float = 0.0  # of the shared sweep
    own_seconds: dict[str, float] = field(default_factory=dict)  # of each intervening method
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls) -> Observation:
        """Nothing was observed."""
        return cls(Counts())

    def cost_of(self, statistic: Statistic | None, name: str) -> float:
        """Seconds that `name` would have cost alone, about: the shared sweep if it used it, its own replays if it intervened."""
        if statistic is None:
            return 0.0
        return self.own_seconds.get(name, 0.0) + (self.seconds if statistic.needs else 0.0)


def observe(
    model: UniversalModel,
    data: Data,
    statistics: Mapping[str, Statistic],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> Observation:
    """Feeds `statistics` (name → statistic) with every batch of `data`, resuming from `checkpoint` if it holds a state.

    Raises `OutOfMemory` (LW-R01) when an eighth of a batch does not fit, and whatever the model's forward raises.
    """
    first = data[0]
    model.see(first)
    run = _Pass(model, statistics, seed)
    done = 0 if checkpoint is None else _resume(checkpoint, run, data)
    saved = time.monotonic()
    total = len(data)
    for index in range(done, total):
        batch = data[index]
        if batch.size == 0:
            raise DataError(f"Batch {index} of {data.name} is empty.", code="LW-D29")
        run.feed(batch, seed * 1_000_003 + index, index * MOST_SAMPLES)
        due = time.monotonic() - saved > SAVE_EVERY or index + 1 == total
        if checkpoint is not None and due:
            _save(checkpoint, run, index + 1, data)
            saved = time.monotonic()
        if progress is not None:
            progress(index + 1, total)
    return run.observation


class _Pass:
    """The engines and statistics of one call of `observe`."""

    def __init__(self, model: UniversalModel, statistics: Mapping[str, Statistic], seed: int) -> None:
        self.model = model
        self.statistics = dict(statistics)
        self.seed = seed
        self.sweep = Sweep(model, [s for s in statistics.values() if s.needs])
        self.probes = {name: s for name, s in statistics.items() if s.intervenes}
        self.walkers = {name: s for name, s in statistics.items() if s.walks}
        self.observation = Observation(self.sweep.counts, own_seconds=dict.fromkeys([*self.probes, *self.walkers], 0.0))

    def feed(self, batch: Batch, seed: int, first: int) -> None:
        """One batch, in as many pieces as memory asks for."""
        before = {name: _copied(s.state()) for name, s in self.statistics.items()}
        for halving in range(HALVINGS + 1):
            size = -(-batch.size // 2**halving)
            try:
                for start in range(0, batch.size, size):
                    self._piece(batch.narrow(start, min(start + size, batch.size)), seed + start * 7_919, first + start)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._roll_back(before, halving, batch.size, error)
            else:
                return

    def _roll_back(self, before: Mapping[str, dict[str, Tensor]], halving: int, size: int, error: BaseException) -> None:
        for name, state in before.items():
            self.statistics[name].load_(_copied(state))
        if halving == HALVINGS or size <= 2**halving:
            raise OutOfMemory(
                f"A piece of {-(-size // 2**halving)} samples does not fit into memory ({str(error).splitlines()[0]}).",
                place=self.model.name,
                remedy="Use a smaller batch size or shorter inputs; what is finished is kept.",
            ) from error
        self.observation.notes.append(f"Memory ran out with {-(-size // 2**halving)} samples; the batch was halved.")

    def _piece(self, batch: Batch, seed: int, first: int) -> None:
        started = time.perf_counter()
        if self.sweep.statistics:
            self.sweep.batch(batch, seed, first)
        self.observation.seconds += time.perf_counter() - started
        if self.probes:
            self._probe(batch)
        if self.walkers:
            self._walk(batch, seed, first)

    def _probe(self, batch: Batch) -> None:
        started = time.perf_counter()
        replay = Replay(self.model, batch, self.sweep.counts)
        shared = time.perf_counter() - started
        for name, statistic in self.probes.items():
            started = time.perf_counter()
            statistic.probe(replay)
            self.observation.own_seconds[name] += shared + time.perf_counter() - started

    def _walk(self, batch: Batch, seed: int, first: int) -> None:
        ids = torch.arange(first, first + batch.size)
        walk = Walk(self.model, batch.to(self.model.device), seed, ids, self.sweep.counts)
        for name, statistic in self.walkers.items():
            started = time.perf_counter()
            statistic.walk(walk)
            self.observation.own_seconds[name] += time.perf_counter() - started


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def _key(run: _Pass, data: Data) -> str:
    """What a checkpoint must agree with: the model, the data, the seed and the methods."""
    parts = [run.model.fingerprint, data.fingerprint, str(run.seed), str(len(data)), *sorted(run.statistics)]
    return "|".join(parts)


def _save(folder: Path, run: _Pass, done: int, data: Data) -> None:
    """Writes ``batch-<n>`` beside the older ones, then removes all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder / f"batch-{done:09d}", force=True) as stage:
        for name, statistic in run.statistics.items():
            save_weights(stage / f"{name}.safetensors", {k: v.cpu().contiguous() for k, v in statistic.state().items()})
        progress = {"done": done, "key": _key(run, data), "counts": vars(run.observation.counts)}
        (stage / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    for old in sorted(folder.glob("batch-*"))[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def _resume(folder: Path, run: _Pass, data: Data) -> int:
    """Loads the newest intact state and returns the number of batches done; 0 where there is none."""
    if not folder.is_dir():
        return 0
    newest, skipped = newest_intact(sorted(folder.glob("batch-*")))
    run.observation.notes.extend(f"A damaged checkpoint was skipped: {path.name}: {why}" for path, why in skipped)
    if newest is None:
        return 0
    progress = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
    if progress["key"] != _key(run, data):
        raise CorruptRun(
            "The checkpoint belongs to another model, data set, seed or set of methods.",
            place=str(newest),
            remedy="Remove the folder to start afresh.",
        )
    for name, statistic in run.statistics.items():
        statistic.load_(read_weights(newest / f"{name}.safetensors"))
    for key, value in progress["counts"].items():
        setattr(run.observation.counts, key, value)
    return int(progress["done"])
