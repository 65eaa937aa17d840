"""Shards equal one pass to the bit, here and in Ray's workers, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import layerwise as lw
from layerwise.analyzer import ANALYZERS, Statistic
from layerwise.data import Data
from layerwise.errors import DataError, UsageError, WorkerLost
from layerwise.executors import executor_named, split
from layerwise.feeding import Feeder
from layerwise.model import UniversalModel
from layerwise.moments import Moments
from layerwise.observe import observe
from layerwise.replay import Replay
from layerwise.statistics import MomentsStatistic
from layerwise.task import Classification
from tests.models import CASES, vectors

FED = [name for name in sorted(ANALYZERS) if ANALYZERS[name]().statistic(CASES["residual"].model()) is not None]


def statistics(model: UniversalModel) -> dict[str, Statistic]:
    return {name: ANALYZERS[name]().statistic(model) for name in FED}


def bits(found: dict[str, Statistic]) -> dict[str, bytes]:
    return {f"{n}.{k}": t.cpu().contiguous().numpy().tobytes() for n, s in found.items() for k, t in s.state().items()}


@pytest.mark.parametrize("subject", ["residual", "bert"])
@pytest.mark.parametrize("parts", [2, 3])
def test_shards_merged_equal_one_pass_to_the_bit(subject: str, parts: int) -> None:
    case = CASES[subject]
    model, data = case.model(), case.data(5, 4, 6, 5, 4)
    whole = statistics(model)
    observe(model, data, whole, seed=3)
    merged = Feeder(model, statistics(model), data, 3)
    for indices in reversed(split(range(5), parts)):
        shard = Feeder(model, statistics(model), data, 3)
        for index in indices:
            shard.feed(index)
        merged.absorb(indices, shard.nodes())
    merged.finish()
    found, expected = bits(merged.statistics), bits(whole)
    assert [key for key in expected if found[key] != expected[key]] == []


def test_what_is_split_is_all_in_order_and_even() -> None:
    assert split(range(10), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert split([4, 5], 8) == [[4], [5]]
    assert split([], 3) == []


@pytest.mark.parametrize("spec", ["rya", "ray:0", "ray:x", "ray:", "local:2"])
def test_an_unknown_executor_is_told_with_the_way_out(spec: str) -> None:
    with pytest.raises(UsageError, match=r"LW-C .*ray"):
        executor_named(spec)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_report_as_one_process(cluster: Any) -> None:
    case = CASES["residual"]
    data = case.data(4, 5, 6, 4, 5, 6, 4)
    one, many = (lw.analyze(case.model(Classification()), data, "all", executor=e) for e in ("local", "ray:2"))
    for method in one.methods:
        assert str(one[method].entries) == str(many[method].entries), method  # NaN errors compare by their text


class Killer(MomentsStatistic):
    """Counts samples; kills its own process, once or always, when it meets a batch of `deadly` samples."""

    intervenes: ClassVar[bool] = True
    deadly = 7

    def __init__(self, marks: Path, always: bool) -> None:
        super().__init__(Moments(1))
        self.marks, self.always = marks, always

    def probe(self, replay: Replay) -> None:
        if replay.batch.size == self.deadly and (self.always or not any(self.marks.iterdir())):
            (self.marks / f"{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.moments.add_(0, torch.ones(replay.batch.size))


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_counted_twice(cluster: Any, tmp_path: Path) -> None:
    statistic = Killer(tmp_path, always=False)
    model = CASES["residual"].model(Classification())
    observe(model, CASES["residual"].data(3, 7, 4), {"killer": statistic}, executor="ray:2")
    assert len(list(tmp_path.iterdir())) == 1, "the fault did not fire"
    assert statistic.samples == 14


def test_a_worker_that_always_dies_is_said_and_what_is_finished_is_kept(cluster: Any, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    model = CASES["residual"].model(Classification())
    data = CASES["residual"].data(3, 4, 7)
    with pytest.raises(WorkerLost, match=r"LW-R13 .*batches 2 … 2 died 4 times"):
        observe(model, data, {"k": Killer(marks, always=True)}, executor="ray:1", checkpoint=tmp_path / "state")
    assert len(list(marks.iterdir())) == 4, "tried once and three times again"


def test_an_error_in_a_worker_comes_out_as_itself(cluster: Any) -> None:
    model = CASES["residual"].model(Classification())
    wrong = vectors()(4)
    wrong.labels[2] = 99
    data = Data.of([vectors()(4), wrong])
    with pytest.raises(DataError, match=r"LW-D34 .*Label 99 in row 2"):
        observe(model, data, {"x": ANALYZERS["layer_ablation"]().statistic(model)}, executor="ray:2")
