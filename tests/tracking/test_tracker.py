"""What is told comes back: rows, lineage, idempotence, layer scores."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from tracking_factory import faithfulness_results, result

from layerwise.errors import UsageError
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.plan import CompressionPlan
from layerwise.result import Measurement, Proof
from layerwise.scores import LayerScore, Scores, Status
from layerwise.tracking import PerformanceTracker
from layerwise.tracking.models import plain, restored


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[PerformanceTracker]:
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        yield tracker


def test_everything_the_result_knows_comes_back(tracker: PerformanceTracker, tmp_path: Path) -> None:
    told = result()
    row = tracker.row(tracker.track(told, folder=tmp_path / "run"))
    assert Measurement.from_dict(row["before"]) == told.before
    assert Measurement.from_dict(row["after"]) == told.after
    plan = CompressionPlan.from_dict(row["plan"])
    assert plan == told.plan
    assert plan.digest == row["plan_digest"]
    proofs = [Proof.from_dict(p) for p in row["proofs"]]
    assert proofs[0] == told.proofs[0]
    assert math.isnan(proofs[1].measured)
    assert proofs[1].passed is None
    facts = dict(told.original)
    assert row["analyzers"] == facts.pop("methods")
    assert {"model": facts.pop("name")} | facts == {k: row[k] for k in ("model", *facts)}
    assert (row["methods"], row["ratio"], row["device"], row["proven"]) == (["remove", "quantize"], 0.5, "cpu", True)
    assert row["folder"] == str(tmp_path / "run")
    assert row["software"]["torch"].count(".") >= 1
    assert abs((datetime.now(UTC) - row["created"]).total_seconds()) < 60


def test_rows_survive_the_process(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/board.db"
    with PerformanceTracker(url) as first:
        id = first.track(result(), name="renamed")
    with PerformanceTracker(url) as second:
        assert second.row(id)["model"] == "renamed"


def test_the_same_result_twice_is_one_row(tracker: PerformanceTracker) -> None:
    first = tracker.track(result())
    told = result()
    slower = replace(told, after=replace(told.after, latency=99.0))  # a second look at the clock is no second result
    assert tracker.track(slower, name="other", folder="elsewhere") == first
    assert len(tracker.generate_leaderboard()) == 1


@pytest.mark.parametrize(
    "other",
    [
        result(seed=4),
        result(device="cuda"),
        result(accuracy=0.87),
        result(data_fingerprint="e" * 64),
        result(fingerprint="a" * 64),
        replace(result(), plan=CompressionPlan((), model="f" * 64)),
    ],
    ids=["seed", "device", "quality", "data", "model", "plan"],
)
def test_a_different_result_is_another_row(tracker: PerformanceTracker, other: object) -> None:
    assert tracker.track(result()) != tracker.track(other)  # type: ignore[arg-type]  # a CompressionResult


def test_proven_needs_a_proof_that_passed(tracker: PerformanceTracker) -> None:
    cases = {(): False, (None,): False, (True,): True, (True, None): True, (True, False): False}
    for seed, (passed, proven) in enumerate(cases.items()):
        proofs = tuple(Proof(f"p{i}", p, "") for i, p in enumerate(passed))
        assert tracker.row(tracker.track(result(proofs=proofs, seed=seed)))["proven"] is proven, passed


def test_lineage_runs_from_the_first_ancestor(tracker: PerformanceTracker) -> None:
    first = tracker.track(result(seed=1))
    second = tracker.track(result(seed=2), parent=first)
    third = tracker.track(result(seed=3), parent=second)
    tracker.track(result(seed=4), parent=first)
    assert [row["id"] for row in tracker.lineage(third)] == [first, second, third]
    assert [row["id"] for row in tracker.lineage(first)] == [first]


@pytest.mark.parametrize("id", [0, -1, 7, 2**31, 2**63, 10**30])
def test_an_unknown_row_is_named(tracker: PerformanceTracker, id: int) -> None:
    for ask in (tracker.row, tracker.lineage, lambda id: tracker.track(result(), parent=id)):
        with pytest.raises(UsageError, match=f"There is no run {id}"):
            ask(id)
    assert tracker.generate_leaderboard().empty  # the row with the wrong parent was not written


def test_the_mission_signature(tracker: PerformanceTracker) -> None:
    row = tracker.track_compression_performance("bert", "classification", 0.4, {"accuracy": np.float32(0.5)}, domain="text")
    assert list(row) == ["model", "task", "compression_ratio", "metrics", "timestamp"]
    assert (row["model"], row["task"], row["compression_ratio"], row["metrics"]) == (
        "bert",
        "classification",
        0.4,
        {"accuracy": 0.5},
    )
    assert datetime.fromisoformat(row["timestamp"]).utcoffset() is not None
    again = tracker.track_compression_performance("bert", "classification", 0.4, {"accuracy": 0.5}, domain="text")
    assert again == row
    frame = tracker.generate_leaderboard("text")
    assert len(frame) == 1
    assert not frame["proven"].any()


@pytest.mark.parametrize(
    ("ratio", "metrics", "more", "text"),
    [
        (0.0, {}, {}, "ratio 0.0"),
        (math.nan, {}, {}, "ratio nan"),
        ("half", {}, {}, "ratio 'half'"),
        (0.5, {"accuracy": "good"}, {}, "metric 'accuracy' is 'good'"),
        (0.5, {}, {"devise": "cpu"}, "Did you mean 'device'"),
        (0.5, {}, {"parent": 5}, "no run 5"),
    ],
)
def test_reported_figures_are_checked(tracker: PerformanceTracker, ratio: float, metrics: dict, more: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        tracker.track_compression_performance("m", "classification", ratio, metrics, **more)
    assert tracker.generate_leaderboard().empty


def test_awkward_names_and_numbers_are_stored(tracker: PerformanceTracker) -> None:
    told = result(name="a\nb\0\ud800", domain="native", source={"path": "x\0\ud800"})
    told = replace(told, after=replace(told.after, metrics={"accuracy": 0.5, "perplexity": math.inf}))
    row = tracker.row(tracker.track(told))
    assert row["model"] == r"a\nb\x00\ud800"
    assert row["domain"] == "other"
    assert row["after"]["metrics"]["perplexity"] == math.inf


def test_plain_values_come_back_from_strict_json() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": -math.inf}}
    assert restored(plain(value)) == value
    assert plain({1: (np.int64(3), Path("x"))}) == {"1": [3, "x"]}
    assert math.isnan(restored(plain(np.float32("nan"))))


def report() -> ImportanceReport:
    layers = tuple(LayerInfo(f"blocks.{i}", i, "Block", 10, True, "") for i in range(3))
    entries = {
        "blocks.0": LayerScore(1.0, 0.1),
        "blocks.1": LayerScore(2.0, 0.1),
        "blocks.2": LayerScore.missing(Status.FAILED, "nan"),
    }
    scores = {"fisher_information": Scores("fisher_information", "nats", entries, 8, 0.5)}
    return ImportanceReport("tiny", "classification", "digits", layers, scores, domain="vision")


def test_layer_scores_are_stored_once_and_linked(tracker: PerformanceTracker) -> None:
    ids = [tracker.track(result(seed=seed), report=report()) for seed in (1, 2)]
    digest = tracker.track_report(report())
    assert [tracker.row(id)["report"] for id in ids] == [digest, digest]
    frame = tracker.layer_scores(domain="vision")
    assert list(frame["layer"]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert frame["rank"].to_list()[:2] == [2, 1]
    assert frame["rank"].isna().to_list() == [False, False, True]
    assert frame["status"].to_list() == ["ok", "ok", "failed"]
    assert tracker.layer_scores(model="another").empty


def test_importing_stays_light() -> None:
    code = "import sys, layerwise.tracking; print(sorted({'torch', 'pandas', 'alembic', 'psycopg'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_benchmark_is_recorded_once_and_read_back(tmp_path: Path) -> None:
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        first = tracker.record_faithfulness(faithfulness_results())
        assert tracker.record_faithfulness(faithfulness_results()) == first
        second = tracker.record_faithfulness(faithfulness_results(0.7))
        frame = tracker.faithfulness()
        assert frame["rho"].tolist() == [0.5, 0.7]
        assert frame["benchmark"].tolist() == [first, second]
        assert frame["partial"].isna().all()
        assert set(frame["domain"]) == {"vision"}
        assert tracker.faithfulness(benchmark=second)["rho"].tolist() == [0.7]
        assert tracker.faithfulness(model="other").empty
        with pytest.raises(UsageError, match="correlations"):
            tracker.record_faithfulness({"protocol": {}, "subjects": []})
