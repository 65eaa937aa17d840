"""Ranking: honest groups, proven first, direction of metrics, trade-offs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tracking_factory import result

from layerwise.errors import UsageError
from layerwise.result import Proof
from layerwise.task import Classification, Fidelity, LanguageModelling, Task
from layerwise.tracking import PerformanceTracker
from layerwise.tracking.leaderboard import COLUMNS, QUALITY, lower_is_better, rank, to_frame


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[PerformanceTracker]:
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        yield tracker


def run(
    id: int, *, before: float | None = 0.9, after: float | None = 0.8, quality: str = "accuracy", **more: Any
) -> dict[str, Any]:
    size = more.pop("size", 500)
    facts: dict[str, Any] = {
        "id": id, "parent_id": None, "created": datetime(2026, 1, 1, tzinfo=UTC), "model": f"m{id}", "domain": "vision",
        "task": "classification", "data": "digits", "data_fingerprint": "d", "device": "cpu", "methods": ["remove"],
        "ratio": size / 1000, "proven": True, "seed": 0,
        "before": {"size": 1000, "latency": 2.0, "metrics": {} if before is None else {quality: before}},
        "after": {"size": size, "latency": 1.0, "metrics": {} if after is None else {quality: after}},
    }  # fmt: skip
    return facts | more


def order(runs: list[dict[str, Any]], **options: Any) -> list[tuple[int, int | None]]:
    return [(row["id"], row["rank"]) for row in rank(runs, **options)]


def test_best_first() -> None:
    assert order([run(1, after=0.7), run(2, after=0.9), run(3, after=0.8)]) == [(2, 1), (3, 2), (1, 3)]


def test_lower_is_better_for_perplexity() -> None:
    runs = [run(i, task="language_modelling", quality="perplexity", before=10.0, after=a) for i, a in ((1, 20.0), (2, 12.5))]
    assert order(runs) == [(2, 1), (1, 2)]
    assert [row["retained"] for row in rank(runs)] == [0.8, 0.5]


def test_unproven_stand_below_proven_whatever_they_claim() -> None:
    assert order([run(1, after=0.99, proven=False), run(2, after=0.1)]) == [(2, 1), (1, 2)]


@pytest.mark.parametrize("column", ["task", "data", "data_fingerprint", "device"])
def test_what_differs_is_ranked_apart(column: str) -> None:
    runs = [run(1, after=0.7), run(2, after=0.9, **{column: "another"})]
    assert sorted(order(runs)) == [(1, 1), (2, 1)]
    assert len({row[column] for row in rank(runs)}) == 2


def test_different_quality_metrics_are_ranked_apart() -> None:
    runs = [run(1, after=0.7), run(2, after=0.9, quality="f1")]
    assert sorted(order(runs)) == [(1, 1), (2, 1)]


def test_ties_go_to_the_smaller_and_equals_share_a_rank() -> None:
    assert order([run(1, size=600), run(2, size=500), run(3, size=500), run(4, after=0.1)]) == [(2, 1), (3, 1), (1, 3), (4, 4)]


def test_a_missing_figure_has_no_rank() -> None:
    assert order([run(1, after=math.nan), run(2)]) == [(2, 1), (1, None)]
    assert not rank([run(1, after=math.nan)])[0]["pareto"]


def test_ranking_by_a_cost() -> None:
    runs = [run(1, after=0.9, size=800), run(2, after=0.7, size=300)]
    assert order(runs) == [(1, 1), (2, 2)]
    for metric in ("size", "ratio"):
        assert order(runs, metric=metric) == [(2, 1), (1, 2)]
    assert rank(runs, metric="size")[0]["quality"] == "accuracy"


def test_pareto_marks_the_trade_offs() -> None:
    runs = [run(1, after=0.9, size=800), run(2, after=0.7, size=300), run(3, after=0.6, size=400)]
    runs += [run(4, after=0.99, size=100, proven=False)]
    assert {row["id"]: row["pareto"] for row in rank(runs)} == {1: True, 2: True, 3: False, 4: False}


def test_limit_counts_per_group() -> None:
    runs = [run(i, after=i / 10, device=device) for i, device in ((1, "cpu"), (2, "cpu"), (3, "cuda"), (4, "cuda"))]
    assert order(runs, limit=1) == [(2, 1), (4, 1)]


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (-1.0, 0.5), (0.5, -1.0), (None, 0.5)])
def test_no_share_where_a_ratio_has_no_meaning(before: float | None, after: float) -> None:
    assert math.isnan(rank([run(1, before=before, after=after)])[0]["retained"])


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'accuracy'"):
        rank([run(1)], metric="acuracy")


def test_the_frame(tracker: PerformanceTracker) -> None:
    parent = tracker.track(result(accuracy=0.88, size=500))
    tracker.track(result(accuracy=0.45, size=250), parent=parent)
    tracker.track(result(accuracy=0.99, proofs=(Proof("shrank", False, "it grew"),)))
    frame = tracker.generate_leaderboard("vision")
    assert list(frame.columns) == COLUMNS
    assert frame["rank"].to_list() == [1, 2, 3]
    assert frame["proven"].to_list() == [True, True, False]
    assert frame["after"].to_list() == [0.88, 0.45, 0.99]
    assert frame["retained"].iloc[1] == pytest.approx(0.5)
    assert (frame["latency_before"].iloc[1], frame["latency_after"].iloc[1]) == (10.0, 2.5)
    assert (frame["params"].iloc[1], frame["size"].iloc[1], frame["macs"].iloc[1]) == (62, 250, 2500)
    assert frame["methods"].iloc[0] == "remove, quantize"
    assert frame["parent"].iloc[1] == parent
    assert pd.isna(frame["parent"].iloc[0])


def test_filters(tracker: PerformanceTracker) -> None:
    tracker.track(result())
    tracker.track(result(seed=9, name="big", domain="text", task="fidelity"))
    assert tracker.generate_leaderboard("text")["model"].to_list() == ["big"]
    assert tracker.generate_leaderboard(task="classification")["model"].to_list() == ["tiny"]
    assert tracker.generate_leaderboard(model="big")["domain"].to_list() == ["text"]
    assert tracker.generate_leaderboard("audio", metric="accuracy").empty
    with pytest.raises(UsageError, match="Did you mean 'vision'"):
        tracker.generate_leaderboard("vison")
    with pytest.raises(UsageError, match="limit -1"):
        tracker.generate_leaderboard(limit=-1)


def test_an_empty_board_has_its_columns() -> None:
    assert list(to_frame([]).columns) == COLUMNS


@pytest.mark.parametrize("task", [Classification, LanguageModelling, Fidelity])
def test_the_tasks_own_quality_and_direction(task: type[Task]) -> None:
    assert QUALITY[task.name] == task.quality
    assert lower_is_better(task.quality) is not task.higher_is_better
