"""The whole benchmark in miniature, through the command line; curves by hand; the rule; what is committed agrees with itself."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerwise.analyzer import ANALYZERS, ImportanceAnalyzer
from layerwise.benchmark import choice, contenders, faithfulness, figures, protocol, subjects
from layerwise.benchmark.page import page
from layerwise.cli import main
from layerwise.errors import DataError
from layerwise.importance import spearman
from layerwise.tracking import PerformanceTracker
from tests.benchmark import tiny

FEW = "depth,random,layer_ablation,weight_norm"
SMALL = protocol.Protocol(bootstraps=20, permutations=50, halves=4, random_orders=3, curve_samples=16)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "SUBJECTS", tiny.subjects())
    monkeypatch.setattr(faithfulness, "Protocol", lambda: SMALL)


def benchmark(out: Path, *more: str) -> int:
    return main(["benchmark", "faithfulness", "--out", str(out), "--judge", FEW, *more])


def test_a_run_writes_results_page_and_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/board.db"
    assert benchmark(tmp_path / "out", "--record", "--database", url, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    results = faithfulness.load_results(tmp_path / "out" / faithfulness.RESULTS)
    assert {r["method"] for r in said["methods"]} == {*FEW.split(","), "greedy"}
    assert [s["model"] for s in results["subjects"]] == ["one", "two"]
    assert page(results) == (tmp_path / "out" / faithfulness.PAGE).read_text(encoding="utf-8")
    row = results["rows"][0]
    assert row.keys() >= {
        "model",
        "domain",
        "layer",
        "depth",
        "parameters",
        "kind",
        "op",
        "damage",
        "damage_stderr",
        "reliability",
    }
    assert row["score.depth"] == 1.0
    assert len(results["rows"]) == 2 * 6 * len(protocol.DAMAGES)
    frame = PerformanceTracker(url).faithfulness(method="depth")
    assert len(frame) == sum(r["method"] == "depth" for r in results["correlations"])
    assert math.isnan(frame["partial"].iloc[0]), "depth given depth says nothing"


def test_the_near_oracle_is_near_and_depth_is_right_by_construction(tmp_path: Path) -> None:
    results = faithfulness.run(tmp_path, methods=FEW.split(","))
    skip = {
        (r["model"], r["method"]): r["rho"] for r in results["correlations"] if r["damage"] == "skip" and r["metric"] == "dce"
    }
    assert min(skip[m, "layer_ablation"] for m in ("one", "two")) > 0.8
    assert min(skip[m, "depth"] for m in ("one", "two")) > 0.7
    greedy = [r["auc"] for r in results["methods"] if r["method"] == "greedy"]
    assert greedy == pytest.approx([1.0] * len(greedy))


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second subject breaks; when it is whole again, the first one is not opened a second time."""
    opened: list[str] = []
    whole = tiny.subjects()

    def watched(name: str, broken: bool) -> subjects.Subject:
        def make() -> subjects.Parts:
            opened.append(name)
            if broken:
                raise KeyboardInterrupt
            return whole[name].open()

        return subjects.Subject(name, "other", name, make)

    monkeypatch.setattr(faithfulness, "SUBJECTS", {"one": watched("one", False), "two": watched("two", True)})
    assert benchmark(tmp_path) == 130
    monkeypatch.setattr(faithfulness, "SUBJECTS", {"one": watched("one", False), "two": watched("two", False)})
    assert benchmark(tmp_path) == 0
    assert opened == ["one", "two", "two"]
    assert benchmark(tmp_path) == 0
    assert opened == ["one", "two", "two"]


def test_a_method_that_breaks_is_recorded_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: ImportanceAnalyzer, model: object, statistic: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(ANALYZERS["weight_norm"], "score", breaks)
    results = faithfulness.run(tmp_path, methods=FEW.split(","))
    failed = [r for r in results["methods"] if r["failure"]]
    assert [(r["model"], r["method"]) for r in failed] == [("one", "weight_norm"), ("two", "weight_norm")]
    assert "no such luck" in page(results)


def test_a_bar_shows_what_is_being_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert benchmark(tmp_path) == 0
    assert "one: damages" in terminal.getvalue()
    assert "two: methods" in terminal.getvalue()


def test_unknown_names_are_told_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "faithfullness", "--out", str(tmp_path)]) == 2
    assert "faithfulness" in capsys.readouterr().err
    assert main(["benchmark", "faithfulness", "--out", str(tmp_path), "--subjects", "onne"]) == 2
    assert "one" in capsys.readouterr().err
    assert main(["benchmark", "faithfulness", "--out", str(tmp_path), "--judge", "dept"]) == 2
    assert "depth" in capsys.readouterr().err


def test_absent_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="absent") as caught:
        subjects.SUBJECTS["resnet20"].open()
    assert "LAYERWISE_DATA" in caught.value.remedy


def study(auc: dict[str, float], random: list[float]) -> dict[str, Any]:
    """Raw figures of a net of two layers with these areas under the curve."""
    methods = {name: {"scores": {"a": 1.0, "b": 2.0}, "passes": 1.0, "counts": {}} for name in auc}
    return {
        "model": "m",
        "layers": [{"layer": n, "skippable": True} for n in "ab"],
        "methods": methods,
        "curves": {"methods": auc, "random orders": random},
        "allocation": {"methods": {n: {"dce": 0.5} for n in auc}, "random rankings": [0.4, 0.5, 0.6, 0.7]},
    }


def test_the_area_is_0_for_random_and_1_for_greedy() -> None:
    found = figures.method_records(study({"greedy": 0.9, "good": 0.7, "bad": 0.3}, [0.4, 0.6]))
    assert [r["auc"] for r in found] == pytest.approx([1.0, 0.5, -0.5])
    assert [r["beats"] for r in found] == [0.625] * 3
    flat = figures.method_records(study({"greedy": 0.505, "good": 0.9}, [0.5]))
    assert all("auc" not in r for r in flat), "the gap is too small to divide by"


def test_passes_count_block_calls_for_interventions_and_backwards_twice() -> None:
    assert contenders.passes({"forwards": 4, "backwards": 4, "block_calls": 0}, 4, 6) == 3
    assert contenders.passes({"forwards": 28, "backwards": 0, "block_calls": 84}, 4, 6) == 3.5


def test_weights_drawn_anew_are_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.opened(0).model
    before = model.fingerprint
    noise = contenders.drawn_anew(model, 0)
    assert model.fingerprint == before != noise.fingerprint


def results_of(scores: dict[str, list[float]], passes: dict[str, float]) -> dict[str, Any]:
    """Results of one model of six layers whose damage is 0 … 5, with these scores."""
    fixed = {"model": "m", "op": "skip", "reliability": 1.0}
    rows = [fixed | {"damage": float(i)} | {f"score.{m}": s[i] for m, s in scores.items()} for i in range(6)]
    correlations = [
        {"model": "m", "method": m, "damage": "skip", "metric": "dce", "layers": 6, "partial": None, "score": 0.5}
        | {"rho": spearman(np.array(s), np.arange(6))}
        for m, s in scores.items()
    ]
    methods = [{"model": "m", "method": m, "failure": "", "passes": passes[m], "changed": True} for m in scores]
    return {
        "rows": rows,
        "correlations": correlations,
        "methods": methods,
        "defaults": list(scores),
        "subjects": [{"model": "m", "allocation": {"one width": 0.5}}],
    }


def test_the_rule_takes_the_best_then_what_adds_to_it_within_the_budget() -> None:
    scores = {
        "good": [0, 2, 1, 4, 3, 5.0],
        "twin": [0, 2, 1, 4, 3, 5.0],
        "other": [1, 0, 2, 3, 5, 4.0],
        "dear": [0, 1, 2, 3, 4, 5.0],
        "bad": [5, 4, 3, 2, 1, 0.0],
    }
    passes = {"good": 3.0, "twin": 5.0, "other": 2.0, "dear": 99.0, "bad": 1.0}
    assert choice.auto_rule(results_of(scores, passes)) == ("other", "good", "depth")
