"""The knapsack against brute force, what is said when nothing was measured, and where fidelities come from."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from layerwise.analyzer import ANALYZERS
from layerwise.errors import CorruptRun, UsageError
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.scores import LayerScore, Scores
from layerwise.selection import AUTO, BUDGETS, IntelligentMethodSelector, Method, passes_of, read_methods, write_methods
from layerwise.tracking import PerformanceTracker

COSTS = read_methods()
FIDELITY = {
    "layer_ablation": 0.9,
    "gradient_based": 0.6,
    "fisher_information": 0.55,
    "layer_correlation": 0.5,
    "spectral_analysis": -0.3,
}


def measured(folder: Path, fidelity: dict[str, float] = FIDELITY) -> Path:
    rows = {m: {**vars(COSTS[m]), "fidelity": {"all": f}} for m, f in fidelity.items()}
    path = folder / "methods.json"
    path.write_text(json.dumps({"methods": rows}), encoding="utf-8")
    return path


def unmeasured(folder: Path) -> Path:
    rows = {m: {**vars(row), "fidelity": {}} for m, row in COSTS.items()}
    path = folder / "unmeasured.json"
    path.write_text(json.dumps({"methods": rows}), encoding="utf-8")
    return path


def test_the_optimum_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    for passes in (0.0, 1.0, 3.0, 8.0, 20.0):
        matrix = {
            f"m{i}": Method(
                "abc"[i % 3], float(rng.integers(0, 3)), float(rng.integers(0, 9)), {"all": float(rng.uniform(0.1, 1))}
            )
            for i in range(8)
        }

        def worth(chosen: tuple[str, ...], matrix: dict[str, Method] = matrix) -> float:
            total = 0.0
            for family in "abc":
                ordered = sorted((matrix[m].fidelity["all"] for m in chosen if matrix[m].family == family), reverse=True)
                total += sum(f / 2**k for k, f in enumerate(ordered))
            return total

        subsets = [c for k in range(9) for c in itertools.combinations(matrix, k) if passes_of(c, matrix) <= passes]
        found = IntelligentMethodSelector()._optimize_method_combination(matrix, "all", passes)
        assert passes_of(found, matrix) <= passes
        assert worth(tuple(found)) == pytest.approx(max(map(worth, subsets)))


def test_a_shared_sweep_is_paid_once_and_own_passes_each() -> None:
    matrix = {"a": Method("x", 2.0, 0.0, {}), "b": Method("x", 1.0, 0.0, {}), "c": Method("x", 0.0, 5.0, {})}
    assert passes_of("ab", matrix) == 2.0
    assert passes_of("abc", matrix) == 7.0
    assert passes_of("", matrix) == 0.0


def test_the_budget_decides_and_what_misleads_is_left_out(tmp_path: Path) -> None:
    selector = IntelligentMethodSelector(path=measured(tmp_path))
    assert selector.select_methods("text", "classification", 256, "low") == [
        "layer_correlation",
        "fisher_information",
        "gradient_based",
    ]
    assert "layer_ablation" in selector.select_methods("text", "classification", 256, "medium")
    assert selector.select_methods("text", "classification", 256, 256.0) == ["layer_correlation"]
    assert selector.select_methods("text", "classification", 256, 0) == []
    assert "spectral_analysis" not in selector.select_methods("text", "classification", 256, "high")
    found = selector.select("text", "classification", 256, "medium")
    assert found.measured
    assert found.cost == (2.25 + 6.5) * 256 <= found.budget == 2560


def test_relatives_are_worth_less_than_strangers() -> None:
    matrix = {
        "best": Method("gradient", 0.0, 1.0, {"all": 0.6}),
        "cousin": Method("gradient", 0.0, 1.0, {"all": 0.59}),
        "stranger": Method("weights", 0.0, 1.0, {"all": 0.4}),
    }
    assert set(IntelligentMethodSelector()._optimize_method_combination(matrix, "all", 2.0)) == {"best", "stranger"}


def test_unmeasured_it_says_so_and_keeps_the_default_within_the_budget(tmp_path: Path) -> None:
    selector = IntelligentMethodSelector(path=unmeasured(tmp_path))
    found = selector.select("vision", "classification", 100, "medium")
    assert not found.measured
    assert "no method's fidelity has been measured" in found.why
    assert set(found.methods) == {"fisher_information", "gradient_based", *AUTO} - {"depth"}
    low = selector.select("vision", "classification", 100, "low")
    assert set(low.methods) == set(found.methods) - {"layer_ablation"}
    assert low.cost <= low.budget
    assert selector.select_methods("vision", "classification", 0, "high") == ["spectral_analysis"]


def test_the_primary_methods_of_the_task_come_first(tmp_path: Path) -> None:
    found = IntelligentMethodSelector(path=unmeasured(tmp_path)).select_methods("text", "translation", 100, "low")
    assert "attention_analysis" in found


def report(seed: int) -> ImportanceReport:
    rng = np.random.default_rng(seed)
    layers = tuple(LayerInfo(f"b.{i}", i, "mlp", 10, True, "b") for i in range(10))
    damage = rng.normal(size=10)
    values = {"layer_ablation": damage, "layer_correlation": damage + 0.1 * rng.normal(size=10), "gradient_based": -damage}
    scores = {
        m: Scores(m, "nats", {x.name: LayerScore(float(v)) for x, v in zip(layers, column, strict=True)})
        for m, column in values.items()
    }
    return ImportanceReport(f"net{seed}", "classification", "d", layers, scores, fingerprint=str(seed), domain="text")


def test_tracked_models_outweigh_the_table_once_there_are_three(tmp_path: Path) -> None:
    with PerformanceTracker(f"sqlite:///{tmp_path / 'runs.db'}") as tracker:
        selector = IntelligentMethodSelector(tracker, unmeasured(tmp_path))
        for seed in range(2):
            tracker.track_report(report(seed))
        assert not selector.select("text", "classification", 10).measured
        tracker.track_report(report(2))
        matrix = selector._load_performance_matrix("text")
        assert matrix["layer_correlation"].known("text") > 0.9
        assert matrix["gradient_based"].known("text") == pytest.approx(-1.0)
        assert matrix["layer_ablation"].known("text") == pytest.approx(1.0)
        assert math.isnan(matrix["spectral_analysis"].known("text"))
        assert selector.select_methods("text", "classification", 10, "low") == ["layer_correlation"]


def test_the_table_is_written_from_the_benchmarks_rows(tmp_path: Path) -> None:
    frames = []
    for model, domain, sign in (("a", "text", 1), ("b", "text", 1), ("c", "vision", -1)):
        damage = np.arange(6.0)
        scores = {"score.layer_correlation": sign * damage, "score.gradient_based": damage}
        frames.append(pd.DataFrame({"model": model, "domain": domain, "op": "skip", "damage": damage, **scores}))
    rows = pd.concat([*frames, frames[0].assign(op="w4", damage=-frames[0]["damage"])])
    results = tmp_path / "faithfulness.json"
    results.write_text(json.dumps({"rows": rows.to_dict("records")}), encoding="utf-8")
    write_methods(results, tmp_path / "methods.json")
    found = read_methods(tmp_path / "methods.json")
    assert found["layer_correlation"].fidelity == {"all": pytest.approx(1 / 3, abs=1e-3), "text": 1.0, "vision": -1.0}
    assert found["layer_correlation"].known("audio") == pytest.approx(1 / 3, abs=1e-3)
    assert found["gradient_based"].shared == COSTS["gradient_based"].shared
    assert math.isnan(found["spectral_analysis"].known("text"))


def test_the_shipped_table_has_every_registered_method_of_the_sixteen() -> None:
    sixteen = {m for m, cls in ANALYZERS.items() if cls.__name__ in SIXTEEN}
    assert sixteen <= set(COSTS)
    assert all(row.shared >= 0 and row.own >= 0 for row in COSTS.values())


SIXTEEN = {
    "FisherInformationAnalyzer", "GradientBasedAnalyzer", "LayerAblationAnalyzer", "MutualInformationAnalyzer",
    "LayerConductanceAnalyzer", "SHAPAnalyzer", "AttentionAnalyzer", "NeuronActivationAnalyzer", "GradientFlowAnalyzer",
    "LayerCorrelationAnalyzer", "InfoBottleneckAnalyzer", "CausalAnalyzer", "UncertaintyAnalyzer", "SpectralAnalyzer",
    "TopologyAnalyzer", "MetaLearningAnalyzer",
}  # fmt: skip


def test_wrong_budgets_sizes_and_tables_are_told(tmp_path: Path) -> None:
    selector = IntelligentMethodSelector()
    with pytest.raises(UsageError, match="medium"):
        selector.select_methods("text", "qa", 10, "meduim")
    for size, budget in ((-1, "low"), (10, -1.0), (10, math.nan)):
        with pytest.raises(UsageError):
            selector.select_methods("text", "qa", size, budget)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CorruptRun):
        IntelligentMethodSelector(path=tmp_path / "x.json").select_methods("text", "qa", 10)
    assert list(BUDGETS) == ["low", "medium", "high"]
