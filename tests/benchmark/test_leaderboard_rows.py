"""What the benchmarks of compression measured stands in the leaderboard, every row or the reason why not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise import engine
from layerwise.tracking import PerformanceTracker
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("leaderboard"), importlib.import_module("compression")
    for name in ("leaderboard", "compression"):
        sys.modules.pop(name, None)


def test_every_row_of_every_part_is_recorded_or_left_out_with_a_reason(benchmarks: Any, tmp_path: Path) -> None:
    leaderboard, compression = benchmarks
    found, place = compression.results(), f"sqlite:///{tmp_path}/board.db"
    assert found.keys() <= leaderboard.PARTS.keys() <= compression.PARTS.keys()
    counts, left = leaderboard.record(found, place)
    for part, result in found.items():
        told = list(leaderboard.rows(part, result))
        assert len(told) == len(result["rows"]), part
        assert counts[part] == sum(isinstance(row, leaderboard.Record) for row in told) > 0, part
    assert all(row.reason for row in left)
    board = engine.leaderboard(database=place)
    assert len(board) == sum(counts.values()) == sum(len(r["rows"]) for r in found.values()) - len(left)
    assert not board["proven"].any()  # figures that were told are no proof
    assert (board["ratio"] > 0).all()
    assert (board[["data", "device", "methods"]] != "").all(axis=None)
    quality = board[~board["data"].str.contains("no quality")]
    assert quality[["rank", "before"]].notna().all(axis=None)
    assert not (board["domain"] == "other").any(), set(board["model"][board["domain"] == "other"])


def test_what_is_read_back_is_what_was_measured_and_the_same_again_adds_nothing(benchmarks: Any, tmp_path: Path) -> None:
    leaderboard, _ = benchmarks
    result = json.loads((RESULTS / "compression_distill.json").read_text(encoding="utf-8"))
    with PerformanceTracker(f"sqlite:///{tmp_path}/board.db") as tracker:
        for _ in range(2):
            leaderboard.record({"distill": result}, tracker.url)
        board = tracker.generate_leaderboard("text", task="classification")
        assert len(board) == len(result["rows"])
        (id_,) = board["id"][(board["methods"] == "response + feature") & (board["seed"] == 1)]
        row = tracker.row(int(id_))
    measured = next(r for r in result["rows"] if (r["method"], r["seed"], r["setting"]) == ("response + feature", 1, ""))
    assert row["after"]["metrics"] == measured["metrics"]
    assert row["before"]["metrics"] == result["rows"][0]["metrics"]
    assert row["ratio"] == measured["bytes"] / result["rows"][0]["bytes"]
    assert row["source"]["command"] == result["command"]
    assert row["device"] == result["device"]
